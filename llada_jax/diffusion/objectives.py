"""The training objectives: BDLM (Eq. 1), MDLM (Eq. 2), SFT (Eq. 5), CAP (Eq. 6) and, as block size 1, AR.

    L = E_t E_{x_t} [ -alpha'_t / (1 - alpha_t)  sum_i 1[x_t^i = MASK]  -log p(x_0^i | x_t^k, x_0^{<k}) ] / tokens

BDLM: noisy block k sees itself and the clean blocks before it, in one pass over [x_t | x_0]. MDLM: one block, no clean
half. SFT: Eq. 1 with noise on the response only. CAP adds lambda times the mean entropy of the masked tokens that are
predicted correctly. Editing (diffusion/editing.py) adds wrong tokens to x_t and a term for the tokens that are not
masked; groups (diffusion/groups.py) let blocks of an answer be denoised together. All share one forward pass and one
reduction.

`prepare` draws the noise, `score` runs the pass, `loss` reduces its sums. The normaliser is known before that pass, so
micro-batches are weighted exactly.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax.attention.visibility import BLOCK_ORIGINS, Layout, make_layout
from llada_jax.diffusion.editing import Editing, replace_tokens
from llada_jax.diffusion.groups import Groups, grouped, groups_of
from llada_jax.diffusion.levenshtein import labels_of_rows
from llada_jax.diffusion.noise import EMBEDDING, Masking, NoiseSpec, Stratum, complement, draw_masking, mask_tokens
from llada_jax.errors import InputError, check_range
from llada_jax.model import head
from llada_jax.model.alignment import predictable
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution, denoising_pass
from llada_jax.model.parameters import Params


@dataclasses.dataclass(frozen=True)
class Objective:
    """Which loss to compute. Raises InputError naming the field.

    time_weight: "elbo" is -alpha'_t / (1 - alpha_t) = 1 / t, "uniform" is 1. normalizer: the loss is divided by the
    number of "tokens" that could be masked, or of those that are "masked". complementary: add each row a second time,
    with the inverse mask. block_origin: "global" (Eq. 3) or "document". confidence_weight: lambda of Eq. 6; the entropy
    is taken at confidence_temperature. document_mask: attention stays within documents (Eq. 3, 4). Without it a row is
    one document, from its first token to its last, and padding in between is text that is never masked. group_blocks:
    most blocks of an answer that are denoised together (diffusion/groups.py). editing: wrong tokens and drafts.

    Example:
        >>> import llada_jax
        >>> cap = llada_jax.Objective(time_weight="uniform", normalizer="masked", confidence_weight=0.1)
        >>> cap.noise.masking
        'bernoulli'
    """

    noise: NoiseSpec = NoiseSpec()
    time_weight: str = "elbo"
    normalizer: str = "tokens"
    complementary: bool = False
    block_origin: str = "global"
    confidence_weight: float = 0.0
    confidence_temperature: float = 1.0
    document_mask: bool = True
    group_blocks: int = 1
    editing: Editing = Editing()

    def __post_init__(self):
        check_range("objective.group_blocks", self.group_blocks, at_least=1)
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
    """A batch with its noise drawn. All [batch, length], except keys and drafted [batch].

    clean int: x_0, the `tokens` of prepare. noisy int: x_t. hidden bool: tokens replaced by the mask in x_t; rate
    float32: with what probability. masked bool: those of them that are scored, all but a document's tail (`tails`).
    eligible bool: tokens that could be masked and scored; writable bool: and tails. unmasked bool: with Editing.weight
    the other eligible ones, which are scored too. weights float32: factor on each token's negative log-likelihood, zero
    where not scored, not normalised.
    segment_ids int: as attention sees them (Objective.document_mask). real bool: tokens of stored documents, not
    padding. positions int: from the start of the document. keys: one per row, of all noise. drafted bool: rows whose
    x_t is a draft (diffusion/drafts.py); None: no row. targets int: what is predicted, by Editing.labels; None: x_0.
    """

    clean: jax.Array
    noisy: jax.Array
    hidden: jax.Array
    rate: jax.Array
    masked: jax.Array
    eligible: jax.Array
    writable: jax.Array
    unmasked: jax.Array
    weights: jax.Array
    segment_ids: jax.Array
    real: jax.Array
    positions: jax.Array
    layout: Layout
    keys: jax.Array
    drafted: jax.Array | None = None
    targets: jax.Array | None = None


@flax.struct.dataclass
class Sums:
    """Sums over a batch, float32 scalars.

    weighted: of weighted nll. nll, correct, correct_entropy: of nll, correctness and the entropy of correct
    predictions, over the masked tokens. masked, eligible: numbers of tokens, as in Example. Of the unmasked tokens that
    are scored: unmasked_nll; wrong, wrong_correct: how many are not x_0 in x_t, and for how many of these the
    target is predicted; right, right_correct: the others. expert_load int32 [layers with experts, experts]: real tokens
    that each expert got, in both halves where there are two; None in a dense model.
    """

    weighted: jax.Array
    nll: jax.Array
    correct: jax.Array
    correct_entropy: jax.Array
    masked: jax.Array
    eligible: jax.Array
    unmasked_nll: jax.Array
    wrong: jax.Array
    wrong_correct: jax.Array
    right: jax.Array
    right_correct: jax.Array
    expert_load: jax.Array | None = None


def prepare_batch(
    batch, keys: jax.Array, block_size: jax.Array | int, config: ModelConfig, objective: Objective, halves: str
) -> Example:
    """`prepare` of a data.order.Batch of arrays, with the groups of its rows."""
    arrays = batch.ids, batch.segment_ids, batch.supervised
    groups = groups_of(batch.row_ids, batch.epochs, objective.group_blocks) if objective.group_blocks > 1 else None
    return prepare(*arrays, keys, block_size, config, objective, halves, groups=groups)


def prepare(
    tokens: jax.Array,
    segment_ids: jax.Array,
    supervised: jax.Array,
    keys: jax.Array,
    block_size: jax.Array | int,
    config: ModelConfig,
    objective: Objective,
    halves: str = "both",
    noise_source: Callable[[Layout, jax.Array], jax.Array] | None = None,
    stratum: Stratum | None = None,
    groups: Groups | None = None,
) -> Example:
    """Draws the noise of a batch. Returns an Example of `batch` rows; a complementary objective doubles them, the
    inverse masks after the originals.

    tokens, segment_ids [batch, length] int. supervised [batch, length] bool: tokens that may be masked and scored. (The
    tail of a document is masked with them but not scored: see `tails`.) keys [batch]: noise.example_keys. block_size:
    int, may be traced. halves: as in schedule.Phase. noise_source: a function of (layout, segment_ids) that returns
    `source` of noise.draw_masking, or None. stratum: as in noise.draw_masking. groups: None is each block alone.
    """
    real = segment_ids > 0
    supervised = supervised & real
    tail = tails(segment_ids, supervised)
    if not objective.document_mask:
        segment_ids = one_document(segment_ids)
    layout = make_layout(segment_ids, block_size, objective.block_origin)
    eligible = predictable(layout, segment_ids, config.alignment) & supervised
    if groups is not None:
        layout = grouped(layout, groups, eligible)
    if halves == "clean":
        masking = Masking(eligible, jnp.ones(tokens.shape))
    else:
        source = None if noise_source is None else noise_source(layout, segment_ids)
        masking = draw_masking(keys, eligible | tail, layout, objective.noise, source, stratum)
    example = Example(
        clean=tokens,
        noisy=tokens,
        hidden=masking.masked,
        rate=masking.rate,
        masked=masking.masked,
        eligible=eligible,
        writable=eligible | tail,
        unmasked=masking.masked,
        weights=masking.rate,
        segment_ids=segment_ids,
        real=real,
        positions=jnp.arange(tokens.shape[1])[None] - layout.document_start,
        layout=layout,
        keys=keys,
    )
    if halves != "clean":
        example = _noised(example, config, objective)
    return weighted(example, config, objective)


def _noised(example: Example, config: ModelConfig, objective: Objective) -> Example:
    """The example with x_t; with the inverse masks behind it if the objective is complementary."""
    if objective.complementary:
        inverse = complement(Masking(example.hidden, example.rate), example.writable)
        inverse = example.replace(hidden=inverse.masked, rate=inverse.rate)
        example = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), example, inverse)
    tokens, editing = example.clean, objective.editing
    if editing.replaces:
        if editing.vocab_size is None:
            editing = dataclasses.replace(editing, vocab_size=config.vocab_size)
        barred = (*config.eos_token_ids, *unwritten_ids(config))
        tokens = replace_tokens(example.keys, tokens, example.writable, example.layout, editing, barred)
    return example.replace(noisy=mask_tokens(tokens, Masking(example.hidden, example.rate), config.mask_token_id))


def unwritten_ids(config: ModelConfig) -> tuple[int, ...]:
    """The mask, and the tokens of LLaDA2.2's edits: predicted, but never part of a text."""
    return tuple(i for i in (config.mask_token_id, config.delete_token_id, config.insert_token_id) if i is not None)


def weighted(example: Example, config: ModelConfig, objective: Objective) -> Example:
    """The example with what follows from its x_t: which tokens are scored, as what, and with what weights."""
    masked = example.hidden & example.eligible
    weights = masked.astype(jnp.float32)
    if objective.time_weight == "elbo":
        weights = jnp.where(masked, weights / jnp.where(masked, example.rate, 1), 0)
    editing = objective.editing
    unmasked, weight = jnp.zeros_like(masked), editing.weight
    if weight:
        unmasked = example.eligible & ~example.hidden
        if objective.normalizer == "masked":  # each term is a mean of its own
            weight *= _count(masked) / _count(unmasked)
        weights = jnp.where(unmasked, weight, weights)
    return example.replace(
        masked=masked, unmasked=unmasked, weights=weights, targets=_targets(example, config, editing)
    )


def _targets(example: Example, config: ModelConfig, editing: Editing) -> jax.Array | None:
    if editing.labels == "target" or example.drafted is None:
        return None
    ids = dict(mask_id=config.mask_token_id, delete_id=config.delete_token_id, insert_id=config.insert_token_id)
    rows = example.noisy, example.clean, example.writable, example.segment_ids
    return jnp.where(example.drafted[:, None], labels_of_rows(*rows, editing.block_size, **ids), example.clean)


def _count(tokens: jax.Array) -> jax.Array:
    """How many, float32, at least 1."""
    return jnp.maximum(tokens.sum().astype(jnp.float32), 1.0)


def tails(segment_ids: jax.Array, supervised: jax.Array) -> jax.Array:
    """Returns bool [batch, length]: the tokens after the last supervised one of each document that has one.

    Documents end with their last answer, so these tokens fill its last block (--tail of tools/pack_data.py). In
    decoding that block is masked to its end. A clean tail in the noisy half would tell the model where the answer ends.
    """
    layout = make_layout(segment_ids, 1)
    sums = jnp.pad(jnp.cumsum(supervised & (segment_ids > 0), axis=1), ((0, 0), (1, 0)))
    before, through, end = (
        jnp.take_along_axis(sums, at, axis=1) for at in (layout.document_start, layout.block_end, layout.document_end)
    )
    return (segment_ids > 0) & (before < end) & (through == end) & ~supervised


def one_document(segment_ids: jax.Array) -> jax.Array:
    """Returns segment_ids [batch, length] with each row as one document: 1 from the first token of its first document
    to the last token of its last one, padding in between included; 0 outside.
    """
    real = (segment_ids > 0).astype(segment_ids.dtype)
    begun, to_come = jax.lax.cummax(real, axis=1), jax.lax.cummax(real, axis=1, reverse=True)
    return begun * to_come


def normalizer(example: Example, objective: Objective) -> jax.Array:
    """Returns the divisor of the summed loss, float32: at least 1, so that a step without masked tokens has loss 0."""
    return _count(example.eligible if objective.normalizer == "tokens" else example.masked)


def loss(sums: Sums, total: jax.Array, objective: Objective) -> jax.Array:
    """Returns the loss in nats: sum of weighted nll / total, plus lambda times the mean entropy of Eq. 6.

    sums: of a batch or one of its micro-batches. total: `normalizer` of the whole batch. The mean of Eq. 6 is over the
    correctly predicted tokens of `sums`: which these are is not known before the forward pass.
    """
    value = sums.weighted / total
    if objective.confidence_weight:
        value += objective.confidence_weight * sums.correct_entropy / jnp.maximum(sums.correct, 1.0)
    return value


def score(
    params: Params,
    config: ModelConfig,
    example: Example,
    halves: str = "both",
    execution: Execution = Execution(),
    embedding_noise_std: jax.Array | float | None = None,
    entropy_temperature: float | None = None,
) -> tuple[Sums, head.TokenScores]:
    """Runs one forward pass. Returns the sums for loss and metrics, and the scores of each token.

    halves: as in schedule.Phase. embedding_noise_std: standard deviation (a scalar, may be traced) of Gaussian noise on
    the embeddings of masked tokens (Section 7.1), or None. entropy_temperature: temperature of the entropy in Eq. 6;
    None does not compute it.
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
        hidden,
        example.clean if example.targets is None else example.targets,
        example.masked | example.unmasked,
        matrix,
        entropy_temperature,
        execution.reduce_dtype,
    )
    differs = example.noisy != example.clean
    wrong, right = example.unmasked & differs, example.unmasked & ~differs
    return Sums(
        weighted=(scores.nll * example.weights).sum(),
        nll=(scores.nll * example.masked).sum(),
        correct=(scores.correct * example.masked).sum(),
        correct_entropy=(scores.correct * scores.entropy * example.masked).sum(),
        masked=example.masked.sum().astype(jnp.float32),
        eligible=example.eligible.sum().astype(jnp.float32),
        unmasked_nll=(scores.nll * example.unmasked).sum(),
        wrong=wrong.sum().astype(jnp.float32),
        wrong_correct=(scores.correct * wrong).sum(),
        right=right.sum().astype(jnp.float32),
        right_correct=(scores.correct * right).sum(),
        expert_load=load,
    ), scores


def _embedding_noise(example: Example, std: jax.Array, width: int) -> jax.Array:
    """Returns independent Gaussian noise for hidden tokens, zero elsewhere: float32 [batch, length, width]."""
    shape = example.hidden.shape[1], width

    def draw():
        keys = jax.vmap(lambda key: jax.random.fold_in(key, EMBEDDING))(example.keys)
        unit = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return jnp.where(example.hidden[..., None], std * unit, 0.0)

    return jax.lax.cond(std > 0, draw, lambda: jnp.zeros(example.hidden.shape[:1] + shape))
