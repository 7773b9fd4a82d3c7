"""The output head: logits, and per-token scores without holding [tokens, vocab] in memory."""

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.model.config import ModelConfig

CHUNK = 128  # positions of each row whose logits are in memory at a time


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
) -> TokenScores:
    """Scores of the supervised positions only, CHUNK positions of each row at a time.

    hidden [batch, length, embed] aligned to its targets; targets [batch, length] int; supervised [batch, length] bool;
    head [embed, vocab]. Chunks without a supervised position cost nothing, and the backward pass recomputes logits.
    """
    batch, length, _ = hidden.shape
    order = jnp.argsort(~supervised, axis=1, stable=True)  # supervised positions first, in every row alike
    padding = -length % min(CHUNK, length)
    order = jnp.pad(order, ((0, 0), (0, padding)), constant_values=length)  # out of bounds: reads fill, writes drop

    def chunks(x):
        rows = jnp.arange(batch)[:, None]
        gathered = x.at[rows, order].get(mode="fill", fill_value=0)
        return jnp.moveaxis(gathered.reshape(batch, -1, min(CHUNK, length), *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(carry, inputs):
        hidden, targets, supervised = inputs
        nothing = jnp.zeros((3,) + targets.shape, jnp.float32)
        return carry, jax.lax.cond(
            supervised.any(), lambda: _score(hidden, targets, supervised, head, entropy_temperature), lambda: nothing
        )

    _, scores = jax.lax.scan(one_chunk, None, (chunks(hidden), chunks(targets), chunks(supervised)))
    scores = jnp.moveaxis(scores, 0, 2).reshape(3, batch, length + padding)
    unsorted = jnp.zeros((3, batch, length)).at[:, jnp.arange(batch)[:, None], order].set(scores, mode="drop")
    return TokenScores(*unsorted)


def _score(hidden, targets, supervised, head, entropy_temperature) -> jax.Array:
    """[3, batch, chunk] float32: negative log-likelihood, correctness and entropy, zero where not supervised."""
    z = jnp.dot(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    log_norm = jax.nn.logsumexp(z, axis=-1)
    nll = log_norm - jnp.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    correct = (jnp.argmax(z, axis=-1) == targets).astype(jnp.float32)
    entropy = jnp.zeros_like(nll)
    if entropy_temperature is not None:
        log_p = jax.nn.log_softmax(z / entropy_temperature, axis=-1)
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    return jnp.where(supervised, jnp.stack([nll, correct, entropy]), 0.0)
