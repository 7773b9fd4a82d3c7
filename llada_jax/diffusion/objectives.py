"""The training objectives: BDLM (Eq. 1), MDLM (Eq. 2), SFT (Eq. 5), CAP (Eq. 6) and, as block size 1, AR.

    L = E_t E_{x_t} [ -alpha'_t / (1 - alpha_t)  sum_i 1[x_t^i = MASK]  -log p(x_0^i | x_t^k, x_0^{<k}) ] / tokens

BDLM: the noisy block k sees itself and the clean blocks before it, in one pass over [x_t | x_0]. MDLM: one block, no
clean half. SFT: Eq. 1 with noise on the response only. CAP adds lambda times the mean entropy of the supervised tokens
that are predicted correctly. All share one forward pass and one reduction. `prepare` draws the noise and knows the
normaliser before any forward pass, so that micro-batches can be weighted exactly.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import BLOCK_ORIGINS, Layout, make_layout
from llada_jax.diffusion.noise import EMBEDDING, Masking, NoiseSpec, Stratum, complement, draw_masking, mask_tokens
from llada_jax.errors import InputError, check_range
from llada_jax.model import head
from llada_jax.model.alignment import predictable
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution, denoising_pass


@dataclasses.dataclass(frozen=True)
class Objective:
    """time_weight: "elbo" is -alpha'_t / (1 - alpha_t) = 1 / t, "uniform" is 1. normalizer: the loss is divided by the
    number of "tokens" that could be masked, or of those "masked". complementary: each row also comes with the inverse
    mask. block_origin: "global" (Eq. 3) or "document". confidence_weight: lambda of Eq. 6, of the entropy at
    confidence_temperature. document_mask: attention ends where a document does (Eq. 3, 4); without it the documents of
    a row are one, from its first token to its last, and padding between them is text that is not supervised.
    """

    noise: NoiseSpec = NoiseSpec()
    time_weight: str = "elbo"
    normalizer: str = "tokens"
    complementary: bool = False
    block_origin: str = "global"
    confidence_weight: float = 0.0
    confidence_temperature: float = 1.0
    document_mask: bool = True

    def __post_init__(self):
        check_range("objective.confidence_weight", self.confidence_weight, at_least=0)
        check_range("objective.confidence_temperature", self.confidence_temperature, above=0)
        for field, choices in (
            ("time_weight", ("elbo", "uniform")),
            ("normalizer", ("tokens", "masked")),
            ("block_origin", BLOCK_ORIGINS),
        ):
            if getattr(self, field) not in choices:
                raise InputError(f"objective.{field}={getattr(self, field)!r}, expected one of {', '.join(choices)}")


@flax.struct.dataclass
class Example:
    """A batch with its noise drawn. All [batch, length]; keys [batch].

    hidden: tokens that are the mask in the noisy copy; masked: those of them that are scored, all but a document's
    tail (`tails`). eligible: tokens that could be masked and scored. weights float32: of each token's negative
    log-likelihood, zero where not supervised, normalised by nothing yet. segment_ids: as attention sees them
    (Objective.document_mask). real: tokens of the stored documents, no padding.
    """

    clean: jax.Array
    noisy: jax.Array
    hidden: jax.Array
    masked: jax.Array
    eligible: jax.Array
    weights: jax.Array
    segment_ids: jax.Array
    real: jax.Array
    positions: jax.Array
    layout: Layout
    keys: jax.Array


@flax.struct.dataclass
class Sums:
    """Sums over a batch, float32 scalars.

    weighted: of weighted nll. nll, correct, correct_entropy: of nll, correctness and the entropy of correct
    predictions, over the masked tokens. masked, eligible: numbers of tokens, as in Example. expert_load int32 [layers
    with experts, experts]: real tokens that each expert got, in both halves where there are two; None in a dense model.
    """

    weighted: jax.Array
    nll: jax.Array
    correct: jax.Array
    correct_entropy: jax.Array
    masked: jax.Array
    eligible: jax.Array
    expert_load: jax.Array | None = None


def prepare(
    tokens,
    segment_ids,
    supervised,
    keys,
    block_size,
    config: ModelConfig,
    objective: Objective,
    halves="both",
    noise_source=None,
    stratum: Stratum | None = None,
) -> Example:
    """Draws the noise of a batch.

    tokens, segment_ids [batch, length] int; supervised [batch, length] bool: tokens that may be masked and scored (a
    document's tail behind them is masked with them, not scored: see `tails`); keys [batch]; block_size a traced or
    concrete int; halves as in schedule.Phase; noise_source: a function of (layout, segment_ids) that gives `source` of
    noise.draw_masking, or None; stratum: of noise.draw_masking. A complementary objective returns 2 * batch rows, the
    inverses after the originals.
    """
    real = segment_ids > 0
    supervised = supervised & real
    tail = tails(segment_ids, supervised)
    if not objective.document_mask:
        segment_ids = one_document(segment_ids)
    layout = make_layout(segment_ids, block_size, objective.block_origin)
    eligible = predictable(layout, segment_ids, config.alignment) & supervised
    if halves == "clean":
        masking = Masking(eligible, jnp.ones(tokens.shape))
    else:
        source = None if noise_source is None else noise_source(layout, segment_ids)
        masking = draw_masking(keys, eligible | tail, layout, objective.noise, source, stratum)
    if objective.complementary and halves != "clean":
        inverse = complement(masking, eligible | tail)
        masking, tokens, segment_ids, real, eligible, layout, keys = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]),
            (masking, tokens, segment_ids, real, eligible, layout, keys),
            (inverse, tokens, segment_ids, real, eligible, layout, keys),
        )
    masked = masking.masked & eligible
    weights = masked.astype(jnp.float32)
    if objective.time_weight == "elbo":
        weights = jnp.where(masked, weights / jnp.where(masked, masking.rate, 1), 0)
    return Example(
        clean=tokens,
        noisy=tokens if halves == "clean" else mask_tokens(tokens, masking, config.mask_token_id),
        hidden=masking.masked,
        masked=masked,
        eligible=eligible,
        weights=weights,
        segment_ids=segment_ids,
        real=real,
        positions=jnp.arange(tokens.shape[1])[None] - layout.document_start,
        layout=layout,
        keys=keys,
    )


def tails(segment_ids: jax.Array, supervised: jax.Array) -> jax.Array:
    """bool [batch, length]: what follows the last supervised token in each document that has one.

    Documents end with their last answer, so this is what fills its last block (--tail of tools/pack_data.py). When the
    answer is decoded, that block is masked to its end: a clean tail in the noisy half would show where the answer ends.
    """
    layout = make_layout(segment_ids, 1)
    sums = jnp.pad(jnp.cumsum(supervised & (segment_ids > 0), axis=1), ((0, 0), (1, 0)))
    before, through, end = (
        jnp.take_along_axis(sums, at, axis=1) for at in (layout.document_start, layout.block_end, layout.document_end)
    )
    return (segment_ids > 0) & (before < end) & (through == end) & ~supervised


def one_document(segment_ids: jax.Array) -> jax.Array:
    """segment_ids [batch, length] of rows whose documents are one: 1 from the first token of a document to the last one
    of any, whatever lies between; 0 before and behind.
    """
    real = (segment_ids > 0).astype(segment_ids.dtype)
    begun, to_come = jax.lax.cummax(real, axis=1), jax.lax.cummax(real, axis=1, reverse=True)
    return begun * to_come


def normalizer(example: Example, objective: Objective) -> jax.Array:
    """What the summed loss is divided by: at least 1, so that a step without a supervised token has loss zero."""
    counted = example.eligible if objective.normalizer == "tokens" else example.masked
    return jnp.maximum(counted.sum().astype(jnp.float32), 1.0)


def loss(sums: Sums, total: jax.Array, objective: Objective) -> jax.Array:
    """sum of weighted nll / total, plus (Eq. 6) lambda times the mean entropy over correctly predicted tokens.

    sums: of a batch or of one of its micro-batches; total: `normalizer` of the whole batch. The mean of Eq. 6 is over
    the tokens of `sums`: which are correct is not known before the forward pass.
    """
    value = sums.weighted / total
    if objective.confidence_weight:
        value += objective.confidence_weight * sums.correct_entropy / jnp.maximum(sums.correct, 1.0)
    return value


def score(
    params,
    config: ModelConfig,
    example: Example,
    halves="both",
    execution=Execution(),
    embedding_noise_std=None,
    entropy_temperature=None,
) -> tuple[Sums, head.TokenScores]:
    """One forward pass: the sums that the loss and the metrics are made of, and the scores of each token.

    embedding_noise_std: standard deviation (a scalar, may be traced) of the Gaussian noise on the embedding output of
    masked tokens (Section 7.1), or None. entropy_temperature: compute the entropy, for Eq. 6.
    """
    noisy = None if halves == "clean" else example.noisy
    clean = None if halves == "noisy" else example.clean
    added = None
    if embedding_noise_std is not None and noisy is not None:
        added = _embedding_noise(example, embedding_noise_std, config.hidden_size)
    hidden, load = denoising_pass(
        params, config, noisy, clean, example.layout, example.positions, execution, added, example.real
    )
    matrix = head.head_matrix(params, config)
    scores = head.token_scores(
        hidden, example.clean, example.masked, matrix, entropy_temperature, execution.reduce_dtype
    )
    return Sums(
        weighted=(scores.nll * example.weights).sum(),
        nll=scores.nll.sum(),
        correct=scores.correct.sum(),
        correct_entropy=(scores.correct * scores.entropy).sum(),
        masked=example.masked.sum().astype(jnp.float32),
        eligible=example.eligible.sum().astype(jnp.float32),
        expert_load=load,
    ), scores


def _embedding_noise(example: Example, std: jax.Array, width: int) -> jax.Array:
    """Independent Gaussian noise where a token is hidden, zero elsewhere: [batch, length, width] float32."""
    shape = example.hidden.shape[1], width

    def draw():
        keys = jax.vmap(lambda key: jax.random.fold_in(key, EMBEDDING))(example.keys)
        unit = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return jnp.where(example.hidden[..., None], std * unit, 0.0)

    return jax.lax.cond(std > 0, draw, lambda: jnp.zeros(example.hidden.shape[:1] + shape))
