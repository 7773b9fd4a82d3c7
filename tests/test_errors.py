"""Ranges of numbers, which NaN is in none of."""

import math
from fractions import Fraction

import numpy as np
import pytest

from llada_jax.errors import InputError, check_range
from llada_jax.evaluation.likelihood import Draws
from llada_jax.model.config import RopeScaling, preset
from llada_jax.model.lora import Lora
from llada_jax.sampling.generate import GenerateConfig


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.3), np.int64(1), Fraction(1, 3)])
def test_numbers_in_the_range_pass(value):
    check_range("x", value, at_least=0, at_most=1)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -1e-9, 1.0, "0.5", None, True, (), np.float32("nan"), 10**400]
)
def test_all_else_is_refused_by_name_and_value(value):
    with pytest.raises(InputError) as caught:
        check_range("x", value, at_least=0, below=1)
    assert str(caught.value) == f"x={value!r}, expected at least 0 and below 1"


def test_a_truth_value_is_no_number():
    with pytest.raises(InputError, match="x=True, expected at least 0 and at most 1"):
        check_range("x", True, at_least=0, at_most=1)


def test_infinity_where_it_is_allowed_and_any_finite_number():
    check_range("x", math.inf, above=0, infinite=True)
    with pytest.raises(InputError, match="x=nan, expected more than 0"):
        check_range("x", math.nan, above=0, infinite=True)
    with pytest.raises(InputError, match="x=inf, expected a finite number"):
        check_range("x", math.inf)


FLOATS = ["temperature", "top_p", "top_k", "threshold", "editing_threshold", "entropy_bound", "max_post_steps"]
MODEL = ["rope_theta", "routed_scaling_factor", "initializer_range", "rms_norm_eps"]


@pytest.mark.parametrize(
    "make,field",
    [(lambda name, x: GenerateConfig(4, **{name: x}), field) for field in FLOATS]
    + [(lambda name, x: preset("tiny_moe").replace(**{name: x}), field) for field in MODEL]
    + [(lambda name, x: RopeScaling("llama3", **{"factor": 2.0, "original_length": 64, name: x}), field)
       for field in ("factor", "original_length", "low_freq_factor", "high_freq_factor")]
    + [(lambda name, x: preset("tiny").extended(x), "rope_scaling.factor")]
    + [(lambda name, x: Lora(preset("tiny"), **{"rank": 2, "alpha": 1.0, "targets": (), name: x}), field)
       for field in ("rank", "alpha")]
    + [(lambda name, x: Draws(**{name: x}), field) for field in ("samples", "repeats")],
)  # fmt: skip
def test_nan_is_refused_everywhere(make, field):
    with pytest.raises(InputError, match=f"{field}=nan"):
        make(field, math.nan)


def test_never_and_always_are_legal_ways_to_decode():
    config = GenerateConfig(4, threshold=math.inf, editing_threshold=math.inf, entropy_bound=math.inf)
    assert config.threshold == math.inf
    with pytest.raises(InputError, match="temperature=inf, expected at least 0"):
        GenerateConfig(4, temperature=math.inf)
