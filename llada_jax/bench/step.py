"""Measures a BDLM training step with each attention implementation on the current device."""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llada_jax.data.order import Batch
from llada_jax.diffusion.objectives import Objective
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig, preset
from llada_jax.model.forward import Execution
from llada_jax.training import train_state
from llada_jax.training.step import denoising_loss, make_train_step

REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """seconds: minimum of REPEATS steps. temp_bytes: temporaries of the compiled step. loss: equal for all."""

    seconds: float
    temp_bytes: int
    loss: float


def compiled_step(model: ModelConfig, attention: str, segment_ids: np.ndarray, block_size: int):
    """Returns (compiled training step on segment_ids [rows, length], its arguments)."""
    rows, length = segment_ids.shape
    ids = np.random.default_rng(0).integers(0, model.mask_token_id, (rows, length), dtype=np.int32)
    index = np.arange(rows, dtype=np.uint32)
    batch = jax.device_put(Batch(ids, segment_ids, np.ones((rows, length), bool), index, np.zeros_like(index)))
    optimizer = optax.adamw(1e-4)
    step = make_train_step(model, denoising_loss(model, Objective(), Execution(attention=attention), seed=0), optimizer)
    arguments = None, batch, jnp.int32(block_size), jnp.float32(0)
    state = train_state.create(parameters.initialize(model, jax.random.key(0)), optimizer)
    return step.lower(state, *arguments, "both").compile(), (state, *arguments)


def measure(model: ModelConfig, attentions, segment_ids: np.ndarray, block_size: int) -> dict[str, Measured]:
    """Times a step with each of `attentions` in turn, so that all see the same machine load."""
    steps = {attention: compiled_step(model, attention, segment_ids, block_size) for attention in attentions}
    seconds, losses = {attention: [] for attention in attentions}, {}
    for _ in range(REPEATS):
        for attention, (step, (state, *arguments)) in steps.items():
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # the step donates it
            begin = time.perf_counter()
            _, metrics = jax.block_until_ready(step(state, *arguments))
            seconds[attention].append(time.perf_counter() - begin)
            losses[attention] = float(metrics["loss"])
    return {
        attention: Measured(min(seconds[attention]), step.memory_analysis().temp_size_in_bytes, losses[attention])
        for attention, (step, _) in steps.items()
    }


def table(attentions, lengths, model_name: str, num_rows: int) -> Iterator[dict]:
    """Prints a line per measurement and yields its values."""
    model = preset(model_name)
    print(f"{jax.devices()[0].device_kind}, {model_name}, {num_rows} row(s) of one document, block size 32: a step")
    print(f"length implementation  seconds (least of {REPEATS})  temporaries MiB  loss")
    for length in lengths:
        measured = measure(model, attentions, np.ones((num_rows, length), np.int32), block_size=32)
        for name, row in measured.items():
            print(f"{length:6} {name:14} {row.seconds:10.3f} {row.temp_bytes / 2**20:24.1f} {row.loss:11.4f}")
            yield {"implementation": name, "length": length} | dataclasses.asdict(row)
