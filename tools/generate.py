"""Answers prompts by block diffusion.

python tools/generate.py --checkpoint=DIR --prompt=TEXT [--trajectory] [--save=FILE.html]
python tools/generate.py --checkpoint=DIR --chat
python tools/generate.py --checkpoint=DIR --input=prompts.jsonl --output=answers.jsonl

Text is printed as its blocks are finished. --chat alone holds a conversation; with --prompt it puts the prompt into the
checkpoint's chat template. --trajectory shows how the answer filled: a line for each block, every token coloured by the
step that wrote it. --save writes that as a picture, FILE.png or FILE.svg (pip install -e '.[plot]'), or as a page that
plays it, FILE.html, which needs nothing but a browser.

An input line is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]} with "tools" if there are any
(llada_jax/data/README.md), and may set "seed" and any of "gen_length", "steps", "threshold", "temperature", "top_k",
"top_p", "eos_early_stop", "editing_threshold", "max_post_steps", "max_steps_per_block", "entropy_bound",
"active_blocks", "add_block_threshold", "semi_complete_threshold" for itself. Other keys, such as an "id", come back
with the answer; those that look like a setting are refused. Its answer line is the line with "answer", "tokens",
"forward_passes", "commit_passes", "prefill_passes", "tokens_per_forward", "positions_evaluated" and, for each token,
its "token_ids", and the "steps" of its block and "confidences" at which it was written. --replay adds "stop_length" and
"replay_token_ids", "replay_steps", "replay_confidences": the same to the end of the answer's last block, the tokens
behind its end included; where nothing was written, the mask and step -1. --history adds "history": all writes in their
order, edits too, with "positions" in the replay, "token_ids", "steps" of the block, "forwards" (the request's denoising
passes, from 0) and "confidences". A key that lines of the file have themselves stays theirs, and the new one is
"generated_answer", "generated_steps" and so on. Requests are batched continuously: --batch of them are decoded
together, and the next one takes the place of the first that ends.
DIR: a converted checkpoint, a training step, or a workdir (its newest good step). Where the host has several devices,
they share the work out (--mesh).
"""

import dataclasses
import difflib
import importlib.util
import sys
from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.data import jsonl
from llada_jax.errors import InputError
from llada_jax.sampling import decoding_flags

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_CHAT = flags.DEFINE_bool("chat", False, "Talk; or with --prompt, put it into the chat template as the user's turn.")
_INPUT = flags.DEFINE_string("input", None, "JSONL file of prompts.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file of answers, for --input.")
decoding_flags.define(gen_length=128)
_BATCH = flags.DEFINE_integer("batch", 8, "Prompts decoded together.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws at temperature > 0.", 0, 2**32 - 1)
_TEMPLATE_DATE = flags.DEFINE_string(
    "template_date", None, "The day, YYYY-MM-DD, that a chat template takes for today (default: 2024-07-26)."
)
_TRAJECTORY = flags.DEFINE_bool("trajectory", False, "Show how the answer filled.")
_REPLAY = flags.DEFINE_bool("replay", False, "Write the answer's whole last block, for --input.")
_HISTORY = flags.DEFINE_bool("history", False, "Write all that was written, edits included, for --input.")
_SAVE = flags.DEFINE_string("save", None, "The trajectory as a picture, .svg or .png, or a page that plays it, .html.")

# Settings of other programs, which would otherwise be taken for remarks.
_ELSEWHERE = (
    "max_tokens", "max_new_tokens", "max_length", "max_completion_tokens", "max_gen_toks", "min_tokens", "n", "stop",
    "stop_sequences", "until", "do_sample", "num_beams", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "response_format", "tool_choice", "block_length", "rule", "stream",
    "delete_id", "insert_id",
)  # fmt: skip

PER_REQUEST = (
    "gen_length", "steps", "threshold", "temperature", "top_k", "top_p", "eos_early_stop", "editing_threshold",
    "max_post_steps", "max_steps_per_block", "entropy_bound", "active_blocks", "add_block_threshold",
    "semi_complete_threshold",
)  # fmt: skip


def main(argv) -> None:
    del argv
    conversation = _CHAT.value and _PROMPT.value is None and _INPUT.value is None
    if not _CHECKPOINT.value or (_PROMPT.value is not None) + (_INPUT.value is not None) + conversation != 1:
        raise InputError("--checkpoint=DIR and one of --prompt=TEXT, --input=FILE and --chat are required; see --help")
    if bool(_INPUT.value) != bool(_OUTPUT.value):
        raise InputError("--input needs --output=FILE, and only --input has one")
    if (_TRAJECTORY.value or _SAVE.value) and _INPUT.value:
        raise InputError("--trajectory and --save show one answer: use --prompt")
    if (_REPLAY.value or _HISTORY.value) and not _INPUT.value:
        raise InputError("--replay and --history are for the lines of --output: use --input")
    if _SAVE.value and Path(_SAVE.value).suffix not in (".svg", ".png", ".html"):
        raise InputError(f"--save={_SAVE.value}, expected .svg, .png or .html")
    if _SAVE.value and not _saves_page() and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--save: matplotlib is not installed; pip install 'llada_jax[plot]'")
    rows = _read_rows(_INPUT.value) if _INPUT.value else None

    config = decoding_flags.generate_config()
    configs = None if rows is None else [_config_of(config, place, row) for place, row in rows]

    jsonl.prepare(_OUTPUT.value)
    jsonl.prepare(_SAVE.value)

    # After the flags are right: jax takes seconds.
    from llada_jax.checkpoint.weights import load_checkpoint, read_config

    together = 1 if rows is None else min(_BATCH.value, len(rows))
    with decoding_flags.mesh(read_config(_CHECKPOINT.value)[0], together) as mesh:
        model = decoding_flags.with_bos(load_checkpoint(_CHECKPOINT.value, mesh=mesh))
        model = decoding_flags.with_experts_dtype(model)
        _answer(model, rows, config, configs, conversation)


def _answer(model, rows, config, configs, conversation: bool) -> None:
    if model.tokenizer is None:
        raise InputError(f"{_CHECKPOINT.value}: no tokenizer")
    if _TEMPLATE_DATE.value:
        model = model._replace(tokenizer=model.tokenizer.with_template_date(_TEMPLATE_DATE.value))
    from llada_jax.sampling.generate import decode_settings

    decode_settings(model.config, configs or [config], history=_HISTORY.value)  # refused before anything is printed
    if rows is not None:
        _answer_file(model, rows, configs)
    elif conversation:
        _converse(model, config)
    else:
        prompt = _prompt("--prompt", {"prompt": _PROMPT.value}, model.tokenizer)
        print(_PROMPT.value, end="", flush=True)
        _answer_one(model, prompt, config)


def _answer_file(model, placed: list[tuple[str, dict]], configs) -> None:
    import numpy as np

    from llada_jax.sampling.batching import Request, Usage, serve
    from llada_jax.sampling.generate import prefill_execution

    prompts = [np.array(_prompt(place, row, model.tokenizer).ids(model.tokenizer), np.int32) for place, row in placed]
    rows, count = [row for _, row in placed], len(placed)
    seeds = [row.get("seed", (_SEED.value, index)) for index, row in enumerate(rows)]
    requests = [Request(*request) for request in zip(prompts, configs, seeds, strict=True)]
    longest = max(len(prompt) + config.gen_length for prompt, config in zip(prompts, configs, strict=True))
    usage, done = Usage(), 0
    batch = min(_BATCH.value, count)
    execution = prefill_execution(max(map(len, prompts)))
    answers = serve(
        model.params, model.config, requests, batch, longest, model.tokenizer, execution=execution, usage=usage,
        history=_HISTORY.value,
    )  # fmt: skip
    taken = {key for row in rows for key in row}  # by any of them, so that a name is the same in all
    for answer in answers:
        rows[answer.index] |= jsonl.beside(taken, _record(answer))
        done += 1
        if done % batch == 0 or done == count:
            print(f"{done}/{count} prompts, {usage.busy:.0%} of {batch} rows busy", flush=True)
    jsonl.write_values(_OUTPUT.value, rows)


def _record(answer) -> dict:
    """What an answer line adds."""
    record = {
        "answer": answer.text,
        "tokens": len(answer.tokens),
        "forward_passes": answer.forward_passes,
        "commit_passes": answer.commit_passes,
        "prefill_passes": answer.prefill_passes,
        "tokens_per_forward": round(answer.tokens_per_forward, 4),
        "positions_evaluated": answer.positions_evaluated,
        "token_ids": answer.tokens.tolist(),
        "steps": answer.written_at.tolist(),
        "confidences": _rounded(answer.confidence),
    }
    if _REPLAY.value:
        record |= {
            "stop_length": answer.stop_length,
            "replay_token_ids": answer.replay_tokens.tolist(),
            "replay_steps": answer.replay_written_at.tolist(),
            "replay_confidences": _rounded(answer.replay_confidence),
        }
    if _HISTORY.value:
        position, token, step, forward, confidence = answer.history
        lists = dict(positions=position, token_ids=token, steps=step, forwards=forward)
        lists = {name: array.tolist() for name, array in lists.items()}
        record["history"] = lists | {"confidences": _rounded(confidence)}
    return record


def _rounded(probabilities) -> list[float]:
    return [round(float(p), 4) for p in probabilities]


def _answer_one(model, prompt, config):
    """Prints the answer to a data.chat.Prompt as its blocks are finished, and what was asked for about it.

    Returns the answer.
    """
    import numpy as np

    from llada_jax.sampling.batching import Request, serve
    from llada_jax.sampling.generate import prefill_execution

    ids = prompt.ids(model.tokenizer)
    known, printed = [], ""

    def print_new(_, tokens):
        nonlocal printed
        known.extend(tokens.tolist())
        text = model.tokenizer.decode_after(ids, known)
        if not text.endswith("\ufffd"):  # a character whose bytes have not all come yet
            print(text[len(printed) :], end="", flush=True)
            printed = text

    # The length is rounded up, so that a conversation compiles few programs.
    length = 1 << (len(ids) + config.gen_length - 1).bit_length()
    request = Request(np.array(ids, np.int32), config, _SEED.value)
    (answer,) = serve(
        model.params, model.config, [request], 1, length, model.tokenizer, admit_every=4,
        execution=prefill_execution(len(ids)), on_tokens=print_new,
        history=_saves_page() and config.rule != "llada2.2",
    )  # fmt: skip
    print(answer.text[len(printed) :])
    passes = answer.forward_passes + answer.commit_passes + answer.prefill_passes
    print(
        f"\n[{len(answer.tokens)} tokens in {passes} forward passes: {answer.prefill_passes} prefill, "
        f"{answer.forward_passes} denoising, {answer.commit_passes} commit; "
        f"{answer.tokens_per_forward:.2f} tokens per forward, {answer.positions_evaluated} positions evaluated]"
    )
    if (_TRAJECTORY.value or _SAVE.value) and len(answer.tokens):
        _show(model, prompt.text, ids, answer, config)
    return answer


def _saves_page() -> bool:
    return bool(_SAVE.value) and Path(_SAVE.value).suffix == ".html"


def _show(model, text: str, prompt: list[int], answer, config) -> None:
    import rich

    from llada_jax.sampling import trajectory

    ids = [*prompt, *answer.tokens.tolist()]
    pieces = [model.tokenizer.text.piece(ids[:end], ids[end]) for end in range(len(prompt), len(ids))]
    spans = trajectory.blocks(len(prompt), answer.tokens, config.block_length)
    if _TRAJECTORY.value:
        rich.print(trajectory.terminal(pieces, answer.written_at, spans))
    if _saves_page():
        from llada_jax.serving import page

        name = Path(_CHECKPOINT.value).absolute().name
        html = page.replay(name, text, prompt, answer, model.tokenizer, config.block_length)
        Path(_SAVE.value).write_text(html, encoding="utf-8")
    elif _SAVE.value:
        trajectory.draw(pieces, answer.written_at, answer.confidence, spans, _SAVE.value)
    if _SAVE.value:
        print(_SAVE.value)


def _converse(model, config) -> None:
    """Turns of a conversation from the terminal, until its end (Ctrl-D) or an empty line."""
    from llada_jax.data import chat

    messages = []
    while True:
        print("> " if sys.stdin.isatty() else "", end="", flush=True)
        if not (line := sys.stdin.readline()).strip():
            return
        messages.append({"role": "user", "content": line.strip()})
        answer = _answer_one(model, chat.prompt({"messages": messages}, model.tokenizer), config)
        messages.append({"role": "assistant", "content": answer.text})


def _read_rows(path: str) -> list[tuple[str, dict]]:
    rows = list(jsonl.read_values(path))
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: not a JSON object")
        for name in row:
            if near := _setting_like(name):
                raise InputError(f"{place}: {name} is no setting of a request; {near}")
        seed = row.get("seed", 0)
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise InputError(f"{place}: seed={seed!r}, expected an integer in [0, 2^32)")
    if not rows:
        raise InputError(f"{path}: no prompts")
    return rows


def _setting_like(name: str) -> str:
    """What is meant by a key that is no setting but looks like one; "" if it looks like none."""
    known = ("prompt", "messages", "tools", "seed", *PER_REQUEST)
    near = difflib.get_close_matches(name.lower(), known, 1, 0.8)
    if name in known or not (near or name in _ELSEWHERE):
        return ""
    return f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known[3:])}"


def _config_of(config, place: str, row: dict):
    """The flags' config with what the row sets for itself."""
    try:
        return dataclasses.replace(config, **{name: row[name] for name in PER_REQUEST if name in row})
    except (InputError, TypeError) as error:
        raise InputError(f"{place}: {error}") from error


def _prompt(place: str, row: dict, tokenizer):
    """What the model continues, a data.chat.Prompt. Raises InputError naming the place if that is nothing, or not all
    that the row says.
    """
    from llada_jax.data import chat

    try:
        return chat.prompt({name: value for name, value in row.items() if value is not None}, tokenizer, _CHAT.value)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


if __name__ == "__main__":
    command_line.run(main)
