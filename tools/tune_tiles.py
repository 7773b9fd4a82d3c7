"""Fills the attention kernel's table of tile sizes, llada_jax/attention/tiles.json.

python tools/tune_tiles.py --topology=v5p:2x2x1 [--head_dims=64,128] [--shapes=row,decode]   # the compiler's estimate
python tools/tune_tiles.py --device=tpu                                                      # timed on the TPU at hand

Prices every combination of query rows, chunk size and chunks a step on the bench's rows, prints them as they are found,
then the ranking, and writes the cheapest into the table with its cost. --check writes nothing and fails when the table
holds another choice. A compilation takes 10 to 60 s, one at a time.
"""

from pathlib import Path

from absl import flags

from llada_jax import command_line
from llada_jax.errors import InputError

_TOPOLOGY = flags.DEFINE_string("topology", None, "Slice to compile for: v4 | v5e | v5p | v6e | tpu7x, e.g. v5p:2x2x1.")
_DEVICE = flags.DEFINE_enum("device", None, ["tpu"], "Time the kernel on this device instead of compiling for another.")
_HEAD_DIMS = flags.DEFINE_list("head_dims", ["64", "128"], "Head sizes to fill in.")
_SHAPES = flags.DEFINE_list("shapes", ["row", "decode"], "row: training and prefill; decode: a block against a cache.")
_ROWS = flags.DEFINE_list("rows", ["512"], "Rows of a query tile (heads of a group x positions) to try.")
_CHUNKS = flags.DEFINE_list("chunks", ["128"], "Keys of a chunk to try.")
_STEPS = flags.DEFINE_list("steps", ["1", "2", "4", "8"], "Chunks a step to try.")
_CHECK = flags.DEFINE_bool("check", False, "Write nothing; fail where the table holds another choice.")
_TABLE = flags.DEFINE_string("table", None, "Another table than the package's.")


def main(argv) -> None:
    if (_TOPOLOGY.value is None) == (_DEVICE.value is None):
        raise InputError("expected --topology=CHIP:SIDES or --device=tpu, one of them")
    numbers = {name: _numbers(name, flag.value) for name, flag in _LISTS.items()}
    import jax  # importing jax takes seconds: not before the flags are right

    from llada_jax.attention import tiles
    from llada_jax.chips import parse_topology

    for shape in _SHAPES.value:
        if shape not in tiles.SHAPES:
            raise InputError(f"--shapes={shape}, expected some of {', '.join(tiles.SHAPES)}")
    jax.config.update("jax_platforms", _DEVICE.value or "cpu")
    kind = jax.devices()[0].device_kind if _DEVICE.value else parse_topology(_TOPOLOGY.value).chip.device_kind
    path = Path(_TABLE.value) if _TABLE.value else tiles.TABLE
    table = tiles.read_table(path)
    for head_dim in numbers["head_dims"]:
        for shape in _SHAPES.value:
            best = _best(kind, head_dim, shape, numbers)
            _compare(table.get(best.key), best)
            if not _CHECK.value:
                table[best.key] = best
                tiles.write_table(table, path)


_LISTS = {"head_dims": _HEAD_DIMS, "rows": _ROWS, "chunks": _CHUNKS, "steps": _STEPS}


def _numbers(name: str, values: list[str]) -> list[int]:
    if not values or not all(value.isdecimal() and int(value) > 0 for value in values):
        raise InputError(f"--{name}={','.join(values)}, expected positive integers")
    return list(map(int, values))


def _best(kind: str, head_dim: int, shape: str, numbers: dict[str, list[int]]):
    from llada_jax.bench import tune

    def report(line: str) -> None:
        print(line, flush=True)

    report(f"{kind}, head_dim {head_dim}, {shape}:")
    entries = list(tune.candidates(kind, head_dim, shape, numbers["rows"], numbers["chunks"], numbers["steps"]))
    if _DEVICE.value:
        price, unit = tune.timed(head_dim), "seconds"
    else:
        price, unit = tune.estimated(_TOPOLOGY.value, head_dim), "cycles"
    ranked = tune.ranking(entries, price, unit, report)
    if not ranked:
        raise InputError(f"{kind}, head_dim {head_dim}, {shape}: no candidate compiles")
    for place, entry in enumerate(ranked[:8], 1):
        steps = f"rows {entry.rows}, chunk {entry.chunk} x {entry.forward} forward, x {entry.backward} backward"
        report(f"{place}. {steps}: {tune.total(entry):.4g} {unit}")
    return ranked[0]


def _compare(old, new) -> None:
    choices = [
        None if entry is None else (entry.rows, entry.chunk, entry.forward, entry.backward) for entry in (old, new)
    ]
    if choices[0] == choices[1]:
        print("as in the table")
    elif _CHECK.value:
        raise InputError(
            f"{new.key}: the table holds (rows, chunk, forward, backward) {choices[0]}, found {choices[1]}"
        )


if __name__ == "__main__":
    command_line.run(main)
