"""The training loop: one loop for every stage; what a step does is data (block size) and a choice of halves.

Rows and noise are functions of the step alone, so a resumed run is the uninterrupted one, bit for bit.
"""

import contextlib
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.data.order import prefetch
from llada_jax.diffusion import schedule
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.training import config as settings
from llada_jax.training import held_out, saved_step, saver
from llada_jax.training import state as states
from llada_jax.training.goodput import Goodput
from llada_jax.training.inputs import Inputs, initial_params, lineage, open_inputs
from llada_jax.training.lora import describe
from llada_jax.training.metrics import MetricsWriter, Progress
from llada_jax.training.mirror import Mirror, open_workdir
from llada_jax.training.optimizer import learning_rate, make_optimizer
from llada_jax.training.preemption import stop_on_sigterm
from llada_jax.training.profiling import Profile, parse_steps
from llada_jax.training.reference import open_reference
from llada_jax.training.source import continue_learning_rate
from llada_jax.training.speed import Speed
from llada_jax.training.step import Loss, denoising_loss, make_train_step, preference_loss, whole
from llada_jax.training.xla_options import xla_options


def train(config: ConfigDict, workdir: str, devices=None) -> None:
    """Trains to the end of the schedule, from the newest checkpoint of `workdir` if there is one.

    Writes config.json, checkpoints/, metrics.jsonl and TensorBoard event files. SIGTERM saves and returns. devices:
    those of the mesh, by default all. A workdir may be gs:// (training/mirror.py). Raises InputError on bad input,
    before anything is written.
    """
    settings.check(config)
    phases = settings.phases(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    settings.check_rows(config, mesh)
    with open_workdir(workdir, config) as (mirror, config):
        directory = mirror.local
        inputs = open_inputs(config, directory)
        if inputs.source is not None:
            print(inputs.source.describe(), flush=True)
        config = continue_learning_rate(config, inputs.source)
        directory.mkdir(parents=True, exist_ok=True)
        settings.write(config, directory / "config.json")
        with jax.set_mesh(mesh), stop_on_sigterm() as stop:
            _run(config, phases, mesh, directory, inputs, stop, mirror)


def _run(config, phases, mesh, workdir: Path, inputs: Inputs, stop, mirror: Mirror) -> None:
    goodput = Goodput(workdir, writes=jax.process_index() == 0)
    last_step = schedule.total_steps(phases)
    optimizer = make_optimizer(config.optimizer, inputs.trained, last_step)
    abstract = states.abstract(inputs.trained, optimizer)
    where = states.shardings(abstract, inputs.trained, mesh)
    batch_sharding = NamedSharding(mesh, PartitionSpec(sharding.spec(("batch",), (config.batch.rows,), mesh)[0]))
    reference = open_reference(config, phases, inputs, batch_sharding, workdir, stop)
    if reference is None:
        return
    with goodput.spent("restore"):
        state = _restore(config, workdir, inputs, abstract, where)
    if state is None:
        params = initial_params(inputs, config.seed, where.params)
        state = jax.jit(lambda p: states.create(p, optimizer), out_shardings=where)(params)
    first_step = int(state.step)
    _announce(config, phases, inputs, mesh, first_step, last_step)
    if first_step >= last_step:
        return

    train_step = goodput.timed_steps(_train_step(config, inputs, optimizer, mesh))
    rates = learning_rate(config.optimizer, last_step)
    writer = MetricsWriter(workdir, first_step)
    progress = Progress(first_step, last_step, config.batch.rows * config.data.length)
    batches = prefetch(inputs.rows, first_step, last_step, config.batch.rows)
    keep = Checkpoints(config, workdir, inputs)
    speed = Speed(config, phases, inputs, mesh.devices.flat)
    profile = Profile(workdir / "profile", parse_steps(config.profile.steps), goodput.spent)
    goodput.begin_steps(first_step)
    with contextlib.ExitStack() as closing:
        closing.callback(writer.close)
        closing.callback(batches.close)
        closing.callback(profile.close)
        for step, batch in goodput.timed_batches(batches):
            phase = schedule.phase_at(phases, step)
            scalars = jax.device_put((jnp.int32(phase.block_size), jnp.float32(_noise_std(config, step))))
            batch = jax.device_put(reference.join(step, batch), batch_sharding)
            done = step + 1
            profile.before(done, state)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, reference.frozen, batch, *scalars, phase.halves)
            profile.after(done, metrics)
            last = done == last_step or stop.is_set
            if done % config.log_every_steps == 0 or done == first_step + 1 or last:
                timed = speed.fields(phase, goodput.mark(done)) | goodput.fields()
                _log(writer, progress, done, phase, metrics, float(rates(step)), timed)
            save = done % config.checkpoint.every_steps == 0 or done == last_step
            score = None  # a step that SIGTERM makes us save has none: there is no time, and no other run would have it
            if done % config.evaluation.every_steps == 0 or done == last_step or (save and config.checkpoint.keep_best):
                params = whole(state.params, reference.frozen, inputs.trained)
                with goodput.spent("evaluate"):
                    score = held_out.evaluate(config, inputs, reference, params, writer, done)
            if save or last:
                with goodput.spent("save"):
                    mirror.push()  # a saved step has its rows of metrics
                    keep.save(done, state, score)
            if last:
                break
    with goodput.spent("save"):
        keep.wait()
    goodput.mark(done)
    ended = "stopped" if stop.is_set else "finished"
    print(f"{goodput.describe()}\n{ended} at step {done}: {mirror.remote or workdir}", flush=True)


def _train_step(config, inputs: Inputs, optimizer, mesh):
    """make_train_step's function; where config.compiled_step has its program, that."""
    loss = train_loss(config, inputs.model, settings.execution(config))
    options = xla_options(jax.default_backend())
    rate = config.optimizer.expert_bias_rate
    train_step = make_train_step(inputs.trained, loss, optimizer, config.batch.micro_batches, rate, options)
    if not config.compiled_step:
        return train_step
    made_for = saved_step.identity(config, inputs.trained, mesh, config.compiled_halves)
    compiled = saved_step.load(config.compiled_step, made_for, mesh.devices.flat)
    return lambda *arguments: (
        compiled(*arguments[:-1]) if arguments[-1] == config.compiled_halves else train_step(*arguments)
    )


def train_loss(config: ConfigDict, model: ModelConfig, execution: Execution) -> Loss:
    """What the stage of the config optimises."""
    common = model, settings.objective(config), execution, config.seed
    if (preference := settings.preference(config)) is None:
        return denoising_loss(*common, config.batch.micro_batches)
    return preference_loss(*common, preference, config.preference.reference == "precomputed")


def checkpoints(config: ConfigDict, workdir: Path) -> str | Path:
    """The folder of the steps of a run."""
    return config.checkpoint.directory or workdir / "checkpoints"


class Checkpoints:
    """Saves steps of a run in the background."""

    def __init__(self, config: ConfigDict, workdir: Path, inputs: Inputs):
        self._saver = saver.Saver(
            checkpoints(config, workdir), config.checkpoint.keep_last, config.checkpoint.keep_best
        )
        self._inputs = inputs
        self._lineage = lineage(config, inputs)
        self._init_weights = None if inputs.source is None else inputs.source.weights

    def save(self, step: int, state: states.TrainState, score: float | None) -> None:
        tokenizer = self._inputs.tokenizer
        self._saver.save(
            step, state.params, state.optimizer,
            {"step": step, "data_offset": 0, "init_weights": self._init_weights}, self._inputs.trained,
            {} if tokenizer is None else tokenizer.files, self._lineage, score,
        )  # fmt: skip

    def wait(self) -> None:
        self._saver.wait()


def _restore(config, workdir: Path, inputs: Inputs, abstract, where) -> states.TrainState | None:
    found = saver.restore(
        checkpoints(config, workdir),
        inputs.trained,
        abstract.params,
        abstract.optimizer,
        (where.params, where.optimizer),
    )
    if found is None:
        return None
    step, params, optimizer, host = found
    if config.preference.enabled and inputs.source.weights != (started := host.get("init_weights")):
        raise InputError(
            f"config.init_from={config.init_from}: its weights are {inputs.source.weights}, but the reference of "
            f"{workdir} is {started}; name the step that the run started from"
        )
    return states.TrainState(jax.device_put(jnp.int32(step), where.step), params, optimizer)


def _noise_std(config, step: int) -> float:
    c = config.objective
    return c.embedding_noise_std if step < c.embedding_noise_steps else 0.0


def _log(writer, progress, step, phase, metrics, rate, timed) -> None:
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    line, tokens_per_second = progress.line(step, phase, metrics)
    print(line, flush=True)
    row = {"step": step, "phase": phase.name, "block_size": phase.block_size, "learning_rate": rate}
    writer.write(row | metrics | {"tokens_per_second": round(tokens_per_second, 1)} | timed, "train")
    if not math.isfinite(metrics["loss"]):
        raise InputError(f"step {step}: the loss is {metrics['loss']}; lower optimizer.learning_rate")


def _announce(config, phases, inputs: Inputs, mesh, first_step, last_step) -> None:
    model = inputs.model
    start = "starting from random weights" if inputs.source is None else "starting from init_from"
    start = f"resuming at step {first_step}" if first_step else start
    devices = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    print(
        f"{config.model}: {parameters.count(model):,} parameters, alignment {model.alignment}, {start}\n"
        f"{len(inputs.rows):,} rows of {config.data.length} tokens, {len(inputs.held_out.ids)} held out; "
        f"{config.batch.rows} rows a step on {devices} ({jax.devices()[0].platform}, "
        f"{settings.execution(config).attention} attention)\n"
        f"{last_step} steps: "
        + ", ".join(f"{p.name} block {p.block_size} x {p.steps}" for p in phases)
        + (f"\n{describe(inputs.lora)}" if inputs.lora else ""),
        flush=True,
    )
