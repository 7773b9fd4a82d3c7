"""Formats results: means with standard errors as text, and JSON values for infinite and undefined numbers."""

import math

import numpy as np


def with_error(value: float | None, stderr: float | None, form: str = ".4f", error_form: str | None = None) -> str:
    """ "1.2500 ± 0.0100"; n/a for None, which a single row, question or pair does not determine."""
    error = "n/a" if stderr is None else format(stderr, error_form or form)
    return f"{'n/a' if value is None else format(value, form)} ± {error}"


def mean_error(values: np.ndarray) -> tuple[float, float | None]:
    """Returns (mean of values [n], n >= 1; its standard error, None if n is 1)."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error


def json_value(value):
    """The value with "inf", "-inf" and None in place of numbers that JSON cannot represent."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {key: json_value(entry) for key, entry in value.items()}
    return [json_value(entry) for entry in value] if isinstance(value, list | tuple) else value
