"""The rotary embedding in a config.json: rope_theta and rope_scaling, or rope_parameters (transformers 5).

The result is what transformers computes. Any other type, key or value is refused by name, and so are two fields that
contradict each other, since readers differ in which one they take.
"""

import math
from typing import NamedTuple

from llada_jax.errors import InputError
from llada_jax.interop.config_values import integer, number, unsupported
from llada_jax.model.config import ModelConfig, RopeScaling

_FIELDS = ("rope_scaling", "rope_parameters")
# Keys of every type; an original length without a factor says nothing.
_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor")
_KEYS_OF = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", *_LLAMA3_KEYS},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"},
}


class Rope(NamedTuple):
    theta: float
    scaling: RopeScaling | None
    partial: float | None  # the share of a head's channels that is rotated, where it is given


def read(hf: dict, default_theta: float) -> Rope:
    """Raises InputError naming a field or key that contradicts another or that the forward pass does not implement."""
    given = [field for field in _FIELDS if hf.get(field)]
    ropes = [_parsed(hf, field, default_theta) for field in given or ["rope_scaling"]]
    if len(set(ropes)) > 1:
        values = " and ".join(f"{field}={hf[field]!r}" for field in given)
        raise InputError(f"config.json: {values} contradict each other; keep one of them, with its rope_theta")
    return ropes[0]


def _parsed(hf: dict, field: str, default_theta: float) -> Rope:
    given = hf.get(field) or {}
    if not isinstance(given, dict):
        raise unsupported(field, given)
    for key, value in given.items():
        if isinstance(value, dict):  # one rotary embedding for each type of layer
            raise unsupported(f"{field}.{key}", value)
    values = {key: value for key, value in given.items() if value is not None}
    theta = _beside(hf, field, values, "rope_theta", default_theta)
    partial = _beside(hf, field, values, "partial_rotary_factor", 0) or None
    return Rope(theta, _scaling(hf, field, given, values), partial)


def _beside(hf: dict, field: str, values: dict, name: str, default: float) -> float:
    """A number that stands in `field` or beside it."""
    outer = hf.get(name)
    if name not in values:
        return number({name: default if outer is None else outer}, name)
    value = number(values, name)
    if outer is not None and number(hf, name) != value:
        raise InputError(f"config.json: {name}={outer!r} contradicts {field}.{name}={values[name]!r}")
    return value


def _scaling(hf: dict, field: str, given: dict, values: dict) -> RopeScaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    if values.get("type", kind) != kind:
        raise InputError(f"config.json: {field}.type={values['type']!r} contradicts {field}.rope_type={kind!r}")
    if not isinstance(kind, str) or kind not in _KEYS_OF:
        raise unsupported(f"{field}.rope_type", kind)
    for name in sorted(set(values) - _KEYS - _KEYS_OF[kind]):
        raise InputError(f"config.json: {field}.{name}={values[name]!r} is not supported with rope_type {kind!r}")
    if kind == "default":
        return None
    factor = number(values, "factor")
    if kind == "linear":
        return RopeScaling(kind, factor)
    length = _original_length(hf, field, values)
    if kind == "llama3":
        return RopeScaling(kind, factor, length, **{name: number(values, name) for name in _LLAMA3_KEYS})
    _check_yarn(field, given, values, factor)
    return RopeScaling(kind, factor, length)


def _original_length(hf: dict, field: str, values: dict) -> int:
    name = "original_max_position_embeddings"
    length = integer(values, name, hf.get(name) or hf.get("max_position_embeddings"))
    if hf.get(name) not in (None, length):
        raise InputError(f"config.json: {name}={hf[name]!r} contradicts {field}.{name}={length}")
    return length


def _check_yarn(field: str, given: dict, values: dict, factor: float) -> None:
    """Raises InputError if an optional key of YaRN has another value than the forward pass uses."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    expected = {"beta_fast": 32, "beta_slow": 1, "attention_factor": scale(1)}
    for name, default in expected.items():
        value = number(values, name, default)
        if name.startswith("beta") and value == 0:  # transformers: `get(name) or default`
            continue
        if not math.isclose(value, default, rel_tol=1e-6):
            raise unsupported(f"{field}.{name}", values[name])
    if not given.get("truncate", True):  # null too
        raise unsupported(f"{field}.truncate", given["truncate"])
    weights = [number(values, name, 0) for name in ("mscale", "mscale_all_dim")]
    if "attention_factor" not in values and all(weights):  # only the two together change the scale
        if not math.isclose(scale(weights[0]) / scale(weights[1]), scale(1), rel_tol=1e-6):
            raise unsupported(f"{field}.mscale_all_dim", values["mscale_all_dim"])


def to_hf(scaling: RopeScaling | None) -> dict | None:
    """rope_scaling, as every version of transformers reads it."""
    if scaling is None:
        return None
    hf = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        hf["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        hf |= {name: getattr(scaling, name) for name in _LLAMA3_KEYS}
    return hf


def restated(config: ModelConfig, source: dict) -> dict:
    """The rope_parameters of an export, for a `source` config.json that uses that field.

    Only this field is written, since a second one could contradict it.
    """
    partial = source["rope_parameters"].get("partial_rotary_factor")
    values = {"rope_theta": config.rope_theta} | (to_hf(config.rope_scaling) or {"rope_type": "default"})
    return {"rope_parameters": values | ({} if partial is None else {"partial_rotary_factor": partial})}
