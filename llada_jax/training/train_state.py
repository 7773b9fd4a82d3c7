"""What training changes: the step, the float32 weights and the optimizer's state; and where they lie on a mesh."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from llada_jax import sharding
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora


@flax.struct.dataclass
class TrainState:
    """params: the weights that train: the model's, or its adapters."""

    step: jax.Array  # int32 scalar: steps done
    params: dict
    optimizer: optax.OptState


def create(params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract(model: ModelConfig | Lora, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes and dtypes of the state, for restoring and for ahead-of-time compilation."""
    return jax.eval_shape(lambda params: create(params, optimizer), parameters.abstract(model))


def shardings(state: TrainState, model: ModelConfig | Lora, mesh) -> TrainState:
    """NamedSharding of every leaf: an optimizer moment lies where its weight does, the rest is replicated."""
    weights = sharding.shardings(state.params, parameters.logical_axes(model), mesh)
    by_path = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(weights)}
    replicated = NamedSharding(mesh, PartitionSpec())

    def of_moment(path, _):
        return next((by_path[path[-n:]] for n in (1, 2) if path[-n:] in by_path), replicated)

    return TrainState(replicated, weights, jax.tree_util.tree_map_with_path(of_moment, state.optimizer))
