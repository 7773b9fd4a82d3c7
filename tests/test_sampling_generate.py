"""Decoding against plain recomputation, alone against in a batch, and what it refuses."""

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling import accept

CONFIGS = {
    "same": preset("tiny_moe").replace(num_layers=2),
    "shifted": preset("tiny").replace(num_layers=2, alignment="shifted"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    params = parameters.initialize(config, jax.random.key(3))
    return jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params), config  # logits with some spread


def recompute(params, config, prompt, g: GenerateConfig):
    """LLaDA2's algorithm with no cache: every step runs the whole two-stream pass over [canvas | canvas]."""
    b, p = g.block_length, len(prompt)
    total = -(-(p + g.gen_length) // b) * b
    tokens = np.full(total, config.mask_token_id)
    tokens[:p] = prompt
    masked = np.arange(total) >= p
    due, passes = accept.schedule(b, min(g.steps, g.gen_length)), 0
    for start in range(p // b * b, total, b):
        for step in range(len(due)):
            window = np.arange(start, start + b)
            if not masked[window].any():
                break
            logits = llada_jax.denoise(params, config, tokens[None], tokens[None], block_size=b)[0, window]
            logits = np.asarray(logits, np.float64)
            passes += 1
            logits[:, config.mask_token_id] = -np.inf
            probability = np.exp(logits - np.logaddexp.reduce(logits, -1)[:, None])
            confidence = np.where(masked[window], probability.max(-1), -np.inf)
            chosen = confidence > g.threshold
            if chosen.sum() < due[step]:
                chosen = np.zeros(b, bool)
                chosen[np.argsort(-confidence, kind="stable")[: min(due[step], masked[window].sum())]] = True
            tokens[window[chosen]] = logits.argmax(-1)[chosen]
            masked[window[chosen]] = False
        if g.eos_id in tokens[p : start + b]:
            break
    answer = tokens[p : p + g.gen_length]
    end = np.flatnonzero(answer == g.eos_id)
    return (answer[: end[0] + 1] if len(end) else answer), passes


def test_equals_recomputation_for_ragged_prompts_and_batches(model):
    params, config = model
    rng = np.random.default_rng(0)
    b = 4
    prompts = [rng.integers(0, 500, n) for n in (1, b - 1, b, b + 1, 5 * b + 3)]
    g = GenerateConfig(gen_length=10, block_length=b, steps=3, threshold=0.3, eos_id=-1)
    batched = llada_jax.generate(params, config, prompts, g)
    for row, prompt in enumerate(prompts):
        expected, passes = recompute(params, config, prompt, g)
        assert np.array_equal(batched.tokens[row], expected), row
        assert batched.forward_passes[row] == passes
        alone = llada_jax.generate(params, config, [prompt], g)
        assert np.array_equal(alone.tokens[0], expected)


def test_end_of_sequence_is_looked_for_among_generated_tokens_only(model):
    params, config = model
    prompt = np.arange(10)
    g = GenerateConfig(gen_length=12, block_length=4, threshold=0.3, eos_id=-1)
    free = llada_jax.generate(params, config, [prompt], g).tokens[0]
    eos = int(free[5])
    stopped = llada_jax.generate(
        params, config, [np.append(prompt[:-1], prompt[-1])],
        GenerateConfig(gen_length=12, block_length=4, threshold=0.3, eos_id=eos),
    ).tokens[0]  # fmt: skip
    first = int(np.flatnonzero(free == eos)[0])
    assert np.array_equal(stopped, free[: first + 1])
    # The same id in the prompt changes the answer's tokens, but does not end it before it begins.
    with_eos = llada_jax.generate(
        params, config, [np.append(prompt, eos)],
        GenerateConfig(gen_length=12, block_length=4, threshold=0.3, eos_id=eos),
    ).tokens[0]  # fmt: skip
    assert len(with_eos) >= 1


def test_prompt_holding_the_mask_token_keeps_it(model):
    params, config = model
    prompt = np.array([1, config.mask_token_id, 2, 3, 4])
    out = llada_jax.generate(params, config, [prompt], GenerateConfig(gen_length=6, block_length=4, eos_id=-1))
    assert len(out.tokens[0]) == 6 and config.mask_token_id not in out.tokens[0]


def test_sampling_depends_on_key_and_request_alone(model):
    params, config = model
    g = GenerateConfig(gen_length=8, block_length=4, temperature=1.0, top_k=50, top_p=0.9, eos_id=-1)
    prompts = [np.arange(5), np.arange(7)]
    one = llada_jax.generate(params, config, prompts, g, key=jax.random.key(1))
    again = llada_jax.generate(params, config, prompts, g, key=jax.random.key(1))
    other = llada_jax.generate(params, config, prompts, g, key=jax.random.key(2))
    alone = llada_jax.generate(params, config, prompts[:1], g, key=jax.random.key(1))
    assert all(np.array_equal(a, b) for a, b in zip(one.tokens, again.tokens, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    assert np.array_equal(alone.tokens[0], one.tokens[0])


def test_top_k_of_one_is_argmax(model):
    params, config = model
    prompts = [np.arange(6)]
    shared = dict(gen_length=8, block_length=4, steps=4, threshold=2.0, eos_id=-1)
    greedy = llada_jax.generate(params, config, prompts, GenerateConfig(**shared))
    # With one candidate its probability is 1, so order by schedule is the only freedom left: one token a step.
    drawn = llada_jax.generate(
        params, config, prompts, GenerateConfig(**shared | dict(steps=1), temperature=0.7, top_k=1)
    )
    all_at_once = llada_jax.generate(params, config, prompts, GenerateConfig(**shared | dict(steps=1)))
    assert np.array_equal(drawn.tokens[0], all_at_once.tokens[0])
    assert greedy.forward_passes[0] == 2 + 4 + 4  # the prompt's tail shares the first block


@pytest.mark.parametrize(
    "field,value",
    [("gen_length", 0), ("block_length", 0), ("steps", -1), ("temperature", -0.1), ("top_p", 0.0), ("rule", "best")],
)
def test_refuses_values_out_of_range(field, value):
    with pytest.raises(InputError, match=field):
        GenerateConfig(**{"gen_length": 4, field: value})


def test_refuses_a_checkpoint_without_mask_token(model):
    params, config = model
    with pytest.raises(InputError, match="--add_mask_token"):
        llada_jax.generate(params, config.replace(mask_token_id=None), [np.arange(3)], GenerateConfig(gen_length=4))


def test_refuses_bad_prompts(model):
    params, config = model
    g = GenerateConfig(gen_length=4)
    with pytest.raises(ValueError, match="prompt 1 holds an id outside"):
        llada_jax.generate(params, config, [np.arange(3), np.array([512])], g)
    if config.alignment == "shifted":
        with pytest.raises(ValueError, match="prompt 0 is empty"):
            llada_jax.generate(params, config, [np.zeros(0, int)], g)
    assert llada_jax.generate(params, config, [], g).tokens == []


def test_schedule_spreads_the_block_over_the_steps():
    assert accept.schedule(8, 3) == [3, 3, 2]
    assert accept.schedule(4, 6) == [1, 1, 1, 1, 0, 0]
