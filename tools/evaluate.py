"""Measures a checkpoint on packed rows: likelihood (nelbo), or how it prefers chosen answers (preference).

python tools/evaluate.py --checkpoint=DIR --task=nelbo --data=PACKED_ROWS --block_sizes=1,4,32 [--output=out.json]
python tools/evaluate.py --checkpoint=DIR --task=preference --reference=DIR --data=PACKED_PAIRS --block_sizes=32 \\
    --samples=8 [--beta=0.1]

DIR: a converted checkpoint, a training step, or a workdir. PACKED_ROWS: made by tools/pack_data.py; the last --rows of
it are scored.

nelbo: nats per token at each block size, with the standard error over rows. "ar" is the next-token loss of the same
weights, one causal pass.

preference: rows hold pairs, the chosen answer and then the rejected one. Accuracy is the share of pairs whose chosen
answer gained more over the reference; margin is beta times the mean of the difference, Var its variance; with standard
errors over pairs.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from llada_jax import errors
from llada_jax.errors import InputError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_TASK = flags.DEFINE_string("task", "nelbo", "nelbo | preference")
_REFERENCE = flags.DEFINE_string("reference", None, "preference: the checkpoint that training started from.")
_BETA = flags.DEFINE_float("beta", 0.1, "preference: beta of Eq. 8.", lower_bound=0.0)
_DATA = flags.DEFINE_string("data", None, "Folder of packed rows.")
_ROWS = flags.DEFINE_integer("rows", 16, "The last rows of the data are scored.")
_BLOCK_SIZES = flags.DEFINE_list("block_sizes", ["1", "4", "32"], "Block sizes, or none.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Draws of the noise for each row.", lower_bound=1)
_BLOCK_ORIGIN = flags.DEFINE_string(
    "block_origin", None, "global (Eq. 3) | document; by default global for nelbo, document for preference."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")


def main(argv) -> None:
    del argv
    if not _CHECKPOINT.value or not _DATA.value:
        raise InputError("--checkpoint=DIR and --data=DIR are required; see --help")
    if _TASK.value not in ("nelbo", "preference"):
        raise InputError(f"--task={_TASK.value}, expected nelbo or preference")
    if (_TASK.value == "preference") != bool(_REFERENCE.value):
        raise InputError(f"--reference={_REFERENCE.value}: --task=preference needs one, no other task does")
    if not all(size.isdigit() and int(size) > 0 for size in _BLOCK_SIZES.value):
        raise InputError(f"--block_sizes={','.join(_BLOCK_SIZES.value)}, expected positive integers")

    from llada_jax.data.order import Rows  # after the flags are right: jax takes seconds

    rows = Rows(_DATA.value, 0, shuffle=False)
    count = min(_ROWS.value, len(rows))
    batch = Rows(_DATA.value, 0, len(rows) - count, shuffle=False).batch(0, count)
    result = {"checkpoint": _CHECKPOINT.value, "data": _DATA.value, "rows": count, "samples": _SAMPLES.value}
    measure = _nelbo if _TASK.value == "nelbo" else _preference
    result |= measure(batch, rows.dataset["tokenizer_digest"])
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")


def _load(path: str, tokenizer_digest: str):
    from llada_jax.training.checkpoint import load_checkpoint

    model = load_checkpoint(path)
    if model.tokenizer is not None and model.tokenizer.digest != tokenizer_digest:
        raise InputError(f"{_DATA.value}: packed with another tokenizer than that of {path}")
    return model


def _nelbo(batch, tokenizer_digest: str) -> dict:
    from llada_jax.evaluation.likelihood import ar_nll, block_nelbo

    model = _load(_CHECKPOINT.value, tokenizer_digest)
    origin = _BLOCK_ORIGIN.value or "global"
    result = {}

    def report(name, estimate):
        line = f"{name:>10}  {estimate.nats:.4f} ± {estimate.stderr:.4f} nats per token ({estimate.tokens} tokens)"
        print(line, flush=True)
        result[name] = dataclasses.asdict(estimate)

    report("ar", ar_nll(model.params, model.config, batch))
    for size in map(int, _BLOCK_SIZES.value):
        estimate = block_nelbo(model.params, model.config, batch, size, samples=_SAMPLES.value, block_origin=origin)
        report(f"block {size}", estimate)
    return result


def _preference(batch, tokenizer_digest: str) -> dict:
    from llada_jax.evaluation.preference import compare, pair_scores, pairs_in

    if not (pairs := pairs_in(batch.segment_ids)):
        raise InputError(f"{_DATA.value}: the last {len(batch.ids)} rows have no pair of documents")
    sizes = [int(size) for size in _BLOCK_SIZES.value]
    origin = _BLOCK_ORIGIN.value or "document"

    def scores(path: str) -> dict:
        model = _load(path, tokenizer_digest)  # one model at a time
        return {
            size: pair_scores(model.params, model.config, batch, size, pairs, draws=_SAMPLES.value, block_origin=origin)
            for size in sizes
        }

    reference, policy = scores(_REFERENCE.value), scores(_CHECKPOINT.value)
    result = {"reference": _REFERENCE.value, "beta": _BETA.value}
    for size in sizes:
        found = compare(policy[size], reference[size], batch.segment_ids, _BETA.value)
        print(f"block {size:>4}  {found.describe()}", flush=True)
        result[f"block {size}"] = dataclasses.asdict(found)
    return result


if __name__ == "__main__":
    errors.run(main)
