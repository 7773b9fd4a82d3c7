"""What a small run of reinforcement learning reads."""

import json
from pathlib import Path

import jax
import numpy as np

from llada_jax.checkpoint.weights import write_weights
from llada_jax.data.byte_tokenizer import byte_tokenizer
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig


def write_rl_inputs(folder: Path, model: ModelConfig, rewards: str) -> None:
    """FOLDER/base: a checkpoint of random weights; questions.jsonl: 40 of them; rewards.py: the text `rewards`."""
    leaves = parameters.unstack(parameters.initialize(model, jax.random.key(0)), model)
    tokenizer = byte_tokenizer(model.eos_token_id, model.mask_token_id)
    arrays = ((name, np.asarray(leaf)) for name, leaf in leaves.items())
    write_weights(folder / "base", model, arrays, tokenizer.files, {})
    rows = [{"prompt": "abcdefghij"[: 3 + i % 7] + str(i), "answer": "x"} for i in range(40)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(rewards)
