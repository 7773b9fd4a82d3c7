"""The Pallas kernel compiled ahead of time for every TPU that it knows; needs libtpu, not a TPU."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.attention import residuals
from llada_jax.attention.decoding import cached_kernel
from llada_jax.attention.kernel import kernel_attention, kernel_plan
from llada_jax.attention.kernel_backward import key_parts
from llada_jax.attention.plan import make_plan
from llada_jax.attention.tiles import ENTRIES, tiles_for
from llada_jax.attention.visibility import block_diffusion, block_window, make_layout, two_block_window
from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.pod.topology import one_device

TOPOLOGIES = {
    "TPU v4": "v4:2x2x1", "TPU v5 lite": "v5e:2x2", "TPU v5": "v5p:2x2x1", "TPU v6 lite": "v6e:2x2",
    "TPU7x": "tpu7x:2x2x1",
}  # fmt: skip


def tpu(kind):
    mesh = one_device(parse_topology(TOPOLOGIES[kind]))
    assert mesh.devices.item().device_kind == kind
    return mesh


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled(mesh, function, *arguments):
    """Call under jax.set_mesh(mesh)."""
    replicated = NamedSharding(mesh, PartitionSpec())
    on_device = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), arguments)
    return jax.jit(function).lower(*on_device).compile()


def calls(program, name):
    """How often a compiled program calls our kernel of a pass."""
    return len(re.findall(rf"%\w*block_diffusion_attention_{name}[\w.]* = ", program.as_text()))


def with_plan(head_dim):
    """A forward and a backward pass. The heads of a position lie side by side, as projections make and take them."""

    def attend(query, key, value, plan):
        heads = (x.reshape(*x.shape[:2], -1, head_dim) for x in (query, key, value))
        return kernel_attention(*heads, plan).reshape(query.shape)

    def step(plan, query, key, value, cotangent):
        output, vjp = jax.vjp(lambda *x: attend(*x, plan), query, key, value)
        return output, vjp(cotangent)

    return step


def row_plan(segments, group, head_dim):
    return kernel_plan(block_diffusion(make_layout(segments, 32)), 2 * segments.shape[1], group, head_dim)


def training(group, head_dim):
    return lambda segments, *arrays: with_plan(head_dim)(row_plan(segments, group, head_dim), *arrays)


@pytest.mark.parametrize("kind,head_dim", sorted({key[:2] for key in ENTRIES}))
def test_training_rows(kind, head_dim):
    query, key = shape(1, 1024, 8 * head_dim), shape(1, 1024, 2 * head_dim)
    mesh = tpu(kind)
    with jax.set_mesh(mesh):
        program = compiled(mesh, training(4, head_dim), shape(1, 512, dtype=jnp.int32), query, key, key, query)
    assert calls(program, "forward") == calls(program, "backward") == 1
    scores = 8 * 1024 * 1024 * 4
    assert program.memory_analysis().temp_size_in_bytes < scores / 2


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5", "TPU v6 lite"])
def test_decoding_a_block_against_a_long_cache(kind):
    rows, block, cache = 8, 32, 8192
    mesh = tpu(kind)

    def decode(cached, query, key, value):
        plan = kernel_plan(block_window(cached, block), block + cache, 4, 128)
        return kernel_attention(query, key, value, plan)

    key = shape(rows, block + cache, 2, 128)
    with jax.set_mesh(mesh):
        program = compiled(mesh, decode, shape(rows, dtype=jnp.int32), shape(rows, block, 8, 128), key, key)
    assert calls(program, "forward") == 1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_the_cache_is_read_in_place(kind, head_dim):
    """Three layers' caches are operands of the kernel: none is copied, sliced or transposed."""
    rows, queries, length = 8, 64, 2048
    mesh = tpu(kind)

    def decode(starts, query, key, value, *cache):
        plan = cached_kernel.make_plan(two_block_window(starts, 32, starts > 64), length, 4)
        return cached_kernel.cached_kernel_attention(query, key, value, *cache, 1, plan)

    key, cache = shape(rows, queries, 2, head_dim), shape(3, rows, 2, length, 128)
    arguments = shape(rows, dtype=jnp.int32), shape(rows, queries, 8, head_dim), key, key, cache, cache
    with jax.set_mesh(mesh):
        program = compiled(mesh, decode, *arguments)
    assert len(re.findall(r"%\w*cached_attention[\w.]* = ", program.as_text())) == 1
    assert program.memory_analysis().temp_size_in_bytes < rows * length * 128 * 2 / 2


def test_a_remat_policy_keeps_what_attention_computed():
    """A layer that keeps attention's residuals computes its operands again, but not attention itself."""
    mesh = tpu("TPU v5")
    policies = jax.checkpoint_policies.nothing_saveable, jax.checkpoint_policies.save_only_these_names(*residuals.NAMES)

    def loss(x, weights, segments, policy):
        plan = row_plan(segments, 2, 128)

        def layer(x, weights):
            query, key, value = ((x @ weights[name]).reshape(1, 1024, -1, 128) for name in "qkv")
            attended = kernel_attention(query, key, value, plan)
            return x + jnp.sin(attended).reshape(x.shape) @ weights["q"], None

        return jax.lax.scan(jax.checkpoint(layer, policy=policy), x, weights)[0].astype(jnp.float32).sum()

    weights = {name: shape(2, 256, heads * 128) for name, heads in zip("qkv", (2, 1, 1), strict=True)}
    arguments = shape(1, 1024, 256), weights, shape(1, 512, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        recomputed, kept = (
            compiled(mesh, jax.grad(lambda *x: loss(*x, policy), argnums=1), *arguments)  # noqa: B023
            for policy in policies
        )
    assert (calls(recomputed, "forward"), calls(recomputed, "backward")) == (2, 1)
    assert (calls(kept, "forward"), calls(kept, "backward")) == (1, 1)


@pytest.mark.parametrize(
    "kind,keys", [("TPU v4", 8), ("TPU v5 lite", 107), ("TPU v5", 43), ("TPU v6 lite", 107), ("TPU7x", 43)]
)
def test_gradients_that_outgrow_fast_memory_go_in_parts(kind, keys):
    """keys: thousands (1024) of keys that go in one part at either head size."""
    with jax.set_mesh(tpu(kind)):
        for head_dim in (64, 128):
            tiles = tiles_for(kind, head_dim, 4, 2**17)
            half = keys * 1024 // 2
            assert key_parts(half, 2 * half, tiles, 4, head_dim) == 1
            assert key_parts(half + 4096, 2 * half + 8192, tiles, 4, head_dim) == 2
            assert key_parts(0, 2 * half + 8192, tiles, 4, head_dim) == 2


def test_long_rows_compile_in_parts_and_not_in_one():
    """64 thousand tokens, two streams, on v5p; one key/value head, as that does not change the kernel."""
    mesh, length = tpu("TPU v5"), 2**16
    x, segments = shape(1, 2 * length, 128), shape(1, length, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        plan = jax.eval_shape(lambda segments: row_plan(segments, 1, 128), segments)
        assert calls(compiled(mesh, with_plan(128), plan, x, x, x, x), "backward") == len(plan.parts) == 3

        def in_one(segments, *arrays):
            plan = make_plan(block_diffusion(make_layout(segments, 32)), 2 * length, tiles_for("TPU v5", 128, 1, 512))
            return with_plan(128)(plan, *arrays)

        with pytest.raises(InputError, match="fast memory, the chip has 64; .* parts"):
            jax.eval_shape(in_one, segments, x, x, x, x)
