"""Draws the attention mask of block diffusion over [x_t | x_0] (Figure 2 of the paper) for packed documents.

python tools/plot_mask.py --documents=7,11,6 --block_size=4 --output=llada_jax/attention/docs/mask.svg [--ascii]

A row is a query, a column a key; the noisy copy of the row comes first, then the clean one. Documents need not be
aligned to blocks. --output ends in .svg or .png, and needs matplotlib: pip install -e '.[plot]'. --ascii prints the
mask: n noisy to noisy, x noisy to clean, c clean to clean.
"""

import importlib.util
from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.errors import InputError

_DOCUMENTS = flags.DEFINE_list("documents", ["7", "11", "6"], "Lengths of the documents of the row, in tokens.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 4, "Tokens of a block.")
_BLOCK_ORIGIN = flags.DEFINE_string("block_origin", "global", "global (Eq. 3) | document")
_OUTPUT = flags.DEFINE_string("output", None, "Picture, .svg or .png.")
_ASCII = flags.DEFINE_bool("ascii", False, "Print the mask.")


def main(argv) -> None:
    del argv
    if not all(n.isdecimal() and int(n) > 0 for n in _DOCUMENTS.value) or sum(map(int, _DOCUMENTS.value)) > 512:
        raise InputError(f"--documents={','.join(_DOCUMENTS.value)}, expected positive lengths, 512 in all at most")
    if _BLOCK_SIZE.value < 1:
        raise InputError(f"--block_size={_BLOCK_SIZE.value}, expected at least 1")
    if not _OUTPUT.value and not _ASCII.value:
        raise InputError("--output=FILE or --ascii is required; see --help")
    if _OUTPUT.value and Path(_OUTPUT.value).suffix not in (".svg", ".png"):
        raise InputError(f"--output={_OUTPUT.value}, expected .svg or .png")
    if _OUTPUT.value and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--output: matplotlib is not installed; pip install 'llada_jax[plot]'")

    import jax

    jax.config.update("jax_platforms", "cpu")
    from llada_jax.attention.picture import draw, kinds, text  # after the flags are right: jax takes seconds
    from llada_jax.attention.visibility import BLOCK_ORIGINS

    if _BLOCK_ORIGIN.value not in BLOCK_ORIGINS:
        raise InputError(f"--block_origin={_BLOCK_ORIGIN.value}, expected one of {', '.join(BLOCK_ORIGINS)}")
    documents = list(map(int, _DOCUMENTS.value))
    mask = kinds(documents, _BLOCK_SIZE.value, _BLOCK_ORIGIN.value)
    if _ASCII.value:
        print(text(mask))
    if _OUTPUT.value:
        draw(mask, documents, _BLOCK_SIZE.value, _OUTPUT.value)
        print(_OUTPUT.value)


if __name__ == "__main__":
    command_line.run(main)
