"""What decoding returns to replay it: the whole last block, the step map, and the history of writes."""

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.batching import Request, in_order, serve
from tests.helpers.plain_decoding import plain_decode

CONFIG = preset("tiny").replace(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64)
MASK, B = CONFIG.mask_token_id, 4
PROMPTS = [np.arange(n) + 7 * n for n in (6, 3)]
EDITING = dict(rule="llada2.1", threshold=0.02, editing_threshold=0.0, max_post_steps=3)


@pytest.fixture(scope="module")
def params():
    params = parameters.initialize(CONFIG, jax.random.key(1))
    return jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params) | {"head": 6 * params["head"]}


def asked(**changes):
    return GenerateConfig(**dict(gen_length=10, block_length=B, threshold=0.05, eos_id=-1) | changes)


def states_of_step_map(prompt, tokens, written_at):
    """The canvas before each pass, of blocks one after the other."""
    whole, filled = np.append(prompt, tokens), np.append(np.full(len(prompt), -1), written_at)
    for start in range(len(prompt) // B * B, len(whole), B):
        for step in range(filled[start : start + B].max() + 1):
            state = whole[: start + B].copy()
            state[start:][filled[start : start + B] >= step] = MASK
            yield state


def check_history(history, prompt, trace):
    """Replays all writes, and compares the canvas before every pass."""
    state = np.full(len(trace.states[0]), MASK)
    state[: len(prompt)] = prompt
    for forward, expected in enumerate(trace.states):
        assert np.array_equal(state[: trace.end], expected[: trace.end]), forward
        now = history.forward == forward
        state[history.position[now] + len(prompt)] = history.token[now]
    kept = [write for write in trace.writes if write.position < trace.end]
    assert history.step.tolist() == [write.step for write in kept]
    assert np.allclose(history.confidence, [write.confidence for write in kept], atol=1e-4)
    return state[len(prompt) : trace.end]


def test_the_step_map_replays_every_state(params):
    g = asked()
    out = llada_jax.generate(params, CONFIG, PROMPTS, g)
    for row, prompt in enumerate(PROMPTS):
        trace = plain_decode(params, CONFIG, prompt, g, canvas=16)
        replayed = list(states_of_step_map(prompt, out.replay_tokens[row], out.replay_written_at[row]))
        assert len(replayed) == len(trace.states) == out.forward_passes[row]
        for state, expected in zip(replayed, trace.states, strict=True):
            assert np.array_equal(state, expected[: len(state)])
        assert len(out.replay_tokens[row]) == 16 - len(prompt) and out.stop_length[row] == 10
        for short, long in (("tokens", "replay_tokens"), ("written_at",) * 2, ("confidence",) * 2):
            long = long if long.startswith("replay") else "replay_" + long
            assert np.array_equal(getattr(out, short)[row], getattr(out, long)[row][:10])
    assert out.history is None


def test_the_history_of_edits_replays_every_state_and_ends_in_the_tokens(params):
    g = asked(**EDITING)
    out = llada_jax.generate(params, CONFIG, PROMPTS, g, history=True)
    for row, prompt in enumerate(PROMPTS):
        trace = plain_decode(params, CONFIG, prompt, g, canvas=16)
        final = check_history(out.history[row], prompt, trace)
        assert np.array_equal(final, out.replay_tokens[row])
        assert len(out.history[row].position) > len(final), "nothing was edited"
        for position in range(len(final)):  # the last write is that of the step map
            last = np.flatnonzero(out.history[row].position == position)[-1]
            assert out.history[row].step[last] == out.replay_written_at[row][position]
            assert out.history[row].confidence[last] == out.replay_confidence[row][position]
    plain = llada_jax.generate(params, CONFIG, PROMPTS, g)
    assert all(np.array_equal(a, b) for a, b in zip(plain.tokens, out.tokens, strict=True))


def test_behind_the_end_of_sequence(params):
    """An end between blocks keeps the rest of its block; one inside leaves masks where nothing was written."""
    free = llada_jax.generate(params, CONFIG, PROMPTS[:1], asked(gen_length=14, threshold=2.0))
    written_at, tokens = free.written_at[0], free.tokens[0]
    end = next(i for i in range(2, 14) if (i + 6) % B < 2 and tokens[i] not in tokens[:i])
    g = dict(gen_length=14, threshold=2.0, eos_id=int(tokens[end]))
    out = llada_jax.generate(params, CONFIG, PROMPTS[:1], asked(**g))
    last = (end + 6) // B * B + B - 6
    assert out.stop_length.tolist() == [end + 1]
    assert np.array_equal(out.replay_tokens[0], tokens[:last])
    assert np.array_equal(out.replay_written_at[0], written_at[:last])
    early = llada_jax.generate(params, CONFIG, PROMPTS[:1], asked(**g, eos_early_stop=True), history=True)
    block = written_at[last - B : last]
    stopped = block[: end - (last - B) + 1].max()  # the step that filled all before the end
    expected = np.where(block > stopped, MASK, tokens[last - B : last])
    assert np.array_equal(early.replay_tokens[0][last - B :], expected) and len(early.replay_tokens[0]) == last
    never = early.replay_tokens[0] == MASK
    assert np.array_equal(early.replay_written_at[0] == -1, never) and not early.replay_confidence[0][never].any()
    assert sorted(early.history[0].position) == np.flatnonzero(~never).tolist()


def test_serve_gives_them_too(params):
    """Rows are taken over by later requests: a log begins anew."""
    rng = np.random.default_rng(0)
    requests = [Request(rng.integers(0, 400, 2 + n), asked(**EDITING, gen_length=6 + n)) for n in range(5)]
    together = llada_jax.generate(
        params, CONFIG, [r.prompt for r in requests], [r.config for r in requests], history=True
    )
    for answer in in_order(serve(params, CONFIG, requests, 2, 20, admit_every=3, history=True)):
        i = answer.index
        assert answer.stop_length == together.stop_length[i]
        assert np.array_equal(answer.replay_tokens, together.replay_tokens[i])
        assert np.array_equal(answer.replay_written_at, together.replay_written_at[i])
        for name in ("position", "token", "step", "forward"):
            assert np.array_equal(getattr(answer.history, name), getattr(together.history[i], name))
    answer = next(serve(params, CONFIG, requests[:1], 2, 20))
    assert answer.history is None


def test_a_log_that_is_too_small_is_refused(params):
    assert llada_jax.generate(params, CONFIG, [], asked(), history=True).history == []
    with pytest.raises(InputError, match=r"history: \d+ writes to one row, its log has room for 16"):
        llada_jax.generate(params, CONFIG, PROMPTS, asked(**EDITING), history=1)
    for bad in (-1, 1.5, "yes", None):
        with pytest.raises(InputError, match=f"history={bad!r}, expected true, false, or writes"):
            llada_jax.generate(params, CONFIG, PROMPTS, asked(), history=bad)


def test_what_deletes_and_inserts_has_no_history_and_one_active_block(params):
    config = CONFIG.replace(delete_token_id=1, insert_token_id=2)
    moving = dict(rule="llada2.2", threshold=0.5)
    with pytest.raises(InputError, match='history: not with rule="llada2.2"'):
        llada_jax.generate(params, config, PROMPTS, asked(**moving), history=True)
    with pytest.raises(InputError, match="active_blocks=2, expected 1 with rule"):
        asked(**moving, active_blocks=2)
