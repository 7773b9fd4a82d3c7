"""Our model class under lm-eval: two tasks of local files, and what it answers against our own functions."""

import os
import re
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}  # read when imported
import lm_eval as harness  # noqa: E402

from llada_jax.data.byte_tokenizer import byte_tokenizer  # noqa: E402
from llada_jax.data.order import Batch  # noqa: E402
from llada_jax.errors import InputError  # noqa: E402
from llada_jax.evaluation import likelihood, lm_eval  # noqa: E402
from llada_jax.model import parameters  # noqa: E402
from llada_jax.model.config import preset  # noqa: E402
from llada_jax.sampling.generate import GenerateConfig, generate  # noqa: E402
from llada_jax.training.checkpoint import Model  # noqa: E402

TASKS = Path(__file__).parent / "data" / "lm_eval"


@pytest.fixture(scope="module")
def model():
    config = preset("tiny").replace(
        num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, intermediate_size=64, alignment="shifted"
    )
    params = parameters.initialize(config, jax.random.key(0, impl="threefry2x32"))
    params = jax.tree.map(lambda w: 3 * w if w.ndim > 2 else w, params)
    return Model(config, params, byte_tokenizer(config.eos_token_id, config.mask_token_id), {})


@pytest.fixture
def build(model, monkeypatch):
    monkeypatch.setattr(lm_eval, "load_checkpoint", lambda path: model)
    return lambda **options: lm_eval.LLaDAJax("somewhere", **options)


def asked(*arguments):
    return [SimpleNamespace(args=entry) for entry in arguments]


def ar_logits(model, ids):
    from llada_jax.model.forward import forward

    return np.asarray(jax.nn.log_softmax(forward(model.params, model.config, np.asarray([ids], np.int32), "causal")))[0]


def test_two_tasks_of_local_files_run(build, tmp_path, monkeypatch):
    for path in TASKS.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = harness.simple_evaluate(
        build(likelihood_block="ar", gen_length=8, block_length=4),
        tasks=["local_choice", "local_generate"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    assert 0 <= found["results"]["local_choice"]["acc,none"] <= 1
    assert found["results"]["local_generate"]["exact_match,none"] == 0
    samples = found["samples"]["local_choice"]
    assert len(samples) == 3 and all(
        np.isfinite(float(score)) for sample in samples for ((score, _),) in sample["resps"]
    )


def test_likelihoods_are_those_of_the_model(build, model):
    """Exact at block size 1 and "ar": the sum of the log-probabilities of the continuation; whether all are best."""
    context, continuation = "some words", " that follow"
    ids = [*(context + continuation).encode()]
    log_p = ar_logits(model, ids)[len(context) - 1 : -1]
    expected = log_p[np.arange(len(continuation)), ids[len(context) :]].sum()
    best = "".join(map(chr, [int(ar_logits(model, [*context.encode()])[-1][:128].argmax())]))
    is_best = ar_logits(model, [*context.encode()])[-1].argmax() < 128
    for block in (1, "ar"):
        scored = build(likelihood_block=block).loglikelihood(asked((context, continuation), (context, best)), True)
        assert scored[0][0] == pytest.approx(expected, abs=1e-3) and not scored[0][1]
        assert scored[1][1] == is_best


def test_diffusion_likelihoods_are_estimates_of_the_nelbo(build, model):
    pairs = [("abc", "defg"), ("a longer context" * 5, " yes"), ("x", "y")]
    for block in (4, "full"):
        found = build(likelihood_block=block, samples=4).loglikelihood(asked(*pairs), True)
        for row, ((context, continuation), (score, _)) in enumerate(zip(pairs, found, strict=True)):
            ids = np.zeros((1, 128 if len(context) > 60 else 64), np.int32)
            text = [*(context + continuation).encode()]
            ids[0, : len(text)] = text
            at = np.arange(ids.shape[1])[None]
            supervised = (at >= len(context)) & (at < len(text))
            batch = Batch(ids, (at < len(text)).astype(np.int32), supervised, np.uint32([row]), np.uint32([0]))
            values, counts = likelihood.row_nelbo(
                model.params, model.config, batch, None if block == "full" else block, likelihood.Draws(4)
            )
            assert counts.tolist() == [len(continuation)]
            assert score == pytest.approx(-values.mean(), rel=1e-4)


def test_rolling_likelihood_is_the_sum_over_windows(build, model):
    text = "a text that is longer than the windows it is read in, by far, so that there are several of them"
    end = model.tokenizer.eos_id
    scores = build(likelihood_block="ar", max_length=4096).loglikelihood_rolling(asked((text,), ("ab",)), True)
    ids = [end, *text.encode()]
    expected = ar_logits(model, ids)[np.arange(len(text)), ids[1:]].sum()
    assert scores[0] == pytest.approx(expected, abs=1e-2) and scores[1] > scores[0]
    cut = build(likelihood_block="ar", max_length=33).loglikelihood_rolling(asked((text,)), True)
    assert np.isfinite(cut[0]) and cut[0] != pytest.approx(scores[0], abs=1e-6)


def test_answers_are_those_of_generate_up_to_the_stop(build, model):
    prompts = ["a", "some other prompt"]
    config = GenerateConfig(8, block_length=4)
    out = generate(model.params, model.config, [model.tokenizer.encode(text) for text in prompts], config)
    texts = [model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]
    wrapper = build(block_length=4)
    settings = {"max_gen_toks": 8, "until": ["\x00never"]}
    assert wrapper.generate_until(asked(*((p, settings) for p in prompts)), True) == texts
    stop = texts[0][1:3] or "x"
    found = wrapper.generate_until(asked((prompts[0], settings | {"until": [stop]})), True)
    assert found == [texts[0].split(stop)[0]]
    assert wrapper.generate_until([], True) == []


def test_bad_settings_are_named(build, model):
    with pytest.raises(InputError, match="likelihood_block='half'"):
        build(likelihood_block="half")
    with pytest.raises(InputError, match="max_length=4: a continuation has 9 tokens"):
        build(max_length=4).loglikelihood(asked(("a", "b" * 9)), True)


def test_the_tasks_that_stand_for_the_papers_benchmarks_exist():
    from lm_eval.tasks import TaskManager

    text = (Path(__file__).parent.parent / "experiments" / "benchmarks.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len({row[0] for row in rows}) == 47
    named = set(re.findall(r"`([a-z][a-z0-9_-]*)`", text)) - {"prompt_level_strict_acc"}  # a score, not a task
    assert len(named) >= 25 and not named - set(TaskManager().all_tasks)
    assert all("`" in row[1] or row[1] == "none" for row in rows)
