"""Exports a checkpoint to a Hugging Face folder (config.json, tokenizer, safetensors).

python tools/orbax_to_hf.py --checkpoint=DIR --out=HF_DIR

DIR: a converted or merged checkpoint, one step of a training run, or a workdir (its newest step).
"""

from absl import flags

from llada_jax import errors
from llada_jax.interop.export import export_checkpoint

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint or workdir.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder of the result.", required=True)


def main(argv) -> None:
    del argv
    export_checkpoint(_CHECKPOINT.value, _OUT.value)
    print(f"{_OUT.value}: written")


if __name__ == "__main__":
    errors.run(main)
