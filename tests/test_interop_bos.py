"""The beginning of sequence: what a tokenizer's post-processor puts in front of a text, and what overrides it."""

import pytest
from foreign_tokenizers import byte_level, llama_like, metaspace, words

from llada_jax.errors import InputError
from llada_jax.interop.tokenizer import parse_add_bos


@pytest.mark.parametrize("make", [llama_like, metaspace, byte_level, words])
def test_auto_follows_the_post_processor(make):
    for added in (False, True):
        tokenizer = make(bos=added)
        text = "the cat"
        assert tokenizer.encode_document(text) == tokenizer.backend.encode(text).ids  # as transformers encodes
        assert tokenizer.adds_bos() == added and tokenizer.adds_bos(True) and not tokenizer.adds_bos(False)
        assert tokenizer.encode_document(text, True) == [1, *tokenizer.encode(text)]
        assert tokenizer.encode_document(text, False) == tokenizer.encode(text)


def test_a_text_that_begins_with_one_gets_no_second():
    for text in ("<s>the", "<s> the cat"):  # as some chat templates write it
        tokenizer = llama_like(bos=True)
        assert tokenizer.encode_document(text) == tokenizer.encode(text) and tokenizer.encode(text)[:2].count(1) == 1
    assert llama_like(bos=True).encode_document("") == [1]


def test_other_values_and_a_tokenizer_without_one_are_refused():
    for value, parsed in {"auto": "auto", "True": True, "false": False, True: True, False: False}.items():
        assert parse_add_bos(value) is parsed
    for value in ("yes", "", None, 1, 0.0):
        with pytest.raises(InputError, match="^add_bos=.*expected auto, true or false$"):
            parse_add_bos(value)
        with pytest.raises(InputError, match="^add_bos=.*expected auto, true or false$"):
            llama_like().document_prefix(value)
    nameless = words(bos_token=None)
    assert nameless.document_prefix() == []
    with pytest.raises(InputError, match="add_bos=true: the tokenizer has no bos_token"):
        nameless.document_prefix(True)
