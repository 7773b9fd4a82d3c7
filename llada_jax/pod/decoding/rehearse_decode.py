"""Compiles a decoding pass for a TPU slice, without the slice: that of sampling/decode.py, on all devices of the mesh.

The pass denoises one block per row against caches filled to a given length, and commits the previous block in the same
window (the more expensive of the two passes of decoding); or it is that of sampling/prefill.py, which computes a chunk
of a prompt. Compiler-estimated, not measured.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.attention.decoding import cache_write, cached, prefix
from llada_jax.chips import Chip, Topology
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.parameters import join_abstract
from llada_jax.pod import aot, hlo, operations, routing_cost
from llada_jax.pod.decoding import cached_attention_cost, fused_experts_cost, prefix_cost, projections_cost
from llada_jax.pod.lower import Slices, check_experts, compile_step, model_of, nothing_to_read, with_shardings
from llada_jax.pod.rehearse import Memory, memory_of, physical_devices
from llada_jax.pod.step_cost import Line, part_seconds, step_lines
from llada_jax.pod.topology import slice_devices
from llada_jax.runtime.xla_options import xla_options
from llada_jax.sampling import decode, denoise, predict
from llada_jax.sampling.cost import PassCost, pass_cost, uniform_hits
from llada_jax.sampling.prefill import prefill_chunk
from llada_jax.sampling.quantize import quantize_experts
from llada_jax.sampling.state import DecodeSettings, empty_state
from llada_jax.training import run_model
from llada_jax.training.config import check, execution

SCOPES = {cached.SCOPE: "attention", denoise.PREDICTION: "head"}  # the parts of their operations


@dataclasses.dataclass(frozen=True)
class DecodeRehearsal:
    """The estimate of a pass on one device. memory.optimizer: the caches and the rest of a batch's state. positions: of
    all rows that the pass computes. chunk: of a prompt, of which each part of the batch has one; None: a decoding pass.
    """

    lines: list[Line]
    memory: Memory
    roofline: PassCost
    compile_seconds: float
    slices: Slices
    rows: int
    block_size: int
    filled: int
    positions: int
    chunk: int | None = None

    @property
    def share_of_peak(self) -> float:
        """The FLOPs that the model needs, over those of all chips at their peak."""
        chips = self.slices.chips * self.slices.topology.chip.peak_bf16
        return self.roofline.flops / sum(self.seconds.values()) / chips

    @property
    def seconds(self) -> dict[str, float]:
        return part_seconds(self.lines)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.slices.topology.chip.hbm_bytes

    def to_json(self) -> dict:
        chip, seconds = self.slices.topology.chip, sum(self.seconds.values())
        return {
            "fits": self.fits,
            "hbm_bytes": self.memory.total,
            "hbm_capacity_bytes": chip.hbm_bytes,
            "chips": self.slices.chips,
            "chip_peak_flops": chip.peak_bf16,
            "rows": self.rows,
            "filled": self.filled,
            "chunk": self.chunk,
            "positions": self.positions,
            "seconds": self.seconds,
            "passes_per_second": 1 / seconds,
            "roofline_seconds": self.roofline.seconds(chip) / self.slices.chips,
            "share_of_peak": self.share_of_peak,
            "compile_seconds": self.compile_seconds,
            "per_op": [dataclasses.asdict(line) for line in sorted(self.lines, key=lambda line: -line.seconds)],
        }


def rehearse_decode(
    config: ConfigDict, slices: Slices, rows: int, canvas: int, filled: int, dumps: Path | None = None,
    chunk: int | None = None, int8_experts: bool = False, how: Mapping[str, object] = {},
) -> DecodeRehearsal:  # fmt: skip
    """Compiles a decoding pass of the config's model for `slices` and estimates its memory and time.

    rows: of the batch, over all chips. canvas: the most positions per request; filled: how many of them are in the
    caches. chunk: instead, the pass that computes so many tokens of a prompt, in one row of each part of the batch.
    Weights and caches are bfloat16, with int8_experts routed experts are int8 (sampling/quantize.py). how: fields of
    DecodeSettings, such as its rule. dumps: as in pod/rehearse.rehearse. Raises InputError on bad input, and DoesNotFit
    as pod/rehearse.rehearse.
    """
    config = nothing_to_read(config)
    check(config)
    config = run_model.fitted(config)
    on_tpu = dataclasses.replace(execution(config, platform="tpu"), dtype="bfloat16", remat="none")
    check_experts(on_tpu, run_model.named(config))
    block = config.schedule.block_size
    for field, value in (("canvas", canvas), ("filled", filled), ("prefill", chunk or 0)):
        if value % block or not 0 <= value <= canvas:
            raise InputError(f"--{field}={value}, expected a multiple of {block}, at most --canvas={canvas}")
    if filled + (chunk or 0) > canvas:
        raise InputError(f"--filled={filled} and --prefill={chunk} are more than --canvas={canvas}")
    mesh = sharding.make_mesh(**config.mesh, devices=list(slice_devices(slices.topology, slices.count).reshape(-1)))
    if mesh.shape["context"] > 1:
        raise InputError(f"config.mesh.context={mesh.shape['context']}: decoding does not split rows, expected 1")
    groups = mesh.size // mesh.shape["tensor"]
    if rows % groups and rows > groups:
        raise InputError(f"--rows={rows} cannot be shared by {mesh.size} devices")
    model = model_of(config)
    how = dict(block_length=block, prefill_chunk=chunk or block, execution=on_tpu) | dict(how)
    decoding = DecodeSettings(model.mask_token_id, **how)
    params, state = _arguments(model, decoding, rows, canvas, mesh, int8_experts)
    with jax.set_mesh(mesh):
        parts = sharding.num_parts("batch", rows)
        local = rows // parts
        function = decode.iterate if chunk is None else prefill_chunk
        function = functools.partial(function, config=model, settings=decoding)
        step = jax.jit(function, donate_argnames=("state",), compiler_options=xla_options("tpu"))
        places = {} if chunk is None else dict.fromkeys(("rows", "first"), jax.ShapeDtypeStruct((parts,), jnp.int32))
        lowered = step.lower(params, state=state, **places)
    compiled, seconds = compile_step(lowered, mesh, slices)
    module = hlo.parse(compiled.as_text())
    if chunk is None:
        positions, head, cached_positions, context = 2 * rows * block, rows * block // 2, rows * filled, filled + block
    else:
        positions, head, cached_positions, context = parts * chunk, 0, parts * filled, filled + (chunk + block) // 2
    kernels = {}
    if model.is_moe:
        kernels = _expert_kernels(config, model, mesh, slices.topology, positions // parts, rows, int8_experts)
    if on_tpu.attention == "kernel":
        rows_here, queries = (local, 2 * block) if chunk is None else (1, chunk)
        kernels |= _attention_kernels(model, mesh, slices.topology, rows_here, queries, block, canvas, filled)
    trips = _trips(local, rows, mesh.size > 1, block, canvas, filled)
    chip = slices.topology.chip
    cycles = aot.operation_cycles(module, dumps, chip) if dumps else {}
    lines = step_lines(module, chip, kernels, physical_devices(mesh, slices), trips, parts=SCOPES, cycles=cycles)
    of_experts = 1 if int8_experts else 2
    cost = pass_cost(model, positions, head, cached_positions, context, bytes_per_expert_value=of_experts)
    memory = memory_of(compiled, module, params, chip.devices)
    return DecodeRehearsal(lines, memory, cost, seconds, slices, rows, block, filled, positions, chunk)


def _arguments(model: ModelConfig, decoding: DecodeSettings, rows: int, canvas: int, mesh, int8_experts: bool):
    """Abstract weights and state, laid out as sharding.RULES say: rows over the batch axes."""
    axes, params = parameters.logical_axes(model), parameters.abstract(model, jnp.bfloat16)
    if int8_experts:
        params = jax.eval_shape(functools.partial(quantize_experts, config=model), params)
        of_layer = parameters.layer_axes(model, "sparse", params["sparse"])
        axes["sparse"] = {name: ("layers", *of_layer[name]) for name in of_layer}
    params = with_shardings(params, lambda x: sharding.shardings(x, axes, mesh))
    if decoding.execution.attention == "kernel":
        with jax.set_mesh(mesh):
            params = join_abstract(params, model)
    state = jax.eval_shape(functools.partial(empty_state, model, decoding, rows, canvas, "bfloat16"))

    def layout(path, leaf):
        if path[0].name == "cache":
            return NamedSharding(mesh, sharding.spec(cached.CACHE_AXES, leaf.shape, mesh))
        rowwise = leaf.ndim and leaf.shape[0] == rows
        return NamedSharding(mesh, sharding.spec(("batch",), (rows,), mesh) if rowwise else PartitionSpec())

    return params, with_shardings(state, lambda tree: jax.tree_util.tree_map_with_path(layout, tree))


def _attention_kernels(
    model: ModelConfig, mesh, topology: Topology, rows: int, queries: int, block: int, canvas: int, filled: int
) -> dict:
    """Costs of the kernels of attention and of its projections on one device. rows: of it; queries: of each row."""
    heads, kv_heads, copies = _heads_of_device(model, mesh)
    head_dim = model.head_dim
    costs = {cache_write.NAME: functools.partial(_cache_write, topology.chip)}
    if prefix.takes(queries, rows, heads // kv_heads):
        sizes = queries, canvas, heads, kv_heads, head_dim, model.rotary_dim // 2, model.qk_norm
        return costs | prefix_cost.kernel_costs(prefix_cost.Shape(*sizes), filled, block, topology)
    shape = cached_attention_cost.Shape(rows, queries, canvas, heads, kv_heads, head_dim)
    costs |= cached_attention_cost.kernel_costs(shape, filled, topology)
    if copies > 1:
        kv_heads = model.num_kv_heads  # each device projects all of them
    shape = projections_cost.Shape(rows, queries, model.hidden_size, heads, kv_heads, head_dim, model.rotary_dim // 2)
    with jax.set_mesh(mesh):
        tilings = shape.tilings()
    return costs | (projections_cost.kernel_costs(shape, tilings, topology) if all(tilings) else {})


def _heads_of_device(model: ModelConfig, mesh) -> tuple[int, int, int]:
    """(heads, key/value heads that it uses, sharding.kv_copies)"""
    with jax.set_mesh(mesh):
        copies = sharding.kv_copies(model.num_heads, model.num_kv_heads)
        ranks = sharding.num_parts("kv_heads", model.num_kv_heads * copies)
    return model.num_heads // ranks, model.num_kv_heads * copies // ranks, copies


def _cache_write(chip: Chip, result, operands):
    """Every row has a block to write: one read of the blocks, and one write."""
    (blocks,) = [x for x in operands if len(x.shape) == 5 and x.shape != result[0].shape]
    seconds = 2 * blocks.bytes / chip.stream_bandwidth
    return "attention", operations.OperationCost(seconds, from_bytes=seconds)


def _expert_kernels(
    config: ConfigDict, model: ModelConfig, mesh, topology: Topology, tokens: int, rows: int, int8_experts: bool
):
    """Costs of the kernels of the router and the experts. A matmul costs one read of the weights that uniform routing
    reaches, or its arithmetic if that takes longer; the activation costs its bytes. tokens: of a device; rows: of all.
    """
    chip = topology.chip
    bandwidth = chip.stream_bandwidth
    ranks = mesh.shape["expert"] if config.execution.expert_parallel == "gather_tokens" else 1
    exchanged = ranks > 1 and "expert" in sharding.split_over(("batch",), (rows,), mesh)

    def gmm(result, operands):
        (weights,) = [x for x in operands if len(x.shape) == 3]
        (product,) = [x for x in operands if x.dtype == "bf16" and x.shape[:-1] == result[0].shape[:-1]]
        # With "gather_tokens" the buffer is for the worst case: the pairs of all ranks' tokens, of which one part is
        # expected here.
        pairs = result[0].shape[0]
        reached = uniform_hits(model, pairs // model.num_experts_per_token) / model.num_experts
        pairs_here = pairs / ranks
        # `weights` may be those of all layers, of which one is used.
        one_layer = math.prod(weights.shape[1:]) * model.num_experts // ranks
        values = reached * one_layer + pairs_here * (product.shape[-1] + result[0].shape[-1])
        flops = 2 * pairs_here * product.shape[-1] * result[0].shape[-1]
        by_bytes = 2 * values / bandwidth
        by_flops = flops / (chip.peak_bf16 / chip.devices)
        return "experts", operations.OperationCost(
            max(by_bytes, by_flops), flops, by_bytes if by_bytes > by_flops else 0.0
        )

    def activation(result, operands):
        seconds = sum(x.bytes for x in (*result, *operands)) / bandwidth
        return "experts", operations.OperationCost(seconds, from_bytes=seconds)

    costs = {"gmm": gmm, "expert_activation": activation} | routing_cost.kernel_costs(model, tokens, ranks, topology)
    width, experts = model.moe_intermediate_size // mesh.shape["tensor"], model.num_experts // ranks
    shape = fused_experts_cost.Shape(
        tokens * (ranks if exchanged else 1), model.hidden_size, width, experts, model.num_experts,
        model.num_experts_per_token, "int8" if int8_experts else "bfloat16",
    )  # fmt: skip
    with jax.set_mesh(mesh):
        fitting = shape.calls()
    if fitting is None:
        return costs
    calls, cut = fitting
    if exchanged:  # part by part (model/experts.py)
        calls, cut = calls * cut.parts, cut._replace(parts=1)
    shape = dataclasses.replace(shape, tokens=shape.tokens // calls)
    return costs | fused_experts_cost.kernel_costs(shape, cut, topology)


def _trips(rows: int, all_rows: int, on_mesh: bool, block: int, length: int, filled: int) -> dict[str, int]:
    """Trip counts, by scope, of loops that depend on the data: half of the positions are masked, and every row has a
    block to commit. rows: of a device.
    """
    chunk = cached.chunk_of(length)
    return {
        cached.WHOLE_CHUNKS: filled // chunk,
        cached.OTHER_CHUNKS: math.ceil(filled % chunk / chunk),
        predict.TILES: predict.num_tiles(all_rows * block // 2, on_mesh),
        cache_write.WRITTEN_ROWS: rows,
    }
