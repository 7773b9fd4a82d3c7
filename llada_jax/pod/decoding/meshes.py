"""The meshes of decoding (sampling/meshes.py) as fields of a config, and the table of what they cost."""

from collections.abc import Iterable, Mapping

from llada_jax.pod.step_cost import PARTS
from llada_jax.sampling import meshes
from llada_jax.sharding import MESH_AXES

_GIB = 2**30


def fields_of(sizes: Mapping[str, int]) -> dict[str, object]:
    """{field of the config: value}"""
    fields = {f"mesh.{axis}": sizes.get(axis, 1) for axis in MESH_AXES}
    if sizes.get("expert", 1) > 1:
        fields["execution.expert_parallel"] = "gather_tokens"
    return fields


def arguments(sizes: Mapping[str, int]) -> list[str]:
    """Of the command line."""
    return [f"--config.{field}={value}" for field, value in fields_of(sizes).items()]


def table(results: Iterable[tuple[Mapping[str, int], Mapping]], rows: int) -> str:
    """results: (sizes, the JSON of its rehearsal) of each mesh; the fastest comes first. At least one must fit."""
    fitting = [(sizes, values) for sizes, values in results if values["fits"]]
    heads = "".join(f"{part:>12}" for part in PARTS)
    lines = [f"{'mesh':24} {'ms a pass':>9} {'x roofline':>10} {'GiB a chip':>10} {heads}"]
    ranked = sorted(fitting, key=lambda pair: sum(pair[1]["seconds"].values()))
    for sizes, values in ranked:
        seconds, memory = sum(values["seconds"].values()), values["hbm_bytes"] / _GIB
        numbers = f"{seconds * 1e3:9.2f} {seconds / values['roofline_seconds']:10.2f} {memory:10.2f} "
        parts = "".join(f"{values['seconds'][part] * 1e3:12.2f}" for part in PARTS)
        lines.append(f"{meshes.name_of(sizes):24} {numbers}{parts}")
    lines.append(f"fastest for {rows} rows: {' '.join(arguments(ranked[0][0]))}")
    return "\n".join(lines)
