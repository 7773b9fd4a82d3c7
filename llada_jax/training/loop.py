"""The training loop: one loop for every stage; what a step does is data (block size) and a choice of halves.

Rows and noise are functions of the step alone, so a resumed run is the uninterrupted one, bit for bit.
"""

import contextlib
import json
import math
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.data.order import prefetch
from llada_jax.diffusion import schedule
from llada_jax.errors import InputError
from llada_jax.evaluation.likelihood import block_nelbo
from llada_jax.model import parameters
from llada_jax.training import checkpoint, saver
from llada_jax.training import config as settings
from llada_jax.training import state as states
from llada_jax.training.inputs import Inputs, initial_params, open_inputs
from llada_jax.training.lora import describe
from llada_jax.training.metrics import MetricsWriter, Progress
from llada_jax.training.optimizer import learning_rate, make_optimizer
from llada_jax.training.step import denoising_loss, make_train_step, preference_loss, whole


def train(config: ConfigDict, workdir: str, devices=None) -> None:
    """Trains to the end of the schedule, from the newest checkpoint of `workdir` if there is one.

    Writes config.json, checkpoints/, metrics.jsonl and TensorBoard event files. SIGTERM saves and returns. devices:
    those of the mesh, by default all. Raises InputError on bad input, before anything is written.
    """
    settings.check(config)
    phases = settings.phases(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    if config.batch.rows // config.batch.micro_batches % (mesh.size // mesh.shape["tensor"]):
        raise InputError(f"config.batch.rows={config.batch.rows} cannot be shared by {mesh.size} devices")
    directory = Path(workdir)
    inputs = open_inputs(config, directory)
    directory.mkdir(parents=True, exist_ok=True)
    _write_config(config, directory)
    with jax.set_mesh(mesh), _stop_on_sigterm() as stop:
        _run(config, phases, mesh, directory, inputs, stop)


def _run(config, phases, mesh, workdir: Path, inputs: Inputs, stop) -> None:
    last_step = schedule.total_steps(phases)
    optimizer = make_optimizer(config.optimizer, inputs.trained, last_step)
    abstract = states.abstract(inputs.trained, optimizer)
    where = states.shardings(abstract, inputs.trained, mesh)
    state = _restore(workdir, inputs, abstract, where)
    if state is None:
        params = initial_params(config, inputs.trained, where.params)
        state = jax.jit(lambda p: states.create(p, optimizer), out_shardings=where)(params)
    first_step = int(state.step)
    _announce(config, phases, inputs, mesh, first_step, last_step)
    if first_step >= last_step:
        return

    objective, execution = settings.objective(config), settings.execution(config)
    loss, frozen = _loss(config, inputs.model), _frozen_params(config, inputs, mesh)
    train_step = make_train_step(inputs.trained, loss, optimizer, config.batch.micro_batches)
    rates = learning_rate(config.optimizer, last_step)
    writer = MetricsWriter(workdir, first_step)
    progress = Progress(first_step, last_step, config.batch.rows * config.data.length)
    batches = prefetch(inputs.rows, first_step, last_step, config.batch.rows)
    batch_sharding = NamedSharding(mesh, PartitionSpec(sharding.spec(("batch",), (config.batch.rows,), mesh)[0]))
    keep = Checkpoints(config, workdir, inputs)
    with contextlib.ExitStack() as closing:
        closing.callback(writer.close)
        closing.callback(batches.close)
        for step, batch in batches:
            phase = schedule.phase_at(phases, step)
            scalars = jax.device_put((jnp.int32(phase.block_size), jnp.float32(_noise_std(config, step))))
            if config.preference.enabled and batch.segment_ids.max() > 2 * config.preference.max_pairs:
                raise InputError(
                    f"config.preference.max_pairs={config.preference.max_pairs}: a row of step {step} has "
                    f"{batch.segment_ids.max()} documents"
                )
            batch = jax.device_put(batch, batch_sharding)
            with jax.transfer_guard("disallow"):
                state, metrics = train_step(state, frozen, batch, *scalars, phase.halves)
            done = step + 1
            last = done == last_step or stop.is_set
            if done % config.log_every_steps == 0 or done == first_step + 1 or last:
                _log(writer, progress, done, phase, metrics, float(rates(step)))
            if done % config.evaluation.every_steps == 0 or done == last_step:
                params = whole(state.params, frozen, inputs.trained)
                _evaluate(config, writer, inputs, params, objective, execution, done)
            if done % config.checkpoint.every_steps == 0 or last:
                keep.save(done, state)
            if last:
                break
    keep.wait()
    print(f"{'stopped' if stop.is_set else 'finished'} at step {done}: {workdir}", flush=True)


def _loss(config, model):
    common = model, settings.objective(config), settings.execution(config), config.seed
    if (preference := settings.preference(config)) is None:
        return denoising_loss(*common, config.batch.micro_batches)
    return preference_loss(*common, preference)


def _frozen_params(config, inputs: Inputs, mesh):
    """LoRA's base, in its stored dtype, which is DPO's reference too; without LoRA, DPO's reference; or None."""
    if not (inputs.lora or config.preference.enabled):
        return None
    where = sharding.shardings(parameters.abstract(inputs.model), parameters.logical_axes(inputs.model), mesh)
    if inputs.lora:
        return checkpoint.load_params(inputs.lora.base, shardings=where)
    return initial_params(config, inputs.model, where)


class Checkpoints:
    """Saves steps of a run in the background."""

    def __init__(self, config: ConfigDict, workdir: Path, inputs: Inputs):
        self._saver = saver.Saver(workdir / "checkpoints", keep_last=config.checkpoint.keep_last)
        self._inputs = inputs
        self._lineage = inputs.lineage | {"config": json.loads(config.to_json())}

    def save(self, step: int, state: states.TrainState) -> None:
        tokenizer = self._inputs.tokenizer
        self._saver.save(
            step, state.params, state.optimizer, {"step": step, "data_offset": 0}, self._inputs.trained,
            {} if tokenizer is None else tokenizer.files, self._lineage,
        )  # fmt: skip

    def wait(self) -> None:
        self._saver.wait()


def _restore(workdir: Path, inputs: Inputs, abstract, where) -> states.TrainState | None:
    found = saver.restore(
        workdir / "checkpoints", inputs.trained, abstract.params, abstract.optimizer, (where.params, where.optimizer)
    )
    if found is None:
        return None
    step, params, optimizer, _ = found
    return states.TrainState(jax.device_put(jnp.int32(step), where.step), params, optimizer)


def _noise_std(config, step: int) -> float:
    c = config.objective
    return c.embedding_noise_std if step < c.embedding_noise_steps else 0.0


def _log(writer, progress, step, phase, metrics, rate) -> None:
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    line, tokens_per_second = progress.line(step, phase, metrics)
    print(line, flush=True)
    row = {"step": step, "phase": phase.name, "block_size": phase.block_size, "learning_rate": rate}
    writer.write(row | metrics | {"tokens_per_second": round(tokens_per_second, 1)}, "train")
    if not math.isfinite(metrics["loss"]):
        raise InputError(f"step {step}: the loss is {metrics['loss']}; lower optimizer.learning_rate")


def _evaluate(config, writer, inputs: Inputs, params, objective, execution, step) -> None:
    """Held-out NELBO at each block size, with the same masks every time, so that differences are paired."""
    texts = []
    sizes = (1,) if config.schedule.kind == "ar" else config.evaluation.block_sizes
    mesh = jax.sharding.get_abstract_mesh()
    for block_size in sizes:
        estimate = block_nelbo(
            params, inputs.model, inputs.held_out, block_size, samples=config.evaluation.samples,
            rows_at_once=max(4, mesh.size), block_origin=objective.block_origin, execution=execution,
        )  # fmt: skip
        row = {"step": step, "block_size": block_size, "nelbo": estimate.nats, "nelbo_stderr": estimate.stderr}
        writer.write(row, f"held_out_block_{block_size}")
        texts.append(f"{block_size}: {estimate.nats:.3f} ± {estimate.stderr:.3f}")
    print(f"step {step}  held-out NELBO, nats per token, by block size  " + "   ".join(texts), flush=True)


def _write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes the resolved config; on a later run says which fields changed since."""
    path = workdir / "config.json"
    new = json.loads(config.to_json())
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError:
            old = {}
        for field in sorted(set(flatten(old)) | set(flatten(new))):
            before, after = flatten(old).get(field), flatten(new).get(field)
            if before != after:
                print(f"config.{field} was {before!r}, is now {after!r}", flush=True)
    temporary = path.with_name("config.json.partial")
    temporary.write_text(json.dumps(new, indent=2) + "\n")
    temporary.replace(path)


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _announce(config, phases, inputs: Inputs, mesh, first_step, last_step) -> None:
    model, origin = inputs.model, config.init_from or "random weights"
    start = f"resuming at step {first_step}" if first_step else f"starting from {origin}"
    devices = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    print(
        f"{config.model}: {parameters.count(model):,} parameters, alignment {model.alignment}, {start}\n"
        f"{len(inputs.rows):,} rows of {config.data.length} tokens, {len(inputs.held_out.ids)} held out; "
        f"{config.batch.rows} rows a step on {devices} ({jax.devices()[0].platform})\n"
        f"{last_step} steps: "
        + ", ".join(f"{p.name} block {p.block_size} x {p.steps}" for p in phases)
        + (f"\n{describe(inputs.lora)}" if inputs.lora else ""),
        flush=True,
    )


class _Stop:
    is_set = False


@contextlib.contextmanager
def _stop_on_sigterm():
    """Yields a flag that SIGTERM sets; the loop then saves and returns."""
    stop = _Stop()

    def handler(signum, frame):
        stop.is_set = True
        print("SIGTERM: saving a checkpoint", file=sys.stderr, flush=True)

    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread
        yield stop
        return
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
