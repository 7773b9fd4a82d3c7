"""The meshes tried for decoding, as a config and as a table."""

import subprocess
import sys
from pathlib import Path

from llada_jax.model.config import preset
from llada_jax.pod.decoding import meshes
from llada_jax.pod.step_cost import PARTS
from llada_jax.sampling.meshes import candidates

ROOT = Path(__file__).parents[3]


def test_tokens_are_gathered_where_experts_are_shared_out():
    whole, both, _ = candidates(preset("llada2_mini"), 4, 16)
    assert "execution.expert_parallel" not in meshes.fields_of(whole)
    assert "--config.execution.expert_parallel=gather_tokens" in meshes.arguments(both)
    assert "--config.mesh.expert=2" in meshes.arguments(both) and "--config.mesh.data=1" in meshes.arguments(both)


def test_the_fastest_that_fits_is_named():
    def result(seconds, fits=True):
        parts = dict.fromkeys(PARTS, 0.0) | {"glue": seconds}
        return {"fits": fits, "seconds": parts, "roofline_seconds": 1e-3, "hbm_bytes": 2**30}

    tried = candidates(preset("llada2_mini"), 4, 16)
    text = meshes.table(zip(tried, (result(4e-3), result(2e-3), result(1e-3, fits=False)), strict=True), 16)
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["expert 2, tensor 2", "tensor 4"]
    assert lines[-1].startswith("fastest for 16 rows: --config.mesh.data=1") and "--config.mesh.tensor=2" in lines[-1]


def test_from_the_command_line():
    line = [sys.executable, str(ROOT / "tools" / "rehearse.py"), "--topology=v5p:2x2x1", "--rows=4", "--mesh=auto"]
    line += [f"--config={ROOT / 'configs' / 'wsd.py'}:tiny_moe", "--config.alignment=same"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2 and "--rows: only with --decode" in done.stderr
    done = subprocess.run([*line, "--decode", "--canvas=64", "--filled=32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1: data 4" in done.stdout or "fastest for 4 rows: --config.mesh.data=" in done.stdout
