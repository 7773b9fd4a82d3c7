"""What tools/inspect_checkpoint.py prints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.checkpoint import describe, merge, saver, weights
from llada_jax.errors import InputError
from llada_jax.interop.convert import import_checkpoint
from llada_jax.model import parameters
from llada_jax.model.config import preset
from tests.helpers.paths import GOLDENS

CONFIG = preset("tiny").replace(num_layers=2, hidden_size=16, intermediate_size=16)


def test_an_imported_checkpoint(tmp_path):
    import_checkpoint(str(GOLDENS / "llada2_tiny"), str(tmp_path / "a"))
    lines = list(describe.describe_checkpoint(tmp_path / "a"))
    assert lines[0].startswith(f"checkpoint {tmp_path / 'a'}, sha256 ")
    assert "model: llada2_moe, alignment same, mask token id None" in lines
    assert f"imported from {GOLDENS / 'llada2_tiny'}, dtype float32" in lines
    assert lines[-1] == "total: 46 tensors, 381,600 elements, 1,526,400 bytes (0.00 GiB)"
    row = next(line.split() for line in lines if "layers.001.gate " in line)
    assert row[:6] == ["params/layers.001.gate", "[16,", "64,", "32]", "float32", "131,072"]
    merge.merge_checkpoints([tmp_path / "a"], tmp_path / "b")
    lines = list(describe.describe_checkpoint(tmp_path / "b"))
    assert f"mean of {tmp_path / 'a'}" in lines and lines[4].startswith("imported from")


def test_a_step_of_a_run(tmp_path):
    mesh = sharding.make_mesh(data=1, fsdp=8)
    params = parameters.initialize(CONFIG, jax.random.key(0))
    shardings = sharding.shardings(parameters.abstract(CONFIG), parameters.logical_axes(CONFIG), mesh)
    params = jax.tree.map(jax.device_put, params, shardings)
    lineage = {"config": {"stage": "wsd", "seed": 7}, "init_from": "x", "loaded": {"weights": "abc"},
               "source": {"source": "hf://a/b", "dtype": ["float32"]}}  # fmt: skip
    writer = saver.Saver(tmp_path / "checkpoints")
    for step in (3, 5):
        writer.save(step, params, {"count": jnp.zeros(4)}, {}, CONFIG, {}, lineage, score=2.5)
    writer.wait()
    lines = list(describe.describe_checkpoint(weights.directory_of(tmp_path, 3)))
    assert (
        "step 3, score 2.5" in lines
        and list(describe.describe_checkpoint(weights.directory_of(tmp_path)))[2][:6] == "step 5"
    )
    at = lines.index("trained: stage wsd from x (weights abc)")
    assert '"seed": 7' in lines[at + 1] and lines[at + 2] == "imported from hf://a/b, dtype float32"
    row = next(line for line in lines if line.startswith("params/embedding"))
    assert '"fsdp"' in row and "fsdp=8" in row
    assert any(line.startswith("optimizer/count") for line in lines)
    with pytest.raises(InputError, match="--step=4: .* has 5, 3"):
        weights.directory_of(tmp_path, 4)


def test_damage_is_named(tmp_path):
    import_checkpoint(str(GOLDENS / "llada2_tiny"), str(tmp_path / "a"))
    data = np.fromfile(tmp_path / "a" / "config.json", np.uint8)
    data[50] ^= 1
    data.tofile(tmp_path / "a" / "config.json")
    with pytest.raises(InputError, match="config.json is damaged"):
        list(describe.describe_checkpoint(tmp_path / "a"))
