"""Several blocks of a row at once, against plain recomputation of every pass with no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig, sharding
from llada_jax.attention.decoding import prefix
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.model.forward import Execution
from llada_jax.sampling import decode
from llada_jax.sampling.batching import Request, in_order, serve
from llada_jax.sampling.generate import decode_settings, pad, requests_of
from llada_jax.sampling.prefill import prefill_whole
from llada_jax.sampling.state import KEYS, empty_state
from tests.helpers.plain_decoding import plain_decode

B, CANVAS, LENGTHS = 4, 28, (6, 3, 8, 1)
TINY = preset("tiny").replace(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
CONFIGS = {
    "same": TINY,
    "shifted": TINY.replace(alignment="shifted"),
    "moe": preset("tiny_moe").replace(num_layers=2, hidden_size=32),
}
# Settings with which a block is neither filled in one pass nor token by token, and which may leave two behind at once.
RULES = {
    "llada2": dict(threshold=0.15, steps=3),
    "llada2.1": dict(threshold=0.15, editing_threshold=0.05, max_post_steps=2),
    "sglang": dict(threshold=0.15),
    "dinfer": dict(threshold=0.15),
    "entropy": dict(entropy_bound=3.0),
    "fixed": dict(steps=3),
}


@functools.cache
def model(name="same"):
    config = CONFIGS[name]
    params = parameters.initialize(config, jax.random.key(2))
    params = jax.tree.map(lambda w: 12 * w if w.ndim > 2 else w, params)  # so that tokens and probabilities differ
    return params | {"head": 20 * params["head"], "embedding": 8 * params["embedding"]}, config


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(5)
    return [rng.integers(0, 500, n) for n in lengths]


def asked(blocks, gen_length=17, **changes):
    shared = dict(gen_length=gen_length, block_length=B, eos_id=-1, active_blocks=blocks, semi_complete_threshold=0.5)
    return GenerateConfig(**shared | changes)


def check_row(out, row, trace, prompt):
    """Against a Trace: answer, replay, passes, and every write, some of which may have been behind the replay."""
    assert np.array_equal(out.tokens[row], trace.answer)
    assert np.array_equal(out.replay_tokens[row], out_of(trace, prompt))
    assert out.forward_passes[row] == len(trace.states) and out.commit_passes[row] == 0
    history = out.history[row]
    kept = [write for write in trace.writes if write.position < trace.end]
    found = zip(*(getattr(history, name).tolist() for name in ("position", "token", "step", "forward")), strict=True)
    assert list(found) == [(w.position - len(prompt), w.token, w.step, w.forward) for w in kept]
    assert np.allclose(history.confidence, [write.confidence for write in kept], atol=1e-4)


def out_of(trace, prompt):
    state = trace.states[0].copy()
    for write in trace.writes:
        state[write.position] = write.token
    return state[len(prompt) : trace.end]


def traces(name, configs, rows, keys=None):
    keys = [None] * len(rows) if keys is None else keys
    return [plain_decode(*model(name), p, g, CANVAS, key) for p, g, key in zip(rows, configs, keys, strict=True)]


@pytest.mark.parametrize(
    "name,rule",
    [("same", rule) for rule in RULES]
    + [pytest.param("shifted", rule, marks=() if rule == "llada2.1" else pytest.mark.soak) for rule in RULES],
)
def test_equals_plain_recomputation(name, rule):
    """Each row its own number of blocks, in one batch; a prompt that ends inside a block, and one that does not."""
    configs = [asked(n, rule=rule, **RULES[rule]) for n in (4, 2, 3, 1)]
    out = llada_jax.generate(*model(name), prompts(), configs, history=True)
    expected = traces(name, configs, prompts())
    for row, prompt in enumerate(prompts()):
        check_row(out, row, expected[row], prompt)
    together = [len({w.position // B for w in t.writes if w.forward == f}) for t in expected for f in range(99)]
    assert max(together) >= 2, "no pass wrote to two blocks"
    if rule == "llada2.1":
        assert all(len(t.writes) > t.end - len(p) + 5 for t, p in zip(expected, prompts(), strict=True))


def test_draws_depend_on_request_block_step_and_position():
    rows, key = prompts(), jax.random.key(7)
    configs = [asked(n, temperature=0.9, threshold=0.03, steps=3) for n in (4, 2, 3, 1)]
    out = llada_jax.generate(*model(), rows, configs, key=key, history=True)
    bits = [jax.random.bits(jax.random.fold_in(key, row), (2,), "uint32") for row in range(len(rows))]
    expected = traces("same", configs, rows, [jax.random.wrap_key_data(b, impl=KEYS) for b in bits])
    for row, prompt in enumerate(rows):
        check_row(out, row, expected[row], prompt)
    again = llada_jax.generate(*model(), rows, [configs[0], *configs[:0:-1]], key=key, history=True)
    assert np.array_equal(again.history[0], out.history[0])


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("rule", ["llada2", "llada2.1", "sglang"])
def test_ends_of_sequence(rule, early):
    """At tokens that occur in the second to fourth block of the free answer."""
    free = llada_jax.generate(*model(), prompts(), [asked(4, rule=rule, **RULES[rule])] * 4, history=True)
    for at in (5, 9, 13):
        configs = [
            asked(n, rule=rule, eos_id=int(free.tokens[row][at]), eos_early_stop=early, **RULES[rule])
            for row, n in enumerate((4, 2, 3, 1))
        ]
        out = llada_jax.generate(*model(), prompts(), configs, history=True)
        expected = traces("same", configs, prompts())
        for row, prompt in enumerate(prompts()):
            check_row(out, row, expected[row], prompt)
        assert any(len(t.answer) < 17 for t in expected)


def test_positions_evaluated_alone():
    """Of blocks to commit and active ones alone; behind an end of sequence no block is begun."""
    prompt, settings = prompts()[2:3], dict(threshold=2.0, steps=4, add_block_threshold=0.0)
    free = llada_jax.generate(*model(), prompt, asked(4, **settings))
    first = int(np.argmin(free.written_at[0][:4]))  # written three steps before its block is full
    for eos_id in (-1, int(free.tokens[0][first])):
        g = asked(4, **settings | dict(eos_id=eos_id))
        trace, out = plain_decode(*model(), prompt[0], g, CANVAS), llada_jax.generate(*model(), prompt, g)
        assert out.positions_evaluated.tolist() == [8 + trace.evaluated] and np.array_equal(out.tokens[0], trace.answer)
    assert out.positions_evaluated[0] == 8 + 4 * B and len(out.tokens[0]) <= first + 1


@pytest.mark.parametrize("rule", RULES)
def test_a_row_with_one_block_is_as_in_a_batch_of_such(rule):
    """Whatever its batch mates: tokens, steps and passes of the program for one block."""
    one = asked(1, rule=rule, **RULES[rule])
    alone = llada_jax.generate(*model(), prompts(), one, fuse_share=0.0)
    configs = [one, one, one, asked(4, rule=rule, **RULES[rule])]
    mixed = llada_jax.generate(*model(), prompts(), configs, history=True)
    for row in range(3):
        assert np.array_equal(mixed.tokens[row], alone.tokens[row])
        assert np.array_equal(mixed.replay_written_at[row], alone.replay_written_at[row])
        assert np.allclose(mixed.confidence[row], alone.confidence[row], rtol=1e-4)
        assert mixed.forward_passes[row] == alone.forward_passes[row]


@pytest.mark.parametrize("name", ["same", pytest.param("moe", marks=pytest.mark.soak)])
def test_what_is_committed_is_exact(name):
    """After every pass the cache holds, up to the last committed block, the keys and values of a clean prefill."""
    params, config = model(name)
    configs = [asked(n, **RULES["llada2"]) for n in (4, 2, 3, 1)]
    settings, rows = decode_settings(config, configs), prompts()
    keys = jax.vmap(functools.partial(jax.random.key, impl=KEYS))(jnp.arange(4))
    lengths = np.array(LENGTHS)
    state = empty_state(config, settings, 4, CANVAS, "float32")
    requests = requests_of(config, lengths, configs, keys)
    state = decode.admit(params, config, settings, state, np.arange(4), requests, pad(rows, CANVAS), 8)
    committed, together = {}, 0
    while not bool(state.finished.all()):
        state = decode.advance(params, config, settings, state, jnp.int32(1))
        together = max(together, int(state.pending.max()))
        for row in range(4):
            if not state.finished[row]:
                committed[row] = int(state.start[row] - B * state.pending[row])
    _, clean = jax.jit(prefill_whole, static_argnums=(1, 3, 4))(params, config, state.tokens, B, Execution())
    assert min(committed.values()) >= 8 and together >= 2
    for row, end in committed.items():
        for found, expected in zip(jax.tree.leaves(state.cache), jax.tree.leaves(clean), strict=True):
            np.testing.assert_allclose(found[:, row, :, :end], expected[:, row, :, :end], atol=2e-5)


def test_serve_with_numbers_of_blocks_that_come_and_go():
    """The state has as many slots as its requests need; long prompts are computed in chunks meanwhile."""
    rng = np.random.default_rng(3)
    rows = prompts((6, 3, 11, 1, 17, 2, 9))
    configs = [asked(n, int(rng.integers(5, 18)), **RULES["llada2"]) for n in (1, 1, 4, 1, 2, 1, 1)]
    together = llada_jax.generate(*model("shifted"), rows, configs, history=True)
    requests = [Request(*pair) for pair in zip(rows, configs, strict=True)]
    told = {}

    def tell(index, tokens):
        told.setdefault(index, []).extend(tokens.tolist())

    how = dict(admit_every=2, prefill_chunk=8, history=True, on_tokens=tell)
    for answer in in_order(serve(*model("shifted"), requests, 2, 36, **how)):
        i = answer.index
        assert np.array_equal(answer.tokens, together.tokens[i]) and told[i] == answer.tokens.tolist()
        assert np.array_equal(answer.history.forward, together.history[i].forward)
        assert answer.forward_passes == together.forward_passes[i]


@pytest.mark.parametrize(
    "name,sizes",
    [pytest.param("moe", dict(expert=2), marks=pytest.mark.soak), ("shifted", dict(data=2, tensor=2))],
)
def test_over_a_mesh(name, sizes):
    params, config = model(name)
    configs = [asked(n, **RULES["llada2"]) for n in (3, 1, 2, 3)]
    expected = llada_jax.generate(params, config, prompts(), configs, history=True)
    mesh = sharding.make_mesh(**{"data": 1} | sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    laid = sharding.shardings(parameters.abstract(config), parameters.logical_axes(config), mesh)
    with jax.set_mesh(mesh):
        execution = Execution(expert_parallel="gather_tokens" if "expert" in sizes else "gather_weights")
        how = dict(execution=execution, history=True)
        found = llada_jax.generate(jax.device_put(params, laid), config, prompts(), configs, **how)
    for row in range(4):
        assert np.array_equal(found.tokens[row], expected.tokens[row])
        assert np.array_equal(found.history[row].forward, expected.history[row].forward)


@pytest.mark.parametrize("rows,most", [(2, 1024), pytest.param(1, 32, marks=pytest.mark.soak)])
def test_by_kernels(rows, most, monkeypatch):
    """Interpreted. 1,32: windows of a single row, too long for the kernel of windows, by that of chunks."""
    monkeypatch.setattr(prefix, "MOST_OF_A_WINDOW", most)
    config = TINY.replace(num_layers=1)
    params = model()[0] | {"dense": jax.tree.map(lambda w: w[:1], model()[0]["dense"])}
    configs = [asked(n, 20, threshold=0.15, steps=3, block_length=8) for n in (2, 1)[:rows]]
    expected = llada_jax.generate(params, config, prompts()[:rows], configs)
    kernel = Execution(attention="kernel", interpret=True)
    found = llada_jax.generate(params, config, prompts()[:rows], configs, execution=kernel)
    for row in range(rows):
        assert np.array_equal(found.tokens[row], expected.tokens[row])
        assert np.allclose(found.confidence[row], expected.confidence[row], atol=1e-4)
    if rows == 2:
        monkeypatch.setattr(prefix, "MOST_OF_A_WINDOW", 32)
        with pytest.raises(InputError, match="active_blocks=2 with block_length=8: .* windows of at most 16 tokens"):
            llada_jax.generate(params, config, prompts()[:rows], configs, execution=kernel, history=True)


@pytest.mark.parametrize(
    "field,value", [("active_blocks", n) for n in (0, 5, 1.0, True)]
    + [(f"{name}_threshold", x) for name in ("add_block", "semi_complete") for x in (-0.1, 1.1, float("nan"), None)],
)  # fmt: skip
def test_refuses_values_out_of_range(field, value):
    with pytest.raises(InputError, match=f"{field}={value!r}"):
        GenerateConfig(4, **{field: value})
