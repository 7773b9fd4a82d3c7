"""Fields of the training config that had another name, or another value for "off": the old form is still read.

One table serves all readers: flags (config_flag.py), config files (config_fields.py), and the files of older runs
(config.json, scores of a reference). A value is never reinterpreted: an old one has one new one of the same meaning.
"""

import functools
import sys
from typing import NamedTuple


class Rename(NamedTuple):
    """old, new: "section.field"; values: (old value, new value) of those that are written otherwise now."""

    old: str
    new: str
    values: tuple[tuple[object, object], ...] = ()


def _none_for_zero(field: str) -> Rename:
    return Rename(field, field, ((0, None),))


RENAMES = (
    Rename(
        "execution.exchange", "execution.expert_parallel", (("weights", "gather_weights"), ("tokens", "gather_tokens"))
    ),
    Rename("objective.spread_times", "objective.spread"),
    _none_for_zero("yarn_factor"),
    _none_for_zero("optimizer.learning_rate"),
    _none_for_zero("checkpoint.every_minutes"),
    _none_for_zero("checkpoint.keep_last"),
    _none_for_zero("checkpoint.keep_every"),
    _none_for_zero("checkpoint.best_block_size"),
    _none_for_zero("faults.spike_factor"),
    _none_for_zero("faults.hang_minutes"),
)
_BY_FIELD = {rename.old: rename for rename in RENAMES}
_BY_NAME = {rename.old.rpartition(".")[2]: rename for rename in RENAMES}  # names that are unique over all sections


def renamed_key(key: str) -> str | None:
    """The name that the field `key` of a section has now, or None when it is not an old name."""
    rename = _BY_NAME.get(key)
    new = rename.new.rpartition(".")[2] if rename else key
    return new if new != key else None


def renamed_field(field: str) -> str:
    """ "section.field" by the name it has now."""
    return _BY_FIELD[field].new if field in _BY_FIELD else field


def current_value(key: str, value):
    """The value that `value` of a field is written as now. key: the field's old or only name, "section.field" or
    "field".
    """
    rename = _BY_NAME.get(key.rpartition(".")[2])
    for old, new in rename.values if rename else ():
        if type(value) is not bool and value == old:
            return new
    return value


def previous_value(key: str, value):
    """The inverse of `current_value`, for a config file that reads a field by its old name."""
    return next((old for old, new in _BY_NAME[key].values if new == value), value)


def current(flat: dict) -> tuple[dict, dict]:
    """`flat`, {"section.field": value}, as it would be written now; and what of it was written otherwise."""
    changed = {}
    for field, value in flat.items():
        name, new = renamed_field(field), current_value(field, value) if field in _BY_FIELD else value
        if name != field or new is not value:
            changed[name] = new
    return {field: value for field, value in flat.items() if renamed_field(field) == field} | changed, changed


@functools.cache
def announce(line: str) -> None:
    """Prints the line to stderr, once per process: a config file may be read more than once."""
    print(line, file=sys.stderr, flush=True)
