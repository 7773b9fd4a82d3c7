"""The meshes of decoding: which split a model evenly, which is taken, and what the flag refuses."""

import jax
import numpy as np
import pytest

from llada_jax import GenerateConfig, generate, sharding
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.sampling import meshes


@pytest.mark.parametrize(
    ("model", "devices", "rows", "expected"),
    [
        ("llada2_mini", 4, 16, ["tensor 4", "expert 2, tensor 2", "expert 4"]),
        ("llada2_mini", 4, 2, ["tensor 4", "expert 2, tensor 2", "expert 4"]),  # or all have both rows
        ("llada2_mini", 4, 6, ["tensor 4", "expert 2, tensor 2"]),
        ("llada2_mini", 8, 1, ["expert 2, tensor 4", "expert 4, tensor 2", "expert 8"]),  # 512 / 8 is too narrow
        ("llada2_mini", 1, 1, ["one device"]),
        ("smollm2_135m", 4, 8, ["data 4"]),  # nine heads
    ],
)
def test_candidates_split_heads_experts_and_rows_evenly(model, devices, rows, expected):
    assert [meshes.name_of(sizes) for sizes in meshes.candidates(preset(model), devices, rows)] == expected


@pytest.mark.parametrize(
    ("model", "devices", "rows", "expected"),
    [
        ("llada2_mini", 4, 1, "tensor 4"),
        ("llada2_mini", 4, 16, "expert 4"),
        ("llada2_mini", 4, 4, "expert 4"),
        ("llada2_mini", 4, 2, "expert 2, tensor 2"),
        ("llada2_mini", 8, 1, "expert 2, tensor 4"),
        ("llada2_mini", 8, 4, "expert 4, tensor 2"),
        ("llada2_mini", 4, 18, "expert 2, tensor 2"),  # four do not share eighteen rows
        ("smollm2_135m", 4, 16, "data 4"),
        ("smollm2_135m", 4, 1, "one device"),
        ("llada2_mini", 1, 16, "one device"),
    ],
)
def test_default(model, devices, rows, expected):
    assert meshes.name_of(meshes.default(preset(model), devices, rows)) == expected


def test_weights_that_do_not_fit_whole_are_split():
    """Copied rows need all weights of a dense model on every device: 2.4 MB of the tiny one."""
    model = preset("tiny").replace(num_heads=4, num_kv_heads=4)
    size = 2 * parameters.count(model)
    names = [meshes.name_of(meshes.default(model, 4, 8, memory)) for memory in (2 * size, size, size // 2, 1)]
    assert names == ["data 4", "data 2, tensor 2", "tensor 4", "tensor 4"]
    moe = preset("tiny_moe")
    assert meshes.name_of(meshes.default(moe, 4, 8, 3 * parameters.count(moe))) == "expert 4"


def test_from_text():
    devices, model = jax.devices()[:4], preset("tiny_moe")
    assert dict(meshes.from_text("auto", model, 16, devices).shape)["expert"] == 4
    mesh = meshes.from_text("expert=2,tensor=1", model, 16, devices)
    assert mesh.size == 2 and dict(mesh.shape)["expert"] == 2
    for text in ("one", "tensor=1"):
        assert meshes.from_text(text, model, 16, devices) is None
    assert meshes.from_text("auto", model, 16, devices[:1]) is None


@pytest.mark.parametrize("text", ["", "all", "expert", "expert=0", "expert=x", "fsdp=2", "tensor=2,tensor=2"])
def test_other_texts_are_refused(text):
    with pytest.raises(InputError, match="expected auto, one, or sizes"):
        meshes.from_text(text, preset("tiny_moe"), 4, jax.devices())


def test_sizes_that_do_not_fit_are_refused():
    model = preset("tiny_moe")
    with pytest.raises(InputError, match="16 devices, there are 8"):
        meshes.from_text("data=16", model, 16, jax.devices())
    with pytest.raises(InputError, match="tensor=3 does not divide 4"):
        meshes.from_text("tensor=3", model, 16, jax.devices())
    with pytest.raises(
        InputError, match="--mesh=expert=2, expected auto, one, or sizes of data, tensor: data=2,tensor=2"
    ):
        meshes.from_text("expert=2", preset("tiny"), 16, jax.devices())


@pytest.mark.parametrize("sizes", [dict(expert=4), dict(expert=2, tensor=2)])
def test_one_request_over_several_groups_of_experts(sizes):
    """Whole on all of them: the answer of one device."""
    config = preset("tiny_moe").replace(num_layers=2, hidden_size=64)
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, parameters.initialize(config, jax.random.key(0)))
    arguments = config, [np.arange(21)], GenerateConfig(12, block_length=4, threshold=0.02, eos_id=-1)
    expected = generate(params, *arguments)
    mesh = sharding.make_mesh(**{"data": 1} | sizes, devices=jax.devices()[:4])
    laid = sharding.shardings(parameters.abstract(config), parameters.logical_axes(config), mesh)
    with jax.set_mesh(mesh):
        how = Execution(expert_parallel="gather_tokens")
        found = generate(jax.device_put(params, laid), *arguments, execution=how)
    assert np.array_equal(found.tokens[0], expected.tokens[0])
    assert np.array_equal(found.written_at[0], expected.written_at[0])
    assert np.allclose(found.confidence[0], expected.confidence[0], rtol=1e-4)
