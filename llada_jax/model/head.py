"""The token embedding and the output head; per-token scores without holding [tokens, vocab] in memory."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.model.config import ModelConfig

CHUNK = 1024  # positions of a shard whose logits are in memory at a time


def embed(table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """Rows of the embedding: table [vocab, embed], tokens [batch, length] int -> [batch, length, embed] of `dtype`.

    Over a mesh the table is not gathered: the ranks of "fsdp" look up each other's tokens in the columns that they
    hold, and exchange what they find. The table's gradient is summed in its own dtype, on the ranks that hold it.
    """

    def local(tokens, weights, shards):
        part = weights["table"]
        columns_split, rows_split = part.shape[1] < table.shape[1], part.shape[0] < table.shape[0]
        ids = jax.lax.all_gather(tokens, "fsdp", axis=0, tiled=True) if columns_split else tokens
        if rows_split:
            ids = ids - jax.lax.axis_index("tensor") * part.shape[0]
            here = ((ids >= 0) & (ids < part.shape[0]))[..., None]
            x = jnp.where(here, part[jnp.clip(ids, 0, part.shape[0] - 1)], 0).astype(dtype)
            x = sharding.sum_over(x, "tensor")
        else:
            x = part[ids].astype(dtype)
        return jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True) if columns_split else x

    return sharding.over_batch(local, {"table": ("vocab", "embed")})(tokens, {"table": table})


def head_matrix(params, config: ModelConfig) -> jax.Array:
    """[embed, vocab]; a tied model's is its embedding, also when the checkpoint stores another."""
    return params["embedding"].T if config.tie_word_embeddings else params["head"]


def logits(params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """hidden [..., embed] -> float32 [..., vocab]."""
    head = head_matrix(params, config).astype(hidden.dtype)
    return jnp.dot(hidden, head, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class TokenScores:
    """Per position, float32 [batch, length]; zero where nothing is supervised.

    nll: -log p(target), nats. correct: 1 where the target is the most probable token. entropy: of
    softmax(logits / entropy_temperature), nats, or zero when it was not asked for.
    """

    nll: jax.Array
    correct: jax.Array
    entropy: jax.Array


def token_scores(
    hidden: jax.Array,
    targets: jax.Array,
    supervised: jax.Array,
    head: jax.Array,
    entropy_temperature: float | None = None,
    reduce_dtype: str | None = None,
) -> TokenScores:
    """Scores of the supervised positions only, CHUNK of them at a time; the backward pass computes logits again.

    hidden [batch, length, embed] aligned to its targets; targets [batch, length] int; supervised [batch, length] bool;
    head [embed, vocab]. Over a mesh each shard of the batch scores its own positions: it gathers the head once, and its
    chunks without a supervised position cost nothing. The tensor axis splits the vocabulary: its ranks then exchange
    a few numbers a position. reduce_dtype: of the head's gradient, as in sharding.Shards.
    """
    local = jax.named_scope("head")(
        functools.partial(_local_scores, temperature=entropy_temperature, vocab=head.shape[1])
    )
    scores = sharding.over_batch(local, {"head": ("embed", "vocab")}, reduce_dtype)
    return TokenScores(*scores((hidden, targets, supervised), {"head": head}))


def _local_scores(inputs, weights, shards, temperature, vocab):
    """(nll, correct, entropy), each float32 [batch, length], of a shard's rows."""
    hidden, targets, supervised = inputs
    batch, length, width = hidden.shape
    head = shards.gather(weights["head"].astype(hidden.dtype), "head", keep=("tensor",))
    axis = None if head.shape[1] == vocab else "tensor"
    chunk = min(CHUNK, batch * length)
    padding = -batch * length % chunk

    def flat(x):
        return jnp.pad(x.reshape(batch * length, *x.shape[2:]), ((0, padding),) + ((0, 0),) * (x.ndim - 2))

    targets, supervised = flat(targets), flat(supervised)
    order = jnp.argsort(~supervised, stable=True)  # supervised positions first
    back = jnp.argsort(order)
    chunks = permute(flat(hidden), order, back).reshape(-1, chunk, width)
    used = (supervised.sum(dtype=jnp.int32) + chunk - 1) // chunk
    score = functools.partial(_score, temperature=temperature, axis=axis)
    scores = _score_chunks(chunks, head, targets[order].reshape(-1, chunk), used, score)
    scores = jnp.moveaxis(scores, 1, 0).reshape(3, -1)
    scores = permute(scores.T, back, order).T * supervised[None]
    return tuple(scores[:, : batch * length].reshape(3, batch, length))


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order], whose gradient is a gather too: `inverse` undoes `order`."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], (order, inverse)),
    lambda residuals, cotangent: (permute(cotangent, *residuals[::-1]), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _score_chunks(chunks, head, targets, used, score) -> jax.Array:
    """score(logits, targets) of the first `used` chunks, zeros of the others: [chunks, 3, chunk] float32.

    chunks [chunks, chunk, embed]; head [embed, vocab]; targets [chunks, chunk]; used: a run-time int.
    """

    def one(i, scores):
        return scores.at[i].set(score(_logits(chunks[i], head), targets[i]))

    return jax.lax.fori_loop(0, used, one, jnp.zeros((len(chunks), 3, chunks.shape[1])))


def _score_chunks_forward(chunks, head, targets, used, score):
    return _score_chunks(chunks, head, targets, used, score), (chunks, head, targets, used)


def _score_chunks_backward(score, residuals, cotangent):
    chunks, head, targets, used = residuals

    def one(i, gradients):
        d_chunks, d_head = gradients
        _, vjp = jax.vjp(lambda z: score(z, targets[i]), _logits(chunks[i], head))
        dz = vjp(cotangent[i])[0].astype(head.dtype)
        return d_chunks.at[i].set(dz @ head.T), d_head + jnp.dot(chunks[i].T, dz, preferred_element_type=jnp.float32)

    zeros = jnp.zeros_like(chunks), jnp.zeros(head.shape, jnp.float32)
    d_chunks, d_head = jax.lax.fori_loop(0, used, one, zeros)
    return d_chunks, d_head.astype(head.dtype), None, None


_score_chunks.defvjp(_score_chunks_forward, _score_chunks_backward)


def _logits(hidden, head):
    return jnp.dot(hidden, head, preferred_element_type=jnp.float32)


def _score(z, targets, temperature, axis) -> jax.Array:
    """[3, chunk] float32: negative log-likelihood, correctness (ties go to the lowest index) and entropy.

    z: logits [chunk, vocab]; with an axis, this rank's part of the vocabulary, and the targets are of all of it.
    """
    total, highest, lowest = (functools.partial(combine, axis=axis) for combine in (_psum, _pmax, _pmin))
    index = jnp.arange(z.shape[1])[None] + (0 if axis is None else jax.lax.axis_index(axis) * z.shape[1])
    peak = highest(jax.lax.stop_gradient(z).max(axis=1))
    at_target = total(jnp.where(index == targets[:, None], z, 0).sum(axis=1))
    log_norm = peak + jnp.log(total(jnp.exp(z - peak[:, None]).sum(axis=1)))
    best = lowest(jnp.where(z == peak[:, None], index, jnp.iinfo(jnp.int32).max).min(axis=1))
    correct = (best == targets).astype(jnp.float32)
    entropy = jnp.zeros_like(log_norm)
    if temperature is not None:
        shifted = (z - peak[:, None]) / temperature
        weights = jnp.exp(shifted)
        norm = total(weights.sum(axis=1))
        entropy = jnp.log(norm) - total((weights * shifted).sum(axis=1)) / norm
    return jnp.stack([log_norm - at_target, correct, entropy])


def _psum(x, axis):
    return x if axis is None else jax.lax.psum(x, axis)


def _pmax(x, axis):
    return x if axis is None else jax.lax.pmax(x, axis)


def _pmin(x, axis):
    return x if axis is None else jax.lax.pmin(x, axis)
