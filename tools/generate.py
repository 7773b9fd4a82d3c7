"""Answers prompts by block diffusion.

python tools/generate.py --checkpoint=DIR --prompt=TEXT
python tools/generate.py --checkpoint=DIR --input=prompts.jsonl --output=answers.jsonl

An input line is {"prompt": TEXT} or {"messages": [{"role": ..., "content": ...}, ...]}; its answer line adds "answer",
"tokens" and "forward_passes". DIR: a converted checkpoint, a training step, or a workdir (its newest good step).
"""

import time

from absl import flags

from llada_jax import errors
from llada_jax.data import jsonl
from llada_jax.errors import InputError
from llada_jax.sampling import flags as decoding

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_CHAT = flags.DEFINE_bool("chat", False, "Put --prompt into the checkpoint's chat template, as the user's turn.")
_INPUT = flags.DEFINE_string("input", None, "JSONL file of prompts.")
_OUTPUT = flags.DEFINE_string("output", None, "JSONL file of answers, for --input.")
decoding.define(gen_length=128)
_BATCH = flags.DEFINE_integer("batch", 8, "Prompts decoded together.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the draws at temperature > 0.")


def main(argv) -> None:
    del argv
    if not _CHECKPOINT.value or (_PROMPT.value is None) == (_INPUT.value is None):
        raise InputError("--checkpoint=DIR and one of --prompt=TEXT and --input=FILE are required; see --help")
    if _INPUT.value and not _OUTPUT.value:
        raise InputError("--input needs --output=FILE")
    rows = [{"prompt": _PROMPT.value}] if _INPUT.value is None else _read_rows(_INPUT.value)

    import jax  # after the flags are right: it takes seconds

    from llada_jax.sampling.generate import generate
    from llada_jax.training.checkpoint import load_checkpoint

    config = decoding.generate_config()
    model = load_checkpoint(_CHECKPOINT.value)
    if model.tokenizer is None:
        raise InputError(f"{_CHECKPOINT.value}: no tokenizer")
    prompts = [model.tokenizer.encode(_text(row, model.tokenizer)) for row in rows]
    for start in range(0, len(rows), _BATCH.value):
        part = prompts[start : start + _BATCH.value]
        begin = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(_SEED.value), start)
        out = generate(model.params, model.config, part, config, key)
        seconds = time.perf_counter() - begin
        for row, tokens, passes in zip(rows[start:], out.tokens, out.forward_passes, strict=False):
            row["answer"] = model.tokenizer.decode(tokens, skip_special_tokens=True)
            row["tokens"], row["forward_passes"] = len(tokens), int(passes)
        if _INPUT.value:
            print(f"{min(start + len(part), len(rows))}/{len(rows)} prompts, {seconds:.1f} s for the last {len(part)}")
    if _INPUT.value:
        jsonl.write_values(_OUTPUT.value, rows)
    else:
        row = rows[0]
        print(row["prompt"] + row["answer"])
        tokens, passes = row["tokens"], row["forward_passes"]
        print(f"\n[{tokens} tokens in {passes} forward passes: {tokens / max(passes, 1):.2f} tokens per forward]")


def _read_rows(path: str) -> list[dict]:
    rows = []
    for place, row in jsonl.read_values(path):
        known = isinstance(row, dict) and (isinstance(row.get("prompt"), str) or isinstance(row.get("messages"), list))
        if not known:
            raise InputError(f'{place}: expected "prompt" (text) or "messages" (list)')
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: no prompts")
    return rows


def _text(row: dict, tokenizer) -> str:
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"])
    if _CHAT.value:
        return tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}])
    return row["prompt"]


if __name__ == "__main__":
    errors.run(main)
