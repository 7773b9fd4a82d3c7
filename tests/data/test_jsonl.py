"""JSON lines as commands read and write them."""

import pytest

from llada_jax.data import jsonl
from llada_jax.errors import InputError


def test_values_come_back_with_their_places(tmp_path):
    path = tmp_path / "rows.jsonl"
    values = [{"text": "a\u2028b é"}, [1, None], "x"]  # U+2028 ends a line for Python's splitlines, not for JSON
    jsonl.write_values(path, values)
    path.write_bytes(b"\n" + path.read_bytes())
    assert list(jsonl.read_values(path)) == [(f"{path}:{n}", value) for n, value in enumerate(values, 2)]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("line, message", [(b'{"a": ', "rows.jsonl:2: malformed JSON"), (b"\xff", "rows.jsonl:2: not")])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"1\n" + line)
    with pytest.raises(InputError, match=message):
        list(jsonl.read_values(path))
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        list(jsonl.read_values(tmp_path / "none.jsonl"))


def test_new_values_leave_the_keys_of_rows_alone():
    values = {"answer": "new", "steps": [1], "tokens": 2}
    assert jsonl.beside({"prompt"}, values) == values
    found = jsonl.beside({"answer", "generated_answer", "steps"}, values)
    assert found == {"generated_generated_answer": "new", "generated_steps": [1], "tokens": 2}


def test_the_folder_of_a_file_is_there_before_its_rows(tmp_path):
    jsonl.prepare(None)
    jsonl.prepare(tmp_path / "a" / "b" / "c.jsonl")
    assert (tmp_path / "a" / "b").is_dir() and not (tmp_path / "a" / "b" / "c.jsonl").exists()
    (tmp_path / "file").touch()
    for path, message in ((tmp_path / "file" / "x", "file/x: "), (tmp_path / "a", "a: a folder")):
        with pytest.raises(InputError, match=message):
            jsonl.prepare(path)
