"""Prints what a checkpoint holds: names, shapes, dtypes, bytes and shardings of its tensors, its step and its lineage.

    python tools/inspect_checkpoint.py --checkpoint=DIR [--step=N]

DIR: a converted checkpoint, one step of a training run, or a workdir (its newest step, or --step). Reads no weights;
tools/verify_checkpoint.py does.
"""

from absl import flags

from llada_jax import command_line

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory of the checkpoint or workdir.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the workdir; by default the newest.")


def main(argv) -> None:
    del argv
    from llada_jax.checkpoint import describe, weights  # jax, which takes seconds: not before the flags are right

    for line in describe.describe_checkpoint(weights.directory_of(_CHECKPOINT.value, _STEP.value)):
        print(line)


if __name__ == "__main__":
    command_line.run(main)
