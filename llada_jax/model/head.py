"""The token embedding and the output head; per-token scores without holding [tokens, vocab] in memory."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.model.config import ModelConfig
from llada_jax.model.parameters import Params

CHUNK = 1024  # positions per shard whose logits are in memory at a time


def embed(table: jax.Array, tokens: jax.Array, dtype) -> jax.Array:
    """Looks up token embeddings: table [vocab, embed], tokens [batch, length] int -> [batch, length, embed] in `dtype`.

    Over a mesh the table is not gathered: each rank of "fsdp" looks up all ranks' tokens in its own columns, and the
    ranks exchange the results. The table's gradient is summed in the table's dtype, on the ranks that hold it.
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


def head_matrix(params: Params, config: ModelConfig) -> jax.Array:
    """Returns the head [embed, vocab]; in a tied model the embedding, even if the checkpoint stores another head."""
    return params["embedding"].T if config.tie_word_embeddings else params["head"]


def logits(params: Params, config: ModelConfig, hidden: jax.Array) -> jax.Array:
    """Returns the logits of hidden [..., embed]: float32 [..., vocab]."""
    head = head_matrix(params, config).astype(hidden.dtype)
    return jnp.dot(hidden, head, preferred_element_type=jnp.float32)


@flax.struct.dataclass
class TokenScores:
    """Per position, float32 [batch, length]; zero where the token is not masked.

    nll: -log p(target), nats. correct: 1 where the target is the most probable token. entropy: of
    softmax(logits / entropy_temperature), nats, or zero when it was not asked for.
    """

    nll: jax.Array
    correct: jax.Array
    entropy: jax.Array


def token_scores(
    hidden: jax.Array,
    targets: jax.Array,
    masked: jax.Array,
    head: jax.Array,
    entropy_temperature: float | None = None,
    reduce_dtype: str | None = None,
) -> TokenScores:
    """Scores the masked positions only, CHUNK of them at a time; the backward pass recomputes the logits.

    hidden [batch, length, embed], aligned with its targets. targets [batch, length] int. masked [batch, length] bool.
    head [embed, vocab]. Over a mesh each shard of the batch scores its own positions: it gathers the head once, and
    chunks without a masked position cost nothing. Ranks of the tensor axis split the vocabulary and exchange a few
    numbers per position. reduce_dtype: of the head's gradient, as in sharding.WeightShards.
    """
    local = jax.named_scope("head")(
        functools.partial(_local_scores, temperature=entropy_temperature, vocab=head.shape[1])
    )
    hidden, head = sharding.gradients_together((hidden, head))
    scores = sharding.over_batch(local, {"head": ("embed", "vocab")}, reduce_dtype)
    return TokenScores(*scores((hidden, targets, masked), {"head": head}))


def _local_scores(inputs, weights, shards, temperature, vocab):
    """Returns (nll, correct, entropy) of a shard's rows, each float32 [batch, length]."""
    hidden, targets, masked = inputs
    head, axis = _head_of_shard(weights, shards, hidden.dtype, vocab)

    def score(chunks, used, ordered):
        scores = _score_chunks(chunks, head, ordered(targets).reshape(-1, chunks.shape[1]), used, temperature, axis)
        return jnp.moveaxis(scores, 1, 0).reshape(3, -1)

    return _of_needed(score, hidden, masked)


def _head_of_shard(weights, shards, dtype, vocab):
    """(the head, or the part of its vocabulary that this rank of the tensor axis has; that axis, or None)"""
    head = shards.gather(weights["head"].astype(dtype), "head", keep=("tensor",))
    return head, None if head.shape[1] == vocab else "tensor"


def _of_needed(function, hidden, needed):
    """`function` at the needed positions of a shard's rows: a tuple of [batch, length], zero elsewhere.

    function(chunks [chunks, chunk, embed], used, ordered) -> [results, chunks * chunk]: needed positions lie in the
    first `used` chunks. ordered(x [batch, length]) is x in the order of the chunks. hidden [batch, length, embed];
    needed [batch, length] bool.
    """
    batch, length, width = hidden.shape
    chunk = min(CHUNK, batch * length)
    padding = -batch * length % chunk

    def flat(x):
        return jnp.pad(x.reshape(batch * length, *x.shape[2:]), ((0, padding),) + ((0, 0),) * (x.ndim - 2))

    needed = flat(needed)
    order = jnp.argsort(~needed, stable=True)  # needed positions first
    back = jnp.argsort(order)
    chunks = permute(flat(hidden), order, back).reshape(-1, chunk, width)
    used = (needed.sum(dtype=jnp.int32) + chunk - 1) // chunk
    results = function(chunks, used, lambda x: flat(x)[order])
    results = permute(results.T, back, order).T * needed[None]
    return tuple(results[:, : batch * length].reshape(-1, batch, length))


def best_tokens(
    hidden: jax.Array, needed: jax.Array, head: jax.Array, barred: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """The most probable token that is not `barred`, and its probability in the softmax over all logits.

    hidden [batch, length, embed], aligned with what it predicts; needed [batch, length] bool. head [embed, vocab].
    Returns int32 and float32 [batch, length], zero elsewhere; ties go to the lowest id. Not differentiable. Over a mesh
    as `token_scores`; sampling/predict.py is made for the few positions of decoding.
    """
    local = jax.named_scope("head")(functools.partial(_local_best, vocab=head.shape[1], barred=barred))
    token, confidence = sharding.over_batch(local, {"head": ("embed", "vocab")})((hidden, needed), {"head": head})
    return token.astype(jnp.int32), confidence


def _local_best(inputs, weights, shards, vocab, barred):
    hidden, needed = inputs
    head, axis = _head_of_shard(weights, shards, hidden.dtype, vocab)

    def best(chunks, used, ordered):
        def one(i, results):
            return results.at[i].set(_best(_logits(chunks[i], head), barred, axis))

        results = jax.lax.fori_loop(0, used, one, jnp.zeros((len(chunks), 2, chunks.shape[1])))
        return jnp.moveaxis(results, 1, 0).reshape(2, -1)

    return _of_needed(best, hidden, needed)


def _best(z, barred, axis) -> jax.Array:
    """[2, chunk] float32: the best token's id (exact below 2^24) and probability. z: as in _score."""

    def over_ranks(reduce, x):
        return x if axis is None else reduce(x, axis)

    index = _indices(z, axis)
    allowed = jnp.where(jnp.isin(index, jnp.array(barred)), -jnp.inf, z)
    peak, best = (over_ranks(jax.lax.pmax, x.max(axis=1)) for x in (z, allowed))
    token = jnp.where(allowed == best[:, None], index, jnp.iinfo(jnp.int32).max).min(axis=1)
    token = over_ranks(jax.lax.pmin, token)
    total = over_ranks(jax.lax.psum, jnp.exp(z - peak[:, None]).sum(axis=1))
    return jnp.stack([token.astype(jnp.float32), jnp.exp(best - peak) / total])


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[order], whose gradient is a gather too: `inverse` undoes `order`."""
    return x[order]


permute.defvjp(
    lambda x, order, inverse: (x[order], (order, inverse)),
    lambda residuals, cotangent: (permute(cotangent, *residuals[::-1]), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _score_chunks(chunks, head, targets, used, temperature, axis) -> jax.Array:
    """Returns the scores of the first `used` chunks, zeros for the others: [chunks, 3, chunk] float32.

    chunks [chunks, chunk, embed]; head [embed, vocab]; targets [chunks, chunk]; used: a run-time int. The gradient is
    written by hand: since the norm of the softmax is saved, each chunk of logits becomes its gradient at once, and the
    head's gradient is summed in float32.
    """
    return _score_chunks_forward(chunks, head, targets, used, temperature, axis)[0]


def _score_chunks_forward(chunks, head, targets, used, temperature, axis):
    def one(i, results):
        new = _score(_logits(chunks[i], head), targets[i], temperature, axis)
        return jax.tree.map(lambda all_chunks, chunk: all_chunks.at[i].set(chunk), results, new)

    empty = tuple(jnp.zeros((len(chunks), n, chunks.shape[1])) for n in (3, 2))
    scores, norms = jax.lax.fori_loop(0, used, one, empty)
    return scores, (chunks, head, targets, used, scores, norms)


def _score_chunks_backward(temperature, axis, residuals, cotangent):
    chunks, head, targets, used, scores, norms = residuals
    if axis is not None:
        cotangent = cotangent * jax.lax.axis_size(axis)  # as in sharding.sum_over

    def one(i, gradients):
        d_chunks, d_head = gradients
        z = _logits(chunks[i], head)
        dz = _d_logits(z, targets[i], norms[i], scores[i, 2], cotangent[i], temperature, axis).astype(head.dtype)
        dz = jax.lax.optimization_barrier(dz)  # once: XLA would compute it again in each of the two matmuls
        return d_chunks.at[i].set(dz @ head.T), d_head + jnp.dot(chunks[i].T, dz, preferred_element_type=jnp.float32)

    zeros = jnp.zeros_like(chunks), jnp.zeros(head.shape, jnp.float32)
    d_chunks, d_head = jax.lax.fori_loop(0, used, one, zeros)
    return d_chunks, d_head.astype(head.dtype), None, None


_score_chunks.defvjp(_score_chunks_forward, _score_chunks_backward)


def _logits(hidden, head):
    return jnp.dot(hidden, head, preferred_element_type=jnp.float32)


def _score(z, targets, temperature, axis) -> tuple[jax.Array, jax.Array]:
    """[3, chunk] float32: negative log-likelihood, correctness (ties go to the lowest index) and entropy; [2, chunk]:
    log-sum-exp of the logits and of logits / temperature.

    z: logits [chunk, vocab]; with an axis, this rank's part of the vocabulary, while targets are of all of it.
    """

    def total(x):
        x = x.sum(axis=1)
        return x if axis is None else jax.lax.psum(x, axis)

    index = _indices(z, axis)
    peak = z.max(axis=1)
    peak = peak if axis is None else jax.lax.pmax(peak, axis)
    shifted = z - peak[:, None]
    log_norm = peak + jnp.log(total(jnp.exp(shifted)))
    at_target = total(jnp.where(index == targets[:, None], z, 0))
    # Sums only, which XLA takes in one pass over the logits; an argmax is another.
    earlier = total(jnp.where((shifted == 0) & (index < targets[:, None]), 1.0, 0))
    correct = ((at_target == peak) & (earlier == 0)).astype(jnp.float32)
    entropy = tempered = jnp.zeros_like(log_norm)
    if temperature is not None:
        weights = jnp.exp(shifted / temperature)
        norm = total(weights)
        entropy = jnp.log(norm) - total(weights * shifted) / (temperature * norm)
        tempered = peak / temperature + jnp.log(norm)
    return jnp.stack([log_norm - at_target, correct, entropy]), jnp.stack([log_norm, tempered])


def _d_logits(z, targets, norms, entropy, cotangent, temperature, axis) -> jax.Array:
    """Gradient of _score in z [chunk, vocab]. cotangent [3, chunk]; norms, entropy: results of _score."""
    target = (_indices(z, axis) == targets[:, None]).astype(jnp.float32)
    dz = cotangent[0][:, None] * (jnp.exp(z - norms[0][:, None]) - target)
    if temperature is not None:
        log_p = z / temperature - norms[1][:, None]
        dz -= cotangent[2][:, None] * jnp.exp(log_p) * (log_p + entropy[:, None]) / temperature
    return dz


def _indices(z, axis) -> jax.Array:
    """Token ids of the columns of z, int32 [1, columns]."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * z.shape[1]
    return first + jnp.arange(z.shape[1])[None]
