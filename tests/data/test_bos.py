"""The beginning of sequence in packed documents, and prompt and completion as one text."""

import json
from fractions import Fraction

import numpy as np
import pytest

from llada_jax.data import chat, pairs
from llada_jax.data.pack import pack
from llada_jax.data.pack_chat import pack_chat
from llada_jax.errors import InputError
from llada_jax.tokenizer import load_tokenizer
from llada_jax.training import datasets
from llada_jax.training.config import default_config
from tests.helpers.data_helpers import contents, read_back, run_tool, write_rows, write_tokenizer
from tests.helpers.foreign_tokenizers import byte_level, llama_like, metaspace, words

BOS, EOS, LENGTH = 1, 2, 16
BODIES = ["the cat", "", "x" * 40, "<s>the", "a", "yy", "the end of it", "z" * 13]


@pytest.fixture
def source(tmp_path):
    return write_rows(tmp_path / "a.jsonl", [{"text": body} for body in BODIES])


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("make", [llama_like, byte_level])
def test_every_document_begins_with_one_that_is_not_learned(tmp_path, source, make, align):
    tokenizer = make(bos=True)
    dataset = pack(source, tokenizer, str(tmp_path / "out"), LENGTH, block_align=align)
    assert dataset["add_bos"] is True
    rows = read_back(tmp_path / "out")
    packed_ids = [int(i) for row in rows for i in row.ids[row.segment_ids > 0]]
    learned = [int(i) for row in rows for i in row.ids[row.supervised]]
    documents = [[*tokenizer.encode_document(body), EOS] for body in BODIES if body]
    assert all(ids[:2].count(BOS) == 1 and ids[0] == BOS for ids in documents)
    assert packed_ids == [i for ids in documents for i in ids]  # and none where a document goes on in the next row
    assert learned == [i for ids in documents for i in ids[1:]]
    never = pack(source, tokenizer.with_bos(False), str(tmp_path / "never"), LENGTH, block_align=align)
    plain = pack(source, make(bos=False), str(tmp_path / "plain"), LENGTH, block_align=align)
    assert never["add_bos"] is plain["add_bos"] is False and never["digest"] == plain["digest"]


def test_a_row_of_nothing_but_a_beginning_teaches_nothing(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"text": "a" * (LENGTH - 3)}, {"text": "b" * LENGTH}])
    pack(file, byte_level(bos=True), str(tmp_path / "out"), LENGTH)
    first, *_ = read_back(tmp_path / "out")
    assert first.ids.tolist()[-1] == BOS and not first.supervised[-1] and first.supervised.sum() == LENGTH - 2
    pack(file, byte_level(bos=True), str(tmp_path / "short"), 1)
    rows = read_back(tmp_path / "short")
    assert [bool(row.supervised[0]) for row in rows] == [int(row.ids[0]) != BOS for row in rows]


def test_the_tool_has_a_flag_and_other_rows_are_not_mixed_in(tmp_path, source):
    folder = write_tokenizer(tmp_path / "tokenizer", llama_like(bos=True))
    flags = {"source": source, "tokenizer": folder, "out": tmp_path / "out", "length": LENGTH}
    assert run_tool(**flags, add_bos="false").returncode == 0
    packed = contents(tmp_path / "out")
    assert json.loads(packed["dataset.json"])["add_bos"] is False
    result = run_tool(**flags)
    assert result.returncode == 2 and "add_bos is False there but True now" in result.stderr
    assert contents(tmp_path / "out") == packed
    nameless = write_tokenizer(tmp_path / "nameless", llama_like(bos=False, bos_token=None))
    result = run_tool(**flags | {"tokenizer": nameless, "out": tmp_path / "x"}, add_bos="true")
    assert result.returncode == 2 and "add_bos=true: the tokenizer has no bos_token" in result.stderr
    assert not (tmp_path / "x").exists()


def test_a_dataset_older_than_the_flag_is_complete_without_it(tmp_path, source):
    tokenizer = llama_like(bos=False)
    pack(source, tokenizer, str(tmp_path / "out"), LENGTH)
    file = tmp_path / "out" / "dataset.json"
    older = {name: value for name, value in json.loads(file.read_text()).items() if name != "add_bos"}
    file.write_text(json.dumps(older))
    assert pack(source, tokenizer, str(tmp_path / "out"), LENGTH) == older
    with pytest.raises(InputError, match="add_bos is False there but True now"):
        pack(source, tokenizer.with_bos(True), str(tmp_path / "out"), LENGTH)


def test_training_compares_how_documents_begin_and_end(tmp_path, source, capsys):
    tokenizer = llama_like(bos=True)
    config = default_config("tiny")
    config.data.length, config.data.held_out_rows = LENGTH, 1
    folders = [str(tmp_path / name) for name in ("with", "without")]
    pack(source, tokenizer, folders[0], LENGTH)
    pack(source, tokenizer.with_bos(False), folders[1], LENGTH)

    def opened(folder, tokenizer, ends=(EOS,)):
        return datasets.open_rows(config, [(folder, Fraction(1))], tokenizer, ends)

    for folder, own in zip(folders, (tokenizer, tokenizer.with_bos(False)), strict=True):
        opened(folder, own)
        opened(folder, None)
        opened(folder, own, (508, EOS))
        with pytest.raises(InputError, match=f"{folder}: documents end in id 2, .* ends of sequence \\[508, 3\\]"):
            opened(folder, own, (508, 3))
    with pytest.raises(InputError, match="without a beginning .*pack with --add_bos=true, or set .*add_bos=false"):
        opened(folders[1], tokenizer)
    with pytest.raises(InputError, match="with a beginning .*pack with --add_bos=false, or set .*add_bos=true"):
        opened(folders[0], tokenizer.with_bos(False))
    assert capsys.readouterr().out == ""
    file = tmp_path / "without" / "dataset.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "add_bos"}))
    opened(folders[1], tokenizer)
    assert capsys.readouterr().out.startswith(f"{folders[1]}: its documents have no beginning of sequence")


def test_a_checkpoint_folders_tokenizer_goes_on_as_it_was_trained(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", llama_like(bos=True))
    for chosen, adds in ((None, True), ("auto", True), ("false", False), ("true", True)):
        lineage = {} if chosen is None else {"config": {"data": {"add_bos": chosen}}}
        (tmp_path / "config.json").write_text(json.dumps({"model": {}, "lineage": lineage}))
        assert load_tokenizer(str(tmp_path)).adds_bos is adds


# --- prompt and completion --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("make", [llama_like, metaspace, byte_level, words])
@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("the", " cat"),
        ("def f():", "    x"),
        ("", "the cat"),
        ("the c", "at"),
        ("猫", "は"),
        ("the ", "cat"),
        ("a", "é"),
    ],
)
def test_they_are_one_text(make, bos, prompt, completion):
    """Supervised is all that a prompt on its own does not hold, from the completion's first character on."""
    tokenizer = make(bos)
    (found,) = chat.plain(prompt, completion, tokenizer)
    whole = tokenizer.encode_document(prompt + completion)
    assert found.ids.tolist() == [*whole, EOS] and found.spans[0][1] == len(found.ids) and len(found.spans) == 1
    first = found.spans[0][0]
    assert bos <= first < len(whole)
    before, upto = (tokenizer.decode(whole[:end], skip_special_tokens=True) for end in (first, first + 1))
    if "\ufffd" not in upto and tokenizer.token_to_id("<unk>") not in whole:
        assert prompt.startswith(before) and len(prompt) < len(upto) and (prompt + completion).startswith(upto)


def test_a_sentencepiece_completion_has_no_space_of_its_own():
    tokenizer = llama_like(bos=False)
    (found,) = chat.plain("1+1=", "2", tokenizer)
    assert [tokenizer.id_to_token(int(i)) for i in found.ids] == ["▁", "1", "+", "1", "=", "2", "</s>"]
    assert found.spans == [(5, 7)]


def test_a_token_over_the_border_is_learned():
    tokenizer = llama_like(bos=True)  # "▁the" is one token
    (found,) = chat.plain("a ", "the", tokenizer)
    assert [tokenizer.id_to_token(int(i)) for i in found.ids[found.spans[0][0] :]] == ["▁the", "</s>"]


def test_an_end_that_the_completion_writes_itself_is_not_doubled():
    tokenizer = byte_level()
    (found,) = chat.plain("a", "b</s>", tokenizer)
    assert found.ids.tolist() == [*tokenizer.encode("ab"), EOS] and found.spans == [(1, 3)]


def test_pairs_and_packed_rows_begin_so_too(tmp_path):
    tokenizer = llama_like(bos=True)
    row = {"prompt": "the", "chosen": " a", "rejected": " b"}
    for document in pairs.prepare(row, tokenizer):
        assert document.ids.tolist()[:2] == [BOS, tokenizer.token_to_id("▁the")] and document.spans[0][0] == 2
    file = write_rows(tmp_path / "a.jsonl", [{"prompt": "the", "completion": " a"}, {"prompt": "", "completion": "a"}])
    dataset = pack_chat(file, tokenizer, str(tmp_path / "out"), LENGTH, block_align=8)
    (stored,) = read_back(tmp_path / "out")
    assert dataset["add_bos"] and stored.ids[[0, 8]].tolist() == [BOS, BOS]
    assert not stored.supervised[[0, 8]].any() and np.flatnonzero(stored.supervised)[0] == 2
