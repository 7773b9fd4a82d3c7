"""Texts and pairs as rows to score."""

import json

import pytest

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.evaluation.texts import read_texts, scored_bytes
from tests.helpers.data_helpers import write_rows
from tests.helpers.foreign_tokenizers import byte_level, llama_like, metaspace

EOS = 256
TOKENIZER = byte_tokenizer(EOS)


def test_texts_are_cut_into_windows_and_scored_whole(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 25)
    write_rows(tmp_path / "b.jsonl", [{"text": "abc"}])
    batch = read_texts(str(tmp_path), TOKENIZER, 40)
    assert batch.ids.shape == (3, 64) and batch.row_ids.tolist() == [0, 1, 2]
    assert (batch.segment_ids > 0).sum(1).tolist() == [40, 11, 4]
    assert (batch.supervised == (batch.segment_ids > 0)).all()
    assert batch.ids[2, :4].tolist() == [*b"abc", EOS]
    assert scored_bytes(batch, TOKENIZER, "same") == 53
    assert len(read_texts(str(tmp_path), TOKENIZER, 40, limit=2).ids) == 2


def test_of_pairs_the_answer_is_scored(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "x", "completion": "yz", "id": 3}]
    )
    batch = read_texts(path, TOKENIZER, 40)
    assert [batch.ids[row][batch.supervised[row]].tolist() for row in (0, 1)] == [[*b"2", EOS], [*b"yz", EOS]]
    assert batch.ids[0, :4].tolist() == [*b"1+1="]
    assert scored_bytes(batch, TOKENIZER, "same") == scored_bytes(batch, TOKENIZER, "shifted") == 3


def test_the_first_token_of_a_text_has_no_bytes_where_it_has_no_likelihood(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    batch = read_texts(str(tmp_path), TOKENIZER, 40)
    assert scored_bytes(batch, TOKENIZER, "same") == 3 and scored_bytes(batch, TOKENIZER, "shifted") == 2


@pytest.mark.parametrize("alignment", ["same", "shifted"])
@pytest.mark.parametrize("make", [llama_like, byte_level])
def test_bytes_of_any_script_and_window_are_those_of_the_text(tmp_path, make, alignment):
    """With a beginning of sequence the first token has a likelihood too, so nothing but the windows' own first tokens
    is left out where the model predicts the next token."""
    texts = ["吾輩は猫である。名前はまだ無い。" * 3, "the cat", "🙂🚀é", "семья несчастлива", "  x"]
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    tokenizer = make(bos=True)
    for length in (7, 30, 400):
        batch = read_texts(path, tokenizer, length)
        lost = 0
        if alignment == "shifted":
            first = [int(row[0]) for row in batch.ids[batch.goes_on]]
            lost = sum(tokenizer.text.count_bytes([token], [True], False) for token in first)
        assert scored_bytes(batch, tokenizer, alignment) == sum(len(text.encode()) for text in texts) - lost
        assert not batch.supervised[batch.ids == tokenizer.bos_id].any()


def test_the_first_words_space_is_no_byte_of_the_text(tmp_path):
    for make in (llama_like, metaspace):
        path = write_rows(tmp_path / "a.jsonl", [{"text": "the the"}, {"prompt": "the", "answer": " the"}])
        batch = read_texts(path, make(bos=False), 40)
        assert scored_bytes(batch, make(), "same") == len("the the") + len(" the")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x" * 50, "answer": "y"}, "a.jsonl:2: 52 tokens, more than --length=40"),
        ({"other": 1}, "a.jsonl:2: neither"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=message):
        read_texts(str(tmp_path), TOKENIZER, 40)
