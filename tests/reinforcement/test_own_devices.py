"""The weights that a process decodes with: those of training, laid out over its devices, in the dtype of the passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada_jax import sharding
from llada_jax.attention.visibility import block_causal, make_layout
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution, hidden_states
from llada_jax.reinforcement.own_devices import decoding_mesh, in_dtype, logical_axes, on_own_devices

MODEL = preset("tiny_moe").replace(num_layers=2)


@pytest.fixture(scope="module")
def params():
    params = parameters.initialize(MODEL, jax.random.key(0))
    bias = jax.random.normal(jax.random.key(1), params["sparse"]["expert_bias"].shape) * 0.01
    return params | {"sparse": params["sparse"] | {"expert_bias": bias}}


def test_a_dtype_that_is_no_narrower_changes_nothing(params):
    kept = in_dtype(params, jnp.dtype("float32"))
    assert all(a is b for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(params), strict=True))
    narrow = in_dtype(params, jnp.dtype("bfloat16"))
    wide = in_dtype(narrow, jnp.dtype("float32"))  # a base of adapters in bfloat16
    assert all(a is b for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True))


def test_a_pass_in_bfloat16_reads_the_same_from_weights_that_are_cast_before_it(params):
    """Experts are chosen in float32, so the router stays. Operation by operation: XLA keeps more bits in a fusion."""
    cast = in_dtype(params, jnp.dtype("bfloat16"))
    dtypes = {name: w.dtype for name, w in cast["sparse"].items()}
    assert {name for name, dtype in dtypes.items() if dtype == jnp.float32} == {"router", "expert_bias"}
    assert cast["embedding"].dtype == cast["final_norm"].dtype == jnp.bfloat16
    tokens = jax.random.randint(jax.random.key(2), (1, 8), 0, MODEL.vocab_size)
    positions, seen = jnp.arange(8)[None], block_causal(make_layout(jnp.ones_like(tokens), 4))
    with jax.disable_jit():
        execution = Execution(dtype="bfloat16")
        hidden = [hidden_states(each, MODEL, tokens, positions, seen, execution)[0] for each in (params, cast)]
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in hidden))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_weights_are_shared_out_over_the_devices_and_keep_their_values(params, dtype):
    mesh = sharding.make_mesh(data=1, expert=4, devices=jax.devices()[:4])
    expected = in_dtype(params, jnp.dtype(dtype or "float32"))
    with on_own_devices(params, logical_axes(MODEL), mesh, dtype) as own:
        assert jax.sharding.get_abstract_mesh().shape["expert"] == 4
        jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(np.asarray, each) for each in (own, expected)))
        gate = own["sparse"]["gate"]
        assert gate.dtype == (dtype or "float32") and gate.sharding.shard_shape(gate.shape)[1] == MODEL.num_experts // 4
    assert jax.sharding.get_abstract_mesh().empty
    assert decoding_mesh(MODEL, 8).size == len(jax.devices())
