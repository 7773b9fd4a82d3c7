"""A tokenizer that needs no file, with one token per byte, for small models."""

import json

from llada_jax.token_text import byte_characters
from llada_jax.tokenizer import Tokenizer, from_files

EOS, MASK = "<|endoftext|>", "<|mask|>"


def byte_tokenizer(eos_id: int, mask_id: int | None = None) -> Tokenizer:
    """Ids 0 .. 255 are the bytes; eos_id and mask_id lie above them."""
    characters = byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(characters)}
    special = {EOS: eos_id} | ({} if mask_id is None else {MASK: mask_id})
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": token_id, "content": name} | entry for name, token_id in special.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary | special, "merges": []},
    }
    config = {"eos_token": EOS} | ({} if mask_id is None else {"mask_token": MASK})
    return from_files(
        {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(config).encode()}
    )
