"""Estimates what a step of reinforcement learning costs on a TPU slice, without the slice, and whether all of it fits.

Compiled are an update and the scores of its answers, over the mesh of the config, and a pass of decoding on the devices
of a host, whose weights are laid out beside the state of training. The step is the dearest one: answers take all of
rl.gen_length, rows all of data.length, every answer has a gradient, and "trajectory" has a copy for each token of a
block. While answers are decoded, half of a row is cached. Not compiled are the passes over prompts, and those that give
no gradient: drift and entropy. Compiler-estimated, not measured.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.chips import Topology
from llada_jax.errors import InputError
from llada_jax.model import useful_flops
from llada_jax.pod.decoding import meshes as meshes_of_decoding
from llada_jax.pod.decoding.rehearse_decode import DecodeRehearsal, rehearse_decode
from llada_jax.pod.lower import (
    LoweredStep,
    Run,
    Slices,
    abstract_rows,
    abstract_run,
    compile_step,
    model_of,
    nothing_to_read,
    with_shardings,
)
from llada_jax.pod.rehearse import Packing, Rehearsal, check_balance, estimate, mean_pairs
from llada_jax.pod.step_cost import Line
from llada_jax.reinforcement.own_devices import logical_axes
from llada_jax.reinforcement.passes import num_passes
from llada_jax.reinforcement.scoring import ScoredRows
from llada_jax.sampling import meshes
from llada_jax.training import run_model
from llada_jax.training.config import check
from llada_jax.training.reinforcement import needs_old, programs
from llada_jax.training.step import whole

_HOST = 4  # chips, as libtpu assumes


@dataclasses.dataclass(frozen=True)
class RLRehearsal:
    """decoding: of a host; mesh: its {axis: size}. score, update: of the answers of one update, over all chips; score
    is None where a step has one update and no reference. copies: of each answer. answers: of a step;
    updates: in it.
    """

    decoding: DecodeRehearsal
    score: Rehearsal | None
    update: Rehearsal
    mesh: dict[str, int]
    hosts: int
    copies: int
    answers: int
    updates: int

    @property
    def slices(self) -> Slices:
        return self.update.slices

    @property
    def lines(self) -> list[Line]:
        return [line for part in self._parts for line in part.lines]

    @property
    def compile_seconds(self) -> float:
        return sum(part.compile_seconds for part in self._parts)

    @property
    def _parts(self) -> list:
        return [part for part in (self.decoding, self.score, self.update) if part is not None]

    @property
    def state_bytes(self) -> int:
        """Per chip, at all times: weights and optimizer, what is frozen, and the rows of an update."""
        return self.update.memory.parameters + self.update.memory.optimizer

    @property
    def hbm_bytes(self) -> dict[str, int]:
        """Per chip, {what is done: all that is in memory meanwhile}."""
        parts = {
            "answers": self.state_bytes + self.decoding.memory.total,
            "update": self.update.memory.total,
        }
        if self.score is not None:
            memory = self.score.memory
            parts["scores"] = self.state_bytes + memory.activations + memory.temporaries
        return parts

    @property
    def fits(self) -> bool:
        return max(self.hbm_bytes.values()) <= self.slices.topology.chip.hbm_bytes

    def to_json(self) -> dict:
        return {
            "fits": self.fits,
            "hbm_bytes": max(self.hbm_bytes.values()),
            "hbm_bytes_by_part": self.hbm_bytes,
            "hbm_capacity_bytes": self.slices.topology.chip.hbm_bytes,
            "chips": self.slices.chips,
            "hosts": self.hosts,
            "decoding_mesh": self.mesh,
            "copies": self.copies,
            "answers": self.answers,
            "updates": self.updates,
            "decoding": self.decoding.to_json(),
            "score": None if self.score is None else self.score.to_json(),
            "update": self.update.to_json(),
        }


def rehearse_rl(config: ConfigDict, slices: Slices, busiest: float = 1.0, dumps: Path | None = None) -> RLRehearsal:
    """Compiles the programs of a step of reinforcement learning for `slices`, and estimates their memory and time.

    busiest: of Packing. dumps: as in pod/rehearse.rehearse. config.init_from and config.rl.questions need not be named
    where config.model is a preset. Raises InputError on bad input, and DoesNotFit if a program alone needs more memory
    than a chip has.
    """
    config = nothing_to_read(config)
    check(config)
    packing = Packing(0, config.schedule.block_size, busiest)
    check_balance(packing)
    config = run_model.fitted(config)
    if config.execution.dtype != "bfloat16":
        raise InputError(
            f"config.execution.dtype={config.execution.dtype!r}: no estimate of decoding, expected 'bfloat16'"
        )
    host = host_of(slices)
    hosts = slices.chips // host.chips
    mesh = _decoding_mesh(config, host.topology, hosts)
    decoding = _decoding(config, host, hosts, mesh, dumps)
    own = config.copy_and_resolve_references()  # of one update
    own.batch.rows, own.rl.updates = config.batch.rows // config.rl.updates, 1
    run, copies = abstract_run(own, slices), num_copies(config)
    learning = functools.partial(_learning, own, run, slices, packing, copies, dumps, old=needs_old(config))
    score = learning("score") if needs_old(config) or config.rl.kl_weight else None
    update = learning("update")
    updates = config.rl.updates * config.rl.epochs
    return RLRehearsal(decoding, score, update, mesh, hosts, copies, config.batch.rows, updates)


def host_of(slices: Slices) -> Slices:
    """The devices of a host, as a slice of their own; a slice of fewer is one host."""
    topology = slices.topology
    sides = (2, 2, 1)[: len(topology.shape)]
    return Slices(Topology(topology.chip, sides) if topology.chips > _HOST else topology)


def num_copies(config: ConfigDict) -> int:
    """Of each answer; of "trajectory" the most."""
    c, block = config.rl, config.schedule.block_size
    if c.estimator == "elbo":
        return c.copies
    steps = min(block, c.steps) if c.rule in ("llada2", "fixed") else block
    return -(-steps // c.shrink)


def _decoding_mesh(config: ConfigDict, host: Topology, hosts: int) -> dict[str, int]:
    """That of reinforcement/own_devices.py."""
    if config.batch.rows % hosts:
        raise InputError(f"config.batch.rows={config.batch.rows} cannot be shared by {hosts} hosts")
    rows = min(config.rl.rows, config.batch.rows // hosts)
    sizes = meshes.default(model_of(config), host.num_devices, rows, host.chip.hbm_bytes // host.chip.devices)
    if math.prod(sizes.values()) != host.num_devices:
        raise InputError(
            f"config.batch.rows={config.batch.rows}: no mesh of the {host.num_devices} devices of a host decodes "
            f"{rows} answers together; expected a multiple of {hosts * host.num_devices}"
        )
    return sizes


def _decoding(config: ConfigDict, host: Slices, hosts: int, mesh: dict[str, int], dumps: Path | None):
    rows, block = min(config.rl.rows, config.batch.rows // hosts), config.schedule.block_size
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(meshes_of_decoding.fields_of(mesh))
    config.execution.update(attention="kernel", experts="megablox")  # of sampling.generate.prefill_execution
    length, how = config.data.length, {"rule": config.rl.rule, "sample": True}
    result = rehearse_decode(config, host, rows, length, length // 2 // block * block, dumps, how=how)
    _empty(dumps)
    return result


def lower_program(name: str, config: ConfigDict, run: Run, copies: int, old: bool = True) -> LoweredStep:
    """Traces "score" or "update" of training.reinforcement.Programs. config: of one update. old: whether an update has
    the scores of the policy that answered.
    """
    state = run.state
    with jax.set_mesh(run.mesh):
        made = programs(config, run.model, run.trained, run.optimizer, "tpu")
        if name == "update":
            lowered = made.update.lower(state, run.frozen, _rows(config, run.mesh, copies, old, reference=True))
        else:
            axes = logical_axes(run.trained)
            params = jax.eval_shape(lambda params, frozen: whole(params, frozen, run.trained), state.params, run.frozen)
            params = with_shardings(params, lambda x: sharding.shardings(x, axes, run.mesh))
            lowered, state = made.score.lower(params, _rows(config, run.mesh, copies)), state.replace(params=params)
    return LoweredStep(lowered, run.mesh, state, run.model, run.trained, "both")


def _learning(
    config: ConfigDict, run: Run, slices: Slices, packing: Packing, copies: int, dumps: Path | None, name: str,
    old: bool,
) -> Rehearsal:  # fmt: skip
    step = lower_program(name, config, run, copies, old)
    compiled, seconds = compile_step(step.lowered, run.mesh, slices)
    length = config.data.length
    # A mask covers half of an answer; the tokens of a trajectory are each scored once.
    scored = config.rl.gen_length / length * (0.5 if config.rl.estimator == "elbo" else 1 / copies)
    pairs, rows = mean_pairs(length, packing, "both"), config.batch.rows
    useful = copies * useful_flops.useful_flops(run.model, rows, length, "both", pairs, scored)
    useful /= 1 if name == "update" else 3  # no backward pass
    result = estimate(config, step, compiled, seconds, slices, packing, scored, useful, dumps)
    _empty(dumps)
    return result


def _rows(config: ConfigDict, mesh, copies: int, old: bool = False, reference: bool = False) -> ScoredRows:
    """Of the dearest step. old: with the scores of the policy that answered; reference: of that too, if there is one.
    A pass of a trajectory is a row (reinforcement/passes.py).
    """
    rows, length = config.batch.rows, config.data.length
    if config.rl.estimator == "trajectory":
        micro_rows = rows // config.batch.micro_batches
        rows, copies = num_passes(rows * copies, micro_rows, micro_rows), 1
    array = abstract_rows(rows, mesh)
    tokens, scalar, of_copies = array(jnp.int32, length), array(jnp.float32), array(jnp.float32, copies, length)
    scores = scalar if config.rl.estimator == "elbo" else of_copies
    return ScoredRows(
        tokens, tokens, array(jnp.bool_, copies, length), of_copies, scalar, scalar, scores if old else None,
        scores if reference and config.rl.kl_weight else None,
    )  # fmt: skip


def _empty(dumps: Path | None) -> None:
    """Operations of the next program may have the same names."""
    for file in dumps.iterdir() if dumps else ():
        file.unlink()
