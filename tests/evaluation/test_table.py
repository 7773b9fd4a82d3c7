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


def table_of(folder, results):
    for name, result in results.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(result))
    lines = markdown([str(folder / name) for name in results]).splitlines()[2:]
    return [line.split("|")[1].strip() for line in lines]


def test_rows_are_told_apart_by_path_and_by_what_was_asked(tmp_path):
    """Files of one name, two checkpoints, two thresholds, two tasks; what all agree in is not said."""
    answers = {"task": "answers", "checkpoint": "runs/a/wsd", "score": 0.5, "tokens_per_forward": 2.0,
               "positions_evaluated": 3, "seconds": 1.0, "decoding": {"threshold": 0.9, "steps": 8}}  # fmt: skip
    found = table_of(
        tmp_path,
        {"x/out.json": answers | {"checkpoint": "runs/a/wsd"}, "y/out.json": answers | {"checkpoint": "runs/b/wsd"}},
    )
    assert found == ["x/out (checkpoint=a/wsd)", "y/out (checkpoint=b/wsd)"]
    low = answers | {"decoding": {"threshold": 0.5, "steps": 8}}
    assert table_of(tmp_path, {"a.json": answers, "b.json": low}) == ["a (threshold=0.9)", "b (threshold=0.5)"]
    needle = answers | {"task": "needle", "seed": 3}
    assert table_of(tmp_path, {"a.json": answers, "b.json": needle}) == ["a (task=answers)", "b (task=needle)"]
    assert table_of(tmp_path, {"a.json": answers, "b.json": answers}) == ["a", "b"]
    assert len(set(table_of(tmp_path, {"p/q/r.json": answers, "s/q/r.json": answers, "q/r.json": answers}))) == 3


def test_one_row_has_no_error(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"ar": {"nats": 1.0, "stderr": None}}))
    assert "| 1.0000 ± n/a |" in markdown([str(tmp_path / "a.json")])
