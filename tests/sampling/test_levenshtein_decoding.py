"""Rule "llada2.2" against its description, over lists and without a cache; what it takes and refuses."""

import collections

import jax
import numpy as np
import pytest

import llada_jax
from llada_jax import GenerateConfig, sharding
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import decode_settings

# So few tokens that a model with random weights often deletes and inserts; or does instead of writing 0 and 1.
MASK, DELETE, INSERT = 13, 14, 15
SMALL = dict(vocab_size=16, num_layers=2, mask_token_id=MASK, eos_token_id=12, pad_token_id=None)
EDITS = dict(delete_token_id=DELETE, insert_token_id=INSERT)
CONFIGS = {
    "same": preset("tiny_moe").replace(**SMALL, **EDITS, num_dense_layers=0),
    "shifted": preset("tiny").replace(**SMALL, **EDITS, alignment="shifted"),
}
BLOCK, CANVAS = 8, 40
one_model = pytest.mark.parametrize("model", ["shifted"], indirect=True)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    params = parameters.initialize(config, jax.random.key(3))
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params)  # logits with some spread
    if request.param == "shifted":
        params["head"] = params["head"].at[:, DELETE:].set(1.1 * params["head"][:, :2])
    return params, config


def asked(**changes):
    shared = dict(gen_length=14, block_length=BLOCK, steps=8, rule="llada2.2", threshold=0.5, editing_threshold=0.0)
    return GenerateConfig(**shared | dict(eos_id=-1) | changes)


class Loop:
    """The description of LLaDA2.2's loop over a block, for one request at temperature 0."""

    def __init__(self, params, config, prompt, g: GenerateConfig):
        self.params, self.config, self.prompt, self.g = params, config, list(prompt), g
        self.tokens = self.prompt + [MASK] * (CANVAS - len(prompt))
        self.written_at = [0] * CANVAS
        self.passes, self.events = 0, collections.Counter()
        end = -(-(len(prompt) + g.gen_length) // BLOCK) * BLOCK
        for start in range(len(prompt) // BLOCK * BLOCK, end, BLOCK):
            self.block(start)
        self.answer = self.tokens[len(prompt) : len(prompt) + g.gen_length]
        self.steps = self.written_at[len(prompt) : len(prompt) + g.gen_length]

    def probabilities(self, start):
        tokens = np.array(self.tokens)[None]
        logits = llada_jax.denoise(self.params, self.config, tokens, tokens, block_size=BLOCK)
        logits = np.asarray(logits[0, start : start + BLOCK], np.float64)
        self.passes += 1
        return np.exp(logits - np.logaddexp.reduce(logits, -1)[:, None])

    def block(self, start):
        g, prompt = self.g, max(len(self.prompt) - start, 0)
        x = self.tokens[start : start + BLOCK]
        original = [i >= prompt for i in range(BLOCK)]
        at, seen, post, step = [0] * BLOCK, set(), 0, 0
        steps = min(g.steps, g.gen_length)
        initial = BLOCK - prompt
        while True:
            self.tokens[start : start + BLOCK] = x
            p = self.probabilities(start)
            masks = [i for i in range(prompt, BLOCK) if x[i] == MASK]
            old = [i for i in masks if original[i]]
            post = 0 if old else post + 1
            best = [best_of(row) for row in p]
            sure = [p[i][best[i]] for i in range(BLOCK)]
            need = initial // steps + (step < initial % steps) + len(masks) - len(old)
            fill = [i for i in masks if sure[i] > g.threshold]
            if step >= steps:
                fill = masks
            elif len(fill) < need:
                fill = sorted(masks, key=lambda i: -sure[i])[:need]
            edit = [i for i in range(prompt, BLOCK) if i not in masks]
            edit = [i for i in edit if best[i] != x[i] and sure[i] > g.editing_threshold]
            final = post >= g.max_post_steps if g.max_post_steps else bool(old) and set(old) <= set(fill)
            if step == g.max_steps_per_block - 1 and not final:
                self.events["cap"] += 1
                final = True
            y = list(x)
            for i in {*(masks if final else fill), *edit}:
                y[i] = best[i]
                if final and best[i] in (DELETE, INSERT):
                    self.events["scrubbed"] += 1
                    y[i] = best_of(p[i], DELETE, INSERT)
            if not final:
                y = self.leave_loop(x, y, best, sure, p, seen)
            seen.add(tuple(y))
            new, flags, when = [], [], []
            for i in range(BLOCK):
                if i >= prompt and y[i] == DELETE:
                    self.events["deleted"] += 1
                elif i >= prompt and y[i] == INSERT:
                    self.events["inserted"] += 1
                    new, flags, when = new + [MASK, x[i]], flags + [False, original[i]], when + [0, at[i]]
                else:
                    new.append(y[i])
                    flags.append(original[i])
                    when.append(step if y[i] != x[i] else at[i])
            if len(new) > BLOCK:
                self.events["truncated"] += 1
            new, flags, when = ((*new, *[MASK] * BLOCK), (*flags, *[False] * BLOCK), (*when, *[0] * BLOCK))
            new, flags, when = (list(each[:BLOCK]) for each in (new, flags, when))
            settled = new == x and MASK not in new[prompt:]
            x, original, at, step = new, flags, when, step + 1
            if settled or final:
                self.events["final" if final else "settled"] += 1
                break
        self.tokens[start : start + BLOCK] = x
        self.written_at[start : start + BLOCK] = at

    def leave_loop(self, x, y, best, sure, p, seen):
        y, tried = list(y), set()
        for _ in range(5):
            changed = [i for i in range(BLOCK) if y[i] != x[i]]
            if tuple(y) not in seen or not changed:
                break
            if tried >= set(changed):
                tried = set()
            i = min((i for i in changed if i not in tried), key=lambda i: sure[i])
            tried.add(i)
            y[i] = best_of(p[i], y[i]) if y[i] == best[i] else best[i]
            self.events["exchanged"] += 1
        return y


def best_of(probabilities, *banned):
    return max((t for t in range(len(probabilities)) if t not in (MASK, *banned)), key=lambda t: probabilities[t])


REQUESTS = [
    (9, {}),
    (3, dict(threshold=0.2, editing_threshold=0.15)),
    (16, dict(max_post_steps=2, steps=3)),
    (14, dict(max_post_steps=0)),
    (21, dict(gen_length=9, threshold=2.0, steps=20, editing_threshold=0.12)),
    (5, dict(max_steps_per_block=5, max_post_steps=40)),
]


@pytest.fixture(scope="module")
def decoded(model):
    """(prompts, configs, what the description makes of them, our answers to all together)."""
    params, config = model
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 16, n) for n, _ in REQUESTS]  # masks and edits are tokens as any other in prompts
    configs = [asked(**changes) for _, changes in REQUESTS]
    expected = [Loop(params, config, prompt.tolist(), g) for prompt, g in zip(prompts, configs, strict=True)]
    out = llada_jax.generate(params, config, prompts, configs, fuse_share=0.0)
    return prompts, configs, expected, out


def test_equals_its_description_without_a_cache(decoded):
    _, _, expected, out = decoded
    for row, loop in enumerate(expected):
        assert out.tokens[row].tolist() == loop.answer, row
        assert out.written_at[row].tolist() == loop.steps, row
        assert out.forward_passes[row] == loop.passes, row
        assert not np.isin(out.tokens[row], (MASK, DELETE, INSERT)).any()
        assert ((out.confidence[row] > 0) & (out.confidence[row] <= 1)).all()
    events = sum((loop.events for loop in expected), collections.Counter())
    assert set(events) == {"deleted", "inserted", "truncated", "exchanged", "scrubbed", "final", "settled", "cap"}


def test_alone_and_with_commits_of_their_own(model, decoded):
    params, config = model
    prompts, configs, _, out = decoded
    separate = llada_jax.generate(params, config, prompts, configs, fuse_share=2.0)
    assert all(np.array_equal(a, b) for a, b in zip(out.tokens, separate.tokens, strict=True))
    assert out.forward_passes.tolist() == separate.forward_passes.tolist()
    requests = [Request(*each) for each in zip(prompts, configs, strict=True)]
    for answer in serve(params, config, requests, 1, CANVAS, admit_every=7):  # each takes the last one's row
        assert np.array_equal(answer.tokens, out.tokens[answer.index])
        assert answer.forward_passes == out.forward_passes[answer.index]


@one_model
def test_a_mesh_decodes_as_one_device_does(model, decoded):
    params, config = model
    prompts, configs, _, out = decoded
    mesh = sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, parameters.logical_axes(config), mesh))
        sharded = llada_jax.generate(placed, config, prompts, configs)
    assert all(np.array_equal(a, b) for a, b in zip(out.tokens, sharded.tokens, strict=True))


@one_model
def test_draws_depend_on_their_request_alone_and_confidence_on_no_temperature(model, decoded):
    params, config = model
    prompts, _, _, out = decoded
    g = asked(temperature=0.8, top_k=12, gen_length=9)
    requests = [Request(np.arange(n), g, seed) for seed, n in enumerate((9, 3, 12))]
    requests.append(Request(prompts[0], asked(temperature=0.8, top_k=1)))  # nothing to draw from, as at temperature 0
    one, two = (
        {answer.index: answer.tokens.tolist() for answer in serve(params, config, requests, rows, CANVAS)}
        for rows in (1, 4)
    )
    assert one == two and len({tuple(tokens) for tokens in one.values()}) == 4
    assert one[3] == out.tokens[0].tolist()
    assert not {MASK, DELETE, INSERT} & {token for tokens in one.values() for token in tokens}


@one_model
def test_whose_ids_are_taken(model):
    params, config = model
    unnamed = config.replace(delete_token_id=None, insert_token_id=None)
    settings = decode_settings(unnamed, [asked(delete_id=4, insert_id=5)])
    assert (settings.delete_id, settings.insert_id) == (4, 5)
    settings = decode_settings(config, [asked(insert_id=5)])
    assert (settings.delete_id, settings.insert_id) == (DELETE, 5)
    assert decode_settings(unnamed, [asked(rule="llada2.1")]).delete_id == -1  # others need none
    with pytest.raises(InputError, match="^rule=llada2.2: the checkpoint names no token that deletes: give delete_id$"):
        llada_jax.generate(params, unnamed, [np.arange(3)], asked())
    with pytest.raises(InputError, match="names no token that inserts: give insert_id"):
        decode_settings(unnamed, [asked(delete_id=1)])
    for wrong in (MASK, DELETE, 16):
        with pytest.raises(
            InputError, match=f"insert_id={wrong}, expected another token than mask_id=13, delete_id=14"
        ):
            decode_settings(config, [asked(insert_id=wrong)])
    with pytest.raises(InputError, match="delete_id: 1 and 2 in one batch"):
        decode_settings(config, [asked(delete_id=1), asked(delete_id=2)])


@pytest.mark.parametrize(
    "field, value", [("max_steps_per_block", 0), ("max_steps_per_block", 1025), ("delete_id", -1), ("insert_id", 0.5)]
)
def test_refuses_values_out_of_range(field, value):
    with pytest.raises(InputError, match=f"{field}={value}"):
        asked(**{field: value})


@one_model
def test_another_rule_does_not_take_over_a_row(model):
    params, config = model
    requests = [Request(np.arange(3), asked(rule=rule)) for rule in ("llada2", "llada2.2")]
    with pytest.raises(InputError, match="rule=llada2.2 beside another in one batch"):
        list(serve(params, config, requests, 1, CANVAS))
