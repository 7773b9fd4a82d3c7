"""Packs documents, conversations or preference pairs into rows of tokens for training.

Examples:
  python tools/pack_data.py --source=corpus --tokenizer=checkpoint --out=packed --length=4096
  python tools/pack_data.py --kind=chat --source=chats.jsonl --tokenizer=checkpoint --out=packed --length=4096
  python tools/pack_data.py --kind=preference --source=saved --split=train --tokenizer=checkpoint --out=packed \\
      --length=4096

A source is .jsonl, .json or .parquet files (.txt too for documents; .gz and .zst of all but .parquet), or a folder that
save_to_disk of Hugging Face's datasets wrote. A conversation is a row with `messages` (and `tools`), ShareGPT's
`conversations`, `prompt` and `completion`, `instruction` and `output`, or `input_ids` and `labels`, `supervised` or
`prompt_length`; a pair one with a prompt, `chosen` and `rejected`. llada_jax/data/README.md shows them all. A run that
was interrupted goes on where it stopped when it is started again with the same flags; --processes may differ.
"""

import sys
import time

from absl import flags

from llada_jax import command_line, errors

_SOURCE = flags.DEFINE_string(
    "source", None, "File, folder (searched recursively) or saved dataset to pack.", required=True
)
flags.DEFINE_string("split", "", "Split of a saved DatasetDict; may be left out if it has only one.")
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder with tokenizer.json, or a checkpoint.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the packed dataset.", required=True)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens in a row.", lower_bound=1, required=True)
_KIND = flags.DEFINE_enum(
    "kind",
    "text",
    ["text", "chat", "preference"],
    "Documents, conversations with supervised turns, or pairs of a chosen and a rejected answer.",
)
flags.DEFINE_string("field", "text", "Text: JSON key or column that holds the text.")
flags.DEFINE_list("patterns", [], 'Text: more files to read as plain text, e.g. "*.py,*.rst".')
flags.DEFINE_enum(
    "turns",
    "all",
    ["all", "last", "each"],
    "Chat: supervise all of the assistant's turns in one document, the last one only, or each in a document of its "
    "own after all that was said before it. With all, a turn that ends inside a block sees the beginning of the "
    "user's next turn; each and last are exact.",
)
flags.DEFINE_integer(
    "max_pairs", 16, "Preference: pairs in a row, at most config.preference.max_pairs of the training.", lower_bound=1
)
flags.DEFINE_string(
    "tail",
    "all",
    "Chat, preference: a document ends in an end of sequence, and more of them fill it up to --block_align; all of "
    "these, the first N (a number) or none are supervised. Others are masked and not scored; with none, padding.",
)
flags.DEFINE_string(
    "template_date",
    None,
    "Chat, preference: the day, YYYY-MM-DD, that a chat template takes for today (default: 2024-07-26, whatever the "
    "day is, so that the same rows give the same bytes). For templates that write it.",
)
flags.DEFINE_bool("skip_malformed", False, "Chat, preference: count malformed rows instead of stopping.")
flags.DEFINE_integer(
    "block_align", None, "Start documents at multiples of this in a row (default: 1 for text, else 32).", 1
)
_ADD_BOS = flags.DEFINE_enum(
    "add_bos",
    None,
    ["auto", "true", "false"],
    "Begin documents, and prompts without chat template, with a beginning of sequence: auto as the tokenizer's "
    "post-processor does. Default: as the checkpoint was trained. Recorded, and compared when a run opens the rows.",
)
flags.DEFINE_integer("rows_per_shard", 65536, "Rows in a shard file.", lower_bound=1)
flags.DEFINE_integer(
    "processes", 1, "Processes that read and tokenise. The output is the same, byte for byte, with any number.", 1
)
_COMMON = ("split", "block_align", "rows_per_shard", "processes")
_KINDS = {  # what dataset.json calls its examples, and its own flags
    "text": (None, ("field", "patterns")),
    "chat": ("conversations", ("turns", "tail", "skip_malformed", "template_date")),
    "preference": ("pairs", ("max_pairs", "tail", "skip_malformed", "template_date")),
}


def main(argv):
    del argv
    unit, own = _KINDS[_KIND.value]
    for name in (name for _, names in _KINDS.values() for name in names):
        if flags.FLAGS[name].present and name not in own:
            kinds = " or ".join(f"--kind={kind}" for kind, (_, names) in _KINDS.items() if name in names)
            raise errors.InputError(f"--{name} is for {kinds}")
    options = {name: flags.FLAGS[name].value for name in (*_COMMON, *own)}
    options = {name: value for name, value in options.items() if value is not None}
    if options.get("tail", "").isdecimal():
        options["tail"] = int(options["tail"])
    # The packers' modules take half a second to import: not before the flags are right.
    from llada_jax import tokenizer
    from llada_jax.data.pack import pack
    from llada_jax.data.pack_chat import pack_chat
    from llada_jax.data.pack_preference import pack_preference

    packer = {"text": pack, "chat": pack_chat, "preference": pack_preference}[_KIND.value]
    begun = time.monotonic()
    source, vocabulary = _SOURCE.value, tokenizer.load_tokenizer(_TOKENIZER.value)
    if day := options.pop("template_date", None):
        vocabulary = vocabulary.with_template_date(day)
    vocabulary = vocabulary if _ADD_BOS.value is None else vocabulary.with_bos(_ADD_BOS.value)
    dataset = packer(source, vocabulary, _OUT.value, _LENGTH.value, log=sys.stderr, **options)
    summary = (
        f"{dataset['rows']} rows, {dataset['tokens']} tokens, {dataset['documents']} documents, "
        f"{len(dataset['shards'])} shards, {time.monotonic() - begun:.1f} s"
    )
    if unit:
        unusable = ", ".join(f"{count} {reason}" for reason, count in dataset["unusable"].items())
        summary += f", {dataset['supervised_tokens']} supervised tokens, {dataset['used']} of "
        summary += f"{dataset[unit]} {unit} used (unusable: {unusable})"
    print(summary)


if __name__ == "__main__":
    command_line.run(main)
