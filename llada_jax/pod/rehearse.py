"""Estimates what the trainer's own step costs on a TPU slice, without the slice; pod/lower.py compiles it.

Compiler-estimated, not measured.
"""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from llada_jax.attention import context
from llada_jax.chips import Topology
from llada_jax.errors import InputError
from llada_jax.model import head, useful_flops
from llada_jax.pod import aot, attention_cost, experts_cost, hlo, routing_cost, schedule_reader
from llada_jax.pod.collectives import Devices
from llada_jax.pod.lower import LoweredStep, Slices, compile_step, lower_step
from llada_jax.pod.operations import OperationCost
from llada_jax.pod.packings import MEANS, segment_ids
from llada_jax.pod.step_cost import Line, part_seconds, step_lines
from llada_jax.pod.topology import slice_index
from llada_jax.training import compiled_step, run_model
from llada_jax.training.config import check, execution


@dataclasses.dataclass(frozen=True)
class Packing:
    """The contents of the rows and the balance of the experts, on which run-time tile counts depend.

    mean_document: tokens per document; 0: one document per row (pod/packings.py). busiest: load of the busiest shard's
    experts over the mean load; 1 is balanced.
    """

    mean_document: int = 1024
    block_size: int = 32
    busiest: float = 1.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip. activations: what the loops keep for the backward pass; temporaries: all others."""

    parameters: int
    optimizer: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.activations + self.temporaries


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """The estimate of a step. lines and seconds: of one device. rows, flops, useful_flops: of all chips."""

    lines: list[Line]
    memory: Memory
    useful_flops: float
    compile_seconds: float
    slices: Slices
    rows: int
    length: int

    @property
    def seconds(self) -> dict[str, float]:
        return part_seconds(self.lines)

    @property
    def flops(self) -> float:
        """FLOPs that all chips execute."""
        return sum(line.flops for line in self.lines) * self.slices.chips * self.slices.topology.chip.devices

    @property
    def peak(self) -> float:
        return self.slices.chips * self.slices.topology.chip.peak_bf16

    @property
    def serial_mfu(self) -> float:
        return self.useful_flops / (self.peak * sum(self.seconds.values()))

    @property
    def overlapped_mfu(self) -> float:
        compute = sum(seconds for part, seconds in self.seconds.items() if part != "collectives")
        return self.useful_flops / (self.peak * max(compute, self.communication))

    @property
    def weight_traffic_mfu(self) -> float:
        """The MFU if the step consisted of the useful FLOPs at peak and then all collectives, unhidden."""
        least = self.useful_flops / self.peak
        return least / (least + self.communication)

    @property
    def hidden(self) -> float:
        """Seconds of collectives that are hidden behind arithmetic."""
        return sum(line.hidden for line in self.lines if line.part == "collectives")

    @property
    def communication(self) -> float:
        """Seconds of all collectives, hidden or not."""
        return self.seconds["collectives"] + self.hidden

    @property
    def collective_bytes(self) -> dict[str, float]:
        """{mesh axis: bytes that a device sends}."""
        axes = sorted({line.axes for line in self.lines if line.axes})
        return {axis: sum(line.bytes for line in self.lines if line.axes == axis) for axis in axes}

    @property
    def bytes_model_share(self) -> float:
        return sum(line.from_bytes for line in self.lines) / sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.slices.topology.chip.hbm_bytes

    def to_json(self) -> dict:
        chip = self.slices.topology.chip
        return {
            "fits": self.fits,
            "hbm_bytes": self.memory.total,
            "hbm_capacity_bytes": chip.hbm_bytes,
            "hbm": dataclasses.asdict(self.memory),
            "flops": self.flops,
            "useful_flops": self.useful_flops,
            "chips": self.slices.chips,
            "chip_peak_flops": chip.peak_bf16,
            "rows_per_chip": self.rows / self.slices.chips,
            "global_clean_tokens": self.rows * self.length,
            "seconds": self.seconds,
            "hidden_seconds": self.hidden,
            "collective_bytes": self.collective_bytes,
            "serial_mfu": self.serial_mfu,
            "overlapped_mfu": self.overlapped_mfu,
            "weight_traffic_mfu": self.weight_traffic_mfu,
            "bytes_model_share": self.bytes_model_share,
            "compile_seconds": self.compile_seconds,
            "per_op": [dataclasses.asdict(line) for line in sorted(self.lines, key=lambda line: -line.seconds)],
        }


def rehearse(
    config: ConfigDict,
    slices: Slices,
    packing: Packing = Packing(),
    halves: str = "both",
    save: str | None = None,
    dumps: Path | None = None,
) -> Rehearsal:
    """Compiles the config's training step for `slices` and estimates its memory, time and MFU.

    packing: what the rows contain. halves: the pass, as in schedule.Phase. save: a file for the compiled step
    (training/compiled_step.py). dumps: where the compiler dumps its schedules (aot.dump_flags), if it does.
    Raises InputError on bad input, and DoesNotFit if a chip's memory is too small.
    """
    if packing.mean_document not in MEANS:
        raise InputError(f"--mean_document={packing.mean_document}, expected one of {', '.join(map(str, MEANS))}")
    check_balance(packing)
    check(config)
    config = run_model.fitted(config)
    step = lower_step(config, slices, halves)
    compiled, compile_seconds = compile_step(step.lowered, step.mesh, slices)
    if save:
        compiled_step.save(save, compiled, compiled_step.identity(config, step.trained, step.mesh, halves))
    scored = 1.0 if halves == "clean" else useful_flops.MASKED_SHARE
    rows, length = config.batch.rows, config.data.length
    useful = useful_flops.useful_flops(step.model, rows, length, halves, mean_pairs(length, packing, halves))
    return estimate(config, step, compiled, compile_seconds, slices, packing, scored, useful, dumps)


def estimate(
    config: ConfigDict, step: LoweredStep, compiled, compile_seconds: float, slices: Slices, packing: Packing,
    scored: float, useful: float, dumps: Path | None,
) -> Rehearsal:  # fmt: skip
    """Of a compiled program of passes over config.batch.rows rows, in config.batch.micro_batches.

    scored: the share of a row's tokens that the head scores in each pass. useful: FLOPs of all chips.
    """
    module = hlo.parse(compiled.as_text())
    rows, length = config.batch.rows, config.data.length
    kernels = _kernels(config, step, slices, packing)
    trips = {"head": math.ceil(scored * _rows(config, step.mesh) * length / head.CHUNK)}
    untaken = [context.CROSSING] if _blocks_lie_in_stripes(config, step.mesh, packing) else []
    chip = slices.topology.chip
    cycles = aot.operation_cycles(module, dumps, chip) if dumps else {}
    lines = step_lines(module, chip, kernels, physical_devices(step.mesh, slices), trips, untaken, cycles=cycles)
    memory = memory_of(compiled, module, step.state.params, chip.devices)
    return Rehearsal(lines, memory, useful, compile_seconds, slices, rows, length)


def check_balance(packing: Packing) -> None:
    if not 1 <= packing.busiest < math.inf:
        raise InputError(f"--busiest={packing.busiest}, expected at least 1, which is balanced")


def mean_pairs(length: int, packing: Packing, halves: str) -> float:
    """Query-key pairs of a row in a pass."""
    return useful_flops.mean_pairs(segment_ids(length, packing.mean_document), packing.block_size, halves)


def _blocks_lie_in_stripes(config: ConfigDict, mesh, packing: Packing) -> bool:
    ranks = mesh.shape["context"]
    if ranks == 1 or config.objective.block_origin != "global" or config.objective.group_blocks > 1:
        return False
    return context.stripe_size(config.data.length, ranks) % packing.block_size == 0


def _attention_shape(config: ConfigDict, step: LoweredStep) -> attention_cost.Shape:
    tensor = step.mesh.shape["tensor"]
    heads = step.model.num_heads // tensor
    kv_heads = max(step.model.num_kv_heads // tensor, 1)
    ranks = step.mesh.shape["context"]
    model = step.model
    return attention_cost.Shape(
        config.data.length, step.halves, heads, kv_heads, model.head_dim, model.rotary_dim, model.qk_norm, ranks
    )


def _rows(config: ConfigDict, mesh) -> float:
    """Rows of a micro-batch per device; a split row counts by its share of tokens."""
    return config.batch.rows / config.batch.micro_batches / (mesh.size // mesh.shape["tensor"])


def _kernels(config: ConfigDict, step: LoweredStep, slices: Slices, packing: Packing):
    """{prefix of a Pallas kernel's name: its cost}."""
    rows = _rows(config, step.mesh)
    shape = _attention_shape(config, step)
    kernels = {}
    if execution(config, platform="tpu").attention == "kernel":
        kernels |= attention_cost.kernel_costs(
            shape, packing.block_size, packing.mean_document, rows * shape.ranks, slices.topology
        )
    if step.model.is_moe:
        grouped = _expert_costs(config, step, slices.topology, rows * shape.positions, packing)

        def gmm(result, operands):
            (product,) = [x for x in operands if x.dtype == "bf16" and x.shape[:-1] == result[0].shape[:-1]]
            return "experts", grouped["gmm", product.shape[-1], result[0].shape[-1]]

        width = step.model.moe_intermediate_size // step.mesh.shape["tensor"]
        kernels |= experts_cost.activation_costs(width, slices.topology)
        kernels |= {"gmm": gmm, "tgmm": lambda result, operands: ("experts", grouped["tgmm", *result[0].shape[1:]])}
        ranks = step.mesh.shape["expert"] if config.execution.expert_parallel == "gather_tokens" else 1
        kernels |= routing_cost.kernel_costs(step.model, round(rows * shape.positions), ranks, slices.topology)
    return kernels


def _expert_costs(config: ConfigDict, step: LoweredStep, topology: Topology, tokens: float, packing: Packing):
    """{(kernel, contracted, columns): cost} of the grouped matmuls and their gradients; tokens: per device.

    Raises InputError on experts so narrow that the compiler merges a tile with the rest of its step.
    """
    model, mesh = step.model, step.mesh.shape
    width = model.moe_intermediate_size // mesh["tensor"]
    rows, groups = round(tokens) * model.num_experts_per_token, model.num_experts
    sizes = experts_cost.group_sizes(rows, groups)
    if config.execution.expert_parallel == "gather_tokens" and mesh["expert"] > 1:
        # A rank holds its share of the experts; its buffers are for the worst case, all pairs of all ranks.
        sizes = experts_cost.group_sizes(round(rows * packing.busiest), groups // mesh["expert"])
        rows *= mesh["expert"]
    costs = {}
    for contracted, columns in ((model.hidden_size, 2 * width), (width, model.hidden_size)):
        flops = 2.0 * float(sizes.sum()) * contracted * columns
        for direction in experts_cost.PASSES:
            try:
                cost = experts_cost.kernel_cost("megablox", direction, sizes, contracted, columns, topology.name, rows)
            except schedule_reader.UnknownRegions as error:
                shape = f"experts of {model.hidden_size} x {width} on {topology.name}"
                raise InputError(f"config.model={config.model}: no estimate of {shape}: {error}") from error
            sides = (columns, contracted) if direction == "dx" else (contracted, columns)
            seconds = max(cost.cycles / topology.chip.bundle_rate, cost.dma_cycles / topology.chip.clock)
            costs["tgmm" if direction == "dw" else "gmm", *sides] = OperationCost(seconds, flops)
    return costs


def physical_devices(mesh, slices: Slices) -> Devices:
    flat = mesh.devices.reshape(-1)
    coordinates = np.array([device.coords for device in flat])[:, : len(slices.topology.shape)]
    return Devices(dict(mesh.shape), slices.topology, coordinates, np.array([slice_index(d) for d in flat]))


def memory_of(compiled, module: hlo.Module, params, devices: int) -> Memory:
    """Memory per chip of `devices` devices. params: the weights among the program's arguments."""

    def on_device(tree):
        leaves = jax.tree.leaves(tree)
        return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    analysis = compiled.memory_analysis()
    arguments = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary = analysis.temp_size_in_bytes
    weights = on_device(params)
    activations = sum(
        array.bytes
        for op in module.computations[module.entry]
        if op.target == "AllocateBuffer"
        for array in op.result
        if array.in_hbm
    )
    activations = min(activations, temporary)
    sizes = weights, arguments - weights, activations, temporary - activations
    return Memory(*(int(size) * devices for size in sizes))
