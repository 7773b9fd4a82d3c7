import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.data import text
from llada_jax.data.sources import list_files
from llada_jax.errors import InputError
from tests.helpers.data_helpers import write_saved_dataset


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    (root / "b" / ".git").mkdir(parents=True)
    (root / "a.txt").write_text("\ufeffplain ä", encoding="utf-8")
    (root / "b" / "c.jsonl").write_text(
        json.dumps({"text": "one", "other": 1}) + "\n\n" + json.dumps({"text": "zwei ü"}, ensure_ascii=False) + "\r\n"
    )
    (root / "b" / ".git" / "hidden.txt").write_text("hidden")
    (root / "b" / "code.py").write_text("print()\n")
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(700)]}), root / "d.parquet", row_group_size=300)
    (root / "ignored.bin").write_bytes(b"\xff")
    return root


def test_documents_come_in_sorted_order_with_their_offsets(corpus):
    files = list_files(str(corpus), patterns=["*.py"])
    documents = list(text.iter_documents(files))
    assert documents[:4] == [(0, 0, "plain ä"), (1, 0, "one"), (1, 29, "zwei ü"), (2, 0, "print()\n")]
    assert documents[4:] == [(3, row, f"row {row}") for row in range(700)]


def test_reading_resumes_at_any_document(corpus):
    files = list_files(str(corpus), patterns=["*.py"])
    documents = list(text.iter_documents(files))
    for i in (0, 1, 2, 3, 4, 5, 259, 260, 303, 304, 305, 600, 703):
        assert list(text.iter_documents(files, start=documents[i][:2])) == documents[i:]
    assert list(text.iter_documents(files, start=(len(files), 0))) == []


def test_compressed_texts_and_arrays_are_documents(tmp_path):
    for name, codec, content in (
        ("a.txt.gz", "gzip", "plain ä"),
        ("b.txt.zst", "zstd", "ü"),
        ("c.json.zst", "zstd", '[{"text": "1"},\n {"text": "2"}]'),
        ("d.ndjson", None, '{"text": "3"}\n{"text": "4"}'),
    ):
        with pa.output_stream(str(tmp_path / name), compression=codec) as stream:
            stream.write(content.encode())
    files = list_files(str(tmp_path))
    documents = list(text.iter_documents(files))
    assert [document[2] for document in documents] == ["plain ä", "ü", "1", "2", "3", "4"]
    for i, document in enumerate(documents):
        assert list(text.iter_documents(files, start=document[:2])) == documents[i:]


def test_a_saved_dataset_is_read_in_the_order_of_its_state(tmp_path):
    folder = write_saved_dataset(tmp_path / "saved", *([{"text": f"{i} {j}"} for j in range(7)] for i in range(2)))
    files = list_files(folder)
    documents = list(text.iter_documents(files))
    assert documents == [(i, j, f"{i} {j}") for i in range(2) for j in range(7)]
    for i, document in enumerate(documents):
        assert list(text.iter_documents(files, start=document[:2])) == documents[i:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl:2: malformed JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n{"body": "a"}\n', 'x.jsonl:3: field "text" is missing'),
        ("x.jsonl", b'{"text": 3}\n', 'x.jsonl:1: field "text" is not a string'),
        ("x.jsonl", b'{"text": null}\n', 'x.jsonl:1: field "text" is not a string'),
        ("x.jsonl", b'{"text": "\\ud800"}\n', 'x.jsonl:1: field "text" holds a lone surrogate'),
        ("x.jsonl", b'["text"]\n', "x.jsonl:1: not a JSON object"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "x.jsonl:2: not UTF-8"),
        ("x.txt", b"fine\nfine\n\xff\n", "x.txt:3: not UTF-8"),
        ("x.parquet", b"PAR1 but not really", "x.parquet: unreadable parquet file"),
        ("x.parquet", b"", "x.parquet: unreadable parquet file"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(text.iter_documents(list_files(str(tmp_path))))
    assert str(tmp_path / message) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_line_is_counted_from_the_beginning_after_a_resume(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n{}\n')
    with pytest.raises(InputError, match=r'x\.jsonl:3: field "text" is missing'):
        list(text.iter_documents(list_files(str(tmp_path)), start=(0, 14)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["a"]}, "x.parquet: no column text"),
        ({"text": ["a", None]}, 'x.parquet:row 1: field "text" is not a string'),
        ({"text": [1, 2]}, 'x.parquet:row 0: field "text" is not a string'),
    ],
)
def test_bad_parquet_columns_are_named(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    with pytest.raises(InputError) as caught:
        list(text.iter_documents(list_files(str(tmp_path))))
    assert str(tmp_path / message) == str(caught.value)


def test_truncated_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [str(i) * 50 for i in range(1000)]}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:2000] = bytes(1996)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.parquet: unreadable parquet file"):
        list(text.iter_documents(list_files(str(tmp_path))))
