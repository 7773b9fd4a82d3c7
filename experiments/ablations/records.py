"""Records of runs: each is made once."""

import json
import os
import platform
import shlex
import time
from pathlib import Path

import jax
from base import Place, merged, prepare, run_config, score_answers, score_text, train
from runs import RUNS, Run

from llada_jax.checkpoint.weights import code, load_checkpoint
from llada_jax.errors import InputError
from llada_jax.model import parameters


def keep_programs(folder: Path) -> None:
    """Runs differ in little: what is compiled for one is there for the next."""
    jax.config.update("jax_compilation_cache_dir", str((folder / "programs").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def record_ar(place: Place, path: Path) -> None:
    """Makes what text runs start from, and records the AR model at `path`."""
    made_by = machine()  # before it has taken minutes, in which the code may change
    made = prepare(place)
    if not path.exists():
        model = load_checkpoint(place.out / "ar")
        made |= {"parameters": parameters.count(model.config), "scores": score_text(model, place)}
        write(path, made_by | made)


def finished(place: Place, path: Path, seed: int, name: str) -> bool:
    """Whether the run is recorded at `path`, now or before. Raises InputError when it was with other fields."""
    run = RUNS[name]
    recorded = json.loads(path.read_text()) if path.exists() else {}
    changed = dict(run.fields) | {"stage": run.stage, "start": run.start}
    if name in recorded:
        if recorded[name]["changed"] != changed:
            raise InputError(f"{path}: {name} is of {recorded[name]['changed']}, expected {changed}; remove it there")
        return True
    print(f"seed {seed}, {name}", end="", flush=True)
    begun = time.monotonic()
    try:
        record = {"changed": changed, **machine(), **train_and_score(place, run, seed, name)}
    except InputError as error:  # the other runs go on
        print(f": {error}", flush=True)
        return False
    print(f": {time.monotonic() - begun:.0f} s, {record['scores']}", flush=True)
    write(path, recorded | {name: record})
    return True


def train_and_score(place: Place, run: Run, seed: int, name: str) -> dict:
    """What is recorded of a run, besides what it changes and the machine."""
    training, rows = {}, None
    if run.merge:
        checkpoint = merged(place, seed, run.merge)
    else:
        config = run_config(run, seed, place)
        checkpoint, rows = place.out / f"{name}-{seed}", Path(config.data.path)
        training = train(config, checkpoint)
    begun = time.monotonic()
    model = load_checkpoint(checkpoint)
    scores = score_text(model, place) if run.of_text else score_answers(model, rows, place)
    return training | {"scores": scores, "score_seconds": round(time.monotonic() - begun, 1)}


def command(place: Place, seed: int, name: str) -> str:
    """What trains the run, or merges its checkpoints, in a shell."""
    run, workdir = RUNS[name], place.out / f"{name}-{seed}"
    if run.merge:
        source = f"--workdir={place.out / f'wsd-{seed}'}"
        return shlex.join(["python", "tools/merge_checkpoints.py", source, f"--best={run.merge}", f"--out={workdir}"])
    started = place.out / (f"random-{seed}" if run.start == "random" else run.start)
    folder = place.post_training / str(seed)
    fields = {
        "seed": seed,
        "data.path": place.rows if run.of_text else folder / "chats",
        "init_from": started if run.of_text else folder / run.start,
    } | dict(run.fields)
    given = [f"--config.{field}={value}" for field, value in fields.items()]
    file = f"--config=experiments/ablations/config.py:{run.stage},{place.model}"
    return shlex.join(["python", "-m", "llada_jax.train", file, f"--workdir={workdir}", *given])


def machine() -> dict:
    """The code, device and versions that made a record."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0))
    kind = f"{cores} CPU core{'s' * (cores > 1)}" if device.platform == "cpu" else device.device_kind
    return {"code": code(), "device": kind, "python": platform.python_version(), "jax": jax.__version__}


def write(path: Path, value: dict) -> None:
    """Writes JSON, one entry per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()]
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)
