"""Held-out measures of a run: the same rows and masks every time, so that differences between steps are paired."""

import dataclasses

import jax
from ml_collections import ConfigDict

from llada_jax.evaluation.likelihood import block_nelbo, weighted_mean
from llada_jax.evaluation.preference import chosen_only, compare
from llada_jax.evaluation.report import with_error
from llada_jax.monitoring.metrics import MetricsWriter
from llada_jax.training.config import evaluation_block_sizes, execution, ranking_block_size
from llada_jax.training.inputs import Inputs
from llada_jax.training.reference import Reference, held_out_scores


def evaluate(
    config: ConfigDict, inputs: Inputs, reference: Reference, params, writer: MetricsWriter, step: int
) -> float:
    """Writes and prints the NELBO at each block size, and for DPO how policy and reference compare on the pairs.

    Of a mixture the NELBO is the mean over components by their shares, with that of each beside it. Returns the NELBO
    by which checkpoints are ranked. Of pairs only the chosen answers count in it.
    """
    sizes = evaluation_block_sizes(config)
    rows = inputs.held_out
    if reference.held_out is not None:
        _compare(config, inputs, reference, params, writer, step, sizes[-1])
        rows = chosen_only(rows)
    mesh = jax.sharding.get_abstract_mesh()
    nelbo, texts = {}, []
    for block_size in sizes:
        estimates = {
            part.name: block_nelbo(
                params, inputs.model, jax.tree.map(lambda x, part=part: x[part.held_out], rows), block_size,
                samples=config.evaluation.samples, rows_at_once=max(4, mesh.size),
                block_origin=config.objective.block_origin, document_mask=config.objective.document_mask,
                execution=execution(config),
            )
            for part in inputs.components
        }  # fmt: skip
        estimate = weighted_mean(list(estimates.values()), [part.share for part in inputs.components])
        row = {"step": step, "block_size": block_size, "nelbo": estimate.nats, "nelbo_stderr": estimate.stderr}
        if len(estimates) > 1:
            row |= {f"nelbo/{name}": each.nats for name, each in estimates.items()}
            row |= {f"nelbo_stderr/{name}": each.stderr for name, each in estimates.items()}
        writer.write(row, f"held_out_block_{block_size}")
        texts.append(f"{block_size}: {with_error(estimate.nats, estimate.stderr, '.3f')}")
        nelbo[block_size] = estimate.nats
    print(f"step {step}  held-out NELBO, nats per token, by block size  " + "   ".join(texts), flush=True)
    return nelbo[ranking_block_size(config)]


def _compare(config, inputs: Inputs, reference: Reference, params, writer, step: int, block_size: int) -> None:
    policy = held_out_scores(config, inputs, params)
    comparison = compare(policy, reference.held_out, inputs.held_out.segment_ids, config.preference.beta)
    row = {f"preference_{name}": value for name, value in dataclasses.asdict(comparison).items()}
    writer.write({"step": step, "block_size": block_size} | row, "held_out_preference")
    print(f"step {step}  held-out preference  {comparison.describe()}", flush=True)
