"""The beginning of sequence: what a tokenizer's post-processor puts in front of a text, and what overrides it."""

import pytest

from llada_jax.errors import InputError
from llada_jax.tokenizer import parse_add_bos, trained_with
from tests.helpers.foreign_tokenizers import byte_level, llama_like, metaspace, words


@pytest.mark.parametrize("make", [llama_like, metaspace, byte_level, words])
def test_auto_follows_the_post_processor(make):
    for added in (False, True):
        tokenizer = make(bos=added)
        text = "the cat"
        assert tokenizer.encode_document(text) == tokenizer.backend.encode(text).ids  # as transformers encodes
        always, never = tokenizer.with_bos("true"), tokenizer.with_bos(False)
        assert tokenizer.adds_bos == added and always.adds_bos and not never.adds_bos
        assert always.encode_document(text) == [1, *tokenizer.encode(text)]
        assert never.encode_document(text) == tokenizer.encode(text)
        assert never.with_bos("auto").adds_bos == added


def test_a_text_that_begins_with_one_gets_no_second():
    tokenizer = llama_like(bos=True)
    for text in ("<s>the", "<s> the cat"):  # as some chat templates write it
        assert tokenizer.encode_document(text) == tokenizer.encode(text) and tokenizer.encode(text)[:2].count(1) == 1
    assert tokenizer.encode_document("") == [1]


def test_other_values_and_a_tokenizer_without_one_are_refused():
    for value, parsed in {"auto": "auto", "True": True, "false": False, True: True, False: False}.items():
        assert parse_add_bos(value) is parsed
    for value in ("yes", "", None, 1, 0.0):
        with pytest.raises(InputError, match="^add_bos=.*expected auto, true, false$"):
            llama_like().with_bos(value)
    nameless = words(bos_token=None)
    assert nameless.document_prefix == []
    with pytest.raises(InputError, match="add_bos=true: the tokenizer has no bos_token"):
        nameless.with_bos(True)


def test_a_checkpoint_goes_on_as_its_training_chose():
    imported = {"source": "somewhere", "hf_config": {}}
    chose = {"config": {"data": {"add_bos": "false"}}, "source": imported}
    followed = {"config": {"data": {"add_bos": "auto"}}, "source": {"merged": [], "source": chose}}
    before = {"config": {"data": {}}, "source": imported}  # a run older than the choice
    assert [trained_with(each) for each in (imported, chose, followed, before, None)] == [
        "auto", False, False, "auto", "auto",
    ]  # fmt: skip
