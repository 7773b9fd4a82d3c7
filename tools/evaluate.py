"""Measures a checkpoint's likelihood on packed rows: the block NELBO per block size, and its AR loss.

python tools/evaluate.py --checkpoint=DIR --task=nelbo --data=PACKED_ROWS --block_sizes=1,4,32 [--output=out.json]

DIR: a converted checkpoint, a training step, or a workdir. PACKED_ROWS: made by tools/pack_data.py; the last --rows of
it are scored. All numbers are nats per token, with the standard error over rows. "ar" is the next-token loss of the
same weights, one causal pass.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from llada_jax import errors
from llada_jax.errors import InputError

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.")
_TASK = flags.DEFINE_string("task", "nelbo", "nelbo")
_DATA = flags.DEFINE_string("data", None, "Folder of packed rows.")
_ROWS = flags.DEFINE_integer("rows", 16, "The last rows of the data are scored.")
_BLOCK_SIZES = flags.DEFINE_list("block_sizes", ["1", "4", "32"], "Block sizes, or none.")
_SAMPLES = flags.DEFINE_integer("samples", 1, "Draws of the noise for each row.")
_BLOCK_ORIGIN = flags.DEFINE_string("block_origin", "global", "global (Eq. 3) | document")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")


def main(argv) -> None:
    del argv
    if not _CHECKPOINT.value or not _DATA.value:
        raise InputError("--checkpoint=DIR and --data=DIR are required; see --help")
    if _TASK.value != "nelbo":
        raise InputError(f"--task={_TASK.value}, expected nelbo")
    if not all(size.isdigit() and int(size) > 0 for size in _BLOCK_SIZES.value):
        raise InputError(f"--block_sizes={','.join(_BLOCK_SIZES.value)}, expected positive integers")

    from llada_jax.data.order import Rows  # after the flags are right: jax takes seconds
    from llada_jax.evaluation.likelihood import ar_nll, block_nelbo
    from llada_jax.training.checkpoint import load_checkpoint

    rows = Rows(_DATA.value, 0, shuffle=False)
    model = load_checkpoint(_CHECKPOINT.value)
    if model.tokenizer is not None and model.tokenizer.digest != rows.dataset["tokenizer_digest"]:
        raise InputError(f"{_DATA.value}: packed with another tokenizer than the checkpoint's")
    count = min(_ROWS.value, len(rows))
    batch = Rows(_DATA.value, 0, len(rows) - count, shuffle=False).batch(0, count)
    result = {"checkpoint": _CHECKPOINT.value, "data": _DATA.value, "rows": count, "samples": _SAMPLES.value}

    def report(name, estimate):
        line = f"{name:>10}  {estimate.nats:.4f} ± {estimate.stderr:.4f} nats per token ({estimate.tokens} tokens)"
        print(line, flush=True)
        result[name] = dataclasses.asdict(estimate)

    report("ar", ar_nll(model.params, model.config, batch))
    for size in map(int, _BLOCK_SIZES.value):
        report(
            f"block {size}",
            block_nelbo(
                model.params, model.config, batch, size, samples=_SAMPLES.value, block_origin=_BLOCK_ORIGIN.value
            ),
        )
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    errors.run(main)
