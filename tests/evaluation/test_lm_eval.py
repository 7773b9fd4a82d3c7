"""Our model class under lm-eval: two tasks of local files, and what it answers against our own functions."""

import os
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}  # read when imported
import lm_eval as harness  # noqa: E402

from llada_jax.checkpoint.weights import Model  # noqa: E402
from llada_jax.data.byte_tokenizer import byte_tokenizer  # noqa: E402
from llada_jax.data.order import Batch  # noqa: E402
from llada_jax.errors import InputError  # noqa: E402
from llada_jax.evaluation import likelihood, lm_eval  # noqa: E402
from llada_jax.model import parameters  # noqa: E402
from llada_jax.model.config import preset  # noqa: E402
from llada_jax.sampling.generate import GenerateConfig, generate  # noqa: E402
from tests.helpers import foreign_tokenizers  # noqa: E402

TASKS = Path(__file__).parents[1] / "data" / "lm_eval"


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


@pytest.fixture
def served(monkeypatch):
    """The requests that were decoded, in their order."""
    seen, real = [], lm_eval.serve

    def spy(params, config, requests, *rest, **more):
        seen.extend(requests)
        return real(params, config, requests, *rest, **more)

    monkeypatch.setattr(lm_eval, "serve", spy)
    return seen


def test_contexts_are_whole_or_cut_aloud(build, model, served, caplog):
    """max_length is the model's; a context is cut on the left, with a warning, or there is an error that names both."""
    wrapper = build(block_length=4)
    assert wrapper.max_length == model.config.max_position_embeddings == 1024 and wrapper.max_gen_toks == 256
    long, settings = "x" * 100 + "?", {"max_gen_toks": 8}
    wrapper.generate_until(asked((long, settings)), True)
    assert len(served.pop().prompt) == 101 and not caplog.records
    with pytest.raises(InputError, match="max_gen_toks=2048 of max_length=1024 .* a context of 101: set --gen_kwargs"):
        wrapper.generate_until(asked((long, {"max_gen_toks": 2048})), True)
    build(block_length=4, max_length=64).generate_until(asked((long, settings), ("", settings)), True)
    assert served[0].prompt.tolist() == [*long[-56:].encode()] and "1 of 2 contexts are cut" in caplog.text
    assert served[1].prompt.tolist() == [model.tokenizer.eos_id]  # a shifted model needs a token to begin from
    caplog.clear()
    build(likelihood_block="ar", max_length=64).loglikelihood(asked((long, "a"), ("b", "a")), True)
    assert "1 of 2 contexts are cut on the left to max_length=64" in caplog.text


def test_what_was_asked_for_is_what_is_decoded(build, served):
    wrapper = build(block_length=4, steps=4, rule="sglang", threshold=0.5, gen_length=4, seed=7)
    kwargs = {"max_new_tokens": 3, "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    wrapper.generate_until(asked(("a", kwargs), ("b", {"max_gen_toks": 2})), True)
    shared = {"block_length": 4, "steps": 4, "rule": "sglang", "threshold": 0.5}
    assert served[0].config == GenerateConfig(3, temperature=0.6, top_p=0.95, top_k=20, **shared)
    assert served[1].config == GenerateConfig(2, **shared) and [r.seed for r in served] == [(7, 0), (7, 1)]


@pytest.mark.parametrize("batch_size", ["auto", "auto:4", 4, "2"])
def test_batch_size(build, monkeypatch, batch_size):
    """auto: fewer rows while the device has no room for more. A number is what it says."""
    tried = []

    def full(params, config, requests, rows, *rest, **more):
        tried.append(rows)
        if rows > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")
        return [SimpleNamespace(index=i, tokens=request.prompt + 1) for i, request in enumerate(requests)]

    monkeypatch.setattr(lm_eval, "serve", full)
    wrapper = build(block_length=4, batch_size=batch_size, max_batch_size=6, device="cuda:0")
    contexts = asked(*((c, {"max_gen_toks": 4}) for c in "abcdefgh"))
    if batch_size == 4:
        with pytest.raises(jax.errors.JaxRuntimeError):
            wrapper.generate_until(contexts, True)
        return
    assert wrapper.generate_until(contexts, True) == [*"bcdefghi"]
    assert tried == ([2] if batch_size == "2" else [6, 3, 1])


def test_texts_begin_as_the_tokenizer_begins_them(model, monkeypatch):
    def build(**options):
        tokenizer = foreign_tokenizers.byte_level(bos=True)
        monkeypatch.setattr(lm_eval, "load_checkpoint", lambda path: model._replace(tokenizer=tokenizer))
        return lm_eval.LLaDAJax("somewhere", **options)

    wrapper = build()
    bos, plain = wrapper.prefix_token_id, wrapper.tok_encode("the", add_special_tokens=False)
    assert wrapper.tok_encode("the") == [bos, *plain] == wrapper.tok_encode("<s>the") and bos not in plain
    assert build(add_bos_token=False).tok_encode("the") == plain == build(add_bos="false").tok_encode("the")
    assert build(add_bos=True).tok_encode("the") == [bos, *plain]
    assert build(prefix_token_id=7).prefix_token_id == 7 and wrapper.eot_token_id == 2
    with pytest.raises(InputError, match="prefix_token_id=99999"):
        build(prefix_token_id=99999)
    with pytest.raises(InputError, match="add_bos='yes'"):
        build(add_bos="yes")


def test_a_conversation_is_asked_or_continued(model, monkeypatch):
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% if not enable_thinking %}[no]{% endif %}{% endif %}"
    )
    tokenizer = foreign_tokenizers.byte_level(chat_template=template)
    monkeypatch.setattr(lm_eval, "load_checkpoint", lambda path: model._replace(tokenizer=tokenizer))
    wrapper = lm_eval.LLaDAJax("somewhere")
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "The answer is"}]
    assert wrapper.apply_chat_template(turns, add_generation_prompt=False) == "[user]Q[end][assistant]The answer is"
    assert wrapper.apply_chat_template(turns[:1]) == "[user]Q[end][assistant][no]"
    assert wrapper.chat_template(True) == template and wrapper.chat_template(False) is None
    thinking = lm_eval.LLaDAJax("somewhere", enable_thinking=True, chat_template_args='{"x": 1}')
    assert thinking.apply_chat_template(turns[:1]) == "[user]Q[end][assistant]"
    with pytest.raises(InputError, match="not chosen by name"):
        wrapper.chat_template("tool_use")


@pytest.mark.parametrize("answered", [True, False])
def test_a_description_that_the_template_drops_is_an_error(model, monkeypatch, answered):
    template = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    tokenizer = foreign_tokenizers.byte_level(chat_template=template)
    monkeypatch.setattr(lm_eval, "load_checkpoint", lambda path: model._replace(tokenizer=tokenizer))
    turns = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Q"}]
    turns += [{"role": "assistant", "content": "It is"}] * (not answered)
    with pytest.raises(InputError, match="leaves out what .*says: 'Answer in one word.'"):
        lm_eval.LLaDAJax("somewhere").apply_chat_template(turns, add_generation_prompt=answered)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_lenght": 64}, "unknown model argument max_lenght: did you mean max_length?"),
        ({"pretrained": "x"}, "unknown model argument pretrained: known are checkpoint, "),
        ({"checkpoint": None}, "checkpoint=DIR is required"), ({"max_length": 0}, "max_length=0"),
        ({"max_length": "long"}, "max_length='long'"), ({"samples": 2.5}, "samples=2.5"), ({"seed": -1}, "seed=-1"),
        ({"threshold": float("nan")}, "threshold=nan"), ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": "all"}, "batch_size='all'"), ({"batch_size": "auto", "max_batch_size": 0}, "max_batch_size=0"),
        ({"chat_template_args": "{"}, "malformed JSON"), ({"rule": "best"}, "rule='best'"),
        ({"think_end_token": 99999}, "think_end_token=99999"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(model, monkeypatch, options, message):
    monkeypatch.setattr(lm_eval, "load_checkpoint", lambda path: model)
    with pytest.raises(InputError, match=re.escape(message)):
        lm_eval.LLaDAJax(**{"checkpoint": "somewhere"} | options)


def test_the_command_says_what_is_wrong_in_one_line(monkeypatch, capsys):
    import lm_eval.__main__
    from lm_eval.api import registry

    monkeypatch.setattr(sys, "argv", ["lm_eval"])

    def command(main):
        monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", main)
        monkeypatch.setattr(registry, "model_registry", type(registry.model_registry)("model"), raising=False)
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("llada_jax.evaluation.lm_eval", run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    code, said = command(lambda: registry.get_model("llada_jax").create_from_arg_string("checkpoint=x,max_lenght=4"))
    assert code == 2 and said.startswith("error: unknown model argument max_lenght: did") and said.count("\n") == 1
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)  # as where it is not installed
    code, said = command(None)
    assert code == 2 and said.startswith("error: lm-eval is not installed") and said.count("\n") == 1


def test_bad_settings_are_named(build, model):
    with pytest.raises(InputError, match="likelihood_block='half'"):
        build(likelihood_block="half")
    with pytest.raises(InputError, match="max_length=4: a continuation has 9 tokens"):
        build(max_length=4).loglikelihood(asked(("a", "b" * 9)), True)


def test_the_tasks_that_stand_for_the_papers_benchmarks_exist():
    import lm_eval.tasks as lm_eval_tasks
    from lm_eval.tasks import TaskManager

    text = (Path(__file__).parents[2] / "llada_jax" / "evaluation" / "benchmarks.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len({row[0] for row in rows}) == 47
    named = set(re.findall(r"`([a-z][a-z0-9_-]*)`", text)) - {"prompt_level_strict_acc"}  # a score, not a task
    # All tasks are 12,000 files: only folders where one of these stands are read.
    line = re.compile(rf"^\s*(?:task|group|tag|-)\s*:?\s*(?:{'|'.join(map(re.escape, named))})\s*$", re.MULTILINE)
    files = Path(lm_eval_tasks.__file__).parent.rglob("*.y*ml")
    folders = {str(file.parent) for file in files if line.search(file.read_text(errors="ignore"))}
    known = TaskManager(include_path=sorted(folders), include_defaults=False).all_tasks
    assert len(named) >= 25 and not named - set(known)
    assert all("`" in row[1] or row[1] == "none" for row in rows)
