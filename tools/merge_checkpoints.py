"""Averages checkpoints: the top-k merge of Section 4.3.

python tools/merge_checkpoints.py --checkpoints=A,B,C --out=DIR
python tools/merge_checkpoints.py --workdir=DIR --best=3 --out=DIR     (the 3 saved steps of least held-out NELBO)

One checkpoint and --dtype: a conversion. An expert bias in float32 stays so.
"""

from absl import flags

from llada_jax import command_line
from llada_jax.errors import InputError

_CHECKPOINTS = flags.DEFINE_list("checkpoints", [], "Checkpoints to average.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run, instead of --checkpoints.")
_BEST = flags.DEFINE_integer("best", 3, "How many steps of --workdir.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Folder of the result.", required=True)
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; by default that of the first checkpoint.")


def main(argv) -> None:
    del argv
    if bool(_CHECKPOINTS.value) == bool(_WORKDIR.value):
        raise InputError("one of --checkpoints=A,B,C and --workdir=DIR is required")
    import jax  # importing jax takes seconds: not before the flags are right

    from llada_jax.checkpoint import merge
    from llada_jax.interop.huggingface import parse_dtype

    jax.config.update("jax_platforms", "cpu")  # the chips may be another process's
    paths = _CHECKPOINTS.value
    if _WORKDIR.value:
        best = merge.best_steps(_WORKDIR.value, _BEST.value)
        for path, nelbo in best:
            print(f"step {path.name}: held-out NELBO {nelbo:.4f}")
        paths = [path for path, _ in best]
    dtype = None if _DTYPE.value is None else parse_dtype(_DTYPE.value)
    merge.merge_checkpoints(paths, _OUT.value, dtype)
    print(f"{_OUT.value}: the mean of {len(paths)} checkpoints")


if __name__ == "__main__":
    command_line.run(main)
