"""What is written into the page, and that the page comes with the package. How it looks: test_page.py."""

import fnmatch
import json
import re
import tomllib

import jax
import numpy as np
import pytest

from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.sampling.batching import Request, serve
from llada_jax.sampling.generate import GenerateConfig
from llada_jax.serving import page
from tests.helpers.paths import ROOT

CONFIG = preset("tiny").replace(num_layers=1)
TOKENIZER = byte_tokenizer(CONFIG.eos_token_id, CONFIG.mask_token_id)
RULES = {
    "threshold": {},
    "edits": dict(rule="llada2.1", threshold=0.001, editing_threshold=0.0),
    "several blocks": dict(active_blocks=2, add_block_threshold=0.1, semi_complete_threshold=0.9),
}


def embedded(html: str) -> dict:
    """The data that a browser finds in the page."""
    (text,) = re.findall(r'<script type="application/json" id="trajectory">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


@pytest.mark.parametrize("text", ["</script>", "<!-- <script>", "<img onerror=x>", "é\u2028\ud800", "\\u003c & \0"])
def test_no_text_gets_out_of_its_element(text):
    html = page.embed({"prompt": text})
    assert embedded(html) == {"prompt": text}
    assert html.count("</script>") == page.read().count("</script>") + 1
    html.encode("utf-8")


@pytest.fixture(scope="module")
def answered():
    """answered(rule, history) -> (the prompt's ids, the answer, block length)."""
    params = parameters.initialize(CONFIG, jax.random.key(0))
    ids = TOKENIZER.encode_document("def")

    def answer(rule: str, history: bool = True):
        config = GenerateConfig(gen_length=10, block_length=4, eos_id=-1, **{"threshold": 0.004} | RULES[rule])
        (found,) = serve(
            params, CONFIG, [Request(np.array(ids, np.int32), config, 0)], 1, 32, TOKENIZER, history=history
        )
        return ids, found, config.block_length

    return answer


@pytest.mark.parametrize("rule", RULES)
def test_the_writes_of_a_replay_end_in_the_answer(answered, rule):
    ids, answer, block_length = answered(rule)
    data = embedded(page.replay("small", "def", ids, answer, TOKENIZER, block_length))
    assert sum(data["blocks"]) == len(answer.tokens) == 10 and data["blocks"][1] == 4
    final = {position: (text, step) for position, _, step, text, _ in data["writes"]}
    pieces = [TOKENIZER.text.piece([], token) for token in answer.tokens]
    assert [final[i] for i in range(10)] == list(zip(pieces, answer.written_at.tolist(), strict=True))
    passes = [write[1] for write in data["writes"]]
    assert passes == sorted(passes) and max(passes) < data["passes"] == answer.forward_passes
    assert (len(passes) > 10) == (rule == "edits")
    assert data["usage"]["forward_passes"] == answer.forward_passes and data["prompt"] == "def"


def test_without_a_history_it_is_the_same_where_nothing_is_edited(answered):
    pages = []
    for history in (True, False):
        ids, answer, block_length = answered("threshold", history)
        pages.append(embedded(page.replay("small", "def", ids, answer, TOKENIZER, block_length)))
    assert pages[0] == pages[1]


def test_an_answer_line_is_replayed_too(answered):
    ids, answer, block_length = answered("edits")
    counts = ("forward_passes", "commit_passes", "prefill_passes", "tokens_per_forward")
    position, token, step, forward, confidence = (array.tolist() for array in answer.history)
    row = {name: getattr(answer, name) for name in counts} | {
        "prompt": "def",
        "answer": answer.text,
        "token_ids": answer.tokens.tolist(),
        "steps": "mine",
        "generated_steps": answer.written_at.tolist(),
        "confidences": answer.confidence.tolist(),
        "history": {
            "positions": position, "token_ids": token, "steps": step, "forwards": forward, "confidences": confidence,
        },
    }  # fmt: skip
    row = json.loads(json.dumps(row))
    same = page.replay("small", "def", ids, answer, TOKENIZER, block_length)
    assert page.replay_of_row("small", row, TOKENIZER, block_length) == same
    final = embedded(page.replay_of_row("small", row | {"history": None}, TOKENIZER, block_length))["writes"]
    assert len(final) == 10 < len(embedded(same)["writes"])
    with pytest.raises(InputError, match="confidences is not there: not a line of answers"):
        page.replay_of_row("small", {key: row[key] for key in row if key != "confidences"}, TOKENIZER, 4)


def test_an_empty_answer(answered):
    ids, answer, block_length = answered("threshold")
    names = ("tokens", "written_at", "confidence")
    empty = {**vars(answer), **{name: getattr(answer, name)[:0] for name in names}, "history": None}
    data = embedded(page.replay("small", "def", ids, type(answer)(**empty), TOKENIZER, block_length))
    assert (data["blocks"], data["writes"]) == ([], [])


def test_files_that_code_reads_are_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for file in (ROOT / "llada_jax").rglob("*"):
        if file.suffix in (".json", ".html"):
            folder = ".".join(file.parent.relative_to(ROOT).parts)
            assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns.get(folder, ())), file


def test_the_page_needs_nothing_but_itself_and_inserts_no_html():
    text = page.read()
    assert not re.search(r"(src|href)=(?!\"data:)|@import|url\(|https?://", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)
