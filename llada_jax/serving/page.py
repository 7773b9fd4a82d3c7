"""The page: a chat with the server, or with a trajectory in it the replay of an answer. It needs nothing but itself."""

import json
from importlib import resources
from types import SimpleNamespace

import numpy as np

from llada_jax.data import chat
from llada_jax.errors import InputError
from llada_jax.sampling import trajectory
from llada_jax.sampling.history import History
from llada_jax.tokenizer import Tokenizer

_PLACE = "<!-- trajectory -->"
_COUNTS = ("forward_passes", "commit_passes", "prefill_passes", "tokens_per_forward")
_ADDED = ("answer", "token_ids", "steps", "confidences", *_COUNTS)  # to an answer line
_OF_WRITES = ("positions", "token_ids", "steps", "forwards", "confidences")


def read() -> str:
    """The page as it is served."""
    return (resources.files(__package__) / "page.html").read_text(encoding="utf-8")


def replay(model: str, prompt: str, ids, answer, tokenizer: Tokenizer, block_length: int) -> str:
    """Returns the page as one self-contained file that plays how an answer filled.

    model: its name, for the title. prompt: its text; ids: its tokens. answer: a batching.Answer, or what has its
    tokens, written_at, confidence, passes and history.
    """
    spans = trajectory.blocks(len(ids), answer.tokens, block_length)
    arrays = answer.tokens, answer.written_at, answer.confidence
    writes = trajectory.writes(ids, *arrays, spans, tokenizer, answer.history)
    return embed(
        {
            "model": model,
            "prompt": prompt,
            "blocks": [span.stop - span.start for span in spans],
            "writes": writes,
            "passes": answer.forward_passes,
            "usage": {name: getattr(answer, name) for name in _COUNTS},
        }
    )


def replay_of_row(model: str, row: dict, tokenizer: Tokenizer, block_length: int, as_chat: bool = False) -> str:
    """The same of a line of `tools/generate.py --output`; with what --history adds, drafts before an edit too.

    as_chat: --chat was given. Raises InputError if the line lacks what an answer line has, or its prompt is no prompt.
    """
    names = {name: f"generated_{name}" if f"generated_{name}" in row else name for name in (*_ADDED, "history")}
    if missing := [name for name in _ADDED if names[name] not in row]:
        raise InputError(f"{missing[0]} is not there: not a line of answers")
    added = {name: row.get(key) for name, key in names.items()}
    writes = added["history"]
    answer = SimpleNamespace(
        **added | {"history": writes and History(*(np.array(writes[name]) for name in _OF_WRITES))},
        tokens=np.array(added["token_ids"], np.int32),
        written_at=np.array(added["steps"], np.int32),
        confidence=np.array(added["confidences"], np.float32),
    )
    asked = {key: value for key, value in row.items() if value is not None and key not in names.values()}
    prompt = chat.prompt(asked, tokenizer, as_chat)
    return replay(model, prompt.text, prompt.ids(tokenizer), answer, tokenizer, block_length)


def embed(data: dict) -> str:
    """The page with JSON in it. No text in the data can end its element: "<" is written as an escape."""
    text = json.dumps(data).replace("<", "\\u003c")
    return read().replace(_PLACE, f'<script type="application/json" id="trajectory">{text}</script>')
