"""The --config flag of ml_collections, as a value, and its overrides --config.FIELD=VALUE, read before absl reads them.

ml_collections tells an unknown field by a bare KeyError, makes a tuple of whatever a tuple field is given, and shows
what a config file raises as a traceback. So the overrides are read here first, by the types of the config's own fields.
"""

import ast
import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from llada_jax.errors import InputError

NAME = "config"
_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: 'text ("" is none)'}  # by type
_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def resolved(flag) -> ConfigDict:
    """The config of a parsed DEFINE_config_file flag. Raises InputError when the file cannot be read."""
    try:
        flag.value.lock()  # a file that could not be read shows at the first use
        return flag.value
    except OSError as error:
        raise InputError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from error


def load(arguments: Sequence[str]) -> ConfigDict:
    """The config that --config=FILE.py[:ARGUMENT] and --config.FIELD=VALUE make. Raises InputError naming the flag."""
    arguments = ["load", *arguments]
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file(NAME, flag_values=values, sys_argv=arguments)
    try:
        values(checked(arguments), known_only=True)
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from error
    return resolved(flag)


def config_arguments(argv: Sequence[str]) -> list[str]:
    """The --config flags of a command line, each as one argument, --config=FILE or --config.FIELD=VALUE."""
    return [text for text in _joined(argv) if re.match(r"--?(no)?config[.=]", text)]


def checked(argv: Sequence[str]) -> list[str]:
    """argv with the values of all --config.FIELD as ml_collections understands them.

    Raises InputError naming the flag: a file that cannot be read or fails, a field that there is not (with those that
    there are), a section instead of a field, a value of another type.
    """
    argv = _joined(argv)
    paths = [text.partition("=")[2] for text in argv if re.match("--?config=", text)]
    if "" in paths:
        raise InputError("--config=, expected FILE.py[:ARGUMENT]")
    if not paths:
        return argv
    path = paths[-1]
    config = None
    for at, text in enumerate(argv):
        if not (found := _OVERRIDE.fullmatch(text)):
            continue
        config = _load_file(path) if config is None else config
        negated, field, given = found.groups()
        default = field_of(config, field, f"--config.{field}")
        if given is None and not isinstance(default, bool):
            raise InputError(f"{text}: expected a value, {text}=VALUE")
        value = read_value(given if given is not None else str(not negated), default, f"--config.{field}")
        argv[at] = f"--config.{field}={value}"
    if config is None:
        _load_file(path)
    return argv


def field_of(config: ConfigDict, field: str, where: str):
    """The value of "section.field". Raises InputError that begins with `where` and names the fields there are."""
    node, parts = config, field.split(".")
    for depth, name in enumerate(parts):
        if not isinstance(node, ConfigDict):
            raise InputError(f"{where}: config.{'.'.join(parts[:depth])} is a value, it has no fields")
        if name not in node:
            raise InputError(f"{where}: no such field, config.{field}; {_near(config, node, parts, depth)}")
        node = node[name]
    if isinstance(node, ConfigDict):
        raise InputError(f"{where}: config.{field} is a section; set its fields, {', '.join(sorted(node))}")
    return node


def _near(config: ConfigDict, node: ConfigDict, parts: list[str], depth: int) -> str:
    """Fields like the one that there is not, of its section or of any, and all of its section."""
    section = ".".join([NAME, *parts[:depth]])
    here = {name: f"{section}.{name}" for name in node}
    sections = {part: held for part, held in config.items() if isinstance(held, ConfigDict)}
    anywhere = {name: f"{NAME}.{part}.{name}" for part, held in sections.items() for name in held}
    for known in (here, anywhere):
        if close := [known[name] for name in difflib.get_close_matches(parts[depth], known, n=2)]:
            break
    there = f"{section} has {', '.join(sorted(node))}"
    return f"did you mean {' or '.join(close)}? {there}" if close else there


def read_value(text: str, default, where: str):
    """`text` as a value of the type of `default`. Raises InputError that begins with `where`.

    A tuple may be written (1,4), [1,4], 1,4 or, of one entry, 1.
    """
    if isinstance(default, tuple):
        kind = type(default[0]) if default else str
        return tuple(_checked_entry(entry, kind, f"{where}={text}") for entry in _entries(text, kind, where))
    kind = type(default)
    if kind not in EXPECTED:
        raise InputError(f"{where}: the config file sets {default!r} there, expected {', '.join(EXPECTED.values())}")
    try:
        if kind is bool:
            return _BOOLS[text.lower()]
        if kind is not str or text != "None":
            value = kind(text)
            if value == value:  # no NaN
                return value
    except (KeyError, ValueError):
        pass
    raise InputError(f"{where}={text}, expected {EXPECTED[kind]}")


def _checked_entry(value, kind: type, where: str):
    if type(value) is not kind:
        raise InputError(f"{where}: {value!r}, expected {EXPECTED[kind]}")
    return value


def _entries(text: str, kind: type, where: str) -> list:
    """What a tuple's text holds: the entries of a literal, else the words between its commas."""
    try:
        value = ast.literal_eval(text)
        return list(value) if isinstance(value, tuple | list) else [value]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        words = text.strip()
        if words[:1] + words[-1:] in ("()", "[]"):
            words = words[1:-1]
        entries = [word.strip().strip("'\"") for word in words.strip(", ").split(",")]
        if not all(entries) or set(words) & set("()[]"):
            raise InputError(f"{where}={text}, expected values with commas between them, or () for none") from error
        return [int(word) if kind is int and re.fullmatch(r"-?\d+", word) else word for word in entries]


def _joined(argv: Sequence[str]) -> list[str]:
    """argv after --flagfile, with "--config.FIELD VALUE" as one argument. What follows -- stays."""
    argv, joined = list(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)), []
    while argv:
        text = argv.pop(0)
        if text == "--":
            return [*joined, text, *argv]
        apart = re.fullmatch(r"--?config(\.[^=]*)?", text) and argv and not argv[0].startswith("--")
        joined.append(f"{text}={argv.pop(0)}" if apart else text)
    return joined


def _load_file(path: str) -> ConfigDict:
    """get_config of FILE.py[:ARGUMENT]. Raises InputError in one line, whatever the file raises."""
    file, *argument = path.split(":", 1)
    try:
        with open(file, encoding="utf-8") as stream:
            compile(stream.read(), file, "exec")
        spec = importlib.util.spec_from_file_location("config_file", file)
        if spec is None:
            raise InputError(f"--config={path}: expected FILE.py[:ARGUMENT]")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(*argument)
    except InputError as error:
        raise InputError(f"--config={path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config={path}: {getattr(error, 'strerror', None) or 'not a Python file'}") from error
    except SyntaxError as error:
        raise InputError(f"--config={path}: {error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # the file is the user's, and may raise anything
        line = [at.lineno for at in traceback.extract_tb(sys.exc_info()[2]) if at.filename == file]
        place = f"{file}:{line[-1]}: " if line else ""
        words = str(error).strip().splitlines() or [""]
        raise InputError(f"--config={path}: {place}{type(error).__name__}: {words[0]}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config={path}: get_config gives a {type(config).__name__}, expected a ConfigDict")
    return config
