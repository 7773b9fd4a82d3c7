"""A pass of decoding, compiled for a slice that is not there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llada_jax.attention import cached
from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.pod import report
from llada_jax.pod.lower import Slices
from llada_jax.pod.rehearse_decode import rehearse_decode
from llada_jax.training.config import default_config

ROOT = Path(__file__).parents[2]
SLICES = Slices(parse_topology("v5p:2x2x1"))
GIB = 2**30
FILLED = 1056  # whole chunks, and a part of one


def config():
    config = default_config("smollm2_135m")
    config.alignment = "same"
    return config


@pytest.fixture(scope="module")
def results():
    return {filled: rehearse_decode(config(), SLICES, 8, 2048, filled) for filled in (0, FILLED)}


def test_a_pass_reads_its_weights_and_its_caches(results):
    empty, half = results[0], results[FILLED]
    assert half.memory.parameters == 2 * 134_515_008  # bfloat16, whole on every chip
    positions = 8 / 4 * 2048
    assert half.memory.optimizer == pytest.approx(2 * 30 * positions * 64 * 3 * 2, rel=0.15)  # and padding
    assert half.fits and half.memory.total < GIB
    assert half.roofline.bytes > empty.roofline.bytes
    # The weights take 0.1 ms from a chip's memory.
    assert 0.05e-3 < sum(empty.seconds.values()) < sum(half.seconds.values()) < 50e-3


def test_the_loop_over_the_cache_runs_as_often_as_it_is_filled(results):
    def runs(result, scope):
        return max((line.runs for line in result.lines if f"/{scope}/" in line.scope), default=0)

    chunks = FILLED // cached.chunk_of(2048)
    assert chunks > 1
    assert runs(results[FILLED], cached.WHOLE_CHUNKS) == 30 * chunks and runs(results[0], cached.WHOLE_CHUNKS) <= 30
    assert 0 < runs(results[FILLED], cached.OTHER_CHUNKS) <= 30


def test_words_and_numbers(results):
    text = report.describe_decoding(results[FILLED])
    values = results[FILLED].to_json()
    assert f"{sum(values['seconds'].values()) * 1e3:.2f} ms" in text and "compute-bound" in text
    assert values["fits"] and values["passes_per_second"] == pytest.approx(1 / sum(values["seconds"].values()))
    json.dumps(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 2048, 1000), "--filled=1000, expected a multiple of 32, at most --canvas=2048"),
        ((8, 2048, 4096), "--filled=4096, expected a multiple of 32, at most --canvas=2048"),
        ((8, 100, 64), "--canvas=100, expected a multiple of 32"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(InputError, match=message):
        rehearse_decode(config(), SLICES, *arguments)


def test_rows_that_cannot_be_shared():
    with pytest.raises(InputError, match="--rows=6 cannot be shared by 4 devices"):
        rehearse_decode(config(), SLICES, 6, 2048, 0)


def test_from_the_command_line(tmp_path):
    line = [
        sys.executable, str(ROOT / "tools" / "rehearse.py"), "--decode", "--topology=v5p:2x2x1", "--rows=4",
        f"--config={ROOT / 'configs' / 'wsd.py'}:smollm2_135m", "--config.alignment=same", "--canvas=256",
        "--filled=128", f"--json={tmp_path / 'out.json'}",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "a pass over 4 rows" in done.stdout and json.loads((tmp_path / "out.json").read_text())["filled"] == 128
