"""The meshes worth trying for decoding on a slice, and the table of what they cost.

    tensor     every chip has all rows, and its part of each head's and expert's width: two sums per layer over all
    expert     every chip has its own rows and whole experts; tokens are gathered and their sums scattered back
    both       groups of chips share the experts out, and split widths within the group

A dense model has rows instead of experts to share out: axis "data", with weights copied.
"""

from collections.abc import Iterable, Mapping

from llada_jax.model.config import ModelConfig
from llada_jax.pod.step_cost import PARTS

_AXES = ("data", "fsdp", "expert", "context", "tensor")
_GIB = 2**30


def candidates(model: ModelConfig, devices: int, rows: int) -> list[dict[str, object]]:
    """{field of the config: value} of each mesh over `devices` devices that splits the model and the rows evenly."""
    found = []
    for tensor in (n for n in range(devices, 0, -1) if devices % n == 0):
        shared = devices // tensor
        widths = (model.num_heads, model.moe_intermediate_size if model.is_moe else model.intermediate_size)
        if rows % shared or any(width % tensor for width in widths):
            continue
        if model.is_moe and model.num_experts % shared:
            continue
        mesh = dict.fromkeys(_AXES, 1) | {"tensor": tensor, "expert" if model.is_moe else "data": shared}
        fields = {f"mesh.{axis}": size for axis, size in mesh.items()}
        if model.is_moe and shared > 1:
            fields["execution.expert_parallel"] = "gather_tokens"
        found.append(fields)
    return found


def name_of(fields: Mapping[str, object]) -> str:
    """Its axes that are split, e.g. "expert 2, tensor 2"."""
    split = (f"{axis} {fields[f'mesh.{axis}']}" for axis in _AXES if fields[f"mesh.{axis}"] > 1)
    return ", ".join(split) or "one device"


def arguments(fields: Mapping[str, object]) -> list[str]:
    """Of the command line."""
    return [f"--config.{field}={value}" for field, value in fields.items()]


def table(results: Iterable[tuple[Mapping[str, object], Mapping]], rows: int) -> str:
    """results: (fields, the JSON of its rehearsal) of each mesh; the fastest comes first. At least one must fit."""
    fitting = [(fields, values) for fields, values in results if values["fits"]]
    heads = "".join(f"{part:>12}" for part in PARTS)
    lines = [f"{'mesh':24} {'ms a pass':>9} {'x roofline':>10} {'GiB a chip':>10} {heads}"]
    ranked = sorted(fitting, key=lambda pair: sum(pair[1]["seconds"].values()))
    for fields, values in ranked:
        seconds, memory = sum(values["seconds"].values()), values["hbm_bytes"] / _GIB
        numbers = f"{seconds * 1e3:9.2f} {seconds / values['roofline_seconds']:10.2f} {memory:10.2f} "
        parts = "".join(f"{values['seconds'][part] * 1e3:12.2f}" for part in PARTS)
        lines.append(f"{name_of(fields):24} {numbers}{parts}")
    lines.append(f"fastest for {rows} rows: {' '.join(arguments(ranked[0][0]))}")
    return "\n".join(lines)
