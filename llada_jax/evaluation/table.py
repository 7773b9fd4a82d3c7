"""Results of tools/evaluate.py, side by side: one row a file, one column a measure."""

import json
from collections.abc import Sequence
from pathlib import Path

from llada_jax.errors import InputError

# Columns of answers: (heading, field, decimals); one with a field "NAME_stderr" gets it beside.
_ANSWERS = (
    ("score", "score", 4),
    ("tokens per forward", "tokens_per_forward", 2),
    ("positions evaluated", "positions_evaluated", 0),
    ("seconds", "seconds", 1),
)


def markdown(paths: Sequence[str]) -> str:
    """A Markdown table of result files: likelihoods in nats per token, answers with their score; ± standard error.

    Raises InputError naming a file that is no result.
    """
    rows = [(path, _measures(path)) for path in paths]
    headings = list(dict.fromkeys(heading for _, found in rows for heading in found))
    lines = [["result", *headings], ["---"] * (len(headings) + 1)]
    lines += [[Path(path).stem, *(found.get(heading, "") for heading in headings)] for path, found in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _measures(path: str) -> dict[str, str]:
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {name: _cell(entry["nats"], entry["stderr"], 4) for name, entry in result.items() if _is_nats(entry)}
        for heading, field, decimals in _ANSWERS if "score" in result else ():
            found[heading] = _cell(result[field], result.get(f"{field}_stderr"), decimals)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a result of tools/evaluate.py ({error})") from error
    if not found:
        raise InputError(f"{path}: not a result of --task=nelbo or of answered questions")
    return found


def _is_nats(entry) -> bool:
    return isinstance(entry, dict) and "nats" in entry


def _cell(value: float, stderr: float | None, decimals: int) -> str:
    return f"{value:.{decimals}f}" + ("" if stderr is None else f" ± {stderr:.{decimals}f}")
