"""The record of each point of a sweep, OUT/POINT/sweep.json, and how far the point has come.

A record has the point's "flags", the "config" that they made when it was begun (the config file may be edited later),
"finished", and "failure": why it last ended before that.
"""

import json
from collections.abc import Sequence

from etils import epath

from llada_jax.errors import InputError

FILE = "sweep.json"
REPLACED = "replaced"  # folder in OUT: points trained with a config that has changed since


def new_record(flags: Sequence[str], config: dict) -> dict:
    return {"flags": list(flags), "config": config, "finished": False}


def read_record(folder: epath.Path) -> dict | None:
    path = folder / FILE
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise InputError(f"{path}: malformed JSON ({error})") from error


def write_record(folder: epath.Path, record: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(record, indent=1) + "\n")


def differences(before: dict, now: dict, prefix: str = "config.") -> list[str]:
    """ "config.seed was 0, is now 1" for each field; configs are as JSON has them."""
    lines = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name} was {old!r}, is now {new!r}")
    return lines


def changed(record: dict, config: dict) -> list[str]:
    """How `config` differs from that of the record, line by line; older records have no config, only flags."""
    return differences(record["config"], config) if "config" in record else []


def move_aside(out: epath.Path, name: str) -> epath.Path:
    """Renames OUT/NAME to OUT/replaced/NAME-N, which it returns."""
    replaced = out / REPLACED
    replaced.mkdir(exist_ok=True)
    number = next(n for n in range(1, 10**6) if not (replaced / f"{name}-{n}").exists())
    return (out / name).rename(replaced / f"{name}-{number}")


def why_unfinished(record: dict | None, last_step: int, total: int, running: bool) -> str | None:
    """None for a point that has finished or that no sweep has recorded; else what the table shows as its failure."""
    if record is None or record["finished"] or (record.get("launched") and last_step >= total):
        return None
    if running:
        return f"still running, at step {last_step} of {total}"
    if record.get("failure"):
        return record["failure"]
    return f"{'launched' if record.get('launched') else 'stopped'}, at step {last_step} of {total}"
