"""The step and its parts are timed in one process, and the parts are those of the step."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from llada_jax.bench import train
from llada_jax.model import parameters
from llada_jax.model.config import PRESETS, preset
from llada_jax.model.forward import Execution

ROOT = Path(__file__).parents[2]
PARTS = ("step", "matmul", "noise", "layers", "attention", "head", "optimizer")


def test_the_default_model_has_the_size_that_is_named():
    assert parameters.count(train.SMALL) == pytest.approx(4.33e6, rel=1e-3)


@pytest.mark.parametrize("model", ["tiny", "tiny_moe"])
def test_a_step_and_its_parts(monkeypatch, capsys, model):
    monkeypatch.setattr(train, "REPEATS", 1)
    monkeypatch.setattr(train, "PEAK_SIDE", 64)
    (row,) = train.table(model, 2, 64, Execution())
    parts = dict(row["parts"])
    inside = parts.pop("attention") + (parts.pop("experts") if preset(model).is_moe else 0)
    assert set(parts) == {"noise", "layers", "head", "optimizer", "rest"}
    assert sum(parts.values()) == pytest.approx(row["seconds"]) and 0 < inside
    assert row["tokens_per_second"] == pytest.approx(128 / row["seconds"])
    assert f"{row['tokens_per_second']:,.0f} clean tokens per second" in capsys.readouterr().out


def test_a_preset_without_a_mask_token_is_timed(monkeypatch):
    monkeypatch.setitem(PRESETS, "parent", preset("tiny").replace(mask_token_id=None))
    monkeypatch.setattr(train, "programs", lambda model, *_: timed.append(model.mask_token_id) or {})
    monkeypatch.setattr(train, "least_in_turn", lambda *_: dict.fromkeys(PARTS, 1.0))
    timed = []
    assert next(train.table("parent", 2, 64, Execution()))["seconds"] == 1 and timed == [511]


def test_a_gpu_is_asked_for_as_cuda(monkeypatch):
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: asked.append(setting))
    bench = runpy.run_path(str(ROOT / "tools" / "bench.py"))
    for platform in ("gpu", "cpu", "tpu"):
        bench["_on"](platform)
    assert asked == [("jax_platforms", name) for name in ("cuda", "cpu", "tpu")]


def test_bad_lengths_are_one_line(tmp_path):
    line = [sys.executable, str(ROOT / "tools" / "bench.py"), "train", "--lengths=100"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == "error: --lengths=100, expected multiples of 32\n"
    assert not json.dumps(done.stdout).strip('"')
