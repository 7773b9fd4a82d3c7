"""The training loop: one loop for every stage; what a step does is data (block size) and a choice of halves.

Rows and noise are functions of the step alone, so a resumed run is the uninterrupted one, bit for bit.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from llada_jax import sharding
from llada_jax.checkpoint import saver, weights
from llada_jax.diffusion import schedule
from llada_jax.diffusion.schedule import Phase
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.monitoring.goodput import Goodput
from llada_jax.monitoring.metrics import MetricsWriter, Progress
from llada_jax.monitoring.mfu import Speed
from llada_jax.monitoring.profiling import Profile, parse_steps
from llada_jax.runtime import distributed
from llada_jax.runtime.global_arrays import on_all_devices
from llada_jax.runtime.preemption import Stop, stop_on_sigterm
from llada_jax.runtime.remote_workdir import RemoteWorkdir, open_workdir
from llada_jax.runtime.retry import Retry
from llada_jax.runtime.watchdog import watched
from llada_jax.runtime.workdir_lock import claimed
from llada_jax.training import train_state
from llada_jax.training.config import check, check_rows, execution, phases, updates_per_step, write
from llada_jax.training.faults import FaultPolicy
from llada_jax.training.inputs import Inputs, describe_rows, initial_params, open_inputs
from llada_jax.training.lora import describe
from llada_jax.training.optimizer import learning_rate, make_optimizer
from llada_jax.training.reference import Reference, open_reference
from llada_jax.training.reinforcement import Reinforcement, reinforcement
from llada_jax.training.run_model import fitted, length_notice
from llada_jax.training.save_policy import SavePolicy, checkpoints
from llada_jax.training.sections import FROM_CHECKPOINT, TrainConfig
from llada_jax.training.source import continue_learning_rate
from llada_jax.training.step import whole
from llada_jax.training.supervised import Supervised, open_train_step


def train(config: ConfigDict, workdir: str, devices=None) -> None:
    """Trains to the end of the schedule, from the newest checkpoint of `workdir` if there is one.

    Writes config.json, checkpoints/, metrics.jsonl and TensorBoard event files, and faults.jsonl when a step was bad.
    SIGTERM saves and returns. devices: those of the mesh, by default all. workdir: may be gs:// (remote_workdir.py).
    Raises InputError on bad input, before anything is written, when another trainer has the workdir, and when
    config.faults or a failing store ends the run.

    Every process of a run makes this call (runtime/distributed.py).

    Example:
        >>> import llada_jax
        >>> config = llada_jax.stages.ar("tiny", length=64, steps=2)
        >>> config.batch.rows = 8
        >>> llada_jax.train(config, "workdir")
        tiny: 918,656 parameters, alignment shifted, ...
        finished at step 2: workdir
        >>> llada_jax.load_checkpoint("workdir").config.alignment
        'shifted'
    """
    with distributed.console():
        _train(config, workdir, devices)


def _train(config: ConfigDict, workdir: str, devices) -> None:
    check(config)
    config = fitted(config)
    distributed.check_same("config, code or JAX", config.to_json() + weights.code() + jax.__version__)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    check_rows(config, mesh)
    with contextlib.ExitStack() as closing:
        mirror, config = closing.enter_context(open_workdir(workdir, config))
        directory = mirror.local
        if jax.process_index() == 0:
            closing.enter_context(claimed(directory))
        inputs = open_inputs(config, directory)
        if config.rl.enabled:
            distributed.check_same("set of questions (some tasks depend on PYTHONHASHSEED)", inputs.rows.digest)
        if inputs.source is not None:
            print(inputs.source.describe(), flush=True)
        if notice := length_notice(config, inputs.model):
            print(notice, flush=True)
        resolved = TrainConfig.from_config_dict(continue_learning_rate(config, inputs.source))
        distributed.check_shared(epath.Path(workdir))
        with jax.set_mesh(mesh), stop_on_sigterm() as stop:
            _run(resolved, phases(resolved), mesh, mirror, inputs, stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What does not change from step to step. heartbeat: of runtime/watchdog.py. restore() -> (state, host state) of
    the newest checkpoint.
    """

    config: TrainConfig
    phases: Sequence[Phase]
    inputs: Inputs
    reference: Reference
    work: Supervised | Reinforcement
    restore: Callable[[], tuple[train_state.TrainState, dict]]
    saves: SavePolicy
    retry: Retry
    stop: Stop
    heartbeat: Callable[[], None]
    mirror: RemoteWorkdir
    goodput: Goodput
    speed: Speed
    profile: Profile

    @property
    def last_step(self) -> int:
        return schedule.total_steps(self.phases)

    @property
    def workdir(self) -> Path:
        return self.mirror.local


def _run(config: TrainConfig, phases: Sequence[Phase], mesh, mirror: RemoteWorkdir, inputs: Inputs, stop: Stop) -> None:
    """Restores, trains and prints how it ended; nothing but a line when all steps are done already."""
    workdir, last_step = mirror.local, schedule.total_steps(phases)
    goodput = Goodput(workdir, writes=jax.process_index() == 0)
    optimizer = make_optimizer(config.optimizer, inputs.trained, last_step * updates_per_step(config))
    batch_sharding = NamedSharding(mesh, PartitionSpec(sharding.spec(("batch",), (config.batch.rows,), mesh)[0]))
    reference = open_reference(config, phases, inputs, batch_sharding, workdir, stop)
    if reference is None:
        return
    restore = functools.partial(_restore, config, workdir, inputs, optimizer, mesh)
    with goodput.spent("restore"):
        state, host = restore()
    _announce(config, phases, inputs, mesh, int(state.step), last_step)
    if int(state.step) >= last_step:
        return

    retry = Retry(config.checkpoint.retries, config.checkpoint.retry_seconds)
    saves = SavePolicy(config, workdir, inputs, retry)
    with contextlib.ExitStack() as closing:
        if jax.process_count() == 1:  # several agree on how a save went, but an error of one is not waited for
            closing.callback(saves.settle)  # what is being saved when an error ends the run
        heartbeat = closing.enter_context(watched(config.faults.hang_minutes or 0.0, workdir, jax.process_index()))
        profile = Profile(workdir / "profile", parse_steps(config.profile.steps), goodput.spent)
        closing.callback(profile.close)
        if config.rl.enabled:
            opened = reinforcement(config, inputs, reference, optimizer, batch_sharding, stop, workdir)
            work = closing.enter_context(opened)
        else:
            train_step = goodput.timed_steps(open_train_step(config, inputs, optimizer, mesh))
            work = Supervised(config, inputs, reference, train_step, batch_sharding)
        if jax.process_index() == 0:  # not before: config.json is of what has trained here
            write(config, workdir / "config.json")
        run = Run(
            config=config,
            phases=phases,
            inputs=inputs,
            reference=reference,
            work=work,
            restore=restore,
            saves=saves,
            retry=retry,
            stop=stop,
            heartbeat=heartbeat,
            mirror=mirror,
            goodput=goodput,
            speed=Speed(config, phases, inputs.model, inputs.documents, mesh.devices.flat),
            profile=profile,
        )
        done = _train_to_the_end(run, state, host)
    goodput.mark(done)
    ended = "finished" if done == last_step else "stopped"  # experiments/launch/supervise.sh looks for it
    print(f"{goodput.describe()}\n{ended} at step {done}: {mirror.remote or workdir}", flush=True)


def _train_to_the_end(run: Run, state: train_state.TrainState, host: dict) -> int:
    """Trains from `state`, rewinding where config.faults asks for it, and waits for the last save. Returns the steps
    done.
    """
    while True:
        policy = FaultPolicy(run.config, run.phases, run.workdir, host)
        done, bad_step = _steps(run, state, int(state.step), policy)
        if bad_step is None:
            break
        run.goodput.mark(done)
        with run.goodput.spent("restore"):
            run.saves.settle()
            state, host = run.restore()
        host = policy.rewound(bad_step, int(state.step), host)
        print(f"rewound to step {int(state.step)}; the data goes on behind step {bad_step + 1}", flush=True)
        run.heartbeat()
    with run.goodput.spent("save"):
        run.saves.wait()
    return done


def _steps(run: Run, state: train_state.TrainState, first_step: int, policy: FaultPolicy) -> tuple[int, int | None]:
    """Trains from `state`, which is donated, to the last step or to SIGTERM, and begins to save what it has then.

    Returns (steps done, the bad step to be rewound for or None).
    """
    config, last_step = run.config, run.last_step
    rates = learning_rate(config.optimizer, last_step * updates_per_step(config))
    writer = MetricsWriter(run.workdir, first_step, run.retry)
    progress = Progress(first_step, last_step, config.batch.rows * config.data.length)
    batches = run.work.batches(first_step, last_step, policy.data_offset)
    with contextlib.ExitStack() as closing:
        closing.callback(writer.close)
        closing.callback(batches.close)
        if config.rl.enabled and first_step == 0:  # what the updates are compared with
            _evaluate(run, state, writer, 0)
        run.goodput.begin_steps(first_step)
        for step, batch in run.goodput.timed_batches(batches):
            done, phase = step + 1, schedule.phase_at(run.phases, step)
            run.profile.before(done, state)
            state, metrics = run.work.step(state, step, batch, phase, policy.scalars(step))
            if metrics is None:  # stopped before it had an effect
                return _stopped_in_step(run, state, step, first_step, writer, policy), None
            run.profile.after(done, metrics)
            due = _due(config, done, last_step)
            last = run.stop.after_step() or done == last_step
            save = due.save or last or run.saves.due_anywhere(ask=due.log)
            shown = due.log or done == first_step + 1 or last
            bad_step = policy.observe(step, metrics, batch.row_ids, now=shown or due.evaluate or save)
            run.heartbeat()
            if bad_step is not None:
                return done, bad_step
            if shown:
                rate = float(rates(max(step - policy.skipped, 0) * updates_per_step(config)))
                timed = run.speed.fields(phase, run.goodput.mark(done)) | run.goodput.fields()
                _log(writer if due.log else None, progress, done, phase, metrics, rate, timed)
            score = None  # a step that SIGTERM or the clock makes us save has none: no other run would have it
            if due.evaluate:
                score = _evaluate(run, state, writer, done)
            if save:
                with run.goodput.spent("save"):
                    writer.sync()  # a saved step has its rows of metrics
                    run.mirror.push()
                    run.saves.save(done, state, score if due.save else None, policy.host_state())
                run.heartbeat()
            if last:
                break
    return done, None


def _evaluate(run: Run, state: train_state.TrainState, writer: MetricsWriter, step: int) -> float | None:
    """Returns what ranks the checkpoint, if anything does."""
    params = whole(state.params, run.reference.frozen, run.inputs.trained)
    with run.goodput.spent("evaluate"):
        score = run.work.evaluate(params, writer, step)
    run.heartbeat()
    return score


def _stopped_in_step(run: Run, state, step: int, first_step: int, writer: MetricsWriter, policy: FaultPolicy) -> int:
    """Begins to save what the steps before `step` have done; returns their number."""
    if step > first_step:
        with run.goodput.spent("save"):
            writer.sync()
            run.mirror.push()
            run.saves.save(step, state, None, policy.host_state())
    return step


class Due(NamedTuple):
    """What a step is followed by in every run, however often that is interrupted."""

    log: bool
    evaluate: bool
    save: bool


def _due(config: ConfigDict, done: int, last_step: int) -> Due:
    ends = done == last_step
    save = done % config.checkpoint.every_steps == 0 or ends
    evaluate = done % config.evaluation.every_steps == 0 or ends or (save and config.checkpoint.keep_best > 0)
    return Due(done % config.log_every_steps == 0 or done == 1 or ends, evaluate, save)


def _restore(config, workdir: Path, inputs: Inputs, optimizer, mesh) -> tuple[train_state.TrainState, dict]:
    """The state of the newest checkpoint, and the host state kept with it; without a checkpoint those of the start."""
    abstract = train_state.abstract(inputs.trained, optimizer)
    shardings = train_state.shardings(abstract, inputs.trained, mesh)
    restored = saver.restore(
        checkpoints(config, workdir), inputs.trained, abstract.params, abstract.optimizer,
        (shardings.params, shardings.optimizer),
    )  # fmt: skip
    if restored is None:
        params = initial_params(inputs, config.seed, shardings.params)
        return jax.jit(lambda p: train_state.create(p, optimizer), out_shardings=shardings)(params), {}
    step, params, optimizer_state, host = restored
    if "rows_per_step" not in host:  # a checkpoint from before that was kept
        before = weights.read_config(epath.Path(checkpoints(config, workdir)) / str(step))[1].get("config", {})
        host |= {"rows_per_step": before.get("batch", {}).get("rows", config.batch.rows)}
    compared = config.preference.enabled or (config.rl.enabled and config.rl.kl_weight)
    if compared and inputs.source.weights != (started := host.get("init_weights")):
        raise InputError(
            f"config.init_from={config.init_from}: its weights are {inputs.source.weights}, but the reference of "
            f"{workdir} is {started}; name the step that the run started from"
        )
    moved = host.get("data_offset") or host["rows_per_step"] != config.batch.rows
    if moved and config.preference.reference == "precomputed" and config.preference.enabled:
        raise InputError(
            f"{workdir}: its rows are not those of the precomputed scores, as it was rewound or went on with another "
            'batch.rows; set config.preference.reference="frozen"'
        )
    return train_state.TrainState(on_all_devices(np.int32(step), mesh), params, optimizer_state), host


def _log(writer: MetricsWriter | None, progress, step, phase, metrics, rate, timed) -> None:
    """Prints a line; with a writer, writes the row."""
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    line, tokens_per_second = progress.line(step, phase, metrics)
    print(line, flush=True)
    if writer is not None:
        row = {"step": step, "phase": phase.name, "block_size": phase.block_size, "learning_rate": rate}
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        writer.write(row | finite | {"tokens_per_second": round(tokens_per_second, 1)} | timed, "train")


def _announce(config, phases, inputs: Inputs, mesh, first_step, last_step) -> None:
    model = inputs.model
    start = "starting from random weights" if inputs.source is None else "starting from init_from"
    start = f"resuming at step {first_step}" if first_step else start
    devices = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "1 device"
    if jax.process_count() > 1:
        devices += f" of {jax.process_count()} processes"
    name = f"{model.architecture} of init_from" if config.model in FROM_CHECKPOINT else config.model
    print(
        f"{name}: {parameters.count(model):,} parameters, alignment {model.alignment}, {start}\n"
        f"{describe_rows(config, inputs)}; "
        f"{config.batch.rows} rows a step on {devices} ({jax.devices()[0].platform}, "
        f"{execution(config).attention} attention)\n"
        f"{last_step} steps: "
        + ", ".join(f"{p.name} block {p.block_size} x {p.steps}" for p in phases)
        + (f"\n{describe(inputs.lora)}" if inputs.lora else ""),
        flush=True,
    )
