"""The tables of results/, written into experiments/README.md between their marks."""

import json
import re
from pathlib import Path

from points import BEFORE, CHUNK, OF_A_PASS, ROWS, SLICES

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
BEGIN, END = "<!-- decoding on pods -->\n", "<!-- end of decoding on pods -->"
_PARTS = {"attention": "attention", "experts": "experts", "head": "head", "dense": "other matmuls",
          "collectives": "collectives", "glue": "glue"}  # fmt: skip


def path_of(name: str) -> Path:
    return FOLDER / "results" / f"{name}.json"


def recorded(name: str) -> dict[str, dict]:
    """{Point.key: the JSON of its rehearsal, with versions and mesh} of a slice."""
    path = path_of(name)
    return json.loads(path.read_text()) if path.exists() else {}


def passes() -> str:
    """Markdown, a row for each slice and number of requests."""
    speeds = [f"tokens/s at {count:g}" for count in OF_A_PASS]
    head = ["model, slice", "requests", "mesh", *_PARTS.values(), "a pass, ms", "roofline, ms", "times", *speeds]
    lines = [head, ["---"] * len(head)]
    for name in SLICES:
        for rows in ROWS:
            if values := recorded(name).get(f"rows {rows}"):
                lines.append([_name(name), str(rows), *_cells(values, [rows * count for count in OF_A_PASS])])
    return _markdown(lines)


def chunks() -> str:
    """Markdown, a row for each slice and number of tokens before the chunk."""
    head = ["model, slice", "tokens before", "mesh", *_PARTS.values(), "a chunk, ms", "roofline, ms", "times"]
    head += ["prompt tokens/s", "share of the peak"]
    lines = [head, ["---"] * len(head)]
    for name in SLICES:
        for before in BEFORE:
            if values := recorded(name).get(f"chunk after {before}"):
                cells = _cells(values, [values.get("positions", 0)])
                share = f"{values['share_of_peak']:.0%}" if values["fits"] else "-"
                lines.append([_name(name), f"{before:,}", *cells, share])
    return _markdown(lines)


def _cells(values: dict, tokens: list[float]) -> list[str]:
    """Mesh, parts, total, roofline, ratio, then tokens per second."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in values["mesh"].items()) or "one device"
    if not values["fits"]:
        memory, capacity = (values[key] / 2**30 for key in ("hbm_bytes", "hbm_capacity_bytes"))
        return [mesh, f"does not fit: {memory:.0f} of {capacity:.0f} GiB", *["-"] * (len(_PARTS) + 2 + len(tokens))]
    seconds = sum(values["seconds"].values())
    numbers = [values["seconds"][part] * 1e3 for part in _PARTS] + [seconds * 1e3, values["roofline_seconds"] * 1e3]
    ratio = f"**{seconds / values['roofline_seconds']:.1f}**"
    return [mesh, *(f"{number:.2f}" for number in numbers), ratio, *(f"{count / seconds:,.0f}" for count in tokens)]


def _name(name: str) -> str:
    return f"{name.split('_')[0]}, {SLICES[name].topology}"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def section() -> str:
    chunk = f"A chunk of {CHUNK:,} tokens of a prompt, on each part of the requests"
    return f"A pass of decoding:\n\n{passes()}\n\n{chunk}:\n\n{chunks()}\n"


def write() -> None:
    text = README.read_text()
    between = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    README.write_text(between.sub(lambda _: BEGIN + section() + END, text))
