"""What a value of the training config may be: the type of its default, and a range."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from llada_jax.config_flag import EXPECTED
from llada_jax.errors import InputError, check_range

POSITIVE = (
    "data.length", "data.held_out_rows", "batch.rows", "batch.micro_batches",
    "optimizer.clip_norm", "optimizer.eps", "lora.alpha", "checkpoint.every_steps", "faults.spike_window",
    "evaluation.every_steps", "evaluation.rows", "evaluation.samples", "evaluation.preference_draws", "log_every_steps",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "yarn_factor", "optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.decay_steps",
    "optimizer.weight_decay", "optimizer.end_fraction", "optimizer.expert_bias_rate",
    "objective.embedding_noise_std", "objective.embedding_noise_steps",
    "lora.rank", "checkpoint.keep_last", "checkpoint.keep_best", "checkpoint.keep_every", "checkpoint.every_minutes",
    "checkpoint.retries", "checkpoint.retry_seconds",
    "faults.spike_factor", "faults.max_skips", "faults.max_rewinds", "faults.hang_minutes",
)  # fmt: skip
SHARES = ("optimizer.b1", "optimizer.b2", "data.corrupt_share")
_MAY_BE_INFINITE = ("optimizer.clip_norm",)  # no clipping
_MORE_BITS = {"seed": 32}  # of an integer that is not negative; others are int32 in the compiled step


def check(config: ConfigDict, default: ConfigDict) -> None:
    """Raises InputError naming the first field that `default` does not have or has with another type, whose number is
    not finite or does not fit 32 bits, or that is out of its range. The types of a tuple's entries count as well.
    """
    values, known = dict(_flat(config)), dict(_flat(default))
    if odd := sorted(set(values) ^ set(known)):
        raise InputError(f"config.{odd[0]}: {'no such field' if odd[0] in values else 'is missing'}")
    for field, value in values.items():
        _check_type(field, value, known[field])
    # _check_type has said where a number may be infinite.
    for field in POSITIVE:
        check_range(f"config.{field}", values[field], above=0, infinite=True)
    for field in NOT_NEGATIVE:
        check_range(f"config.{field}", values[field], at_least=0, infinite=True)
    for field in SHARES:
        check_range(f"config.{field}", values[field], at_least=0, below=1)


def _flat(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("section.field", value) of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_type(field: str, value, default) -> None:
    if isinstance(default, tuple):
        kind = type(default[0]) if default else str
        if not isinstance(value, tuple | list):
            raise InputError(f"config.{field}={value!r}, expected a tuple")
        for entry in value:
            if type(entry) is not kind:
                raise InputError(f"config.{field}={tuple(value)!r}: {entry!r}, expected {EXPECTED[kind]}")
            _check_number(field, entry)
        return
    kind = type(default)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise InputError(f"config.{field}={value!r}, expected {EXPECTED[kind]}")
    _check_number(field, value)


def _check_number(field: str, value) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        if not (value == math.inf and field in _MAY_BE_INFINITE):
            raise InputError(f"config.{field}={value!r}, expected a finite number")
    bits = _MORE_BITS.get(field, 31)
    if type(value) is int and abs(value) >= 2**bits:
        raise InputError(f"config.{field}={value!r}, expected less than 2^{bits}")
