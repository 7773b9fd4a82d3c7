import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llada_jax.data import chat, records, sources
from llada_jax.data.pack_chat import pack_chat
from llada_jax.errors import InputError
from tests.helpers.data_helpers import LING, message, with_template, write_rows, write_saved_dataset

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


def write_json(file, rows, form):
    """A .json file: an array on one line or on many, or lines."""
    text = {
        "array": json.dumps(rows, ensure_ascii=False),
        "indented": "\ufeff " + json.dumps(rows, indent=2) + "\n\n",
        "lines": "\n".join(map(json.dumps, rows)),
    }
    file.write_text(text[form], encoding="utf-8")


def compress(file, codec):
    """The file, in two frames, as parts that were joined have."""
    data = file.read_bytes()
    file.unlink()
    with open(f"{file}.{dict(gzip='gz', zstd='zst')[codec]}", "wb") as out:
        for part in (data[:500], data[500:]):
            buffer = pa.BufferOutputStream()
            with pa.CompressedOutputStream(buffer, codec) as stream:
                stream.write(part)
            out.write(buffer.getvalue())


FORMATS = ["jsonl", "parquet", "saved", "array", "indented", "lines", "jsonl gzip", "jsonl zstd", "array gzip"]


@pytest.fixture(params=FORMATS)
def source(tmp_path, request):
    """The same rows in each format, in two files."""
    form, _, codec = request.param.partition(" ")
    folder = tmp_path / "source"
    if request.param == "saved":
        return write_saved_dataset(folder, ROWS[:7], ROWS[7:])
    folder.mkdir()
    for name, rows in (("a", ROWS[:7]), ("b", ROWS[7:])):
        file = folder / f"{name}.{'jsonl' if form == 'jsonl' else 'json'}"
        if form != "parquet":
            write_rows(file, rows) if form == "jsonl" else write_json(file, rows, form)
            if codec:
                compress(file, codec)
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
    for (_, row), expected in zip(found, ROWS, strict=True):
        (rendered,) = chat.prepare(row, tokenizer)
        assert [rendered] == chat.prepare(expected, tokenizer)
        assert "None" not in rendered.text


def test_reading_resumes_at_any_row(source):
    found = read(source)
    for i, (place, _) in enumerate(found):
        assert read(source, place) == found[i:]
    assert read(source, (2, 0)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_are_packed_alike_from_every_format(tmp_path, source, processes):
    write_rows(tmp_path / "all.jsonl", ROWS)
    expected = pack_chat(str(tmp_path / "all.jsonl"), with_template(LING), str(tmp_path / "wanted"), 512)
    found = pack_chat(source, with_template(LING), str(tmp_path / "found"), 512, processes=processes)
    names = ("tokens", "supervised_tokens", "documents", "used")
    assert [found[name] for name in names] == [expected[name] for name in names]


def test_one_object_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS[1], indent=1))
    assert [row for _, row in read(str(tmp_path / "a.json"))] == [ROWS[1]]
    (tmp_path / "a.json").write_text(" [ ]\n")
    assert read(str(tmp_path / "a.json")) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[\n{"messages": []},\n{"messages": [}]', "a.json:3: malformed JSON (Expecting value)"),
        ("a.json", '[\n{"messages": []}\n', "a.json:3: malformed JSON (Expecting ',' delimiter)"),
        ("a.json", '[{"messages": []},\n]', "a.json:2: malformed JSON (Expecting value)"),
        ("a.json", '[{"messages": []}]\n\n3', "a.json:3: malformed JSON (Extra data)"),
        ("a.json", '{\n"messages": []}\n{\n"messages": []}', "a.json:3: malformed JSON (Extra data)"),
        ("a.json", '[{"messages": []},\n 3]', "a.json:2: not a JSON object"),
        ("a.json", '{\n"version": 1,\n"data": []}', "a.json:1: neither messages, nor prompt and completion"),
    ],
)
def test_malformed_json_is_named_by_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        pack_chat(str(tmp_path), with_template(LING), str(tmp_path / "out"), 512)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files_that_are_damaged_are_named(tmp_path, codec):
    write_rows(tmp_path / "a.jsonl", [*ROWS * 9, {"messages": 3}])
    compress(tmp_path / "a.jsonl", codec)
    (file,) = tmp_path.iterdir()
    with pytest.raises(InputError, match=f"^{file}:100: messages is not a list"):
        pack_chat(str(tmp_path), with_template(LING), str(tmp_path / "out"), 512)
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"x" * 99, whole + b"x" * 99):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=f"^{file}: "):
            pack_chat(str(tmp_path), with_template(LING), str(tmp_path / "out"), 512)


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
