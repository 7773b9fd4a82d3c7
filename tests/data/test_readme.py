"""The page of the rows that are read: its examples give the texts that stand there, and it names every key."""

import json
import re

import pytest

from llada_jax.data import chat, pairs
from llada_jax.data.conversation import messages, shapes, token_rows
from tests.helpers.data_helpers import ROOT, with_template

PAGE = (ROOT / "llada_jax" / "data" / "README.md").read_text()
TOKENIZER = with_template(re.search("```jinja\n(.*?)\n```", PAGE, re.DOTALL)[1])
EXAMPLES = re.findall("```json\n(.*?)\n```\n```text\n(.*?)\n```", PAGE, re.DOTALL)


def marked(document):
    """The text of a document with brackets around what is supervised."""
    text, end = "", 0
    for start, stop in document.spans:
        text += TOKENIZER.decode(document.ids[end:start]) + "⟦" + TOKENIZER.decode(document.ids[start:stop]) + "⟧"
        end = stop
    return text + TOKENIZER.decode(document.ids[end:])


@pytest.mark.parametrize(("row", "text"), EXAMPLES)
def test_an_example_gives_its_text(row, text):
    row = {name: value for name, value in json.loads(row).items() if value is not None}
    prepare = pairs.prepare if "chosen" in row else chat.prepare
    assert "\n".join(map(marked, chat.tokenise(prepare(row, TOKENIZER), TOKENIZER))) == text


def test_every_key_is_on_the_page():
    assert len(EXAMPLES) == PAGE.count("```json") == PAGE.count("```text") >= 13
    named = set(re.findall(r"`([^`\n]+)`", PAGE))
    for names in (
        chat.COLUMNS, pairs.COLUMNS, messages.ROLES, messages.SAID, messages._FLAGS, messages._REFUSED,
        shapes._REFUSED, shapes.MEDIA, token_rows._REFUSED, token_rows.MASKS,
    ):  # fmt: skip
        assert set(names) <= named, set(names) - named
