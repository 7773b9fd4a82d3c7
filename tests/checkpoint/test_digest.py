import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax.checkpoint import digest

DTYPES = ["float32", "bfloat16", "float16", "int8", "int32", "uint32", "bool", "float8_e4m3fn", "uint8"]


def random_array(seed: int, shape, dtype) -> np.ndarray:
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def test_definition_does_not_change():
    """Checkpoints that exist depend on these."""
    assert digest.digest(np.arange(6, dtype=np.float32).reshape(2, 3)) == GOLDEN["float32"]
    assert digest.digest(np.arange(100_000).astype(np.uint16).view(ml_dtypes.bfloat16)) == GOLDEN["bfloat16"]
    assert digest.digest(np.arange(5, dtype=np.int64)) == GOLDEN["int64"]


GOLDEN = {"float32": "990a3e2493321b37", "bfloat16": "e06701d4df5d9156", "int64": "03c7adfdcc17c0d2"}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(DTYPES), st.sampled_from([(), (1,), (7, 5), (3, 4, 5), (0, 3)]))
def test_numpy_equals_jax(seed, dtype, shape):
    x = random_array(seed, shape, dtype)
    assert digest.to_hex(digest.lanes(jnp.asarray(x))) == digest.digest(x)


def test_numpy_equals_jax_beyond_one_chunk():
    x = random_array(0, (3, 50_000), "bfloat16")
    assert digest.to_hex(jax.jit(digest.lanes)(x)) == digest.digest(x) == digest.to_hex(digest.lanes(x, np))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([d for d in DTYPES if d != "bool"] + ["int64", "float64"]), st.data())
def test_a_flipped_bit_changes_both_lanes(seed, dtype, data):
    x = random_array(seed, (5, 7), dtype)
    flipped = x.copy()
    flat = flipped.reshape(-1).view(np.uint8)
    flat[data.draw(st.integers(0, flat.size - 1))] ^= np.uint8(1 << data.draw(st.integers(0, 7)))
    before, after = digest.lanes(x, np), digest.lanes(flipped, np)
    assert before[0] != after[0] and before[1] != after[1]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 69_999), st.integers(0, 69_999))
def test_swapping_unequal_elements_changes_it(seed, i, j):
    x = np.random.default_rng(seed % 7).integers(0, 2**32, 70_000, dtype=np.uint32)
    y = x.copy()
    y[[i, j]] = y[[j, i]]
    assert (digest.digest(x) == digest.digest(y)) == bool(x[i] == x[j])


def test_sign_flips_in_pairs_change_it():
    """The top bit survives multiplication by an odd number alone, so that plain multipliers would cancel."""
    x = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    seen = {digest.digest(x)}
    for i in range(1, 2000):
        y = x.copy()
        y[[0, i]] *= -1
        seen.add(digest.digest(y))
    assert len(seen) == 2000


@pytest.mark.parametrize("spec", [("a", None), (None, ("b", "a")), ("b", "a"), (None, None), (("a", "b"), None)])
def test_shards_add_up_to_the_whole(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    x = random_array(1, (16, 24), "bfloat16")
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digest.to_hex(digest.shard_lanes(sharded)) == digest.digest(x)
    assert digest.device_digests([sharded], on_host=False) == [[digest.digest(x)]]
    assert digest.device_digests([sharded]) == [[digest.digest(x)]]


def test_stacked_digests_are_those_of_the_rows():
    mesh = jax.make_mesh((8,), ("a",), (jax.sharding.AxisType.Auto,))
    x = random_array(2, (3, 16, 5), "float32")
    rows = [digest.digest(row) for row in x]
    for spec in [(None, "a"), ()]:
        sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        assert digest.device_digests([sharded], [True], on_host=False) == [rows]
    assert digest.device_digests([jnp.asarray(x)], [True], on_host=False) == [rows]
    assert digest.device_digests([jnp.asarray(x)], [True]) == [rows]


@pytest.mark.parametrize("start,size", [((0, 0), (3, 4)), ((2, 5), (4, 2)), ((5, 0), (1, 7))])
def test_pieces_know_their_place(start, size):
    x = random_array(3, (6, 7), "float32")
    alone = np.zeros_like(x)
    rows, columns = (slice(s, s + n) for s, n in zip(start, size, strict=True))
    alone[rows, columns] = x[rows, columns]
    outside = digest.lanes(np.zeros_like(x), np) - digest.lanes(np.zeros(size, np.float32), np, start, x.shape)
    assert np.array_equal(digest.lanes(x[rows, columns], np, start, x.shape) + outside, digest.lanes(alone, np))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "shape,axis,cuts",
    [((70, 3, 10_000), 2, (0, 4100, 9000)), ((40, 100, 5000), 0, (0, 3, 36)), ((9, 130, 50), 1, (0, 7))],
)
def test_slabs_add_up_to_the_whole(monkeypatch, compiled, shape, axis, cuts):
    """Long runs are summed by a compiled loop, or by numpy where there is no CPU device."""
    if not compiled:
        monkeypatch.setattr(digest, "cpu_device", lambda: None)
    x = random_array(5, shape, "uint8")
    total = np.zeros(2, np.uint32)
    for first, last in zip(cuts, (*cuts[1:], shape[axis]), strict=True):
        start = [0] * 3
        start[axis] = first
        total += digest.host_lanes(np.take(x, range(first, last), axis), tuple(start), shape)
    assert np.array_equal(total, digest.lanes(x, np)) and digest.to_hex(total) == digest.digest(x)
    assert np.array_equal(digest.from_hex(digest.to_hex(total)), total)


def test_index_beyond_32_bits(monkeypatch):
    """The split of the index into (row, place), at a size that fits in memory."""
    monkeypatch.setattr(digest, "_leading", lambda shape: 1 if len(shape) > 1 else 0)
    x = random_array(4, (5, 3, 11), "uint32")
    assert digest.to_hex(digest.lanes(jnp.asarray(x))) == digest.digest(x) == digest.to_hex(digest.lanes(x, np))
    assert digest.digest(x) != digest.digest(x[[1, 0, 2, 3, 4]])


def test_leading_dimensions():
    assert digest._leading(()) == digest._leading((2**32,)) == digest._leading((2**16, 2**16)) == 0
    assert digest._leading((2, 2**16, 2**16)) == 1
    assert digest._leading((31, 256, 4096, 1024)) == 1


def test_a_type_without_bytes_is_refused():
    with pytest.raises(TypeError, match="int4"):
        digest.digest(np.zeros(3, ml_dtypes.int4))
