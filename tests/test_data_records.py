import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import LING, message, with_template, write_rows, write_saved_dataset

from llada_jax.data import chat, records, sources
from llada_jax.data.pack_chat import pack_chat
from llada_jax.errors import InputError

CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ROWS = [
    {
        "messages": [
            message("user", "x"),
            message("assistant", None, tool_calls=CALLS),
            message("tool", "1"),
            message("assistant", "y"),
        ],
        "tools": json.dumps(TOOLS),
    },
    {"messages": [message("user", "x"), message("assistant", "z")]},
    *({"messages": [message("user", str(i)), message("assistant", "z" * i)]} for i in range(1, 10)),
]


@pytest.fixture(params=["jsonl", "parquet", "saved"])
def source(tmp_path, request):
    """The same rows in each format, in two files."""
    folder = tmp_path / "source"
    if request.param == "saved":
        return write_saved_dataset(folder, ROWS[:7], ROWS[7:])
    folder.mkdir()
    for name, rows in (("a", ROWS[:7]), ("b", ROWS[7:])):
        if request.param == "jsonl":
            write_rows(folder / f"{name}.jsonl", rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", row_group_size=4)
    return str(folder)


def read(source, start=(0, 0)):
    files = sources.list_files(source, sources.ROW_SUFFIXES)
    return [
        ((file, offset), records.parse_row(row)) for file, offset, row in records.read_rows(files, chat.COLUMNS, start)
    ]


def test_rows_are_the_same_in_every_format(source):
    """A struct has all the keys of all rows in a table: absent ones must not reach the template as None."""
    tokenizer = with_template(LING)
    found = read(source)
    assert [file for (file, _), _ in found] == [0] * 7 + [1] * 4
    for (_, row), wanted in zip(found, ROWS, strict=True):
        (rendered,) = chat.prepare(row, tokenizer)
        assert [rendered] == chat.prepare(wanted, tokenizer)
        assert "None" not in rendered.text


def test_reading_resumes_at_any_row(source):
    found = read(source)
    for i, (place, _) in enumerate(found):
        assert read(source, place) == found[i:]
    assert read(source, (2, 0)) == []


def test_a_malformed_row_is_named_by_its_place(tmp_path):
    rows = [ROWS[1], {"messages": [message("human", "x")]}]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "tables" / "a.parquet")
    saved = write_saved_dataset(tmp_path / "saved", rows[:1], rows[1:])
    write_rows(tmp_path / "a.jsonl", rows)
    for source, place in (
        (tmp_path / "tables", "a.parquet:row 1"),
        (saved, "data-00001-of-00002.arrow:row 0"),
        (tmp_path / "a.jsonl", "a.jsonl:2"),
    ):
        with pytest.raises(InputError, match=f"{place}: messages.0.: role 'human'"):
            pack_chat(str(source), with_template(LING), str(tmp_path / "out"), 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pa.table({"text": ["a"]}), "no column messages or tools or prompt"),
        (b"PAR1", "unreadable parquet file"),
    ],
)
def test_a_table_that_is_no_source_of_conversations(tmp_path, content, message):
    path = tmp_path / "a.parquet"
    pq.write_table(content, path) if isinstance(content, pa.Table) else path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: {message}"):
        pack_chat(str(path), with_template(LING), str(tmp_path / "out"), 512)
