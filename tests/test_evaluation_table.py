"""The table of several results."""

import json

import pytest

from llada_jax.errors import InputError
from llada_jax.evaluation.table import markdown


def test_results_stand_side_by_side(tmp_path):
    nats = {"nats": 1.23456, "stderr": 0.01}
    answers = {"score": 0.5, "score_stderr": 0.05, "tokens_per_forward": 2.0, "tokens_per_forward_stderr": 0.1}
    for name, result in (
        ("a", {"checkpoint": "x", "ar": nats, "block 4": nats | {"nats": 2.0}}),
        ("b", {"ar": nats}),
        ("c", answers | {"positions_evaluated": 640, "seconds": 3.21}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    lines = markdown([str(tmp_path / f"{name}.json") for name in "abc"]).splitlines()
    assert lines == [
        "| result | ar | block 4 | score | tokens per forward | positions evaluated | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a | 1.2346 ± 0.0100 | 2.0000 ± 0.0100 |  |  |  |  |",
        "| b | 1.2346 ± 0.0100 |  |  |  |  |  |",
        "| c |  |  | 0.5000 ± 0.0500 | 2.00 ± 0.10 | 640 | 3.2 |",
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"score": 1}', "{}"])
def test_what_is_no_result_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=r"a\.json: not a result"):
        markdown([str(tmp_path / "a.json")])
    with pytest.raises(InputError, match=r"b\.json: No such file"):
        markdown([str(tmp_path / "b.json")])
