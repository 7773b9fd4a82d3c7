"""Imports a Hugging Face checkpoint (a folder, or one of the hub) or a GGUF file.

The same command goes on where a killed one was; --out appears when it is complete.

Example:
  python tools/hf_to_orbax.py --source=Ling-mini-base-2.0 --out=checkpoints/ling_mini --add_mask_token
"""

from absl import flags

from llada_jax import command_line

_SOURCE = flags.DEFINE_string(
    "source", None, "Hugging Face folder, hf://OWNER/NAME[@REVISION], or .gguf file.", required=True
)
_OUT = flags.DEFINE_string("out", None, "Folder to write; must not exist.", required=True)
_DTYPE = flags.DEFINE_string("dtype", None, "float32 or bfloat16; by default the stored one.")
_ALIGNMENT = flags.DEFINE_string(
    "alignment", None, '"same": position i predicts token i; "shifted": token i + 1. Default: shifted for AR models.'
)
_MASK_TOKEN_ID = flags.DEFINE_integer("mask_token_id", None, "Id of the mask token, if the tokenizer names none.")
_ADD_MASK_TOKEN = flags.DEFINE_bool("add_mask_token", False, "Make a mask token: an unused id, or one more row.")


def main(argv):
    del argv
    import jax  # importing jax takes seconds: not before the flags are right

    from llada_jax.interop import convert

    jax.config.update("jax_platforms", "cpu")  # the chips may be another process's
    convert.import_checkpoint(
        _SOURCE.value,
        _OUT.value,
        dtype=_DTYPE.value,
        alignment=_ALIGNMENT.value,
        mask_token_id=_MASK_TOKEN_ID.value,
        add_mask_token=_ADD_MASK_TOKEN.value,
    )


if __name__ == "__main__":
    command_line.run(main)
