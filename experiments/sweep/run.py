"""Trains once for each point of a grid or a list of config values, and tables the results.

python experiments/sweep.py --config=configs/wsd.py:tiny --out=runs/sweep [--parallel=N] [--dry_run] \
    [--config.FIELD=V] --sweep=optimizer.learning_rate=1e-3,3e-3 --sweep=optimizer.weight_decay=0.0,0.1

Each --sweep is a field of the config and its values; the points are all combinations. Commas inside brackets or quotes
belong to a value: --sweep='schedule.warmup_blocks=(1,4),(1,4,32)', --sweep="data.mixture='A:0.7,B:0.3','A:0.5,B:0.5'";
quotes around a value are removed, and '' is the empty text. --list=FILE has one point per line instead, as in
optimizer.learning_rate=1e-3 batch.rows=4; # begins a comment. Other --config flags hold for all points.

A point is trained in OUT/POINT, where train.log is. Run again, the sweep trains only what has not finished, and resumes
what was begun; a point that failed is tried again. The others go on when one fails, and the exit code is 1 at the end.
A point whose config has changed, as the config file was edited, is trained anew; the old run moves to OUT/replaced.
Other flags for the same OUT are refused.
--launch="tpu_vm --topology=v5p:2x2x1 --project=P --zone=Z --rows=gs://B/ROWS" launches a pod job for each point instead
(experiments/launch/launch.py), OUT being gs://; --table alone makes the table, there or of a sweep that still runs.

OUT/results.md and OUT/results.json: the last values of each run's metrics, best first by --rank_by, a column of the
table ("loss", "NELBO 32"; by default the NELBO at the last block size that was evaluated), less being better. Points
that failed, still run or were stopped say so and come behind those that have finished.
"""

import itertools
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import config_flags
from points import Point, last_values, point_name, split_values, table, unquoted
from records import changed, move_aside, new_record, read_record, why_unfinished, write_record

from llada_jax import command_line, config_flag
from llada_jax.errors import InputError
from llada_jax.runtime.workdir_lock import is_claimed

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, FILE.py:MODEL[,option=N].")
_SWEEP = flags.DEFINE_multi_string("sweep", [], "FIELD=VALUE,VALUE...: an axis of the grid.")
_LIST = flags.DEFINE_string("list", None, "File with one point per line, FIELD=VALUE FIELD=VALUE...")
_OUT = flags.DEFINE_string("out", None, "Folder of the workdirs and of the results.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Points trained side by side, here.", lower_bound=1)
_LAUNCH = flags.DEFINE_string("launch", None, "Arguments of experiments/launch/launch.py: a pod job for each point.")
_RANK_BY = flags.DEFINE_string("rank_by", None, "Column that ranks the points.")
_TABLE = flags.DEFINE_bool("table", False, "Train nothing, only table what is there.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, run none.")

LAUNCH = Path(__file__).resolve().parents[1] / "launch" / "launch.py"


# ---- points


def read_points() -> list[Point]:
    """Raises InputError naming the flag or the line of --list that is wrong."""
    if bool(_SWEEP.value) == bool(_LIST.value):
        raise InputError("--sweep=FIELD=VALUE,VALUE... or --list=FILE is required, one of them; see --help")
    if _LIST.value:
        return _listed(Path(_LIST.value))
    axes: dict[str, list[str]] = {}
    for text in _SWEEP.value:
        field, values = _field(text, f"--sweep={text}")
        if field in axes:
            raise InputError(f"--sweep={text}: {field} is swept twice")
        try:
            quoted = split_values(values)
        except ValueError as error:
            raise InputError(f"--sweep={text}: {error}") from error
        axes[field] = [unquoted(value) for value in quoted]
        if "" in quoted or len(set(axes[field])) < len(axes[field]):
            raise InputError(f"--sweep={text}: an empty value ('' is the empty text), or one that comes twice")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _listed(file: Path) -> list[Point]:
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise InputError(f"--list={file}: {error.strerror}") from error
    points = []
    for number, line in enumerate(lines, 1):
        try:
            parts = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{file}:{number}: {error}") from error
        if parts:
            fields = [_field(part, f"{file}:{number}") for part in parts]
            points.append({field: unquoted(value) for field, value in fields})
    if not points or len({point_name(point) for point in points}) < len(points):
        raise InputError(f"--list={file}: no points, or one that comes twice")
    return points


def _field(text: str, source: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    field = field.removeprefix("config.")
    if not equals:
        raise InputError(f"{source}: {text!r}, expected FIELD=VALUE")
    config_flag.field_of(config_flag.resolved(_CONFIG), field, source)
    return field, value


def config_of(point: Point) -> dict:
    """The config of a point as a JSON dict. Raises InputError naming the flag that is wrong."""
    return json.loads(config_flag.load(point_flags(point)).to_json())


# ---- training


def common_flags() -> list[str]:
    """The --config flags of the command line, which hold for all points."""
    return config_flag.config_arguments(sys.argv[1:])


def point_flags(point: Point) -> list[str]:
    """The --config flags of a point, without common flags of its own fields: values of a tuple would be joined."""
    swept = [f"config.{field}" for field in point]
    common = [text for text in common_flags() if text.lstrip("-").removeprefix("no").partition("=")[0] not in swept]
    return [*common, *(f"--config.{field}={value}" for field, value in point.items())]


def record_of(point: Point) -> tuple[dict, list[str]]:
    """The record of a point, a new one if there is none; and how its config differs from what has been trained there.

    Raises InputError when it was trained with other flags, which give another config.
    """
    flags_now, config, folder = point_flags(point), config_of(point), epath.Path(_OUT.value) / point_name(point)
    record = read_record(folder) or new_record(flags_now, config)
    differing = changed(record, config)
    if record["flags"] != flags_now and (differing or "config" not in record):
        raise InputError(f"{folder}: of other flags, {shlex.join(record['flags'])}; choose another --out")
    return (new_record(flags_now, config) if differing else record), differing


def train_here(point: Point, record: dict, differing: Sequence[str]) -> str | None:
    """None when the point has finished, or in words why it has not."""
    name = point_name(point)
    workdir = Path(_OUT.value) / name
    command = [sys.executable, "-m", "llada_jax.train", f"--workdir={workdir}", *point_flags(point)]
    if _DRY_RUN.value:
        print(shlex.join(command))
        return None
    if differing:
        if is_claimed(workdir):
            return f"still running with another config, {differing[0]}"
        replaced = move_aside(epath.Path(_OUT.value), name)
        print(f"{name}: {'; '.join(differing)}; what was there is in {replaced}", flush=True)
    print(f"{name}: {'going on' if workdir.exists() else 'training'}", flush=True)
    record = {key: value for key, value in record.items() if key != "failure"}
    write_record(epath.Path(workdir), record)
    with open(workdir / "train.log", "a+b") as log:
        begun = log.seek(0, 2)
        code = _call(command, log)
        log.seek(begun)
        lines = log.read().decode(errors="replace").splitlines() or ["nothing was printed"]
    if code == 0 and not any(line.startswith("SIGTERM: saving a checkpoint") for line in lines):
        write_record(epath.Path(workdir), record | {"finished": True})
        return None
    why = f"exit code {code}: {lines[-1]}"
    write_record(epath.Path(workdir), record | {"failure": why})
    return why


_running: set[subprocess.Popen] = set()
_ended = threading.Event()


def _call(command: Sequence[str], log) -> int:
    if _ended.is_set():
        return 130
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    _running.add(process)
    code = process.wait()
    _running.discard(process)
    return code


def train_all_here(points: Sequence[Point]) -> dict[str, str]:
    """{point: why it has not finished}. Ctrl-C stops those that run; they have saved when this returns."""
    failures = {}
    records = [(point, *record_of(point)) for point in points]
    todo = [entry for entry in records if not entry[1]["finished"]]
    with ThreadPoolExecutor(_PARALLEL.value) as pool:
        ended = {point_name(entry[0]): pool.submit(train_here, *entry) for entry in todo}
        try:
            for name, future in ended.items():
                if (why := future.result()) is not None:
                    failures[name] = why
                    print(f"{name}: {why}", file=sys.stderr, flush=True)
        except BaseException:
            _ended.set()
            for process in list(_running):
                process.terminate()
            raise
    return failures


def launch(points: Sequence[Point]) -> dict[str, str]:
    """{point: why it could not be launched}."""
    failures = {}
    arguments = shlex.split(_LAUNCH.value)
    if "://" not in _OUT.value:
        raise InputError(f"--out={_OUT.value}, expected gs://BUCKET/SWEEP: of pod jobs")
    if not _DRY_RUN.value:
        _record_launch(points)
    for number, point in enumerate(points):
        name = f"{re.sub('[^a-z0-9-]', '-', epath.Path(_OUT.value).name.lower())[:30]}-{number}"
        command = [
            sys.executable, str(LAUNCH), *arguments, f"--name={name}", f"--workdir={_OUT.value}/{point_name(point)}",
            *(["--dry_run"] if _DRY_RUN.value else []), "--",
            *point_flags(point),
        ]  # fmt: skip
        print(f"# {point_name(point)}", flush=True)
        if code := subprocess.run(command).returncode:
            failures[point_name(point)] = f"launch.py ended with {code}"
    return failures


def _record_launch(points: Sequence[Point]) -> None:
    """Says in OUT with which configs the points are trained. Raises InputError where others were."""
    try:
        for point in points:
            record, differing = record_of(point)
            folder = epath.Path(_OUT.value) / point_name(point)
            if differing:
                raise InputError(f"{folder}: of another config, {differing[0]}; choose another --out")
            write_record(folder, record | {"launched": True})
    except InputError:
        raise
    except Exception as error:  # whatever the store's client raises
        line = " ".join(str(error).split())[:200]
        print(f"# {_OUT.value}: cannot be written from here, so the table will not know its configs ({line})")


# ---- results


def result(point: Point, failure: str | None) -> dict:
    """The row of a point: its last metrics, of this config alone, and why it has not finished, if so."""
    from llada_jax.diffusion.schedule import total_steps
    from llada_jax.monitoring.metrics import read_rows
    from llada_jax.training.config import phases

    folder, config = epath.Path(_OUT.value) / point_name(point), config_of(point)
    row, record = {"point": point_name(point), **point}, read_record(folder)
    if record is not None and (differing := changed(record, config)):
        return row | {"failure": failure or f"of another config, {differing[0]}"}
    try:
        row |= last_values(read_rows(folder))
    except InputError:
        failure = failure or (record or {}).get("failure") or "no metrics"
    try:
        total = total_steps(phases(config_flag.load(point_flags(point))))
    except InputError:  # the trainer has refused it
        total = 0
    unfinished = why_unfinished(record, row.get("step", 0), total, "://" not in _OUT.value and is_claimed(Path(folder)))
    failure = failure or unfinished
    return row | ({"failure": failure} if failure else {})


def results(points: Sequence[Point], failures: dict[str, str]) -> list[dict]:
    """One row per point, best first; those that have not finished come last."""
    rows = [result(point, failures.get(point_name(point))) for point in points]
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in ("point", "failure")))
    nelbos = [column for column in columns if re.fullmatch(r"NELBO \d+", column)]
    best = _RANK_BY.value or (nelbos[-1] if nelbos else "loss")
    if _RANK_BY.value and best not in columns:
        raise InputError(f"--rank_by={best}, expected one of {', '.join(columns)}")
    numbers = [row.get(best) if "failure" not in row else None for row in rows]
    order = [value if isinstance(value, int | float) and value == value else float("inf") for value in numbers]
    return [rows[i] for i in sorted(range(len(rows)), key=order.__getitem__)]


def main(argv) -> int:
    del argv
    if _CONFIG.value is None or not _OUT.value:
        raise InputError("--config=FILE.py:MODEL and --out=DIR are required; see --help")
    points = read_points()
    failures: dict[str, str] = {}
    if not _TABLE.value:
        failures = launch(points) if _LAUNCH.value else train_all_here(points)
    if _DRY_RUN.value or (_LAUNCH.value and not _TABLE.value):
        return int(bool(failures))
    rows = results(points, failures)
    text = table(rows)
    out = epath.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "results.md").write_text(text + "\n")
    print(text)
    return int(bool(failures))


if __name__ == "__main__":
    command_line.run(main)
