"""The page, driven in a real browser by a keyboard and a mouse, against a server that says what each test wants."""

import functools
import json

import pytest

from llada_jax.serving import page
from tests.helpers.waiting import PATIENCE, wait_until
from tests.serving.browser import Keys, Page, browser  # noqa: F401
from tests.serving.stream_server import DONE, HANG_UP, PAUSE, StreamServer, committed, end, provisional

INJECTED = '<img src=x onerror="document.title=1">', "</script><script>document.title=2</script>"
HALF = provisional(("One", 0), (None, -1), (None, -1), (" four", 2))
FULL = provisional(("One", 0), (" two", 1), (" three", 3), (" four", 2))
BLOCK = committed(("One", 0), (" two", 1), (" three", 3), (" four", 2))
MASKS = provisional((None, -1), (None, -1))
ANSWER = [HALF, FULL, BLOCK, MASKS, committed((" five", 0)), *end()]


@pytest.fixture(scope="module")
def server():
    server = StreamServer()
    yield server
    server.close()


@pytest.fixture
def chat(server, browser):
    """chat(*answers): the page, of a server with these answers to come."""

    def open_chat(*answers) -> Page:
        server.forget(*answers)
        browser.emulate()
        browser.open(server.url)
        browser.run("sessionStorage.clear()")
        wait_until(lambda: "mock-model" in browser.texts("#model"))
        return browser

    return open_chat


def test_a_block_fills_and_is_committed(chat, server):
    seen = chat([HALF, PAUSE, FULL, PAUSE, BLOCK, MASKS, PAUSE, committed((" five", 0)), *end()])
    seen.ask("Count")
    wait_until(lambda: len(seen.answer()) == 4)
    one, four = ("written", "One", "step 1"), ("written", " four", "step 3")
    assert seen.answer() == [one, ("mask", "", "masked"), ("mask", "", "masked"), four]
    assert seen.texts("#spoken") == [""]  # nobody is told what may still change
    assert {e.get_attribute("aria-hidden") for e in seen.all(".turn .token")} == {"true"}
    server.go_on()
    wait_until(lambda: seen.answer()[2] == ("written", " three", "step 4"))
    server.go_on()
    wait_until(lambda: len(seen.answer()) == 6)
    assert [state for state, _, _ in seen.answer()] == ["settled"] * 4 + ["mask"] * 2
    assert seen.texts("#spoken") == ["One two three four"]
    server.go_on()
    seen.sees("tokens per forward")
    seen.finishes()
    assert "".join(text for _, text, _ in seen.answer()) == "One two three four five"
    assert {state for state, _, _ in seen.answer()} == {"settled"}
    assert not seen.all(".turn .token[aria-hidden]")
    assert seen.texts(".figures dd") == ["1.00", "6", "12"]  # 6 tokens in 4 + 1 + 1 passes and half a second


def test_colours_go_by_the_step_and_can_be_switched_off(chat):
    seen = chat([HALF, PAUSE])
    seen.ask("Count")
    wait_until(lambda: len(seen.answer()) == 4)
    tones = [seen.color(f".turn .token:nth-child({i}) .ink", "boxShadow") for i in (1, 4)]
    assert tones[0] != tones[1]
    seen = chat(ANSWER)
    seen.ask("Count")
    seen.finishes()
    tint = functools.partial(seen.color, ".turn .token .ink")
    nothing = "rgba(0, 0, 0, 0)"
    assert tint() != nothing
    seen.all("#tint")[0].click()
    wait_until(lambda: tint() == nothing)
    seen.all("#numbers")[0].click()  # for those who see no colours
    marks = seen.run("""[...document.querySelectorAll(".turn .token")].map(
        (e) => [getComputedStyle(e, "::after").content, e.dataset.step])""")
    assert [step for _, step in marks] == ["1", "2", "4", "3", "1"] and {mark for mark, _ in marks} != {"none"}
    assert seen.texts(".turn .answer") == ["One two three four five"]


def test_the_scale_of_steps_grows(chat):
    seen = chat([committed(("a", 0), ("b", 11)), *end()])
    assert seen.all("#legend")[0].get_attribute("aria-label") == "Colours from step 1 to step 8"
    seen.ask("x")
    wait_until(lambda: seen.all("#legend")[0].get_attribute("aria-label") == "Colours from step 1 to step 12")
    last = "getComputedStyle(document.querySelector(arguments[0])).getPropertyValue('--tone')"
    assert seen.run(last, ".turn .token:last-child") == seen.run(last, "#legend i:last-child")


def test_earlier_turns_are_sent_along_and_only_moved_settings(chat, server):
    seen = chat(ANSWER, [committed(("Six", 0)), *end("length")], ANSWER)
    seen.ask("Count")
    seen.finishes()
    seen.run("document.querySelector('[name=block_length]').focus()")
    seen.press(Keys.ARROW_LEFT)
    assert seen.texts(".sliders output") == ["default", "16", "default", "default"]
    seen.all("#input")[0].send_keys("And", Keys.SHIFT, Keys.ENTER, Keys.NULL, "then?", Keys.ENTER)
    seen.sees("Cut off")
    seen.finishes()
    first, second = server.asked
    said = [("user", "Count"), ("assistant", "One two three four five"), ("user", "And\nthen?")]
    assert [(message["role"], message["content"]) for message in second["messages"]] == said
    assert second["block_length"] == 16 and "block_length" not in first and "threshold" not in second
    assert first["model"] == "mock-model" and first["provisional"] and first["stream"]
    assert first["stream_options"] == {"include_usage": True}
    seen.all("#clear")[0].click()
    seen.ask("Anew")
    wait_until(lambda: len(server.asked) == 3)
    assert len(server.asked[2]["messages"]) == 1


@pytest.mark.parametrize("by", ["button", "escape"])
def test_stop_cancels_the_request_and_keeps_what_is_committed(chat, server, by):
    seen = chat([BLOCK, MASKS, PAUSE, *end()], ANSWER)
    seen.ask("Count")
    wait_until(lambda: len(seen.answer()) == 6)
    seen.all("#stop")[0].click() if by == "button" else seen.press(Keys.ESCAPE)
    assert server.left.wait(PATIENCE)
    seen.sees("Stopped.")
    assert [state for state, _, _ in seen.answer()] == ["settled"] * 4
    assert seen.focused() == "input"
    seen.ask("And on")
    wait_until(lambda: len(server.asked) == 2)
    assert server.asked[1]["messages"][1]["content"] == "One two three four"


FAILURES = {
    "429: too many requests Try again in 3 s.": (429, "too\nmany requests", {"Retry_After": 3}),
    "400: threshold=9, expected at most 1": (400, "threshold=9, expected at most 1", {}),
    "The connection was lost.": [HALF, HANG_UP],
    "out of memory": [HALF, {"error": {"message": "out of memory"}}, DONE],
}


@pytest.mark.parametrize("message", FAILURES)
def test_a_failure_is_one_line_and_the_message_can_be_sent_again(chat, server, message):
    seen = chat(FAILURES[message], ANSWER)
    seen.ask("Count")
    seen.sees(message)
    assert seen.texts("[role=alert]") == [f"{message} Send again"]
    assert not seen.answer()  # no boxes stay
    seen.all(".error button")[0].click()
    seen.sees("five")
    assert not seen.all("[role=alert]") and len(seen.all(".turn")) == 1
    assert [len(asked["messages"]) for asked in server.asked] == [1, 1]


def test_half_an_answer_is_not_sent_along(chat, server):
    seen = chat([BLOCK, HANG_UP], ANSWER)
    seen.ask("Count")
    seen.sees("The connection was lost.")
    seen.ask("Again")
    seen.finishes()
    assert [message["content"] for message in server.asked[1]["messages"]] == ["Again"]


def test_a_server_that_is_gone(chat, browser):
    gone = StreamServer()
    browser.emulate()
    browser.open(gone.url)
    gone.close()
    browser.ask("Count")
    browser.sees("The server cannot be reached.")


def test_the_key_is_asked_for_after_a_401_only(chat, server):
    seen = chat((401, "no key", {}), ANSWER, ANSWER)
    assert not seen.all("#key")[0].is_displayed()
    seen.ask("Count")
    seen.sees("401: no key")
    assert seen.focused() == "secret"
    seen.ask("s3cret")
    seen.sees("five")
    assert not seen.all("#key")[0].is_displayed() and server.keys == [None, "Bearer s3cret"]
    seen.driver.refresh()
    seen.ask("Again")
    seen.sees("five")
    assert server.keys[2] == "Bearer s3cret"


def test_characters_cut_between_tokens_and_text_that_comes_late(chat):
    cut = [committed(("a", 0), ("\ufffd", 1), text="a"), committed(("\ufffd", 2), (" b", 0), text="é b")]
    late = [committed((" c", 3), (" d", 4), text=" c"), committed((" e", 5), text=" d e")]
    seen = chat([*cut, *late, *end()])
    seen.ask("x")
    seen.sees("a é b c d e".replace(" é", "é"))
    assert [(text, title) for _, text, title in seen.answer()] == [
        ("a", "step 1"), ("é", "step 3"), (" b", "step 1"), (" c", "step 4"), (" d", "step 5"), (" e", "step 6"),
    ]  # fmt: skip


def test_a_server_without_blocks(chat):
    """That of another model: what it sends is text."""
    plain = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("Hel", "lo")]
    seen = chat([*plain, DONE])
    seen.ask("x")
    seen.sees("Hello")
    assert seen.answer() == [("settled", "Hel", ""), ("settled", "lo", "")] and not seen.all("[role=alert]")


def test_what_a_model_says_is_text(chat, browser):
    steps = [(text, step) for step, text in enumerate(INJECTED)]
    seen = chat([provisional(*steps), committed(*steps), *end()], (400, INJECTED[0], {}))
    seen.ask(INJECTED[0])
    seen.sees(INJECTED[1])
    seen.finishes()
    seen.ask("again")
    seen.sees(f"400: {INJECTED[0]}")
    assert [text for _, text, _ in seen.answer(0)] == list(INJECTED) and not seen.all("img")
    assert seen.driver.title == "mock-model · llada_jax"


def test_the_keyboard_reaches_everything(chat):
    seen = chat(ANSWER)
    assert seen.focused() == "input"
    seen.ask("Count")
    seen.finishes()
    seen.run("document.querySelector('#tint').focus()")
    order = ["numbers", "clear", "input", "send", "Settings", "threshold", "block_length", "temperature", "max_tokens"]
    for expected in order:
        seen.press(Keys.TAB)
        assert seen.focused() == expected
        ring = "(document.activeElement.closest('.field:has(textarea:focus)') ?? document.activeElement)"
        assert seen.run(f"getComputedStyle({ring}).outlineStyle") != "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_legible_and_narrow_screens_do_not_scroll_sideways(chat, scheme):
    seen = chat([committed((" word" * 30, 1), ("w" * 300, 6)), HALF, PAUSE], ANSWER)
    seen.emulate(320, 640, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    seen.ask("Count " + "w" * 200)
    seen.sees("four")
    seen.all("summary")[0].click()
    assert seen.run("document.documentElement.scrollWidth") <= 320
    for rect in (element.rect for element in seen.all("button, input, textarea, p")):
        assert 0 <= rect["x"] and rect["x"] + rect["width"] <= 320
    paper = seen.color("body")
    assert (contrast("rgb(0, 0, 0)", paper) > contrast("rgb(255, 255, 255)", paper)) == (scheme == "light")
    assert contrast(seen.color("body", "color"), paper) > 7 and contrast(seen.color("label", "color"), paper) > 4.5
    assert seen.color(".mask .ink", "animationName") == "none"


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it, of two colours rgb(r, g, b)."""

    def luminance(color):
        parts = [int(part) / 255 for part in color.removeprefix("rgb(").rstrip(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


TRAJECTORY = {
    "model": "small",
    "prompt": "Say " + INJECTED[1],
    "blocks": [2, 3],
    "writes": [
        [0, 0, 0, "draft", 0.4], [1, 1, 1, INJECTED[1], 0.75], [0, 2, 2, INJECTED[0], 0.9],  # an edit
        [3, 3, 0, " c", 1.0], [2, 4, 1, " b", 0.5], [4, 4, 1, " d", 0.5],
    ],
    "passes": 5,
    "usage": {"forward_passes": 5, "commit_passes": 1, "prefill_passes": 0, "tokens_per_forward": 0.83},
}  # fmt: skip


@pytest.fixture
def replay(browser, tmp_path):
    """replay(motion, passes): the page that plays TRAJECTORY."""

    def open_replay(motion: str = "reduce", passes: int = TRAJECTORY["passes"]) -> Page:
        file = tmp_path / "replay.html"
        file.write_text(page.embed(TRAJECTORY | {"passes": passes}), encoding="utf-8")
        browser.emulate(prefers_reduced_motion=motion)
        return browser.open(file.as_uri())

    return open_replay


def test_a_trajectory_is_replayed_by_the_keyboard(replay):
    seen = replay()
    assert [text for _, text, _ in seen.answer()] == [*INJECTED, " b", " c", " d"]  # it does not move by itself
    assert {state for state, _, _ in seen.answer()} == {"settled"}
    assert seen.texts(".question") == [TRAJECTORY["prompt"]] and seen.driver.title == "small · llada_jax"
    assert seen.texts(".figures dd") == ["0.83", "6"] and not seen.all("img")
    assert not seen.all("#composer")[0].is_displayed()
    seen.press(Keys.HOME)
    assert seen.answer() == [("mask", "", "masked")] * 2
    seen.press(Keys.ARROW_RIGHT)
    assert seen.answer() == [("written", "draft", "step 1, probability 0.4"), ("mask", "", "masked")]
    seen.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert seen.answer() == [
        ("written", INJECTED[0], "step 3, probability 0.9"), ("written", INJECTED[1], "step 2, probability 0.75"),
    ]  # fmt: skip
    seen.press(Keys.ARROW_RIGHT)
    assert [state for state, _, _ in seen.answer()] == ["settled", "settled", "mask", "written", "mask"]
    assert seen.texts("#pass") == ["pass 4 of 5"]
    seen.press(Keys.ARROW_LEFT)
    assert len(seen.answer()) == 2


def test_a_trajectory_plays_and_pauses(replay):
    seen = replay("no-preference", 100_000)  # hours
    seen.driver.find_element("id", "speed").send_keys("4")
    seen.run("document.activeElement.blur()")
    wait_until(lambda: len(seen.answer()) == 5)
    seen.press(" ")
    at = seen.texts("#pass")
    assert seen.texts("#play") == ["Play"] and at != ["pass 100000 of 100000"]
    seen.all("#play")[0].click()
    assert seen.texts("#play") == ["Pause"]
    wait_until(lambda: seen.texts("#pass") != at)
    seen.press(Keys.END)
    assert seen.texts("#play") == ["Play"] and seen.texts("#pass") == ["pass 100000 of 100000"]
    seen.all("#play")[0].click()  # from the beginning
    wait_until(lambda: 0 < seen.run("Number(document.querySelector('#at').value)") < 50_000)


def test_replay_is_one_file(replay):
    seen = replay()
    assert json.loads(seen.texts("#trajectory")[0]) == TRAJECTORY
    assert len(seen.run("performance.getEntriesByType('resource')")) == 0
