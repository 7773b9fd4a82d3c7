"""Held-out measures of a run: the same rows and masks every time, so that differences between steps are paired."""

import jax
from ml_collections import ConfigDict

from llada_jax.evaluation.likelihood import block_nelbo
from llada_jax.training import config as settings
from llada_jax.training.inputs import Inputs
from llada_jax.training.metrics import MetricsWriter


def evaluate(config: ConfigDict, inputs: Inputs, params, writer: MetricsWriter, step: int) -> float:
    """Writes and prints the NELBO at each block size. Returns the one by which checkpoints are ranked."""
    sizes = (1,) if config.schedule.kind == "ar" else config.evaluation.block_sizes
    mesh = jax.sharding.get_abstract_mesh()
    found, texts = {}, []
    for block_size in sizes:
        estimate = block_nelbo(
            params, inputs.model, inputs.held_out, block_size, samples=config.evaluation.samples,
            rows_at_once=max(4, mesh.size), block_origin=config.objective.block_origin,
            execution=settings.execution(config),
        )  # fmt: skip
        row = {"step": step, "block_size": block_size, "nelbo": estimate.nats, "nelbo_stderr": estimate.stderr}
        writer.write(row, f"held_out_block_{block_size}")
        texts.append(f"{block_size}: {estimate.nats:.3f} ± {estimate.stderr:.3f}")
        found[block_size] = estimate.nats
    print(f"step {step}  held-out NELBO, nats per token, by block size  " + "   ".join(texts), flush=True)
    return found.get(config.checkpoint.best_block_size, found[sizes[-1]])
