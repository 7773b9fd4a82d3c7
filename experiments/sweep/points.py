"""The points of a sweep: their values, the names of their folders, and the table of what came of them."""

import hashlib
import json
import re
from collections.abc import Sequence

Point = dict[str, str]  # {field of the config: value}, in words


def split_values(text: str) -> list[str]:
    """ "1,(2,3),'a,b'" -> ["1", "(2,3)", "'a,b'"]. Raises ValueError when a bracket or quote is not closed."""
    values, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += character
        if depth < 0:
            break
    if depth or quote:
        raise ValueError("a bracket or quote without its other half")
    return values


def unquoted(value: str) -> str:
    """A value without the quotes that it stands in, as a whole: "'a,b'" -> "a,b", "''" -> ""."""
    quote = value[:1]
    whole = len(value) > 1 and quote in ("'", '"') and value[-1] == quote and quote not in value[1:-1]
    return value[1:-1] if whole else value


def point_name(point: Point) -> str:
    """Folder of a point: short field names and values, and a digest where these alone would be ambiguous."""
    text = ",".join(f"{field.rpartition('.')[2]}={value}" for field, value in point.items())
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text)
    if name == text and len(name) <= 100 and len({field.rpartition(".")[2] for field in point}) == len(point):
        return name
    return f"{name[:90]}-{hashlib.sha256(json.dumps(point).encode()).hexdigest()[:8]}"


def last_values(rows: Sequence[dict]) -> dict:
    """step and loss of the last training row, and the last NELBO at each block size with its standard error."""
    last = {}
    for row in rows:
        if "loss" in row:
            last |= {name: row[name] for name in ("step", "loss", "tokens_per_second", "goodput") if name in row}
    evaluated = {row["block_size"]: row for row in rows if "nelbo" in row}
    for size, row in evaluated.items():
        last |= {f"NELBO {size}": row["nelbo"], f"NELBO {size} stderr": row["nelbo_stderr"]}
    return last


def table(rows: Sequence[dict]) -> str:
    """Markdown. Standard errors stand beside their values."""
    hidden = {"point"} | {column for row in rows for column in row if column.endswith(" stderr")}
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in hidden))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [_cell(row.get(column), row.get(f"{column} stderr")) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value, stderr) -> str:
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4f}"
    text = "" if value is None else str(value).replace("|", "\\|") or "''"
    return text if stderr is None else f"{text} ± {stderr:.4f}"
