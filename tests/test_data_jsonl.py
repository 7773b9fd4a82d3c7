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
