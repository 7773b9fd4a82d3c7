"""The objectives as one pure function of weights, rows and a key, for experiments outside the trainer."""

import functools

import jax
import jax.numpy as jnp

from llada_jax.diffusion import noise, objectives
from llada_jax.diffusion.drafts import draft
from llada_jax.diffusion.objectives import Objective
from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.parameters import Params


def loss(
    params: Params,
    config: ModelConfig,
    batch,
    key: jax.Array,
    *,
    block_size: int | jax.Array | None,
    objective: Objective = Objective(),
    halves: str | None = None,
    embedding_noise_std: float | jax.Array | None = None,
    execution: Execution = Execution(),
) -> jax.Array:
    """Returns the loss of a batch, a float32 scalar in nats per token, by the objective (diffusion/objectives.py).

    batch: data.order.Batch, as `make_batch` gives; leaves [rows, length]. key: of the noise; each row's depends on it
    and on the row's id and epoch, as in training, where it is jax.random.key(config.seed). block_size: tokens, which
    may be traced; None is full-sequence MDLM (Eq. 2). halves: "both" [x_t | x_0], "noisy" x_t alone, or "clean" x_0
    alone, which with block_size=1 and config.alignment="shifted" is the next-token loss; by default "both", and
    "noisy" with block_size=None. embedding_noise_std: of Gaussian noise on masked embeddings (Section 7.1).
    Compiled; differentiable in params. Raises InputError without a mask token, on an unknown value of `halves`, and
    where editing.labels="levenshtein" does not fit the model or the blocks.

    Example:
        >>> import jax, llada_jax
        >>> config = llada_jax.preset("tiny")
        >>> params = llada_jax.init(config, jax.random.key(0))
        >>> batch = llada_jax.make_batch(jax.random.randint(jax.random.key(1), (2, 32), 0, 256))
        >>> gradient = jax.grad(llada_jax.loss)
        >>> slopes = gradient(params, config, batch, jax.random.key(2), block_size=8)
        >>> slopes["embedding"].shape == params["embedding"].shape
        True
    """
    if halves is None:
        halves = "noisy" if block_size is None else "both"
    if halves not in ("both", "noisy", "clean"):
        raise InputError(f"halves={halves!r}, expected both, noisy or clean")
    if halves != "clean" and config.mask_token_id is None:
        raise InputError("mask_token_id=None: the model has no mask token; config.replace(mask_token_id=N) names one")
    length = batch.ids.shape[1]
    if objective.editing.labels == "levenshtein" and halves != "clean":
        _check_edits(config, objective, length, length if block_size is None else block_size)
    size = jnp.int32(length if block_size is None else block_size)
    return _loss(params, config, batch, key, size, objective, halves, embedding_noise_std, execution)


def _check_edits(config: ModelConfig, objective: Objective, length: int, block_size) -> None:
    labelled = objective.editing.block_size
    if None in (config.delete_token_id, config.insert_token_id):
        raise InputError('editing.labels="levenshtein": the model has no tokens that delete and insert')
    if objective.block_origin != "global" or length % labelled:
        raise InputError(
            f'editing.labels="levenshtein", editing.block_size={labelled}: with block_origin={objective.block_origin!r}'
            f' and rows of {length} tokens, expected "global" and rows of whole blocks'
        )
    if not isinstance(block_size, jax.core.Tracer) and int(block_size) != labelled:
        raise InputError(f"editing.block_size={labelled}, expected the block_size of the loss, {int(block_size)}")


@functools.partial(jax.jit, static_argnames=("config", "objective", "halves", "execution"))
def _loss(params, config, batch, key, block_size, objective, halves, embedding_noise_std, execution):
    keys = noise.keys_from(key, batch.row_ids, batch.epochs)
    example = objectives.prepare_batch(batch, keys, block_size, config, objective, halves)
    if objective.editing.drafts and halves != "clean":
        frozen = jax.lax.stop_gradient(params)
        example = objectives.weighted(draft(frozen, config, example, objective, halves, execution), config, objective)
    temperature = objective.confidence_temperature if objective.confidence_weight else None
    sums, _ = objectives.score(params, config, example, halves, execution, embedding_noise_std, temperature)
    return objectives.loss(sums, objectives.normalizer(example, objective), objective)
