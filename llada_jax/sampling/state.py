"""The state of decoding between iterations: the requests of a batch, the progress of each, and the cache."""

import dataclasses
import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from llada_jax import sharding
from llada_jax.attention.decoding.cached import CACHE_AXES
from llada_jax.attention.decoding.cached_kernel import cache_sizes
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Cache, Execution
from llada_jax.sampling.predict import Sampling

RULES = ("llada2", "llada2.1", "llada2.2", "sglang", "dinfer", "entropy", "fixed")
EDITING = ("llada2.1", "llada2.2")  # those that change what is written
MOST_STEPS = 1024  # of a block, by rule "llada2.2", which remembers them
PREFILL_CHUNK = 1024
MOST_BLOCKS = 4  # of a row at once
KEYS = "threefry2x32"  # whatever the default is: a draw is the same everywhere


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """Static settings of a decoding program: one is compiled for each. Everything else of a request is data.

    sample, cut: whether any request has a temperature, or a top-k or top-p. prefill_chunk: tokens, of whole blocks; a
    longer prompt is computed in chunks of so many. history: keep a log of what is written, with room for so many writes
    per position of the canvas; 0: none. slots: blocks of a row that may be active at once, the largest active_blocks of
    any request. execution: of the prefill; its dtype and its experts are those of all passes, and so is its attention
    where that is "kernel". delete_id, insert_id: of rule "llada2.2".
    """

    mask_id: int
    rule: str = "llada2"
    block_length: int = 32
    sample: bool = False
    cut: bool = False
    prefill_chunk: int = PREFILL_CHUNK
    history: int = 0
    slots: int = 1
    execution: Execution = Execution()
    delete_id: int = -1
    insert_id: int = -1


@flax.struct.dataclass
class Requests:
    """The GenerateConfig of each row, as arrays [rows]: int32, except float32 thresholds and entropy_bound, and bool
    eos_early_stop. row_end: end of the row's last block. max_steps: GenerateConfig.steps.
    eos_ids [rows, ends]: tokens that end an answer; -1 is none.
    """

    prompt_length: jax.Array
    row_end: jax.Array
    max_steps: jax.Array
    threshold: jax.Array
    editing_threshold: jax.Array
    max_post_steps: jax.Array
    max_steps_per_block: jax.Array
    entropy_bound: jax.Array
    active_blocks: jax.Array
    add_block_threshold: jax.Array
    semi_complete_threshold: jax.Array
    eos_ids: jax.Array
    eos_early_stop: jax.Array
    sampling: Sampling


@flax.struct.dataclass
class BlockEdits:
    """What rule "llada2.2" remembers of the current block. original [rows, block] bool: masked positions that no edit
    has made. seen [rows, 2, MOST_STEPS] uint32: a hash of what each of its steps wrote.
    """

    original: jax.Array
    seen: jax.Array


@flax.struct.dataclass
class WriteLog:
    """What was written to each row, in the order of passes and positions: [rows, capacity], int32 but confidence.

    position: in the canvas. step: of its block; forward: of the row's denoising passes, both from 0. confidence
    float32. count [rows] int32: of writes, more than `capacity` if some were lost.
    """

    position: jax.Array
    token: jax.Array
    step: jax.Array
    forward: jax.Array
    confidence: jax.Array
    count: jax.Array


@flax.struct.dataclass
class State:
    """A batch in decoding. A row without a request counts as finished.

    tokens [rows, canvas] int32: prompt, answer so far, mask tokens. written_at [rows, canvas] int32: the step of its
    block that wrote a token; confidence [rows, canvas] float32: the token's probability in that step. masked [rows,
    slots, block] bool: positions of the active blocks that are not written yet. step, post_steps, forced_steps [rows,
    slots] int32: steps that each active block has taken, those after it was full (llada2.1), and those in which it had
    to accept something. Per row, [rows]:
      start: first position of the active blocks; active: their number; of more slots, nothing is meant
      pending: how many blocks before `start` are final but not in the cache; finished: nothing is left to do, and
        `start` is that of the answer's last block
      denoising_passes, commit_passes (separate ones), positions_evaluated (the row's own, in decoding)
      last_hidden [rows, embed]: hidden state of the last token in the cache; predicts the next one (shifted alignment)
    cache: {group: {"key", "value": [layers, rows, kv_heads, canvas, head_dim]}}, with zeros up to whole tiles where the
    kernel of attention reads it.
    log: of all writes; without room where DecodeSettings.history is 0.
    fuse_share [] float32: finished blocks are committed in two-block windows when at least this share of the running
    rows has one to commit, else in a separate pass; 0 always fuses, above 1 never does.
    iterations, busy, batch_positions [] int32, since the host last looked: passes, running rows summed over passes, and
    positions of all rows, idle ones included, summed over passes.
    edits: of rule "llada2.2" only.
    """

    requests: Requests
    tokens: jax.Array
    written_at: jax.Array
    confidence: jax.Array
    masked: jax.Array
    start: jax.Array
    step: jax.Array
    post_steps: jax.Array
    forced_steps: jax.Array
    active: jax.Array
    pending: jax.Array
    finished: jax.Array
    denoising_passes: jax.Array
    commit_passes: jax.Array
    positions_evaluated: jax.Array
    last_hidden: jax.Array
    cache: dict
    log: WriteLog
    fuse_share: jax.Array
    iterations: jax.Array
    busy: jax.Array
    batch_positions: jax.Array
    edits: BlockEdits | None = None


class Written(NamedTuple):
    """A block of each row, [rows, block], with its part of State.written_at and State.confidence."""

    tokens: jax.Array
    written_at: jax.Array
    confidence: jax.Array


class Outcome(NamedTuple):
    """What a step makes of a block. left, written [rows, block] bool: masked still, and written by this step. full
    [rows] bool: the block needs no more steps. post_steps, edits: as in State.
    """

    block: Written
    left: jax.Array
    written: jax.Array
    full: jax.Array
    post_steps: jax.Array
    edits: BlockEdits | None


@functools.partial(jax.jit, static_argnames=("config", "settings", "rows", "canvas", "dtype"))
def empty_state(
    config: ModelConfig, settings: DecodeSettings, rows: int, canvas: int, dtype: str, fuse_share: float = 0.0
) -> State:
    """Returns a state without requests. canvas: most positions of a request, a multiple of the block length.

    jax.eval_shape of this function gives abstract arguments to lower decode.iterate from.
    """

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros(shape, dtype)

    n, slots = zeros(rows), zeros(rows, settings.slots)
    f, no = zeros(rows, dtype=jnp.float32), zeros(rows, dtype=bool)
    requests = Requests(
        prompt_length=n, row_end=n, max_steps=n + 1, threshold=f, editing_threshold=f, max_post_steps=n,
        max_steps_per_block=n + 1, entropy_bound=f, active_blocks=n + 1, add_block_threshold=f,
        semi_complete_threshold=f, eos_ids=zeros(rows, max(len(config.eos_token_ids), 1)), eos_early_stop=no,
        sampling=Sampling(f, n, f + 1, jax.vmap(functools.partial(jax.random.key, impl=KEYS))(n)),
    )  # fmt: skip

    writes = zeros(rows, canvas * settings.history)
    log = WriteLog(writes, writes, writes, writes, writes.astype(jnp.float32), n)
    sizes = canvas, config.head_dim
    if settings.execution.attention == "kernel":
        sizes = cache_sizes(*sizes)
    cached = rows, config.num_kv_heads, *sizes

    def keys_or_values(layers):
        shape = len(layers), *cached
        return sharding.constrain(zeros(*shape, dtype=dtype), CACHE_AXES)

    edits = None
    if settings.rule == "llada2.2":
        edits = BlockEdits(zeros(rows, settings.block_length, dtype=bool), zeros(rows, 2, MOST_STEPS, dtype=jnp.uint32))
    return State(
        requests=requests, tokens=zeros(rows, canvas), written_at=zeros(rows, canvas),
        confidence=zeros(rows, canvas, dtype=jnp.float32),
        masked=zeros(rows, settings.slots, settings.block_length, dtype=bool), start=n, step=slots, post_steps=slots,
        forced_steps=slots, active=n + 1, pending=n, finished=~no, denoising_passes=n, commit_passes=n,
        positions_evaluated=n, last_hidden=zeros(rows, config.hidden_size, dtype=dtype),
        cache={
            group: {"key": keys_or_values(layers), "value": keys_or_values(layers)}
            for group, layers in config.layer_groups.items()
        },
        log=log,
        fuse_share=jnp.asarray(fuse_share, jnp.float32), iterations=zeros(), busy=zeros(), batch_positions=zeros(),
        edits=edits,
    )  # fmt: skip


def constrain_cache(cache: Cache) -> Cache:
    """The cache, laid out over the mesh in force."""
    return jax.tree.map(lambda x: sharding.constrain(x, CACHE_AXES), cache)


def with_slots(state: State, slots: int) -> State:
    """The state with so many slots, of which no request in it may use more."""

    def resized(x, fill):
        x = x[:, :slots]
        return jnp.pad(x, [(0, 0), (0, slots - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)

    steps = {name: resized(getattr(state, name), 0) for name in ("step", "post_steps", "forced_steps")}
    return state.replace(masked=resized(state.masked, True), **steps)
