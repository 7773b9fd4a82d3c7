"""Trains once for each point of a grid or a list of config values, and tables the results.

python experiments/sweep.py --config=configs/wsd.py:tiny --out=runs/sweep [--parallel=N] [--dry_run] \
    [--config.FIELD=V] --sweep=optimizer.learning_rate=1e-3,3e-3 --sweep=optimizer.weight_decay=0.0,0.1

Each --sweep is a field of the config and its values; the points are all combinations. Commas inside brackets or quotes
belong to a value: --sweep='schedule.warmup_blocks=(1,4),(1,4,32)'. --list=FILE has a point a line instead, as in
optimizer.learning_rate=1e-3 batch.rows=4; # begins a comment. Other --config flags hold for all points.

A point is trained in OUT/POINT, where train.log is. Run again, the sweep trains only what has not finished, and resumes
what was begun; a point that failed is tried again. The others go on when one fails, and the exit code is 1 at the end.
--launch="tpu_vm --topology=v5p:2x2x1 --project=P --zone=Z --rows=gs://B/ROWS" launches a pod job for each point instead
(experiments/launch/launch.py), OUT being gs://; --table alone makes the table, there or of a sweep that still runs.

OUT/results.md and OUT/results.json: the last values of each run's metrics, best first by --rank_by, a column of the
table ("loss", "NELBO 32"; by default the NELBO at the last block size that was evaluated), less being better.
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
from sweep_points import Point, last_values, point_name, split_values, table

from llada_jax import errors
from llada_jax.config_flag import resolved
from llada_jax.errors import InputError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, FILE.py:MODEL[,option=N].")
_SWEEP = flags.DEFINE_multi_string("sweep", [], "FIELD=VALUE,VALUE...: an axis of the grid.")
_LIST = flags.DEFINE_string("list", None, "File with a point a line, FIELD=VALUE FIELD=VALUE...")
_OUT = flags.DEFINE_string("out", None, "Folder of the workdirs and of the results.")
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Points trained side by side, here.", lower_bound=1)
_LAUNCH = flags.DEFINE_string("launch", None, "Arguments of experiments/launch/launch.py: a pod job for each point.")
_RANK_BY = flags.DEFINE_string("rank_by", None, "Column that ranks the points.")
_TABLE = flags.DEFINE_bool("table", False, "Train nothing, only table what is there.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, run none.")

LAUNCH = Path(__file__).resolve().parent / "launch" / "launch.py"


# ---- points


def points() -> list[Point]:
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
            axes[field] = split_values(values)
        except ValueError as error:
            raise InputError(f"--sweep={text}: {error}") from error
        if "" in axes[field] or len(set(axes[field])) < len(axes[field]):
            raise InputError(f"--sweep={text}: an empty value, or one that comes twice")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _listed(file: Path) -> list[Point]:
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise InputError(f"--list={file}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            parts = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{file}:{number}: {error}") from error
        if parts:
            found.append(dict(_field(part, f"{file}:{number}") for part in parts))
    if not found or len({point_name(point) for point in found}) < len(found):
        raise InputError(f"--list={file}: no points, or one that comes twice")
    return found


def _field(text: str, where: str) -> tuple[str, str]:
    field, equals, value = text.partition("=")
    field = field.removeprefix("config.")
    if not equals or not value:
        raise InputError(f"{where}: {text!r}, expected FIELD=VALUE")
    node = resolved(_CONFIG)
    for name in field.split("."):
        if not hasattr(node, "keys") or name not in node:
            raise InputError(f"{where}: no such field, config.{field}")
        node = node[name]
    return field, value


# ---- training


def common_flags() -> list[str]:
    """The --config flags of the command line, which hold for all points."""
    arguments = sys.argv[1:]
    if "--config" in arguments:  # and its value apart
        at = arguments.index("--config")
        arguments[at : at + 2] = ["=".join(arguments[at : at + 2])]
    return [text for text in arguments if re.match(r"--?(no)?config[.=]", text)]


def point_flags(point: Point) -> list[str]:
    return [*common_flags(), *(f"--config.{field}={value}" for field, value in point.items())]


def read_record(point: Point) -> dict:
    """{"flags", "finished"} of a point. Raises InputError when it was trained with other flags."""
    path = Path(_OUT.value) / point_name(point) / "sweep.json"
    record = json.loads(path.read_text()) if path.exists() else {"flags": point_flags(point), "finished": False}
    if record["flags"] != point_flags(point):
        raise InputError(f"{path}: of other flags, {shlex.join(record['flags'])}; choose another --out")
    return record


def train_here(point: Point, record: dict) -> str | None:
    """None when the point has finished, or in words why it has not."""
    name = point_name(point)
    workdir = Path(_OUT.value) / name
    command = [sys.executable, "-m", "llada_jax.train", f"--workdir={workdir}", *point_flags(point)]
    if _DRY_RUN.value:
        print(shlex.join(command))
        return None
    print(f"{name}: {'going on' if workdir.exists() else 'training'}", flush=True)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "sweep.json").write_text(json.dumps(record, indent=1) + "\n")
    with open(workdir / "train.log", "a+b") as log:
        begun = log.seek(0, 2)
        code = _call(command, log)
        log.seek(begun)
        lines = log.read().decode(errors="replace").splitlines() or ["nothing was printed"]
    if code == 0 and not any(line.startswith("SIGTERM: saving a checkpoint") for line in lines):
        (workdir / "sweep.json").write_text(json.dumps(record | {"finished": True}, indent=1) + "\n")
        return None
    return f"exit code {code}: {lines[-1]}"


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


def train_all_here(found: Sequence[Point]) -> dict[str, str]:
    """{point: why it has not finished}. Ctrl-C stops those that run; they have saved when this returns."""
    failures = {}
    todo = [(point, record) for point in found if not (record := read_record(point))["finished"]]
    with ThreadPoolExecutor(_PARALLEL.value) as pool:
        ended = {point_name(point): pool.submit(train_here, point, record) for point, record in todo}
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


def launch(found: Sequence[Point]) -> dict[str, str]:
    """{point: why it could not be launched}."""
    failures = {}
    arguments = shlex.split(_LAUNCH.value)
    if "://" not in _OUT.value:
        raise InputError(f"--out={_OUT.value}, expected gs://BUCKET/SWEEP: of pod jobs")
    for number, point in enumerate(found):
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


# ---- results


def results(found: Sequence[Point], failures: dict[str, str]) -> list[dict]:
    """A row a point, best first; those without metrics come last."""
    from llada_jax.training.metrics import read_rows

    rows = []
    for point in found:
        name = point_name(point)
        row = {"point": name, **point}
        try:
            row |= last_values(read_rows(epath.Path(_OUT.value) / name))
        except InputError:
            row["failure"] = "no metrics"
        rows.append(row | ({"failure": failures[name]} if name in failures else {}))
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in ("point", "failure")))
    nelbos = [column for column in columns if re.fullmatch(r"NELBO \d+", column)]
    best = _RANK_BY.value or (nelbos[-1] if nelbos else "loss")
    if _RANK_BY.value and best not in columns:
        raise InputError(f"--rank_by={best}, expected one of {', '.join(columns)}")
    numbers = [row.get(best) for row in rows]
    order = [value if isinstance(value, int | float) and value == value else float("inf") for value in numbers]
    return [rows[i] for i in sorted(range(len(rows)), key=order.__getitem__)]


def main(argv) -> int:
    del argv
    if _CONFIG.value is None or not _OUT.value:
        raise InputError("--config=FILE.py:MODEL and --out=DIR are required; see --help")
    found = points()
    failures: dict[str, str] = {}
    if not _TABLE.value:
        failures = launch(found) if _LAUNCH.value else train_all_here(found)
    if _DRY_RUN.value or (_LAUNCH.value and not _TABLE.value):
        return int(bool(failures))
    rows = results(found, failures)
    text = table(rows)
    out = epath.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "results.md").write_text(text + "\n")
    print(text)
    return int(bool(failures))


if __name__ == "__main__":
    errors.run(main)
