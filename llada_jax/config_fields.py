"""A config as dataclasses: each field has its type, default, meaning and range in one place.

    @dataclasses.dataclass(frozen=True)
    class BatchConfig:
        rows: int = field(8, "Rows per step.", above=0)

    @dataclasses.dataclass(frozen=True)
    class Config:
        batch: BatchConfig = section(BatchConfig)

`config_dict` makes the ConfigDict that flags and config files change, `check` compares one with the dataclass,
`from_config_dict` turns it back into a frozen object, and `tables` documents it.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict, FieldReference

from llada_jax import config_renames
from llada_jax.config_flag import EXPECTED, optional_fields
from llada_jax.errors import InputError, check_range

_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text"}


class Rule(NamedTuple):
    """What a field means and may be. bits: integers are below 2^bits, as int32 in the compiled step."""

    meaning: str
    choices: tuple[str, ...] = ()
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    infinite: bool = False
    bits: int = 31

    def __str__(self) -> str:
        """The range or the choices, in words."""
        if self.choices:
            return quoted(self.choices)
        bounds = (("more than", self.above), ("at least", self.at_least), ("below", self.below))
        return ", ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)


class Kind(NamedTuple):
    """A field's type: int, float, bool or str; of the entries when it is a tuple; optional: may be None."""

    type: type
    is_tuple: bool = False
    optional: bool = False

    def __str__(self) -> str:
        name = _NAMES[self.type]
        return f"tuple of {name}s" if self.is_tuple else f"{name} or None" if self.optional else name


class Field(NamedTuple):
    name: str  # "section.field"
    kind: Kind
    rule: Rule
    default: object


def field(default, meaning: str, **limits):
    """A dataclass field with its meaning, and the limits of `Rule`."""
    return dataclasses.field(default=default, metadata={"rule": Rule(meaning, **limits)})


def section(cls: type):
    """A dataclass field that is a section of its own."""
    return dataclasses.field(default_factory=cls)


def fields_of(cls: type, prefix: str = "") -> Iterator[Field]:
    """All fields of a config dataclass, those of its sections included."""
    hints = typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        name, hint = f"{prefix}{each.name}", hints[each.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(hint, f"{name}.")
        else:
            yield Field(name, _kind(hint), each.metadata["rule"], each.default)


def _kind(hint) -> Kind:
    if isinstance(hint, types.UnionType):
        return Kind(next(each for each in typing.get_args(hint) if each is not type(None)), optional=True)
    if typing.get_origin(hint) is tuple:
        return Kind(typing.get_args(hint)[0], is_tuple=True)
    return Kind(hint)


class Section(ConfigDict):
    """A ConfigDict that reads and sets its fields by the names they had before, too (config_renames.py)."""

    def __setitem__(self, key, value):
        new, current = config_renames.renamed_key(key), config_renames.current_value(key, value)
        if new in self.keys():
            config_renames.announce(f"config: {key}={value!r} is now {new}={current!r}")
            key, value = new, current
        elif current is not value and key in self.keys():
            config_renames.announce(f"config: {key}={value!r} is now {key}={current!r}")
            value = current
        super().__setitem__(key, value)

    def __getitem__(self, key):
        new = config_renames.renamed_key(key)
        if new in self.keys() and key not in self.keys():
            return config_renames.previous_value(key, super().__getitem__(new))
        return super().__getitem__(key)

    def get_type(self, key):
        """As ml_collections asks it how to read a flag: one of a field that may be None is read as a literal."""
        return object if key in optional_fields(self) else super().get_type(key)


def config_dict(values) -> Section:
    """The ConfigDict of a dataclass: its fields by name, with their types."""
    config, hints = Section(), typing.get_type_hints(type(values))
    for each in dataclasses.fields(values):
        value, hint = getattr(values, each.name), hints[each.name]
        if dataclasses.is_dataclass(hint):
            value = config_dict(value)
        elif (kind := _kind(hint)).optional:
            value = FieldReference(value, field_type=kind.type)
        config[each.name] = value
    return config


def from_config_dict(cls: type, config: ConfigDict):
    """The frozen dataclass with the values of a checked config."""
    values, hints = {}, typing.get_type_hints(cls)
    for each in dataclasses.fields(cls):
        value, hint = config[each.name], hints[each.name]
        if dataclasses.is_dataclass(hint):
            value = from_config_dict(hint, value)
        elif value is not None:
            kind = _kind(hint)
            value = tuple(value) if kind.is_tuple else kind.type(value)
        values[each.name] = value
    return cls(**values)


def check(config: ConfigDict, cls: type) -> None:
    """Raises InputError naming the first field that `cls` does not have or has with another type, whose number is not
    finite or does not fit 32 bits, or that is out of its range. The types of a tuple's entries count as well.
    """
    values, known = dict(flat(config)), {each.name: each for each in fields_of(cls)}
    if odd := sorted(set(values) ^ set(known)):
        raise InputError(f"config.{odd[0]}: {'no such field' if odd[0] in values else 'is missing'}")
    for name, value in values.items():
        _check_type(known[name], value)
    for each in known.values():
        check_limits(each, values[each.name])


def flat(config: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("section.field", value) of all fields."""
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_limits(of: Field, value) -> None:
    """Raises InputError when a value of the right type is out of the field's range, or none of its choices."""
    rule = of.rule
    if rule.choices and value not in rule.choices:
        raise InputError(f"config.{of.name}={value!r}, expected {quoted(rule.choices)}")
    if value is None or (rule.above is None and rule.at_least is None and rule.below is None):
        return
    # _check_type has said where a number may be infinite.
    limits = {"above": rule.above, "at_least": rule.at_least, "below": rule.below}
    try:
        check_range(f"config.{of.name}", value, **limits, infinite=True)
    except InputError as error:
        raise InputError(f"{error}, or None") if of.kind.optional else error from None


def quoted(choices: tuple[str, ...]) -> str:
    """'"a", "b" or "c"'"""
    words = [f'"{choice}"' for choice in choices]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _check_type(of: Field, value) -> None:
    kind = of.kind
    if kind.is_tuple:
        if not isinstance(value, tuple | list):
            raise InputError(f"config.{of.name}={value!r}, expected a tuple")
        for entry in value:
            if type(entry) is not kind.type:
                raise InputError(f"config.{of.name}={tuple(value)!r}: {entry!r}, expected {EXPECTED[kind.type]}")
            _check_number(of, entry)
        return
    if value is None and kind.optional:
        return
    if type(value) is not kind.type and not (kind.type is float and type(value) is int):
        raise InputError(f"config.{of.name}={value!r}, expected {EXPECTED[kind.type]}{' or None' * kind.optional}")
    _check_number(of, value)


def _check_number(of: Field, value) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        if not (value == math.inf and of.rule.infinite):
            raise InputError(f"config.{of.name}={value!r}, expected a finite number")
    if type(value) is int and abs(value) >= 2**of.rule.bits:
        raise InputError(f"config.{of.name}={value!r}, expected less than 2^{of.rule.bits}")


def tables(cls: type) -> str:
    """Markdown: a table of the fields for each section of a config dataclass, under the section's docstring."""
    hints = typing.get_type_hints(cls)
    top = [each for each in fields_of(cls) if "." not in each.name]
    parts = [_table(f"## Top level\n\n{_text(cls)}", top)]
    for each in dataclasses.fields(cls):
        if dataclasses.is_dataclass(part := hints[each.name]):
            parts.append(_table(f"## {each.name}\n\n{_text(part)}", fields_of(part, f"{each.name}.")))
    return "\n".join(parts)


def _text(cls: type) -> str:
    return " ".join(cls.__doc__.split())


def _table(heading: str, fields) -> str:
    lines = [heading, "", "| key | type | default | values | meaning |", "|---|---|---|---|---|"]
    for each in fields:
        default = "required" if each.default is dataclasses.MISSING else f"`{_written(each.default)}`"
        meaning = each.rule.meaning.replace("|", "\\|")
        lines.append(f"| `{each.name}` | {each.kind} | {default} | {each.rule} | {meaning} |")
    return "\n".join(lines) + "\n"


def _written(value) -> str:
    """A default as a flag takes it."""
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
