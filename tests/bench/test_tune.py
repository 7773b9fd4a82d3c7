"""How tile sizes are chosen."""

import json

import pytest

from llada_jax.attention.tiles import TABLE, Tiles
from llada_jax.bench import tune
from llada_jax.errors import InputError
from tests.test_tools import run


def test_the_cheapest_sum_of_both_passes_wins_and_nothing_is_priced_twice():
    asked, lines = [], []

    def price(name, tiles):
        asked.append((name, tiles))
        if tiles.forward == 8:
            raise InputError("does not fit")
        return {"forward": {2: 5, 4: 3}, "backward": {2: 6, 4: 7}}[name][tiles.forward] * 128 / tiles.chunk

    entries = tune.candidates("TPU v5", 128, "row", [512], [64, 128], [2, 4, 8])
    best, *rest = tune.ranking(entries, price, "cycles", lines.append)
    assert (best.chunk, best.forward, best.backward) == (128, 4, 2)
    assert best.cost == {"unit": "cycles", "forward": 3, "backward": 6} and tune.total(best) == 9
    assert len(rest) == 2 * 2 * 2 - 1 and all(8 not in (entry.forward, entry.backward) for entry in rest)
    assert len(asked) == len(set(asked)) == len(lines) == 2 * 2 * 3
    assert sum("does not fit" in line for line in lines) == 4


def test_decoding_has_one_pass():
    entries = list(tune.candidates("TPU v5", 128, "decode", [512], [128], [2, 4]))
    assert [entry.forward for entry in entries] == [2, 4]
    ranked = tune.ranking(entries, lambda name, tiles: {"decode": -tiles.forward}[name], "cycles", lambda line: None)
    assert [entry.forward for entry in ranked] == [4, 2]


@pytest.mark.parametrize("name", ["decode", "backward"])
def test_a_device_is_timed(name, monkeypatch):
    """The same code times a TPU; here the kernel is interpreted, on less work."""
    monkeypatch.setattr(tune, "REPEATS", 1)
    monkeypatch.setattr(tune, "HEADS", 1)
    monkeypatch.setattr(tune, "KV_HEADS", 1)
    monkeypatch.setattr(tune.packings, "MEANS", (512,))
    price = tune.timed(8, interpret=True, lengths={"row": 32, "decode": 32}, batch=1)
    assert price(name, Tiles(queries=32, forward=1, backward=1, chunk=32)) > 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([], "--topology"),
        (["--topology=v5p:2x2x1", "--device=tpu"], "one of them"),
        (["--topology=v9:1"], "unknown chip"),
        (["--topology=v5p:2x2x1", "--steps=two"], "--steps=two"),
        (["--topology=v5p:2x2x1", "--shapes=square"], "square"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    done = run("tune_tiles", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr


def test_the_tool_checks_and_writes_a_table(tmp_path):
    """One candidate, compiled for v5p."""
    table = tmp_path / "tiles.json"
    table.write_text(TABLE.read_text())
    arguments = "--topology=v5p:2x2x1", "--head_dims=128", "--shapes=decode", "--steps=4", f"--table={table}"
    done = run("tune_tiles", *arguments, timeout=590)
    assert done.returncode == 0, done.stderr
    (entry,) = (e for e in json.loads(table.read_text()) if e["cost"] and e["shape"] == "decode")
    assert (entry["device_kind"], entry["head_dim"], entry["forward"]) == ("TPU v5", 128, 4)
    assert entry["cost"]["unit"] == "cycles" and entry["cost"]["decode"] > 0
