import json
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from llada_jax.data import pack, rows
from llada_jax.errors import InputError
from llada_jax.tokenizer import from_files, load_tokenizer
from tests.helpers.data_helpers import contents, kill_everywhere, read_back, run_tool

LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    model.add_special_tokens(["<eos>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(str(tokenizer_folder))


@pytest.fixture
def source(tmp_path):
    """Documents shorter than, equal to, and much longer than a row, some empty."""
    folder = tmp_path / "source"
    folder.mkdir()
    random = np.random.default_rng(0)
    bodies = ["x" * n for n in (0, 1, 15, 16, 100, 0, 30, 7, 7, 31, 0)] + [
        "é" * int(n) for n in random.integers(0, 40, 30)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": body}) + "\n" for body in bodies))
    (folder / "b.txt").write_text("the end")
    return folder


def expected_documents(source, tokenizer):
    bodies = [json.loads(line)["text"] for line in (source / "a.jsonl").read_text().splitlines()] + ["the end"]
    return [tokenizer.encode(body) + [tokenizer.eos_id] for body in bodies if body]


@pytest.mark.parametrize("align", [1, 4])
def test_every_token_is_stored_once_and_in_order(tmp_path, source, tokenizer, align):
    out = tmp_path / "out"
    dataset = pack.pack(str(source), tokenizer, str(out), LENGTH, block_align=align, rows_per_shard=7)
    packed = read_back(out)
    expected = expected_documents(source, tokenizer)
    assert [int(t) for row in packed for t in row.ids[row.supervised]] == [t for ids in expected for t in ids]
    assert dataset["tokens"] == sum(map(len, expected))
    assert dataset["documents"] == len(expected)
    assert dataset["rows"] == len(packed) == sum(count for _, count in dataset["shards"])
    assert all(count == 7 for _, count in dataset["shards"][:-1])
    pieces = {}
    for row in packed:
        assert row.ids.shape == row.segment_ids.shape == (LENGTH,) and row.ids.dtype == np.int32
        assert np.array_equal(row.supervised, row.segment_ids > 0)
        assert row.segment_ids.max() == len(row.sources)
        for segment, origin in enumerate(row.sources, 1):
            positions = np.flatnonzero(row.segment_ids == segment)
            assert positions[0] % align == 0
            assert np.array_equal(positions, np.arange(positions[0], positions[-1] + 1))
            pieces.setdefault(origin, []).extend(row.ids[positions].tolist())
    assert list(pieces.values()) == expected
    if align == 1:
        assert all(row.supervised.all() for row in packed[:-1])


def test_sources_lead_back_to_the_documents(tmp_path, source, tokenizer):
    out = tmp_path / "out"
    dataset = pack.pack(str(source), tokenizer, str(out), LENGTH)
    assert dataset["source_files"] == [[name, (source / name).stat().st_size] for name in ("a.jsonl", "b.txt")]
    lines = (source / "a.jsonl").read_bytes()
    for row in read_back(out)[:10]:
        for file, offset in row.sources:
            assert file == 0 and json.loads(lines[offset:].split(b"\n")[0])["text"]


@pytest.mark.parametrize("align", [1, 4])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, source, tokenizer, align, monkeypatch):
    def run(out):
        pack.pack(str(source), tokenizer, str(out), LENGTH, block_align=align, rows_per_shard=13)

    kills = kill_everywhere(run, tmp_path, monkeypatch)
    assert kills >= 4 * len(json.loads((tmp_path / "whole" / "dataset.json").read_text())["shards"])


def test_a_resumed_run_does_not_read_what_is_packed(tmp_path, source, tokenizer, monkeypatch):
    """Nor does it go on with a source that was edited meanwhile, though its size is the same."""
    arguments = (str(source), tokenizer, str(tmp_path / "out"), LENGTH)
    monkeypatch.setattr(pack, "_BATCH_DOCUMENTS", 3)
    with (source / "a.jsonl").open("a") as stream:
        stream.write("broken\n")
    with pytest.raises(InputError, match="malformed JSON"):
        pack.pack(*arguments, rows_per_shard=5)
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert len(progress["shards"]) >= 3
    read, real = [], pack.text.iter_documents

    def documents(files, field, start, stop):
        read.append(start)
        return real(files, field, start, stop)

    monkeypatch.setattr(pack.text, "iter_documents", documents)
    with pytest.raises(InputError, match="malformed JSON"):
        pack.pack(*arguments, rows_per_shard=5)
    assert read == [tuple(progress["source"])]
    mended = (source / "a.jsonl").read_bytes().replace(b"broken", b"      ")
    (source / "a.jsonl").write_bytes(mended)
    with pytest.raises(InputError, match="progress.json: the contents of the source files have changed"):
        pack.pack(*arguments, rows_per_shard=5)
    assert len(read) == 1
    (tmp_path / "out" / "progress.json").write_text(json.dumps({k: v for k, v in progress.items() if k not in LATER}))
    assert pack.pack(*arguments, rows_per_shard=5)["rows"] > 0  # older progress does not say what the contents were


LATER = ("source_digest", "tokenizer_identity")


@pytest.mark.parametrize("name", ["a.jsonl", "b.txt"])
def test_a_complete_dataset_of_other_contents_is_refused(tmp_path, source, tokenizer, name):
    arguments = (str(source), tokenizer, str(tmp_path / "out"), LENGTH)
    pack.pack(*arguments)
    before, text = contents(tmp_path / "out"), (source / name).read_bytes()
    (source / name).write_bytes(text.replace(b"e", b"a"))
    assert (source / name).read_bytes() != text
    with pytest.raises(InputError, match="dataset.json: the contents of the source files have changed; take another"):
        pack.pack(*arguments)
    assert contents(tmp_path / "out") == before


def test_a_tokenizer_whose_files_only_look_different_packs_the_same(tmp_path, source, tokenizer):
    """Other formatting and another generation_config.json; an added token is another tokenizer."""
    arguments = (str(source), str(tmp_path / "out"), LENGTH)
    dataset = pack.pack(arguments[0], tokenizer, *arguments[1:])
    content = json.loads(tokenizer.files["tokenizer.json"])
    looks = {"tokenizer.json": json.dumps(content, indent=3).encode(), "generation_config.json": b'{"top_k": 7}'}
    same = from_files(tokenizer.files | looks)
    assert same.digest != tokenizer.digest
    assert pack.pack(arguments[0], same, *arguments[1:]) == json.loads(json.dumps(dataset))
    token = content["added_tokens"][0] | {"id": same.vocab_size, "content": "<new>"}
    content["added_tokens"].append(token)
    other = from_files(tokenizer.files | {"tokenizer.json": json.dumps(content).encode()})
    with pytest.raises(InputError, match="tokenizer_digest is"):
        pack.pack(arguments[0], other, *arguments[1:])


def test_bad_input_before_the_first_shard_leaves_nothing(tmp_path, source, tokenizer):
    with (source / "a.jsonl").open("a") as stream:
        stream.write("broken\n")
    with pytest.raises(InputError, match="malformed JSON"):
        pack.pack(str(source), tokenizer, str(tmp_path / "new" / "out"), LENGTH)
    assert not (tmp_path / "new").exists()


def test_a_complete_dataset_is_left_alone(tmp_path, source, tokenizer, capsys):
    arguments = (str(source), tokenizer, str(tmp_path / "out"), LENGTH)
    dataset = pack.pack(*arguments)
    before = contents(tmp_path / "out")
    assert pack.pack(*arguments, log=sys.stderr) == json.loads(json.dumps(dataset))
    assert "already complete" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_content_digest_does_not_depend_on_sharding(tmp_path, source, tokenizer):
    digests = [
        pack.pack(str(source), tokenizer, str(tmp_path / str(n)), LENGTH, rows_per_shard=n)["digest"] for n in (3, 100)
    ]
    assert digests[0] == digests[1]
    assert pack.pack(str(source), tokenizer, str(tmp_path / "other"), 2 * LENGTH)["digest"] != digests[0]


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 32}, "length is 16 there but 32 now"),
        ({"block_align": 4}, "block_align is 1 there but 4 now"),
        ({"rows_per_shard": 6}, "rows_per_shard is 5 there but 6 now"),
        ({"patterns": ["*.py"]}, "patterns is [] there but ['*.py'] now"),
        ({"new_file": "c.txt"}, "source_files differ, first at c.txt"),
    ],
)
def test_other_settings_are_refused(tmp_path, source, tokenizer, monkeypatch, complete, change, message):
    out = tmp_path / "out"
    arguments = {"length": LENGTH, "rows_per_shard": 5}
    pack.pack(str(source), tokenizer, str(out), **arguments)
    name = "dataset.json"
    if not complete:
        name = "progress.json"
        state = {"source": [0, 0], "taken": 0}
        (out / name).write_text(json.dumps(json.loads((out / "dataset.json").read_text()) | state))
        (out / "dataset.json").unlink()
    if new_file := change.get("new_file"):
        (source / new_file).write_text("new")
        change = {}
    with pytest.raises(InputError) as caught:
        pack.pack(str(source), tokenizer, str(out), **(arguments | change))
    assert str(out / name) in str(caught.value) and message in str(caught.value)


def test_bad_arguments_are_named(tmp_path, source, tokenizer):
    for changes, message in (
        ({"block_align": 3}, "block_align 3 must be at least 1 and divide length 16"),
        ({"length": 0}, "length 0"),
        ({"out": str(source / "b.txt")}, str(source / "b.txt")),
        ({"out": str(source / "b.txt" / "out")}, str(source / "b.txt")),
    ):
        with pytest.raises(InputError) as caught:
            pack.pack(**({"source": str(source), "tokenizer": tokenizer, "out": "x", "length": LENGTH} | changes))
        assert message in str(caught.value)
    (source / "a.jsonl").unlink()
    (source / "b.txt").write_text("")
    with pytest.raises(InputError, match="empty dataset, every document is empty"):
        pack.pack(str(source), tokenizer, str(tmp_path / "out"), LENGTH)


def test_row_records_round_trip():
    ids = np.arange(8, dtype=np.int32)
    row = rows.decode_row(rows.encode_row(ids, [0, 4], [3, 2], [(0, 5), (1, 0)]))
    assert np.array_equal(row.ids, ids)
    assert row.segment_ids.tolist() == [1, 1, 1, 0, 2, 2, 0, 0]
    assert row.supervised.tolist() == [True, True, True, False, True, True, False, False]
    assert row.sources == ((0, 5), (1, 0))
    spans = rows.decode_row(rows.encode_row(ids, [0, 4], [3, 2], [(0, 5), (1, 0)], [(1, 5)]))
    assert np.flatnonzero(spans.supervised).tolist() == [1, 2, 4]
    nothing = rows.decode_row(rows.encode_row(ids, [0], [8], [(0, 0)], [(0, 0)]))
    assert not nothing.supervised.any()


@pytest.mark.parametrize("record", [b"", b"\x01", b"\xff" * 9, rows.encode_row([1, 2], [0], [2], [])])
def test_a_record_that_is_no_row_is_refused(record):
    with pytest.raises(ValueError, match="not a packed row"):
        rows.decode_row(record)


def test_the_tool_packs_and_sums_up(tmp_path, source, tokenizer_folder):
    result = run_tool(source=source, tokenizer=tokenizer_folder, out=tmp_path / "out", length=LENGTH)
    dataset = rows.read_dataset(str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    start = f"{dataset['rows']} rows, {dataset['tokens']} tokens, {dataset['documents']} documents, 1 shards, "
    assert result.stdout.splitlines()[-1].startswith(start)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "{tmp}/nowhere"}, "{tmp}/nowhere: no such file or folder"),
        ({"field": "body"}, '{tmp}/source/a.jsonl:1: field "body" is missing'),
        ({"tokenizer": "{tmp}/nowhere"}, "{tmp}/nowhere"),
        ({"length": "0"}, "length"),
    ],
)
def test_the_tool_answers_bad_input_in_one_line(tmp_path, source, tokenizer_folder, changes, message):
    flag_values = {"source": source, "tokenizer": tokenizer_folder, "out": tmp_path / "out", "length": LENGTH}
    changes = {name: value.format(tmp=tmp_path) for name, value in changes.items()}
    result = run_tool(**(flag_values | changes))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    assert message.format(tmp=tmp_path) in result.stderr
