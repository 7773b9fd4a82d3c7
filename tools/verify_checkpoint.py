"""Verifies a checkpoint: every tensor and file against the digests that were taken when it was written.

    python tools/verify_checkpoint.py --checkpoint=DIR

DIR: a converted checkpoint, one step of a training run, or a workdir (all its complete steps). Prints one line for each
problem and exits with code 2, or "ok: ..." for each checkpoint. Tensors are read one by one.
"""

from absl import flags

from llada_jax import command_line

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Directory to verify.", required=True)


def main(argv) -> int:
    del argv
    import jax  # importing jax takes seconds: not before the flags are right

    from llada_jax.checkpoint import weights

    jax.config.update("jax_platforms", "cpu")  # the chips may be another process's
    failed = False
    for directory in weights.candidates(_CHECKPOINT.value):
        problems = weights.verify(directory)
        for problem in problems:
            print(problem)
        failed |= bool(problems)
        if not problems:
            tensors, size = weights.size(directory)
            print(f"ok: {tensors} tensors, {size / 2**30:.2f} GiB, {directory}")
    return 2 if failed else 0


if __name__ == "__main__":
    command_line.run(main)
