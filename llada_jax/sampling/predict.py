"""A token and its probability for each position: argmax, or a draw with temperature, top-k and top-p."""

import jax
import jax.numpy as jnp


def predict(logits: jax.Array, mask_id: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Most probable tokens [rows, block] and their probabilities, float32; the mask token is never predicted.

    logits float32 [rows, block, vocab].
    """
    logits = ban(logits, mask_id)
    tokens = jnp.argmax(logits, axis=-1)
    return tokens, probability(logits, tokens)


def draw(logits, mask_id, keys, temperature, top_k: int | None, top_p) -> tuple[jax.Array, jax.Array]:
    """Tokens drawn from softmax(logits / temperature) cut to the top k, then to the nucleus p; and their probabilities
    under that distribution (the order and the filtered probability are those of LLaDA2's HF `generate`).

    logits float32 [rows, block, vocab]; keys [rows]; temperature, top_p scalars (top_p = 1 keeps all).
    """
    logits = ban(logits, mask_id) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kept = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < kept, -jnp.inf, logits)
    logits = jax.lax.cond(top_p < 1, lambda: nucleus(logits, top_p), lambda: logits)
    tokens = jax.vmap(lambda key, row: jax.random.categorical(key, row))(keys, logits)
    return tokens, probability(logits, tokens)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the smallest set of most probable tokens whose probability exceeds top_p; the first always stays."""
    order = jnp.argsort(-logits, axis=-1)
    ranked = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    keep_ranked = jnp.cumsum(ranked, axis=-1) - ranked <= top_p
    keep = jnp.take_along_axis(keep_ranked, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(keep, logits, -jnp.inf)


def ban(logits: jax.Array, token: jax.Array) -> jax.Array:
    return logits.at[..., token].set(-jnp.inf)


def probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
