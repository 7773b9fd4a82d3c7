"""Raw text is packed once, under a digest of what it holds."""

import os

import pytest

from llada_jax.errors import InputError
from llada_jax.training.config import default_config
from llada_jax.training.inputs import open_inputs


def rows_of(tmp_path, source, **data):
    config = default_config("tiny")
    config.data.update({"source": str(source), "tokenizer": "bytes", "length": 64, "held_out_rows": 2} | data)
    config.data.cache = str(tmp_path / "cache")
    config.evaluation.block_sizes, config.evaluation.rows = (64,), 2
    rows = open_inputs(config, tmp_path / "work").rows
    return bytes(i for row in range(rows.stored) for i in rows.read(row).ids.tolist() if i < 256).decode()


def caches(tmp_path):
    return {path.name: (path / "dataset.json").stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "a"
    (folder / "deep").mkdir(parents=True)
    (folder / "x.txt").write_text("the cat sat on the mat. " * 20)
    (folder / "deep" / "y.jsonl").write_text('{"text": "a line of its own, and another"}\n' * 8)
    return folder


def test_edited_and_other_files_of_the_same_size_are_packed_anew(tmp_path, source):
    assert "cat" in rows_of(tmp_path, source)
    stat = (source / "x.txt").stat()
    (source / "x.txt").write_text("the dog lay by the fire." * 20)
    os.utime(source / "x.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # nor does the clock tell
    assert "dog" in (edited := rows_of(tmp_path, source)) and "cat" not in edited
    line = (source / "deep" / "y.jsonl").read_text()
    (source / "deep" / "y.jsonl").write_text(line.replace("another", "the rest"[:7]))
    assert "the res" in rows_of(tmp_path, source)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("a wholly other text here" * 20)
    assert "dog" not in rows_of(tmp_path, tmp_path / "b")
    assert len(caches(tmp_path)) == 4


def test_the_same_contents_elsewhere_are_not_packed_again(tmp_path, source):
    before = rows_of(tmp_path, source)
    cached = caches(tmp_path)
    source.rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "x.txt")
    assert rows_of(tmp_path, tmp_path / "moved") == before and caches(tmp_path) == cached


def test_other_patterns_that_match_the_same_files_are_no_conflict(tmp_path, source):
    (source / "z.md").write_text("# a heading\n" * 20)
    assert "heading" in rows_of(tmp_path, source, patterns=("*.md",))
    assert "heading" in rows_of(tmp_path, source, patterns=("*.m*",))
    assert "heading" not in rows_of(tmp_path, source)


def test_a_file_that_cannot_be_read_is_named(tmp_path, source):
    (source / "w.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="w.txt: No such file"):
        rows_of(tmp_path, source)


def test_wrong_tokens_need_a_tokenizer(tmp_path):
    config = default_config("tiny")
    config.data.path, config.editing.replace_high = str(tmp_path / "rows"), 0.5
    with pytest.raises(InputError, match="config.editing.replace_high=0.5: which ids texts have is not known"):
        open_inputs(config, tmp_path / "work")
