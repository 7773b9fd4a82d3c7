"""lm-eval's own client of OpenAI's API against a server: tasks get the answers of our class in lm-eval's process."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp()}  # read when imported
import lm_eval as harness  # noqa: E402
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from llada_jax.evaluation import lm_eval  # noqa: E402
from tests.serving.running import served, small_model  # noqa: E402

TASKS = Path(__file__).parents[1] / "data" / "lm_eval"
QUESTIONS = ("Say yes:", "One, two,", "abc" * 9, "x", "  y é")


@pytest.fixture(scope="module")
def server():
    with served(small_model()) as running:
        yield running


@pytest.fixture
def answers(tmp_path, monkeypatch, server):
    """answers(a model of lm-eval) -> the responses to the task's documents."""
    for path in TASKS.iterdir():
        shutil.copy(path, tmp_path)
    rows = [{"question": text, "answer": "x"} for text in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (tmp_path / "generate.yaml").read_text().replace('until: ["\\n"]', 'until: ["\\n", "ss", "}}"]')
    (tmp_path / "generate.yaml").write_text(config.replace("max_gen_toks: 8", "max_gen_toks: 20"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lm_eval, "load_checkpoint", lambda path: server.model)

    def run(model) -> list[str]:
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        more = dict(task_manager=manager, bootstrap_iters=0, apply_chat_template=isinstance(model, LocalChatCompletion))
        found = harness.simple_evaluate(model, tasks=["local_generate"], **more)
        return [sample["resps"][0][0] for sample in found["samples"]["local_generate"]]

    return run


@pytest.mark.parametrize("more", [{}, {"batch_size": 3}, {"num_concurrent": 4}])
def test_generate_until_is_what_our_class_answers(server, answers, more):
    inside = answers(lm_eval.LLaDAJax("somewhere", block_length=4, steps=4, threshold=2.0, gen_length=8))
    url = f"{server.url}/v1/completions"
    outside = answers(LocalCompletionsAPI(url, model="tiny", tokenizer_backend=None, **more))
    assert outside == inside and len(set(inside)) > 1 and any(len(text) < 20 for text in inside)


def test_chats_are_answered(server, answers):
    url = f"{server.url}/v1/chat/completions"
    assert all(isinstance(text, str) for text in answers(LocalChatCompletion(url, model="tiny")))
