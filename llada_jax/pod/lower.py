"""Traces and compiles the trainer's step for a TPU slice, without the slice.

The step is that of training/loop.py: noise, tile plan, forward, backward, clipping and optimizer, with the config's
mesh over all devices of the slices.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.chips import Topology
from llada_jax.data.order import Batch
from llada_jax.diffusion import schedule
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.lora import Lora
from llada_jax.pod.packings import LENGTHS, LONG_LENGTHS
from llada_jax.pod.topology import slice_devices
from llada_jax.runtime.xla_options import xla_options
from llada_jax.training import run_model, train_state
from llada_jax.training.config import (
    check,
    check_rows,
    execution,
    extended,
    phases,
    skips_steps,
    updates_per_step,
)
from llada_jax.training.optimizer import make_optimizer
from llada_jax.training.sections import FROM_CHECKPOINT
from llada_jax.training.step import make_train_step
from llada_jax.training.supervised import train_loss


@dataclasses.dataclass(frozen=True)
class Slices:
    """The devices of a launch: `count` slices of one topology, joined by the data-centre network."""

    topology: Topology
    count: int = 1

    @property
    def chips(self) -> int:
        return self.topology.chips * self.count


class DoesNotFit(Exception):
    """The compiler's message about a step that needs more memory than a chip has.

    hbm_bytes: the bytes that it needs per chip; None if the message does not say.
    """

    def __init__(self, message: str, devices: int):
        super().__init__(message)
        match = re.search(r"(?:Used |temporaries \()([\d.]+)([MG])", message)
        unit = {"G": 2**30, "M": 2**20}
        self.hbm_bytes = int(float(match.group(1)) * unit[match.group(2)] * devices) if match else None


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A lowered step; `lowered.compile()` is the program. state: abstract, with shardings."""

    lowered: jax.stages.Lowered
    mesh: jax.sharding.Mesh
    state: train_state.TrainState
    model: ModelConfig
    trained: ModelConfig | Lora
    halves: str


@dataclasses.dataclass(frozen=True)
class Run:
    """What the programs of a run are lowered from. state, frozen: abstract, with shardings; frozen: the weights that do
    not train, None where there are none.
    """

    mesh: jax.sharding.Mesh
    model: ModelConfig
    trained: ModelConfig | Lora
    optimizer: optax.GradientTransformation
    state: train_state.TrainState
    frozen: dict | None
    execution: Execution


def abstract_run(config: ConfigDict, slices: Slices) -> Run:
    """The run of a checked config, over the mesh of config.mesh. Raises InputError if it has no estimate."""
    on_tpu = execution(config, platform="tpu")
    if on_tpu.attention == "blockwise":  # its trip counts depend on the rows' documents
        raise InputError("config.execution.attention='blockwise': no estimate, expected 'kernel', 'dense' or 'auto'")
    check_experts(on_tpu, run_model.named(config))
    if config.data.length not in (known := LENGTHS + LONG_LENGTHS):
        raise InputError(f"config.data.length={config.data.length}: packings exist of {', '.join(map(str, known))}")
    devices = list(slice_devices(slices.topology, slices.count).reshape(-1))
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    model = model_of(config)
    trained = Lora(model, config.lora.rank, config.lora.alpha, config.lora.targets) if config.lora.rank else model
    check_rows(config, mesh)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(
            config.optimizer, trained, schedule.total_steps(phases(config)) * updates_per_step(config)
        )
        state = with_shardings(
            train_state.abstract(trained, optimizer), lambda x: train_state.shardings(x, trained, mesh)
        )
        frozen = None
        compared = config.preference.enabled and config.preference.reference == "frozen"
        if config.lora.rank or compared or (config.rl.enabled and config.rl.kl_weight):
            dtype = jnp.bfloat16 if config.lora.rank else jnp.float32
            axes = parameters.logical_axes(model)
            frozen = with_shardings(parameters.abstract(model, dtype), lambda x: sharding.shardings(x, axes, mesh))
    return Run(mesh, model, trained, optimizer, state, frozen, on_tpu)


def lower_step(config: ConfigDict, slices: Slices, halves: str) -> LoweredStep:
    """Traces the trainer's step over the mesh of config.mesh. Raises InputError if the config is refused."""
    check(config)
    run = abstract_run(config, slices)
    with jax.set_mesh(run.mesh):
        loss = train_loss(config, run.model, run.execution)
        guard = skips_steps(config)
        step = make_train_step(
            run.trained, loss, run.optimizer, config.batch.micro_batches, config.optimizer.expert_bias_rate,
            xla_options("tpu"), guard,
        )  # fmt: skip
        replicated = NamedSharding(run.mesh, PartitionSpec())
        dtypes = (jnp.int32, jnp.float32, *[jnp.float32] * guard)
        scalars = [jax.ShapeDtypeStruct((), dtype, sharding=replicated) for dtype in dtypes]
        lowered = step.lower(run.state, run.frozen, _batch(config, run.mesh), *scalars, halves)
    return LoweredStep(lowered, run.mesh, run.state, run.model, run.trained, halves)


@contextlib.contextmanager
def without_cache():
    """JAX's cache of compiled programs takes those of absent devices, and cannot load them."""
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether there is one is asked once
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_step(lowered: jax.stages.Lowered, mesh, slices: Slices):
    """Returns (compiled program, seconds of compilation). Raises DoesNotFit."""
    begin = time.perf_counter()
    try:
        with jax.set_mesh(mesh), without_cache():
            return lowered.compile(), time.perf_counter() - begin
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower():
            raise DoesNotFit(str(error), slices.topology.chip.devices) from error
        raise


def nothing_to_read(config: ConfigDict) -> ConfigDict:
    """The config as a rehearsal takes it: it opens no checkpoint of a preset's weights and asks no questions, so that a
    run of reinforcement learning need not name them.
    """
    if not config.rl.enabled or config.model in FROM_CHECKPOINT:
        return config
    config = config.copy_and_resolve_references()
    config.init_from, config.rl.questions = config.init_from or "any", config.rl.questions or "any"
    return config


def check_experts(execution: Execution, model: ModelConfig) -> None:
    """Raises InputError on experts in plain XLA, whose trip counts depend on the routing."""
    if model.is_moe and execution.experts != "megablox":
        raise InputError(f"config.execution.experts={execution.experts!r}: no estimate, expected 'megablox' or 'auto'")


def model_of(config: ConfigDict) -> ModelConfig:
    model = run_model.named(config)
    if model.mask_token_id is None:  # import adds one; its id does not change the cost
        model = model.replace(mask_token_id=model.vocab_size - 1)
    return extended(config, model.replace(alignment=config.alignment or model.alignment))


def with_shardings(abstract, shardings_of):
    """A tree of jax.ShapeDtypeStruct with the shardings of shardings_of(tree)."""
    return jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), abstract, shardings_of(abstract)
    )


def abstract_rows(rows: int, mesh) -> Callable[..., jax.ShapeDtypeStruct]:
    """array(dtype, *shape): an abstract array [rows, *shape], whose rows are shared out over the mesh."""
    layout = NamedSharding(mesh, PartitionSpec(sharding.spec(("batch",), (rows,), mesh)[0]))
    return lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=layout)


def _batch(config: ConfigDict, mesh) -> Batch | tuple:
    array, length = abstract_rows(config.batch.rows, mesh), config.data.length
    tokens, ids = array(jnp.int32, length), array(jnp.uint32)
    batch = Batch(tokens, tokens, array(jnp.bool_, length), ids, ids)
    if config.preference.enabled and config.preference.reference == "precomputed":
        return batch, array(jnp.float32, config.preference.max_pairs, 2)
    return batch
