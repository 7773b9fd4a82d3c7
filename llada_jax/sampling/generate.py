"""`generate`: prompts in, answers out."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.sampling import accept
from llada_jax.sampling.decode import Program, Requests, decode

RULES = ("llada2", "llada2.1")


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """How to decode.

    gen_length: most tokens of an answer. block_length: tokens decoded together. steps: most steps a block may take
    (ignored by "llada2.1"). threshold: probability above which a token is accepted (above 1: the schedule decides).
    temperature 0 is argmax. mask_id, eos_id: None is the checkpoint's; eos_id -1 never stops. eos_early_stop: stop
    inside a block once all before the first end of sequence is written. rule "llada2.1" also edits written tokens
    whose prediction changed with probability above editing_threshold (0: always), for at most max_post_steps steps
    after a block is full.
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

    def __post_init__(self):
        def check(field, ok, expected):
            if not ok:
                raise InputError(f"{field}={getattr(self, field)!r}, expected {expected}")

        for field in ("gen_length", "block_length", "steps"):
            value = getattr(self, field)
            check(field, isinstance(value, int) and value >= 1, "a positive integer")
        check("temperature", self.temperature >= 0, "at least 0")
        check("top_k", self.top_k is None or self.top_k >= 1, "at least 1")
        check("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]")
        check("threshold", self.threshold >= 0, "at least 0")
        check("rule", self.rule in RULES, f"one of {', '.join(RULES)}")
        check("editing_threshold", self.editing_threshold >= 0, "at least 0")
        check("max_post_steps", self.max_post_steps >= 0, "at least 0")


@flax.struct.dataclass
class Generation:
    """tokens: the answers, one int32 array a row, up to and including the end of sequence.

    Per row, int32 [rows]: forward_passes (denoising), commit_passes and prefill_passes. Passes over the batch are
    shared, so these are counts of the row's own use.
    """

    tokens: list[np.ndarray]
    forward_passes: np.ndarray
    commit_passes: np.ndarray
    prefill_passes: np.ndarray


def generate(
    params, config: ModelConfig, prompts, generate_config: GenerateConfig, key=None, execution: Execution = Execution()
) -> Generation:
    """Decodes an answer to each prompt by block diffusion (Section 5.4).

    prompts: 1-D int arrays, of any lengths. key: for temperature > 0; None is jax.random.key(0). A row's answer does
    not depend on the others. Raises InputError when the checkpoint has no mask token, ValueError on a bad prompt.
    """
    g = generate_config
    mask_id, eos_id = _special_tokens(config, g)
    prompts = _check_prompts(config, prompts)
    if not prompts:
        empty = np.zeros(0, np.int32)
        return Generation([], empty, empty, empty)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    row_end = -(-(lengths + g.gen_length) // g.block_length) * g.block_length
    canvas = int(row_end.max())
    tokens = np.full((len(prompts), canvas), mask_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    masked = np.arange(canvas) >= lengths[:, None]
    key = jax.random.key(0) if key is None else key
    requests = Requests(
        prompt_length=jnp.asarray(lengths),
        row_end=jnp.asarray(row_end),
        due=jnp.asarray(accept.schedule(g.block_length, min(g.steps, g.gen_length)), jnp.int32),
        threshold=jnp.float32(g.threshold),
        editing_threshold=jnp.float32(g.editing_threshold),
        temperature=jnp.float32(g.temperature or 1.0),
        top_p=jnp.float32(g.top_p or 1.0),
        mask_id=jnp.int32(mask_id),
        eos_id=jnp.int32(eos_id),
        keys=jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(prompts))),
    )
    program = Program(g.rule, g.block_length, g.temperature > 0, g.top_k, g.eos_early_stop, g.max_post_steps, execution)
    prefill_length = int(lengths.max()) // g.block_length * g.block_length
    state = decode(params, config, program, requests, tokens, masked, prefill_length)
    final = np.asarray(state.tokens)
    answers = [_cut(final[row, n : n + g.gen_length], eos_id) for row, n in enumerate(lengths)]
    prefilled = (lengths >= g.block_length).astype(np.int32)
    return Generation(answers, np.asarray(state.denoising_passes), np.asarray(state.commit_passes), prefilled)


def _cut(answer: np.ndarray, eos_id: int) -> np.ndarray:
    ends = np.flatnonzero(answer == eos_id)
    return answer[: ends[0] + 1] if len(ends) else answer


def _special_tokens(config: ModelConfig, g: GenerateConfig) -> tuple[int, int]:
    mask_id = config.mask_token_id if g.mask_id is None else g.mask_id
    if mask_id is None:
        raise InputError(
            "the checkpoint has no mask token: import it with --mask_token_id=N or --add_mask_token, or give mask_id"
        )
    if not 0 <= mask_id < config.vocab_size:
        raise InputError(f"mask_id={mask_id}, vocabulary is {config.vocab_size}")
    eos_id = config.eos_token_id if g.eos_id is None else g.eos_id
    return mask_id, -1 if eos_id is None else eos_id


def _check_prompts(config: ModelConfig, prompts) -> list[np.ndarray]:
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
