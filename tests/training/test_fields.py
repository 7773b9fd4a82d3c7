"""The fields of a training config: their types and ranges, however they were set."""

import numpy as np
import pytest

from llada_jax.errors import InputError
from llada_jax.training.config import check, default_config

BAD = {
    ("batch.rows", None): "config.batch.rows=None, expected an integer",
    ("batch.rows", True): "config.batch.rows=True, expected an integer",
    ("batch.rows", 0): "config.batch.rows=0, expected more than 0",
    ("batch.rows", 2**31): "config.batch.rows=2147483648, expected less than 2^31",
    ("seed", 2**32): "config.seed=4294967296, expected less than 2^32",
    ("seed", -1): "config.seed=-1, expected at least 0",
    ("seed", None): "config.seed=None, expected an integer",
    ("model", None): "config: unknown model None",
    ("model", "huge"): "config: unknown model 'huge'",
    ("data.source", None): "config.data.source=None, expected text",
    ("optimizer.b1", None): "config.optimizer.b1=None, expected a number",
    ("optimizer.learning_rate", "fast"): "config.optimizer.learning_rate='fast', expected a number or None",
    ("optimizer.learning_rate", -1e-3): "config.optimizer.learning_rate=-0.001, expected more than 0, or None",
    ("checkpoint.keep_last", 1.0): "config.checkpoint.keep_last=1.0, expected an integer or None",
    ("checkpoint.keep_last", False): "config.checkpoint.keep_last=False, expected an integer or None",
    ("checkpoint.keep_last", -1): "config.checkpoint.keep_last=-1, expected more than 0, or None",
    ("execution.dtype", "float16"): 'config.execution.dtype=\'float16\', expected "float32" or "bfloat16"',
    ("execution.expert_parallel", "tokens"): "expert_parallel='tokens', expected one of gather_weights, gather_tokens",
    ("alignment", "left"): 'config.alignment=\'left\', expected "same", "shifted" or ""',
    ("schedule.kind", "cosine"): 'config.schedule.kind=\'cosine\', expected "wsd", "constant" or "ar"',
    ("optimizer.learning_rate", float("nan")): "config.optimizer.learning_rate=nan, expected a finite number",
    ("optimizer.learning_rate", float("inf")): "config.optimizer.learning_rate=inf, expected a finite number",
    ("optimizer.clip_norm", float("nan")): "config.optimizer.clip_norm=nan",
    ("optimizer.b2", float("nan")): "config.optimizer.b2=nan",
    ("objective.rate_low", float("nan")): "config.objective.rate_low=nan",
    ("preference.beta", float("nan")): "config.preference.beta=nan",
    ("faults.spike_factor", float("nan")): "config.faults.spike_factor=nan",
    ("yarn_factor", -2.0): "config.yarn_factor=-2.0, expected at least 0",
    ("objective.complementary", None): "config.objective.complementary=None, expected true or false",
    ("evaluation.block_sizes", None): "config.evaluation.block_sizes=None, expected a tuple",
    ("evaluation.block_sizes", (1, "4")): "config.evaluation.block_sizes=(1, '4'): '4', expected an integer",
    ("evaluation.block_sizes", (1, 4.0)): "4.0, expected an integer",
    ("evaluation.block_sizes", (True,)): "True, expected an integer",
    ("evaluation.block_sizes", (1, 2**40)): "expected less than 2^31",
    ("schedule.warmup_steps", (1, None, 1, 1)): "None, expected an integer",
    ("data.patterns", (3,)): "3, expected text",
    ("lora.targets", (None,)): "None, expected text",
}


@pytest.mark.parametrize("field, value", BAD, ids=lambda x: str(x))
def test_a_field_of_another_type_or_out_of_range_is_named(field, value):
    config = default_config("tiny")
    *sections, name = field.split(".")
    node = config
    for section in sections:
        node = node[section]
    with node.ignore_type():
        node[name] = value
    with pytest.raises(InputError) as caught:
        check(config)
    assert BAD[field, value] in str(caught.value)


def test_fields_that_are_too_many_or_too_few():
    config = default_config("tiny")
    with config.unlocked():
        config.optimizer.lr = 1.0
    with pytest.raises(InputError, match="config.optimizer.lr: no such field"):
        check(config)
    config = default_config("tiny")
    with config.unlocked():
        del config.faults.max_skips
    with pytest.raises(InputError, match="config.faults.max_skips: is missing"):
        check(config)


def test_what_is_in_range():
    config = default_config("tiny")
    config.optimizer.clip_norm = float("inf")  # clips nothing
    config.seed = 2**32 - 1
    config.optimizer.learning_rate = 1  # a number
    config.evaluation.block_sizes = [1, 4]
    check(config)
    assert np.random.SeedSequence((config.seed, 1))
