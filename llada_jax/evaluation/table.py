"""Results of tools/evaluate.py side by side: one row per file, one column per measure."""

import json
from collections.abc import Sequence
from pathlib import Path

from llada_jax.errors import InputError
from llada_jax.evaluation.report import with_error

# Columns of answers: (heading, field, decimals); a field "NAME_stderr" is shown beside NAME.
_ANSWERS = (
    ("score", "score", 4),
    ("tokens per forward", "tokens_per_forward", 2),
    ("positions evaluated", "positions_evaluated", 0),
    ("seconds", "seconds", 1),
)
# Settings that are shown per row if the files differ in them; of "settings" and "decoding", each entry.
_SETTINGS = (
    "task", "checkpoint", "reference", "data", "settings", "seed", "yarn", "extract", "context", "needles", "questions",
    "rows", "samples", "times", "masking", "repeats", "block_origin", "decoding",
)  # fmt: skip


def markdown(paths: Sequence[str]) -> str:
    """A Markdown table of result files: likelihoods in nats per token, and scores of answers, ± standard error.

    A row is named by its file, with as much of the path as distinguishes it, and by the settings in which the files
    differ. Raises InputError naming a file that is not a result.
    """
    results = [_read(path) for path in paths]
    rows = [_measures(path, result) for path, result in zip(paths, results, strict=True)]
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    lines = [["result", *headings], ["---"] * (len(headings) + 1)]
    names = _names(paths, results)
    lines += [[name, *(row.get(heading, "") for heading in headings)] for name, row in zip(names, rows, strict=True)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines)


def _read(path: str) -> dict:
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not a result of tools/evaluate.py ({error})") from error
    if not isinstance(result, dict):
        raise InputError(f"{path}: not a result of tools/evaluate.py")
    return result


def _measures(path: str, result: dict) -> dict[str, str]:
    try:
        measures = {
            name: with_error(entry["nats"], entry["stderr"])
            for name, entry in result.items()
            if isinstance(entry, dict) and "nats" in entry
        }
        for heading, field, decimals in _ANSWERS if "score" in result else ():
            value, error = format(result[field], f".{decimals}f"), f"{field}_stderr"
            measures[heading] = with_error(result[field], result[error], f".{decimals}f") if error in result else value
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a result of tools/evaluate.py ({error})") from error
    if not measures:
        raise InputError(f"{path}: not a result of --task=nelbo or of answered questions")
    return measures


def _names(paths: Sequence[str], results: Sequence[dict]) -> list[str]:
    asked = [_asked(result) for result in results]
    values: dict[str, list] = {}
    for settings in asked:
        for name, value in settings.items():
            values.setdefault(name, []).append(value)
    differ = [name for name, seen in values.items() if any(value != seen[0] for value in seen)]
    shortest = _shortest([str(Path(path).with_suffix("")) for path in paths])
    places = {
        name: dict(zip(known, _shortest(known), strict=True))
        for name in differ
        if (known := sorted({value for value in values[name] if isinstance(value, str)}))
    }
    names = []
    for name, settings in zip(shortest, asked, strict=True):
        said = [
            f"{field}={places.get(field, {}).get(settings[field], settings[field])}"
            for field in differ
            if field in settings
        ]
        names.append(f"{name} ({', '.join(said)})" if said else name)
    return names


def _asked(result: dict) -> dict:
    settings = {}
    for name in _SETTINGS:
        if name in result:
            value = result[name]
            settings |= value if isinstance(value, dict) else {name: value}
    return settings


def _shortest(paths: Sequence[str]) -> list[str]:
    """The last parts of each path, as many as distinguish it from the others."""
    parts = [Path(path).parts for path in paths]
    names = []
    for path in parts:
        others = [other for other in parts if other != path]
        count = next((n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others)), len(path))
        names.append("/".join(path[-count:]).replace("//", "/"))
    return names
