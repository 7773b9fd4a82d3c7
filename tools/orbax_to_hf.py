"""Exports a checkpoint to a Hugging Face folder (config.json, tokenizer, safetensors).

python tools/orbax_to_hf.py --checkpoint=DIR --out=HF_DIR [--step=N] [--dtype=bfloat16]

DIR: a converted or merged checkpoint, one step of a training run, or a workdir (its newest step, or --step; training
may go on meanwhile). The weights of a LoRA run are merged. The same command goes on where a killed one was.
"""

from absl import flags

from llada_jax import command_line

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the result.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the workdir; by default the newest.")
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; by default that of each tensor.")


def main(argv) -> None:
    del argv
    import jax  # importing jax takes seconds: not before the flags are right

    from llada_jax.interop.export import export_checkpoint

    jax.config.update("jax_platforms", "cpu")  # the chips may be another process's
    export_checkpoint(_CHECKPOINT.value, _OUT.value, dtype=_DTYPE.value, step=_STEP.value)
    print(f"{_OUT.value}: written")


if __name__ == "__main__":
    command_line.run(main)
