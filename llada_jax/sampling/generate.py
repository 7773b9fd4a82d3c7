"""`generate`: takes prompts, returns answers; its config, and the arrays that decoding makes of both."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from llada_jax import sharding
from llada_jax.errors import InputError, check_range
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.parameters import Params
from llada_jax.sampling import history as histories
from llada_jax.sampling.cost import second_block_price
from llada_jax.sampling.decode import decode
from llada_jax.sampling.predict import Sampling
from llada_jax.sampling.prefill import num_passes
from llada_jax.sampling.quantize import has_int8_experts
from llada_jax.sampling.state import (
    KEYS,
    MOST_BLOCKS,
    MOST_STEPS,
    PREFILL_CHUNK,
    RULES,
    DecodeSettings,
    Requests,
    State,
)

_SHARED = ("block_length", "rule", "mask_id", "delete_id", "insert_id")  # by the requests of a batch


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to decode a request. Requests of one batch must share block_length, rule, mask_id, delete_id and insert_id.

    gen_length: most tokens of an answer. block_length: tokens decoded together; the block_size of training, under the
    name that LLaDA2's Hugging Face `generate` gives it (its gen_length and steps keep their names too). steps: most
    steps per block (rules "llada2" and "fixed"), of those in which it must accept something. threshold: probability
    above which a token is accepted; above 1 nothing passes it and the schedule of steps decides. temperature: 0 is
    argmax. top_k, top_p: None is off. mask_id: None is the checkpoint's. eos_id: token that ends an answer; None is any
    of the checkpoint's ends of sequence, -1 none. eos_early_stop: stop inside a block once every position before the
    first end of sequence is written. rule: of sampling/accept.py. "llada2.1" also edits written tokens whose prediction
    changes with probability above editing_threshold (0: always), for at most max_post_steps steps after a block is
    full. entropy_bound: nats that rule "entropy" may write per step, the largest not counted. "llada2.2" edits as
    "llada2.1", and its edits may also be the tokens delete_id and insert_id (None: the checkpoint's), which move what
    follows; it takes at most max_steps_per_block steps for a block (sampling/levenshtein.py; LLaDA2.2's own threshold
    is 0.5, its editing_threshold 0).

    active_blocks: blocks that are decoded at once, 1 to 4; more than one is for models that were trained for it
    (MultiTF). After each pass one more becomes active if at least add_block_threshold of the last one's positions are
    written. A block behind others accepts only what passes its threshold (rule "entropy": the largest counts too;
    "fixed": nothing) until at least semi_complete_threshold of the block before it is written, and at least one token a
    step from then on. Names, defaults and meaning of the two are Diffulex's (diffulex/engine/dllm_block.py). With rule
    "llada2.1", blocks stay open to edits as long as one before them is. Raises InputError naming the field.

    Example:
        >>> import llada_jax
        >>> llada_jax.GenerateConfig(gen_length=64, rule="llada2.1", threshold=0.7).editing_threshold
        0.5
    """

    gen_length: int
    block_length: int = 32
    steps: int = 32
    threshold: float = 0.95
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_early_stop: bool = False
    mask_id: int | None = None
    eos_id: int | None = None
    rule: str = "llada2"
    editing_threshold: float = 0.5
    max_post_steps: int = 16
    entropy_bound: float = 0.15
    max_steps_per_block: int = 1000
    delete_id: int | None = None
    insert_id: int | None = None
    active_blocks: int = 1
    add_block_threshold: float = 0.1
    semi_complete_threshold: float = 0.9

    def __post_init__(self):
        def check(field, ok, expected):
            if not ok:
                raise InputError(f"{field}={getattr(self, field)!r}, expected {expected}")

        def whole(value, least):
            return _is_integer(value) and least <= value < 2**31

        for field in ("gen_length", "block_length", "steps"):
            check(field, whole(getattr(self, field), 1), "a positive integer")
        for field in ("threshold", "editing_threshold", "entropy_bound"):
            check_range(field, getattr(self, field), at_least=0, infinite=True)  # beyond all probabilities: never
        for field in ("add_block_threshold", "semi_complete_threshold"):
            check_range(field, getattr(self, field), at_least=0, at_most=1)
        check("active_blocks", whole(self.active_blocks, 1) and self.active_blocks <= MOST_BLOCKS, "1 to 4")
        check_range("temperature", self.temperature, at_least=0)
        if self.top_p is not None:
            check_range("top_p", self.top_p, above=0, at_most=1)
        check("top_k", self.top_k is None or whole(self.top_k, 1), "a positive integer")
        check("rule", self.rule in RULES, f"one of {', '.join(RULES)}")
        check("active_blocks", self.active_blocks == 1 or self.rule != "llada2.2", '1 with rule="llada2.2"')
        check("max_post_steps", whole(self.max_post_steps, 0), "an integer of at least 0")
        check("eos_early_stop", isinstance(self.eos_early_stop, bool | np.bool_), "true or false")
        capped = whole(self.max_steps_per_block, 1) and self.max_steps_per_block <= MOST_STEPS
        check("max_steps_per_block", capped, f"an integer from 1 to {MOST_STEPS}")
        for field in ("mask_id", "delete_id", "insert_id"):
            check(field, getattr(self, field) is None or whole(getattr(self, field), 0), "a token id")
        check("eos_id", self.eos_id is None or whole(self.eos_id, -1), "a token id, or -1")


def _is_integer(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@flax.struct.dataclass
class Generation:
    """Answers to a batch of prompts, and what each took.

    tokens: the answers, one int32 array per row, up to and including the end of sequence. written_at, confidence: one
    array per row like tokens: the step of its block that wrote each token (int32, from 0), and the token's probability
    in that step (float32). Per row, int32 [rows]: forward_passes (denoising), commit_passes (separate ones),
    prefill_passes, and positions_evaluated in all of them. Rows share passes: each counts those that worked for it.

    replay_tokens, replay_written_at, replay_confidence: the same up to the end of the answer's last block, with what
    was decoded behind the end of sequence or beyond gen_length: all that the model saw of its own. Where nothing was
    written before the answer stopped stand the mask, step -1 and probability 0. history: one history.History per row
    of all writes, edits included, if asked for; else None.
    """

    tokens: list[np.ndarray]
    forward_passes: np.ndarray
    commit_passes: np.ndarray
    prefill_passes: np.ndarray
    written_at: list[np.ndarray]
    confidence: list[np.ndarray]
    positions_evaluated: np.ndarray
    replay_tokens: list[np.ndarray]
    replay_written_at: list[np.ndarray]
    replay_confidence: list[np.ndarray]
    history: list[histories.History] | None = None

    @property
    def stop_length(self) -> np.ndarray:
        """int32 [rows]: lengths of the answers, where the replays go on."""
        return np.array([len(answer) for answer in self.tokens], np.int32)

    @property
    def tokens_per_forward(self) -> np.ndarray:
        """float64 [rows]: answer tokens over all the row's passes: prefill, denoising and commit."""
        passes = self.forward_passes + self.commit_passes + self.prefill_passes
        return self.stop_length / np.maximum(passes, 1)

    @property
    def steps(self) -> list[np.ndarray]:
        """Former name of written_at."""
        return self.written_at


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[ArrayLike],
    generate_config: GenerateConfig | Sequence[GenerateConfig],
    key: jax.Array | None = None,
    execution: Execution = Execution(),
    fuse_share: float | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    history: bool | int = False,
) -> Generation:
    """Decodes an answer to each prompt by block diffusion (Section 5.4), the whole batch in one compiled loop.

    prompts: 1-D int arrays of any length. generate_config: one for all prompts, or one per prompt. key: of draws at
    temperature > 0; None is jax.random.key(0). execution: as in DecodeSettings. fuse_share: 0 always commits finished
    blocks in two-block windows, above 1 never does; None takes what is cheaper for this batch on this device
    (sampling/cost.py). prefill_chunk: most tokens of a prompt that are computed at once, rounded down to whole blocks;
    longer prompts are computed in chunks. history: keep all writes (Generation.history); an int is the room for them
    per position, by default 8 with rule "llada2.1". A row's answer does not depend on the other rows. Raises InputError
    if the checkpoint has no mask token, the configs cannot share a batch, or a history had no room; ValueError on a bad
    prompt.

    Example:
        >>> import llada_jax
        >>> model = llada_jax.load_checkpoint("checkpoint")
        >>> settings = llada_jax.GenerateConfig(gen_length=8, block_length=8, steps=2)
        >>> out = llada_jax.generate(model.params, model.config, [model.tokenizer.encode("def f(")], settings)
        >>> 0 < len(out.tokens[0]) <= 8
        True
    """
    prompts = check_prompts(config, prompts)
    one = isinstance(generate_config, GenerateConfig)
    configs = [generate_config] * max(len(prompts), 1) if one else list(generate_config)
    if not one and len(configs) != len(prompts):
        raise InputError(f"{len(configs)} configs for {len(prompts)} prompts, expected one for each")
    settings = decode_settings(config, configs, execution, prefill_chunk, history)
    if not prompts:
        empty = np.zeros(0, np.int32)
        return Generation([], empty, empty, empty, [], [], empty, [], [], [], [] if settings.history else None)
    key = jax.random.key(0) if key is None else key
    keys = jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (2,), "uint32"))(jnp.arange(len(prompts)))
    lengths = np.array([len(prompt) for prompt in prompts])
    requests = requests_of(config, lengths, configs, jax.random.wrap_key_data(keys, impl=KEYS))
    canvas = int(requests.row_end.max())
    prefill_length = int(lengths.max()) // settings.block_length * settings.block_length
    if fuse_share is None:
        in_int8 = has_int8_experts(params)
        fuse_share = second_block_price(config, len(prompts), settings.block_length, int8_experts=in_int8)
    state = decode(params, config, settings, requests, pad(prompts, canvas), fuse_share, prefill_length)
    return collect(state, np.arange(len(prompts)), lengths, configs, requests.eos_ids, settings)


def decode_settings(
    config: ModelConfig, configs: Sequence[GenerateConfig], execution: Execution = Execution(),
    prefill_chunk: int = PREFILL_CHUNK, history: bool | int = False,
) -> DecodeSettings:  # fmt: skip
    """The static settings for requests with these configs. Raises InputError if they cannot share a batch."""
    if not _is_integer(prefill_chunk) or prefill_chunk < 1:
        raise InputError(f"prefill_chunk={prefill_chunk!r}, expected a positive integer")
    first = configs[0]
    for other in configs:
        for field in _SHARED:
            if getattr(other, field) != getattr(first, field):
                values = f"{getattr(first, field)!r} and {getattr(other, field)!r}"
                raise InputError(f"{field}: {values} in one batch, expected one value")
    mask_id = _mask_id(config, first)
    delete_id, insert_id = _edit_ids(config, first, mask_id) if first.rule == "llada2.2" else (-1, -1)
    return DecodeSettings(
        mask_id=mask_id,
        rule=first.rule,
        block_length=first.block_length,
        sample=any(g.temperature > 0 for g in configs),
        cut=any(g.temperature > 0 and (g.top_k is not None or (g.top_p or 1) < 1) for g in configs),
        prefill_chunk=max(prefill_chunk // first.block_length, 1) * first.block_length,
        slots=max(g.active_blocks for g in configs),
        history=histories.room(history, first.rule),
        execution=execution,
        delete_id=delete_id,
        insert_id=insert_id,
    )


def prefill_execution(longest: int) -> Execution:
    """How to prefill prompts of up to `longest` tokens on this device, and by which kernels the passes after it run; on
    the mesh in force, tokens meet the experts that are shared out over it.
    """
    mesh = sharding.mesh_in_force()
    how = {} if mesh is None or mesh.shape["expert"] == 1 else {"expert_parallel": "gather_tokens"}
    if jax.default_backend() == "tpu":
        return Execution(attention="kernel", experts="megablox", **how)
    return Execution(
        attention="blockwise" if longest > 1024 else "dense", **how
    )  # dense holds [longest, longest] scores


def requests_of(
    config: ModelConfig, lengths: np.ndarray, configs: Sequence[GenerateConfig], keys: jax.Array
) -> Requests:
    """Requests of [rows] from prompt lengths [rows], their configs and keys [rows]."""

    def field(dtype, value):
        return np.array([value(g) for g in configs], dtype)

    block = field(np.int32, lambda g: g.block_length)
    gen_length = field(np.int32, lambda g: g.gen_length)
    return Requests(
        prompt_length=lengths.astype(np.int32),
        row_end=(-(-(lengths + gen_length) // block) * block).astype(np.int32),
        max_steps=field(np.int32, lambda g: min(g.steps, g.gen_length)),
        threshold=field(np.float32, lambda g: g.threshold),
        editing_threshold=field(np.float32, lambda g: g.editing_threshold),
        max_post_steps=field(np.int32, lambda g: g.max_post_steps),
        max_steps_per_block=field(np.int32, lambda g: g.max_steps_per_block),
        entropy_bound=field(np.float32, lambda g: g.entropy_bound),
        active_blocks=field(np.int32, lambda g: g.active_blocks),
        add_block_threshold=field(np.float32, lambda g: g.add_block_threshold),
        semi_complete_threshold=field(np.float32, lambda g: g.semi_complete_threshold),
        eos_ids=field(np.int32, lambda g: eos_ids_of(config, g)),
        eos_early_stop=field(bool, lambda g: g.eos_early_stop),
        sampling=Sampling(
            temperature=field(np.float32, lambda g: g.temperature),
            top_k=field(np.int32, lambda g: g.top_k or 0),
            top_p=field(np.float32, lambda g: g.top_p or 1.0),
            key=keys,
        ),
    )


def pad(prompts: Sequence[np.ndarray], canvas: int) -> np.ndarray:
    """int32 [rows, canvas], zeros after each prompt."""
    padded = np.zeros((len(prompts), canvas), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    return padded


def collect(
    state: State,
    rows: np.ndarray,
    lengths: Sequence[int],
    configs: Sequence[GenerateConfig],
    eos_ids: Sequence[Sequence[int]],
    settings: DecodeSettings,
) -> Generation:
    """Returns the answers of the finished `rows` [n]. lengths [n]: of their prompts; eos_ids [n, ends]."""
    canvas = jax.device_get((state.tokens, state.written_at, state.confidence))
    counts = jax.device_get((state.denoising_passes, state.commit_passes, state.positions_evaluated))
    ends = jax.device_get(state.start)[rows] + settings.block_length
    answers, replays = [], []
    for row, start, end, g, eos in zip(rows, lengths, ends, configs, eos_ids, strict=True):
        tokens, written_at, confidence = replay = [array[row, start:end] for array in canvas]
        stop = len(cut(tokens[: g.gen_length], eos))
        answers.append([array[:stop] for array in replay])
        never = tokens == settings.mask_id
        replays.append([tokens, np.where(never, -1, written_at), np.where(never, 0, confidence)])
    denoising, commit, positions = (count[rows] for count in counts)
    prefilled = np.asarray(lengths) // settings.block_length * settings.block_length
    prefill = np.array([num_passes(length, settings) for length in lengths], np.int32)
    positions = (positions + prefilled).astype(np.int32)
    tokens, written_at, confidence = map(list, zip(*answers, strict=True))
    replays = map(list, zip(*replays, strict=True))
    history = histories.collect(state.log, rows, lengths, ends) if settings.history else None
    return Generation(tokens, denoising, commit, prefill, written_at, confidence, positions, *replays, history)


def cut(answer: np.ndarray, eos_ids: Sequence[int]) -> np.ndarray:
    """Up to and including the first end of sequence."""
    ends = np.flatnonzero(np.isin(answer, eos_ids))
    return answer[: ends[0] + 1] if len(ends) else answer


def _mask_id(config: ModelConfig, g: GenerateConfig) -> int:
    mask_id = config.mask_token_id if g.mask_id is None else g.mask_id
    if mask_id is None:
        raise InputError(
            "the checkpoint has no mask token: import it with --mask_token_id=N or --add_mask_token, or give mask_id"
        )
    if not 0 <= mask_id < config.vocab_size:
        raise InputError(f"mask_id={mask_id}, vocabulary is {config.vocab_size}")
    return mask_id


def _edit_ids(config: ModelConfig, g: GenerateConfig, mask_id: int) -> tuple[int, int]:
    """The tokens that delete and insert. Raises InputError naming the field."""
    ids = {"mask_id": mask_id}
    for name in ("delete", "insert"):
        field, given = f"{name}_id", getattr(g, f"{name}_id")
        value = getattr(config, f"{name}_token_id") if given is None else given
        if value is None:
            raise InputError(f"rule=llada2.2: the checkpoint names no token that {name}s: give {field}")
        if value >= config.vocab_size or value in ids.values():
            known = ", ".join(f"{key}={other}" for key, other in ids.items())
            raise InputError(f"{field}={value}, expected another token than {known}, below {config.vocab_size}")
        ids[field] = value
    return ids["delete_id"], ids["insert_id"]


def eos_ids_of(config: ModelConfig, g: GenerateConfig) -> list[int]:
    """Ends of sequence that stop a request, padded with -1 (none) to the same length for all requests to a model."""
    ids = list(config.eos_token_ids) if g.eos_id is None else [g.eos_id]
    return ids + [-1] * (max(len(config.eos_token_ids), 1) - len(ids))


def check_prompts(config: ModelConfig, prompts: Sequence[ArrayLike]) -> list[np.ndarray]:
    """Returns the prompts as 1-D int32 arrays. Raises ValueError naming the first bad one."""
    checked = []
    for row, prompt in enumerate(prompts):
        prompt = np.asarray(prompt)
        if prompt.ndim != 1 or (prompt.size and not np.issubdtype(prompt.dtype, np.integer)):
            raise ValueError(f"prompt {row} has shape {prompt.shape} and dtype {prompt.dtype}, expected 1-D integers")
        if prompt.size and (prompt.min() < 0 or prompt.max() >= config.vocab_size):
            raise ValueError(f"prompt {row} holds an id outside the vocabulary of {config.vocab_size}")
        if not prompt.size and config.alignment == "shifted":
            raise ValueError(f"prompt {row} is empty: a shifted model needs a token to predict the first one from")
        checked.append(prompt.astype(np.int32))
    return checked
