"""Decoding against plain recomputation, alone against in a batch, and what it refuses."""

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig, sharding
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.sampling import accept
from llada_jax.sampling.decode import iterate
from llada_jax.sampling.generate import decode_settings, prefill_execution
from llada_jax.sampling.state import empty_state

CONFIGS = {
    "same": preset("tiny_moe").replace(num_layers=2, num_dense_layers=0),
    "shifted": preset("tiny").replace(num_layers=2, alignment="shifted"),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    params = parameters.initialize(config, jax.random.key(3))
    return jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params), config  # logits with some spread


# One program decodes a single row in most tests here: canvas of 20, of which 8 are prefilled.
ONE = dict(gen_length=12, block_length=4, eos_id=-1)
PROMPT = np.arange(8)


def recompute(params, config, prompt, g: GenerateConfig, canvas: int):
    """LLaDA2's algorithm with no cache: every step runs the whole two-stream pass over [canvas | canvas]."""
    b, p = g.block_length, len(prompt)
    total = -(-(p + g.gen_length) // b) * b
    tokens = np.full(canvas, config.mask_token_id)
    tokens[:p] = prompt
    masked = np.arange(canvas) >= p
    steps, passes = min(g.steps, g.gen_length), 0
    due = [accept.due(b, steps, step) for step in range(steps)]
    for start in range(p // b * b, total, b):
        for step in range(len(due)):
            window = np.arange(start, start + b)
            if not masked[window].any():
                break
            logits = llada_jax.denoise(params, config, tokens[None], tokens[None], block_size=b)[0, window]
            logits = np.asarray(logits, np.float64)
            passes += 1
            probability = np.exp(logits - np.logaddexp.reduce(logits, -1)[:, None])
            logits[:, config.mask_token_id], probability[:, config.mask_token_id] = -np.inf, 0
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
    fused, separate = (llada_jax.generate(params, config, prompts, g, fuse_share=share) for share in (0.0, 2.0))
    for row, prompt in enumerate(prompts):
        expected, passes = recompute(params, config, prompt, g, canvas=36)
        for out in (fused, separate):
            assert np.array_equal(out.tokens[row], expected), row
            assert out.forward_passes[row] == passes
    assert fused.commit_passes.sum() == 0
    decoded = [(len(prompt) + 9) // b - len(prompt) // b for prompt in prompts]  # blocks but the last
    assert separate.commit_passes.tolist() == decoded
    prefilled = np.array([len(prompt) // b * b for prompt in prompts])
    assert separate.prefill_passes.tolist() == (prefilled > 0).tolist()
    evaluated = prefilled + b * (separate.forward_passes + separate.commit_passes)
    assert separate.positions_evaluated.tolist() == evaluated.tolist()
    total = separate.forward_passes + separate.commit_passes + separate.prefill_passes
    assert np.allclose(separate.tokens_per_forward, 10 / total)


def test_alone_and_in_a_batch_of_other_settings(model):
    params, config = model
    prompts = [np.arange(9), np.arange(3) + 40, np.arange(14) + 7]
    changes = (dict(threshold=2.0), dict(gen_length=3, steps=1), dict(temperature=0.8, top_k=20, top_p=0.9))
    configs = [GenerateConfig(**dict(gen_length=8, block_length=4, eos_id=-1) | change) for change in changes]
    batch = llada_jax.generate(params, config, prompts, configs)
    greedy = llada_jax.generate(params, config, prompts[:1], configs[0])
    assert np.array_equal(batch.tokens[0], greedy.tokens[0]) and len(batch.tokens[1]) == 3
    drawn = [llada_jax.generate(params, config, [*prompts[:2], prompts[2]], configs[2]).tokens[2]]
    assert np.array_equal(batch.tokens[2], drawn[0])


def test_steps_and_confidence_say_when_and_how_surely_each_token_was_written(model):
    params, config = model
    out = llada_jax.generate(params, config, [PROMPT], GenerateConfig(**ONE, threshold=2.0))
    steps, confidence = out.written_at[0].reshape(3, 4), out.confidence[0]
    assert (np.sort(steps) == np.arange(4)).all()  # one token a step
    assert ((confidence > 0) & (confidence <= 1)).all()
    first = int(np.argmin(steps[0]))
    noisy = np.append(PROMPT, [config.mask_token_id] * 28)
    logits = np.array(llada_jax.denoise(params, config, noisy[None], noisy[None], block_size=4)[0, 8 + first])
    norm = np.logaddexp.reduce(logits)  # of all of them, the mask's too
    logits[config.mask_token_id] = -np.inf
    assert np.isclose(np.exp(logits.max() - norm), confidence[first], rtol=1e-3)


@pytest.mark.parametrize("rule", ["sglang", "dinfer", "entropy", "fixed"])
def test_other_rules(model, rule):
    params, config = model
    shared = dict(ONE, rule=rule)
    sure = GenerateConfig(**shared, threshold=0.0, entropy_bound=1e9, steps=1)
    unsure = GenerateConfig(**shared, threshold=2.0, entropy_bound=0.0)
    out = llada_jax.generate(params, config, [PROMPT] * 2, [sure, unsure])
    if rule == "dinfer":  # which takes near-ties of the largest together
        unsure_passes = range(3, 13)
    else:
        unsure_passes = [12]  # a token a step
    assert out.forward_passes[0] == 3 and out.forward_passes[1] in unsure_passes
    assert config.mask_token_id not in out.tokens[0]
    one_by_one = llada_jax.generate(params, config, [PROMPT], GenerateConfig(**ONE, threshold=2.0))
    if rule in ("sglang", "fixed"):
        assert np.array_equal(out.tokens[1], one_by_one.tokens[0])


@pytest.mark.parametrize("rule", ["sglang", "llada2"])
def test_stops_inside_a_block_once_all_before_the_end_is_written(model, rule):
    params, config = model
    shared = dict(gen_length=12, block_length=12, threshold=2.0, rule=rule)
    free = llada_jax.generate(params, config, [np.arange(12)], GenerateConfig(**shared, eos_id=-1))
    # The position whose prefix is written first: ending there must stop the block early.
    done = [int(max(free.written_at[0][: i + 1])) + 1 for i in range(12)]
    at = int(np.argmin(done))
    g = GenerateConfig(**shared, eos_id=int(free.tokens[0][at]), eos_early_stop=True)
    out = llada_jax.generate(params, config, [np.arange(12)], g)
    first = int(np.flatnonzero(free.tokens[0] == g.eos_id)[0])
    assert np.array_equal(out.tokens[0], free.tokens[0][: first + 1])
    assert out.forward_passes[0] <= done[at]


def test_all_probability_on_the_mask_token_still_ends(model):
    params, config = model
    params = dict(params, head=params["head"].at[:, config.mask_token_id].set(params["head"].sum(1) * 50))
    out = llada_jax.generate(params, config, [np.arange(9)], GenerateConfig(**ONE | dict(gen_length=11)))
    assert len(out.tokens[0]) == 11 and config.mask_token_id not in out.tokens[0]


def test_the_kernel_of_attention_writes_the_same_answer(model):
    params, config = model
    prompts = [PROMPT, PROMPT[:3]]
    kernel = Execution(attention="kernel", interpret=True)
    expected, found = (
        llada_jax.generate(params, config, prompts, GenerateConfig(**ONE), execution=execution, fuse_share=0.0)
        for execution in (Execution(), kernel)
    )
    for a, b in zip(expected.tokens, found.tokens, strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(expected.confidence, found.confidence, strict=True):
        assert np.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
    ("backend", "longest", "expected"),
    [("tpu", 10, ("kernel", "megablox")), ("cpu", 10, ("dense", "xla")), ("gpu", 2000, ("blockwise", "xla"))],
)
def test_a_tpu_decodes_by_its_kernels(monkeypatch, backend, longest, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    execution = prefill_execution(longest)
    assert (execution.attention, execution.experts) == expected


def test_a_mesh_decodes_as_one_device_does(model):
    params, config = model
    prompts = [np.arange(n) for n in (3, 6, 9, 12)]
    g = GenerateConfig(gen_length=8, block_length=4, threshold=0.3, eos_id=-1)
    expected = llada_jax.generate(params, config, prompts, g)
    mesh = sharding.make_mesh(data=4, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, parameters.logical_axes(config), mesh))
        out = llada_jax.generate(placed, config, prompts, g)
    assert all(np.array_equal(a, b) for a, b in zip(out.tokens, expected.tokens, strict=True))


def test_the_step_can_be_compiled_from_abstract_arguments(model):
    params, config = model
    settings = decode_settings(config, [GenerateConfig(gen_length=8, block_length=4)])
    abstract = jax.eval_shape(lambda: empty_state(config, settings, 4, 16, "float32"))
    step = jax.jit(iterate, static_argnames=("config", "settings"))
    shapes = jax.eval_shape(lambda: params)
    lowered = step.lower(shapes, config, settings, abstract)
    assert jax.tree.structure(lowered.out_info) == jax.tree.structure(abstract)


def test_end_of_sequence_is_looked_for_among_generated_tokens_only(model):
    params, config = model
    prompt = np.arange(9)
    shared = dict(gen_length=10, block_length=4, threshold=0.3)
    g = GenerateConfig(**shared, eos_id=-1)
    free = llada_jax.generate(params, config, [prompt], g).tokens[0]
    eos = int(free[5])
    stopped = llada_jax.generate(params, config, [prompt], GenerateConfig(**shared, eos_id=eos)).tokens[0]
    first = int(np.flatnonzero(free == eos)[0])
    assert np.array_equal(stopped, free[: first + 1])
    # The same id in the prompt changes the answer's tokens, but does not end it before it begins.
    with_eos = np.append(prompt, eos)
    with_eos = llada_jax.generate(params, config, [with_eos], GenerateConfig(**shared, eos_id=eos)).tokens[0]
    assert len(with_eos) >= 1


def test_prompt_holding_the_mask_token_keeps_it(model):
    params, config = model
    prompt = np.array([1, config.mask_token_id, 2, 3, 4] * 2)
    out = llada_jax.generate(params, config, [prompt], GenerateConfig(**ONE | dict(gen_length=10)))
    assert len(out.tokens[0]) == 10 and config.mask_token_id not in out.tokens[0]


def test_sampling_depends_on_key_and_request_alone(model):
    params, config = model
    g = GenerateConfig(gen_length=8, block_length=4, temperature=1.0, top_k=50, top_p=0.9, eos_id=-1)
    prompts = [np.arange(9), np.arange(3), np.arange(14)]
    one = llada_jax.generate(params, config, prompts, g, key=jax.random.key(1))
    again = llada_jax.generate(params, config, prompts, g, key=jax.random.key(1))
    other = llada_jax.generate(params, config, prompts, g, key=jax.random.key(2))
    alone = llada_jax.generate(params, config, prompts[:1], g, key=jax.random.key(1))
    assert all(np.array_equal(a, b) for a, b in zip(one.tokens, again.tokens, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    assert np.array_equal(alone.tokens[0], one.tokens[0])


def test_top_k_of_one_is_argmax(model):
    params, config = model
    prompts = [np.arange(10)]
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
    [
        ("gen_length", 0),
        ("block_length", 0),
        ("steps", -1),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("rule", "best"),
        ("entropy_bound", -1.0),
        ("threshold", float("nan")),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "0.5"),
        ("top_p", float("nan")),
        ("entropy_bound", float("nan")),
        ("editing_threshold", None),
        ("top_k", 2.5),
        ("top_k", True),
        ("steps", 2.0),
        ("gen_length", True),
        ("gen_length", 2**31),
        ("max_post_steps", 0.5),
        ("eos_early_stop", 1),
        ("eos_id", "</s>"),
        ("mask_id", -1),
    ],
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


def test_refuses_configs_that_cannot_share_a_batch(model):
    params, config = model
    one, other = GenerateConfig(gen_length=4), GenerateConfig(gen_length=4, block_length=16)
    with pytest.raises(InputError, match="block_length: 32 and 16 in one batch"):
        llada_jax.generate(params, config, [np.arange(3)] * 2, [one, other])
    with pytest.raises(InputError, match="1 configs for 2 prompts"):
        llada_jax.generate(params, config, [np.arange(3)] * 2, [one])
