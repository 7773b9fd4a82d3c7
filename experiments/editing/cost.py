"""What a step with two turns costs beside a step of SFT: processor seconds, in turn, of the tiny model.

    python experiments/editing/cost.py [ROUNDS]

The least of ROUNDS (5) rounds of three steps each, after one that compiles: 8 rows of 256 tokens and their inverse
masks, in blocks of 32.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import llada_jax
from llada_jax.model import parameters
from llada_jax.model.config import preset
from llada_jax.training import stages, train_state
from llada_jax.training.config import execution, objective
from llada_jax.training.optimizer import make_optimizer
from llada_jax.training.step import denoising_loss, make_train_step

ROWS, LENGTH, BLOCK, STEPS = 8, 256, 32, 3
MODEL = preset("tiny")


def stage(name: str):
    """(step, state) of a stage of the tiny model."""
    config = stages.STAGES[name]("tiny", length=LENGTH)
    optimizer = make_optimizer(config.optimizer, MODEL, 1000)
    loss = denoising_loss(MODEL, objective(config), execution(config, "cpu"), seed=0)
    params = parameters.initialize(MODEL, jax.random.key(0))
    return make_train_step(MODEL, loss, optimizer), train_state.create(params, optimizer)


def main(rounds: int) -> None:
    ids = np.random.default_rng(0).integers(0, MODEL.eos_token_id, (ROWS, LENGTH)).astype(np.int32)
    batch = jax.device_put(llada_jax.make_batch(ids))
    running = {name: stage(name) for name in ("sft", "edit")}
    seconds = {name: [] for name in running}
    for _ in range(rounds + 1):
        for name, (step, state) in running.items():
            begin = time.process_time()
            for _ in range(STEPS):
                state, _ = step(state, None, batch, jnp.int32(BLOCK), jnp.float32(0), "both")
            jax.block_until_ready(state)
            seconds[name].append((time.process_time() - begin) / STEPS)
            running[name] = step, state
    least = {name: min(values[1:]) for name, values in seconds.items()}
    print(", ".join(f"{name} {value:.2f} s" for name, value in least.items()), end="; ")
    print(f"edit takes {least['edit'] / least['sft']:.2f} times as long")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
