"""Small tokenizers of the families that strangers bring: SentencePiece-like, byte-level with merges, word-level."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from llada_jax.tokenizer import Tokenizer, from_files

SPECIAL = ("<unk>", "<s>", "</s>", "<|mask|>")


def _finished(backend: tokenizers.Tokenizer, bos: bool, config: dict) -> Tokenizer:
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if bos:
        pair = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [pair])
    named = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<|mask|>"} | config
    return from_files(
        {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": json.dumps(named).encode()}
    )


def _vocabulary(tokens) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys([*SPECIAL, *tokens]))}


def llama_like(bos: bool = True, **config) -> Tokenizer:
    """As Llama-2's: Prepend and Replace, byte fallback, Strip in the decoder; "▁the" and "▁▁" are tokens."""
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁t", "he", "▁the", "▁▁"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    model = models.BPE(_vocabulary(tokens), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _finished(backend, bos, config)


def metaspace(bos: bool = False, **config) -> Tokenizer:
    """As T5's and Albert's: unigrams behind a Metaspace pre-tokenizer and decoder, no byte fallback."""
    tokens = ["▁", *(chr(c) for c in range(33, 127)), "é", "猫", "▁the", "ing"]
    scores = [(token, -float(5 if len(token) == 1 else 1)) for token in _vocabulary(tokens)]
    backend = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _finished(backend, bos, config)


def byte_level(bos: bool = False, **config) -> Tokenizer:
    """As GPT-2's, Qwen's and Llama-3's: byte-level BPE; some merges join the bytes of two characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = tokenizers.Tokenizer(models.BPE(_vocabulary(alphabet), []))
    backend.pre_tokenizer = split
    (kitten, _) = split.pre_tokenize_str("猫は")[0]  # E7 8C AB, E3 81 AF
    pieces = [(kitten[2], kitten[3]), ("h", "e"), ("Ġ", "t")]
    backend.model = models.BPE(_vocabulary([*alphabet, *(a + b for a, b in pieces)]), pieces)
    backend.decoder = decoders.ByteLevel()
    return _finished(backend, bos, config)


def words(bos: bool = False, **config) -> Tokenizer:
    """Whole words, joined by spaces, no decoder."""
    backend = tokenizers.Tokenizer(models.WordLevel(_vocabulary(["the", "cat", "sat", "猫", "."]), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _finished(backend, bos, config)
