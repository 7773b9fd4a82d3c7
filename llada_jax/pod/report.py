"""Formats a rehearsal as text."""

import json
import math
from pathlib import Path

from llada_jax.pod.decoding.rehearse_decode import DecodeRehearsal
from llada_jax.pod.rehearse import Rehearsal, Slices
from llada_jax.pod.reinforcement.rehearse_rl import RLRehearsal
from llada_jax.pod.step_cost import PARTS
from llada_jax.sampling.meshes import name_of

_GIB = 2**30
_CALIBRATION = Path(__file__).with_name("calibration.json")  # of experiments/calibration/report.py


def describe_step(result: Rehearsal) -> str:
    """The table that tools/rehearse.py prints."""
    chip, memory, seconds = result.slices.topology.chip, result.memory, result.seconds
    total = sum(seconds.values())
    rows, bound = result.rows / result.slices.chips, result.weight_traffic_mfu
    lines = [
        f"compiled in {result.compile_seconds:.0f} s for {_name(result.slices)}, {result.slices.chips} chips; "
        "all that follows is compiler-estimated",
        f"memory of a chip, GiB: parameters {memory.parameters / _GIB:.2f}, optimizer {memory.optimizer / _GIB:.2f}, "
        f"activations {memory.activations / _GIB:.2f}, temporaries {memory.temporaries / _GIB:.2f}: "
        f"{memory.total / _GIB:.2f} of {chip.hbm_bytes / _GIB:.0f}",
        f"rows per chip: {rows:g}; at least {_most_rows(result)} fit (if everything but the state grows with the rows)",
        f"FLOPs of the step: {result.flops:.3e}, useful {result.useful_flops:.3e}",
        "bytes that a device sends, GB: "
        + (", ".join(f"{axis} {n / 1e9:.1f}" for axis, n in result.collective_bytes.items()) or "none"),
        "seconds of a step: "
        + ", ".join(f"{part} {seconds[part]:.4f}" for part in PARTS)
        + f" (and {result.hidden:.4f} hidden behind arithmetic)",
        f"  {total:.4f} in all, {result.bytes_model_share:.0%} of it from the bytes model",
        f"{result.rows * result.length / total:,.0f} clean tokens per second, "
        f"{result.rows * result.length / total / result.slices.chips:,.0f} per chip",
        f"MFU: serial {result.serial_mfu:.1%}, overlapped {result.overlapped_mfu:.1%}"
        + (f"; at most {bound:.1%} if no collective were hidden" if bound < 1 else ""),
        band(chip.name),
    ]
    return "\n".join(lines)


def describe_decoding(result: DecodeRehearsal) -> str:
    """The table that tools/rehearse.py --decode prints."""
    chip, memory, seconds = result.slices.topology.chip, result.memory, result.seconds
    total, floor = sum(seconds.values()), result.roofline.seconds(chip) / result.slices.chips
    if result.chunk is None:
        what = f"a pass over {result.rows} rows, two blocks of {result.block_size} each"
        speed = f"{result.rows / total:,.0f} tokens per second for each token that a pass accepts per row"
    else:
        what = f"a chunk of {result.chunk} tokens of {result.positions // result.chunk} prompts"
        speed = f"{result.positions / total:,.0f} tokens of prompts per second, {result.share_of_peak:.0%} of the peak"
    return "\n".join([
        f"compiled in {result.compile_seconds:.0f} s for {_name(result.slices)}, {result.slices.chips} chips; "
        "all that follows is compiler-estimated",
        f"memory of a chip, GiB: parameters {memory.parameters / _GIB:.2f}, caches {memory.optimizer / _GIB:.2f}, "
        f"temporaries {(memory.activations + memory.temporaries) / _GIB:.2f}: "
        f"{memory.total / _GIB:.2f} of {chip.hbm_bytes / _GIB:.0f}",
        f"{what}, {result.filled} cached positions per row: {total * 1e3:.2f} ms",
        "ms by part: " + ", ".join(f"{part} {seconds[part] * 1e3:.2f}" for part in PARTS),
        f"{result.roofline.bound(chip)}-bound, {floor * 1e3:.2f} ms if every chip ran at its peaks; {speed}",
        f"{band(chip.name)}; no pass of decoding is among them",
    ])  # fmt: skip


def describe_rl(result: RLRehearsal) -> str:
    """The table that tools/rehearse.py prints of a step of reinforcement learning."""
    chip, decoding, learned = result.slices.topology.chip, result.decoding, result.update
    hbm, memory, pass_seconds = result.hbm_bytes, decoding.memory, sum(decoding.seconds.values())
    share = result.answers // result.hosts
    mesh = name_of(result.mesh)
    scores = f"scores of {learned.rows} answers, {result.copies} copies of each: "
    scores += "none, as one update is of the policy that answered" if result.score is None else _seconds(result.score)
    in_all = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in hbm.items())
    return "\n".join([
        f"compiled in {result.compile_seconds:.0f} s for {_name(result.slices)}, {result.slices.chips} chips; "
        "all that follows is compiler-estimated",
        f"memory of a chip, GiB: training state {result.state_bytes / _GIB:.2f}; beside it while answers are decoded: "
        f"weights {memory.parameters / _GIB:.2f}, caches {memory.optimizer / _GIB:.2f}, temporaries "
        f"{(memory.activations + memory.temporaries) / _GIB:.2f}",
        f"  in all: {in_all}: at most {max(hbm.values()) / _GIB:.2f} of {chip.hbm_bytes / _GIB:.0f}",
        f"answers: {share} on each of {result.hosts} hosts ({mesh}), {decoding.rows} together; a pass takes "
        f"{pass_seconds * 1e3:.2f} ms, {decoding.roofline.bound(chip)}-bound, with {decoding.filled} cached positions "
        "per row",
        "  ms by part: " + ", ".join(f"{part} {decoding.seconds[part] * 1e3:.2f}" for part in PARTS),
        scores,
        f"an update by {learned.rows} answers, {result.copies} copies of each: {_seconds(learned)}",
        f"  {result.updates} of them in a step",
        band(chip.name) + "; no step of reinforcement learning is among them",
    ])  # fmt: skip


def _seconds(result: Rehearsal) -> str:
    parts = ", ".join(f"{part} {seconds:.4f}" for part, seconds in result.seconds.items())
    return (
        f"{sum(result.seconds.values()):.4f} s, MFU {result.serial_mfu:.1%}\n"
        f"  {parts} (and {result.hidden:.4f} hidden behind arithmetic)"
    )


def band(chip: str) -> str:
    """How far estimates were from the steps of public runs that were timed. chip: its name, e.g. "v5p"."""
    known = json.loads(_CALIBRATION.read_text())
    here = "" if chip in known["chips"] else f", none on {chip}"
    return (
        f"where steps were timed, the estimate was {known['least']:g} to {known['most']:g} times the measured one, "
        f"median {known['median']:g} ({known['runs']} training runs on {', '.join(known['chips'])}{here})"
    )


def does_not_fit(hbm_bytes: int | None, slices: Slices) -> str:
    """The message of DoesNotFit: by how much, and what to change. hbm_bytes: needed per chip; None: unknown."""
    capacity = slices.topology.chip.hbm_bytes
    excess = ""
    if hbm_bytes is not None:
        excess = f": {hbm_bytes / _GIB:.1f} GiB of {capacity / _GIB:.0f}, {hbm_bytes / capacity - 1:.0%} too much"
    return (
        f"the step does not fit a chip of {_name(slices)}{excess}; try fewer config.batch.rows or more "
        "config.batch.micro_batches, config.execution.remat=full, a larger config.mesh.fsdp, or a larger slice"
    )


def _name(slices: Slices) -> str:
    return f"{slices.count} x {slices.topology.name}" if slices.count > 1 else slices.topology.name


def _most_rows(result: Rehearsal) -> str:
    memory = result.memory
    left = result.slices.topology.chip.hbm_bytes - memory.parameters - memory.optimizer
    grows = memory.activations + memory.temporaries
    return f"{math.floor(result.rows / result.slices.chips * left / grows)}"
