"""The page in a real browser, of the server itself."""

import pytest

from tests.helpers.waiting import wait_until
from tests.serving.browser import browser  # noqa: F401
from tests.serving.running import alone, served, small_model


@pytest.fixture(scope="module")
def server():
    with served(small_model(), keys=("sesame",)) as running:
        yield running


def test_a_chat_with_the_server(server, browser):
    model = server.model
    browser.open(server.url)
    browser.ask("hi")
    browser.sees("401")
    browser.run("document.querySelector('#secret').focus()")
    browser.ask("sesame")
    browser.finishes()
    answer = alone(model, model.tokenizer.encode("user:hi|assistant:"))
    browser.sees("tokens per forward")
    assert "".join(text for _, text, _ in browser.answer()) == answer.text
    assert {state for state, _, _ in browser.answer()} == {"settled"}
    wait_until(lambda: browser.texts("#model") == ["tiny"])
    titles = [title for _, _, title in browser.answer()]
    assert titles == [f"step {step + 1}" for step in answer.written_at]
    browser.ask("and")
    browser.finishes()
    text = f"user:hi|assistant:{answer.text}|user:and|assistant:"
    assert "".join(text for _, text, _ in browser.answer()) == alone(model, model.tokenizer.encode(text)).text
