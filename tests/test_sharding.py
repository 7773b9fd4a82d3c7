"""The training step over eight fake devices: every mesh computes what one device does."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.chips import parse_topology
from llada_jax.data.order import Batch
from llada_jax.diffusion.editing import Editing
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.pod.topology import slice_devices
from llada_jax.runtime.xla_options import xla_options
from llada_jax.training.step import denoising_loss
from tests.helpers.environment import process_environment
from tests.helpers.processes import free_port

ROWS, LENGTH = 8, 32
SMALL = dict(hidden_size=64, num_layers=2, num_heads=8, num_kv_heads=4, head_dim=8, intermediate_size=64)
MODELS = {
    "tiny": preset("tiny").replace(**SMALL | dict(rotary_dim=8)),
    "tiny_moe": preset("tiny_moe").replace(**SMALL | dict(num_dense_layers=0, rotary_dim=4, moe_intermediate_size=16)),
}
BLOCKWISE = dict(attention="blockwise")
MESHES = [
    ("tiny", dict(fsdp=8), dict(remat="dots")),
    ("tiny", dict(tensor=8), BLOCKWISE),  # beyond the 4 key/value heads
    ("tiny_moe", dict(data=8), dict(remat="attention")),
    ("tiny_moe", dict(fsdp=8), dict(remat="full", reduce_dtype="float32")),
    ("tiny_moe", dict(expert=8), dict(remat="projections")),
    ("tiny_moe", dict(expert=8), dict(expert_parallel="gather_tokens", remat="hidden")),
    ("tiny_moe", dict(tensor=8), BLOCKWISE | dict(remat="offload")),
    ("tiny_moe", dict(fsdp=8), BLOCKWISE | dict(remat="offload_input")),
    ("tiny_moe", dict(data=2, expert=2, tensor=2), BLOCKWISE | dict(expert_parallel="gather_tokens")),
    ("tiny_moe", dict(fsdp=4, expert=2), dict(remat="rows")),
    ("tiny_moe", dict(fsdp=2, expert=4), dict(expert_parallel="gather_tokens")),
]


def batch_of(model) -> Batch:
    """ROWS packed rows of random tokens; the first row is padding only."""
    ids = np.random.default_rng(0).integers(0, model.mask_token_id, (ROWS, LENGTH), dtype=np.int32)
    segments = np.repeat([[1, 2, 0]], [13, 16, 3], axis=1).repeat(ROWS, axis=0).astype(np.int32)
    segments[0] = 0
    index = np.arange(ROWS, dtype=np.uint32)
    return Batch(ids, segments, np.ones((ROWS, LENGTH), bool), index, np.zeros_like(index))


CAP = Objective(confidence_weight=0.5)  # entropies too
EDIT = Objective(  # drafts accept all: rounding decides which of equally masked tokens is the most confident one
    NoiseSpec("chain"), "uniform", normalizer="masked", complementary=True, group_blocks=2,
    editing=Editing(weight=0.5, replace_high=0.5, turns=2, draft_share=0.6, threshold_low=0.0, threshold_high=0.0),
)  # fmt: skip


def loss_and_gradients(name: str, mesh=None, reduce=None, objective=CAP, **execution):
    """((loss, load of the experts), gradients), as host arrays; on `mesh`, weights and batch lie as the trainer's.

    reduce: of the gradients, inside the program.
    """
    model = MODELS[name]
    loss = denoising_loss(model, objective, Execution(**execution), seed=0)

    def value(params, batch):
        example = loss.prepare(batch, jnp.int32(8), "both")
        if loss.draft is not None:
            example = loss.draft(jax.lax.stop_gradient(params), example, "both")
        value, sums = loss.value(params, None, example, loss.total(example), jnp.float32(0), "both")
        return value, sums.expert_load

    def function(params, batch):
        result, gradients = jax.value_and_grad(value, has_aux=True)(params, batch)
        return result, gradients if reduce is None else jax.tree.map(reduce, gradients)

    params, batch = parameters.initialize(model, jax.random.key(0)), batch_of(model)
    if mesh is None:
        return jax.tree.map(np.asarray, jax.jit(function)(params, batch))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.shardings(params, parameters.logical_axes(model), mesh))
        rows = jax.tree.map(lambda x: jax.NamedSharding(mesh, sharding.spec(("batch",), x.shape[:1], mesh)), batch)
        return jax.tree.map(np.asarray, jax.jit(function)(params, jax.device_put(batch, rows)))


@pytest.fixture(scope="module")
def one_device():
    return {name: loss_and_gradients(name) for name in MODELS}


@pytest.mark.parametrize("name,sizes,execution", MESHES)
def test_a_mesh_computes_what_one_device_does(one_device, name, sizes, execution):
    mesh = sharding.make_mesh(**{"data": 1} | sizes)
    (loss, load), gradients = loss_and_gradients(name, mesh, **execution)
    check_same(loss, load, gradients, *one_device[name])


@pytest.mark.parametrize(
    "name,sizes,execution",
    [
        ("tiny", dict(fsdp=2, tensor=4), BLOCKWISE),
        ("tiny_moe", dict(data=2, expert=2, tensor=2), BLOCKWISE | dict(expert_parallel="gather_tokens")),
    ],
)
def test_a_mesh_edits_and_drafts_as_one_device_does(name, sizes, execution):
    mesh = sharding.make_mesh(**{"data": 1} | sizes)
    (loss, load), gradients = loss_and_gradients(name, mesh, objective=EDIT, **execution)
    check_same(loss, load, gradients, *loss_and_gradients(name, objective=EDIT))


def check_same(loss, load, gradients, expected_loss_and_load, expected):
    expected_loss, expected_load = expected_loss_and_load
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    np.testing.assert_array_equal(load, expected_load)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), gradients, expected)


@pytest.mark.parametrize("sizes", [dict(fsdp=16, context=4), dict(fsdp=8, context=8), dict(fsdp=32, context=2)])
def test_experts_are_gathered_over_a_torus_whose_sides_the_axes_share(sizes):
    """libtpu writes zeros and an all-reduce, twice the bytes, where it does not know the order of the devices."""
    devices = list(slice_devices(parse_topology("v5p:4x4x4")).reshape(-1))
    mesh = sharding.make_mesh(**{"data": 1} | sizes, devices=devices)
    place = sharding.spec(("experts", None, None), (64, 256, 128), mesh)

    def gathered(w):
        local = lambda w: sharding.gather_axes(w, place[0], 0, None)  # noqa: E731
        return jax.shard_map(local, in_specs=place, out_specs=jax.P(), check_vma=False)(w)

    with jax.set_mesh(mesh):
        w = jax.ShapeDtypeStruct((64, 256, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, place))
        text = jax.jit(gathered, compiler_options=xla_options("tpu")).lower(w).compile().as_text()
    assert "all-gather" in text
    assert "all-reduce" not in text


def summary(gradient: jax.Array) -> jax.Array:
    """Three numbers of an array, float32: its norm, and its sum with smooth and with alternating weights."""
    flat = gradient.reshape(-1)
    index = jnp.arange(flat.size, dtype=jnp.float32)
    return jnp.stack([jnp.linalg.norm(flat), (flat * jnp.cos(index / 97)).sum(), (flat * jnp.cos(2.9 * index)).sum()])


def test_gradients_that_wait_for_each_other_are_the_same_and_frozen_ones_are_not_waited_for():
    x, w, frozen = jnp.arange(3.0), jnp.ones((3, 3)), jnp.full((3, 3), 2.0)

    def loss(together, x, w):
        (x, ws) = together((x, {"w": w, "frozen": frozen}))
        return jnp.sin(x @ ws["w"] @ ws["frozen"]).sum()

    gradients = [jax.grad(loss, (1, 2))(f, x, w) for f in (sharding.gradients_together, lambda tree: tree)]
    jax.tree.map(np.testing.assert_array_equal, *gradients)
    text = str(jax.make_jaxpr(lambda x, w: jax.grad(loss, (1, 2))(sharding.gradients_together, x, w))(x, w))
    (barrier,) = re.findall(r"= optimization_barrier (.*)", text)
    assert len(barrier.split()) == 2, "of x and w alone"


PROCESS = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from llada_jax import sharding
from tests.test_sharding import loss_and_gradients, summary
mesh = sharding.make_mesh(data=1, fsdp=4, expert=2)
(loss, load), gradients = loss_and_gradients("tiny_moe", mesh, summary, expert_parallel="gather_tokens")
print(json.dumps([float(loss), [leaf.tolist() for leaf in jax.tree.leaves(gradients)]]))
"""


def test_two_processes_compute_what_one_device_does():
    address = f"localhost:{free_port()}"
    env = process_environment(devices=4)
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, address, str(i)], env=env, text=True, stdout=subprocess.PIPE)
        for i in range(2)
    ]
    (expected, _), gradients = loss_and_gradients("tiny_moe", reduce=summary)
    try:
        outputs = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0
        loss, found = json.loads(output.splitlines()[-1])
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        np.testing.assert_allclose(found, jax.tree.leaves(gradients), rtol=2e-3, atol=1e-5)
