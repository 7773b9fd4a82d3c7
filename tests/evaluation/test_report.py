"""Means with their errors as text, and results as JSON."""

import json
import math

import numpy as np
import pytest

from llada_jax.evaluation.report import json_value, mean_error, with_error


def test_a_value_with_its_error():
    assert with_error(1.25, 0.01) == "1.2500 ± 0.0100" and with_error(3.0, None, ".1f") == "3.0 ± n/a"
    assert with_error(None, None) == "n/a ± n/a" and with_error(math.inf, 0.5, ".3g", ".1f") == "inf ± 0.5"


def test_the_error_of_a_mean():
    mean, error = mean_error(np.array([1.0, 2.0, 4.0]))
    assert mean == pytest.approx(7 / 3) and error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert mean_error(np.array([2.0])) == (2.0, None)


def test_json_says_what_it_has_no_number_for():
    value = {"a": math.inf, "b": [math.nan, -math.inf, 1.5], "c": {"d": (None, "inf", 2)}}
    assert json.dumps(json_value(value), allow_nan=False) == (
        '{"a": "inf", "b": [null, "-inf", 1.5], "c": {"d": [null, "inf", 2]}}'
    )
