"""Packs documents (.txt, .jsonl, .parquet) into rows of tokens for training.

Example:
  python tools/pack_data.py --source=corpus --tokenizer=checkpoint --out=packed --length=4096

A run that was interrupted goes on where it stopped when it is started again with the same flags.
"""

import sys
import time

from absl import flags

from llada_jax import errors
from llada_jax.data import pack
from llada_jax.interop import tokenizer

_SOURCE = flags.DEFINE_string("source", None, "Folder (searched recursively) or file of documents.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Folder with tokenizer.json, or a checkpoint.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder for the packed dataset.", required=True)
_LENGTH = flags.DEFINE_integer("length", None, "Tokens in a row.", lower_bound=1, required=True)
_FIELD = flags.DEFINE_string("field", "text", "JSON key or parquet column that holds the text.")
_PATTERNS = flags.DEFINE_list("patterns", [], 'More files to read as plain text, e.g. "*.py,*.rst".')
_BLOCK_ALIGN = flags.DEFINE_integer("block_align", 1, "Start documents at multiples of this in a row.", lower_bound=1)
_ROWS_PER_SHARD = flags.DEFINE_integer("rows_per_shard", 65536, "Rows in a shard file.", lower_bound=1)


def main(argv):
    del argv
    begun = time.monotonic()
    dataset = pack.pack(
        _SOURCE.value,
        tokenizer.load_tokenizer(_TOKENIZER.value),
        _OUT.value,
        _LENGTH.value,
        field=_FIELD.value,
        patterns=_PATTERNS.value,
        block_align=_BLOCK_ALIGN.value,
        rows_per_shard=_ROWS_PER_SHARD.value,
        log=sys.stderr,
    )
    print(
        f"{dataset['rows']} rows, {dataset['tokens']} tokens, {dataset['documents']} documents, "
        f"{len(dataset['shards'])} shards, {time.monotonic() - begun:.1f} s"
    )


if __name__ == "__main__":
    errors.run(main)
