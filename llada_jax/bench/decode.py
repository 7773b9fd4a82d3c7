"""Measures decoding: throughput by batch size, the cache against recomputation, and the share of busy rows."""

import contextlib
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.attention.visibility import block_causal, make_layout
from llada_jax.bench.timing import least_seconds
from llada_jax.model import experts, head
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution, hidden_states
from llada_jax.sampling import accept, decode
from llada_jax.sampling.batches.prefixes import Prefixes
from llada_jax.sampling.batching import Batch, Request, Usage, serve
from llada_jax.sampling.generate import GenerateConfig, decode_settings, generate, pad, prefill_execution, requests_of
from llada_jax.sampling.state import KEYS, empty_state

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Throughput for a batch of ragged prompts. positions: evaluated per token of an answer, over all passes."""

    rows: int
    commit: str
    tokens_per_second: float
    seconds_per_pass: float
    passes: int
    commit_passes: float
    positions: float


def throughput(params, config: ModelConfig, rows: int, commit: str, gen_length: int, steps: int) -> Throughput:
    """Decodes `rows` answers of gen_length tokens, `steps` steps per block. commit: "fused", "separate" or "chosen"."""
    rng = np.random.default_rng(rows)
    prompts = [rng.integers(0, config.vocab_size - 16, rng.integers(1, 65)) for _ in range(rows)]
    g = GenerateConfig(gen_length=gen_length, block_length=BLOCK, steps=steps, threshold=2.0, eos_id=-1)
    share = {"fused": 0.0, "separate": 2.0, "chosen": None}[commit]
    out = generate(params, config, prompts, g, fuse_share=share)
    seconds = least_seconds(lambda: generate(params, config, prompts, g, fuse_share=share))
    passes = int((out.forward_passes + out.commit_passes).max())
    tokens = rows * gen_length
    return Throughput(
        rows=rows, commit=commit, tokens_per_second=tokens / seconds, seconds_per_pass=seconds / passes, passes=passes,
        commit_passes=float(out.commit_passes.mean()), positions=float(out.positions_evaluated.sum() / tokens),
    )  # fmt: skip


def cached_against_recomputed(params, config: ModelConfig, tokens: int = 512) -> tuple[float, float, float]:
    """Returns (seconds with the cache, seconds with the prefix recomputed in every step, share of equal tokens).

    Decodes `tokens` tokens, one per forward pass. The share counts tokens before the first difference, which rounding
    may cause at a near tie. Recomputation is the reference's algorithm: a jitted pass over all positions up to the end
    of the current block, with logits of that block only, one program per length, all on the device. Same alignment
    only.
    """
    g = GenerateConfig(gen_length=tokens - 1, block_length=BLOCK, threshold=2.0, eos_id=-1)
    prompt = np.array([3], np.int32)
    canvas = np.full((1, tokens), config.mask_token_id, np.int32)
    canvas[0, 0] = prompt[0]

    @functools.partial(jax.jit, static_argnames=("end",), donate_argnames=("canvas",))
    def step(canvas, masked, end):
        window = canvas[:, :end]
        visibility = block_causal(make_layout(jnp.ones_like(window), BLOCK))
        positions = jnp.broadcast_to(jnp.arange(end), window.shape)
        hidden, _ = hidden_states(params, config, window, positions, visibility)
        logits = head.logits(params, config, hidden[:, -BLOCK:]).at[..., config.mask_token_id].set(-jnp.inf)
        token = jnp.argmax(logits, axis=-1)
        confidence = jnp.exp(logits.max(-1) - jax.nn.logsumexp(logits, axis=-1))
        chosen = accept.top(confidence, masked, jnp.ones(1, jnp.int32))
        block = jnp.where(chosen, token, window[:, -BLOCK:])
        return jax.lax.dynamic_update_slice(canvas, block, (0, end - BLOCK)), masked & ~chosen

    def recomputed():
        tokens_now = jnp.asarray(canvas)
        for end in range(BLOCK, tokens + 1, BLOCK):
            masked = jnp.asarray(np.arange(end - BLOCK, end)[None] > 0)
            for _ in range(BLOCK if end > BLOCK else BLOCK - 1):
                tokens_now, masked = step(tokens_now, masked, end)
        return np.asarray(tokens_now)[0, 1:]

    def cached():
        return generate(params, config, [prompt], g).tokens[0]

    differs = np.append(recomputed() != cached(), True)
    seconds = [(least_seconds(cached, 1), least_seconds(recomputed, 1)) for _ in range(3)]  # in turn
    return min(pair[0] for pair in seconds), min(pair[1] for pair in seconds), float(differs.argmax() / (tokens - 1))


def question_seconds(
    params, config: ModelConfig, chunk: int, shared: int = 2048, own: int = 64, rounds: int = 9
) -> tuple[float, float]:
    """Seconds to the first block of an answer: (all of the prompt computed, its first `shared` tokens known).

    Medians, in turn. Every prompt ends in `own` tokens that no other has. A block takes 4 steps. Raises RuntimeError if
    the answers differ.
    """
    rng = np.random.default_rng(chunk)
    g = GenerateConfig(gen_length=BLOCK, block_length=BLOCK, steps=4, threshold=2.0, eos_id=-1)
    length, vocab = shared + own + BLOCK, config.vocab_size - 16
    how = dict(execution=prefill_execution(length), prefill_chunk=chunk)
    batches = [Batch(params, config, 1, length, prefixes=known, **how) for known in (None, Prefixes(2**40))]
    common, seconds = rng.integers(0, vocab, shared), []
    for number in range(-1, rounds):  # the first one compiles, and makes the prompt known
        request = Request(np.concatenate([common, rng.integers(0, vocab, own)]), g, 0)
        seconds.append([])
        answers = []
        for batch in batches:
            begin = time.perf_counter()
            batch.admit(number, request)
            while not (done := batch.step(1).answers):
                pass
            seconds[-1].append(time.perf_counter() - begin)
            answers.append(done[0].tokens)
        if not np.array_equal(*answers):
            raise RuntimeError("a known prompt has another answer")
    return tuple(np.median(seconds[1:], axis=0).tolist())


def step_seconds(params, config: ModelConfig, prefixes=(0, 512)) -> dict[int, float]:
    """{prefix length: seconds of a denoising step} for one row, in the first block after the prefix."""
    g = GenerateConfig(gen_length=BLOCK, block_length=BLOCK, threshold=2.0, eos_id=-1)
    settings = decode_settings(config, [g])
    canvas = max(prefixes) + BLOCK
    steps = BLOCK - 2
    seconds = {prefix: [] for prefix in prefixes}
    for _ in range(6):  # in turn: all see the same machine
        for prefix in prefixes:
            prompt = np.arange(prefix + 1, dtype=np.int32) % 256
            request = dataclasses.replace(g, gen_length=BLOCK - 1)
            key = jax.random.key(0, impl=KEYS)[None]
            requests = requests_of(config, np.array([prefix + 1]), [request], key)
            state = empty_state(config, settings, 1, canvas, str(params["embedding"].dtype))
            rows = np.zeros(1, np.int32)
            state = decode.admit(params, config, settings, state, rows, requests, pad([prompt], canvas), prefix)
            jax.block_until_ready(state)
            begin = time.perf_counter()
            jax.block_until_ready(decode.advance(params, config, settings, state, jnp.int32(steps)))
            seconds[prefix].append((time.perf_counter() - begin) / steps)
    return {prefix: min(times[1:]) for prefix, times in seconds.items()}


def pass_seconds(params, config: ModelConfig, rows: int) -> tuple[float, float]:
    """Returns (seconds of a pass over one block, over two blocks)."""
    g = GenerateConfig(gen_length=BLOCK, block_length=BLOCK)
    settings = decode_settings(config, [g])
    state = empty_state(config, settings, rows, 4 * BLOCK, str(params["embedding"].dtype))
    state = state.replace(start=state.start + BLOCK)
    one_or_two = [
        jax.jit(functools.partial(decode.window_pass, params, config, settings, blocks=blocks)) for blocks in (1, 2)
    ]
    return tuple(least_seconds(lambda p=p: p(state), 11) for p in one_or_two)  # one compiles


def ragged_requests(config: ModelConfig, count: int, longest: int = 192) -> list[Request]:
    """Prompts of 1 to 64 tokens and answers of 16 to `longest`, a function of `count`."""
    rng = np.random.default_rng(count)
    return [
        Request(
            rng.integers(0, config.vocab_size - 16, rng.integers(1, 65)),
            GenerateConfig(int(rng.integers(16, longest + 1)), BLOCK, steps=16, threshold=2.0, eos_id=-1),
        )
        for _ in range(count)
    ]


def continuous(params, config: ModelConfig, count: int, rows: int) -> tuple[Usage, float, int]:
    """(usage, seconds with compilation, tokens) for `count` ragged requests over `rows` rows."""
    usage, begin = Usage(), time.perf_counter()
    answers = list(serve(params, config, ragged_requests(config, count), rows, 64 + 192, usage=usage))
    return usage, time.perf_counter() - begin, sum(len(answer.tokens) for answer in answers)


def expert_hits(params, config: ModelConfig, tokens: int) -> np.ndarray:
    """Distinct experts that `tokens` random tokens reach per sparse layer, measured in one pass."""
    hits: list[int] = []
    original = experts.route

    def recording(x, router, bias, config):
        chosen, weights = original(x, router, bias, config)
        jax.debug.callback(lambda chosen: hits.append(len(np.unique(chosen))), chosen)
        return chosen, weights

    @contextlib.contextmanager
    def recorded():
        experts.route = recording
        try:
            yield
        finally:
            experts.route = original

    ids = np.random.default_rng(tokens).integers(0, config.vocab_size - 16, (1, tokens), dtype=np.int32)
    visibility = block_causal(make_layout(jnp.ones_like(ids), BLOCK))
    positions = jnp.broadcast_to(jnp.arange(tokens), ids.shape)
    with recorded():
        run = jax.jit(lambda params: hidden_states(params, config, ids, positions, visibility, Execution())[0])
        jax.block_until_ready(run(params))
        jax.effects_barrier()
    return np.array(hits)
