"""Typed values of a config.json. Every function raises InputError naming the field."""

import math

from llada_jax.errors import InputError


def unsupported(field: str, value) -> InputError:
    return InputError(f"config.json: {field}={value!r} is not supported")


def integer(values: dict, name: str, default=None) -> int:
    value = _present(values, name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"config.json: {name}={value!r}, expected an integer")
    if abs(value) >= 2**31:
        raise InputError(f"config.json: {name} has {len(str(abs(value)))} digits, expected an integer below 2^31")
    return value


def number(values: dict, name: str, default=None) -> float:
    value = _present(values, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"config.json: {name}={value!r}, expected a number")
    return float(value)


def boolean(values: dict, name: str, default=None) -> bool:
    value = _present(values, name, default)
    if not isinstance(value, bool):
        raise InputError(f"config.json: {name}={value!r}, expected true or false")
    return value


def _present(values: dict, name: str, default):
    value = values.get(name, default)
    if value is None:
        raise InputError(f"config.json: {name} is missing")
    return value
