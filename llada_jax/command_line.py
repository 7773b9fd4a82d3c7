"""The frame that every command runs in: absl flags, --help, one line for what the user can mend, the exit code.

A tool of several commands has a `Command` for each, with a help of its own. Either the first argument names the command
(tools/bench.py attention), or a flag does (tools/evaluate.py --task=nelbo).
"""

import copy
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from absl import flags

from llada_jax.errors import InputError, report

_HELP = ("-h", "-help", "--help", "--helpfull")


class Command(NamedTuple):
    """One command of several. text: what --help says, the first line a summary. flags: names of those that it takes."""

    text: str
    flags: Sequence[str]


def run(
    main: Callable[[Sequence[str]], int | None],
    commands: Mapping[str, Command] | Sequence[str] = (),
    more: bool = False,
    common: Sequence[str] = (),
    by: str | None = None,
) -> None:
    """Parses absl flags, calls `main(argv)` and exits: 0 (or main's int), 2 on bad input, 130 on Ctrl-C.

    With `commands`, the first argument is one of them, argv[1] of main. more: others may follow. by: a flag whose
    value, up to its first colon, is the command instead. Given a mapping, each command takes its own flags and the
    `common` ones, and refuses others.
    """
    sys.exit(_run(main, commands, more, common, by))


def _run(main, commands, more, common, by) -> int:
    try:
        tool = Tool(commands, common, by) if isinstance(commands, Mapping) else None
        flags.FLAGS.set_gnu_getopt(True)
        if any(arg in _HELP for arg in sys.argv[1:]):
            print(_help(sys.argv, tool))
            return 0
        argv = _parse_flags(sys.argv, () if by else commands, more)
        if tool is not None:
            tool.check(argv)
        return main(argv) or 0
    except (InputError, KeyboardInterrupt) as error:
        return report(error)


def fix_string_hashes() -> None:
    """Starts this program again with PYTHONHASHSEED=0, unless the variable is set.

    Some of reasoning-gym's tasks (0.1.25: isomorphic_strings, polynomial_multiplication, ransom_note) go through sets
    of strings, whose order Python draws anew in every process: their questions would not be a function of the seed.
    """
    if "PYTHONHASHSEED" not in os.environ:
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Tool(NamedTuple):
    """The commands of a tool: see `run`."""

    commands: Mapping[str, Command]
    common: Sequence[str]
    by: str | None

    def named(self, argv: Sequence[str]) -> str | None:
        """The command that arguments name which are not parsed yet: --help stands among them."""
        words = list(argv[1:])
        if self.by:
            flag = rf"--?{self.by}"
            after = [value for word, value in zip(words, words[1:], strict=False) if re.fullmatch(flag, word)]
            words = [found.group(1) for word in words if (found := re.fullmatch(f"{flag}=(.*)", word))] + after
        return next((word for word in (word.partition(":")[0] for word in words) if word in self.commands), None)

    def check(self, argv: Sequence[str]) -> None:
        """Raises InputError on a parsed flag that belongs to other commands than the one that is run."""
        name = flags.FLAGS[self.by].value.partition(":")[0] if self.by else argv[1]
        if name not in self.commands:
            return  # main says what there is
        for flag in {flag for command in self.commands.values() for flag in command.flags}:
            if flags.FLAGS[flag].present and flag not in (*self.commands[name].flags, *self.common):
                owners = ", ".join(other for other, command in self.commands.items() if flag in command.flags)
                raise InputError(f"{flags.FLAGS[flag].serialize()} is for {owners}, not for {name}; see --help")


def _help(argv: Sequence[str], tool: Tool | None) -> str:
    script = sys.modules["__main__"]
    if tool is None:
        return f"{(script.__doc__ or '').strip()}\n\nFlags:\n{_all_flags(script)}"
    if name := tool.named(argv):
        command = tool.commands[name]
        return f"{command.text.strip()}\n\nFlags:\n{_flags_help([*command.flags, *tool.common])}"
    width = max(map(len, tool.commands))
    lines = [f"  {name:{width}}  {command.text.strip().splitlines()[0]}" for name, command in tool.commands.items()]
    one = f"--{tool.by}=NAME" if tool.by else "NAME"
    own = f"{one} --help shows what one of them does, and its flags."
    return "\n".join([script.__doc__.strip(), "", *lines, "", own, "", "Flags of all:", _flags_help(tool.common)])


def _all_flags(script) -> str:
    path = getattr(script, "__file__", None) or sys.argv[0]
    return flags.FLAGS.module_help(path) or flags.FLAGS.main_module_help()


def _flags_help(names: Sequence[str]) -> str:
    some = flags.FlagValues()
    for name in names:
        some[name] = flags.FLAGS[name]
    return some.get_help(include_special_flags=False)


def _parse_flags(argv: Sequence[str], commands: Sequence[str], more: bool) -> Sequence[str]:
    """Returns the positional arguments. Raises InputError on a bad flag or argument."""
    _check_other_flags(argv)
    if "config" in flags.FLAGS:
        from llada_jax import config_flag  # ml_collections, which only these commands need

        sys.argv = argv = config_flag.checked(argv)  # ml_collections looks up there which fields are set
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(_first_line(error)) from error
    if commands and (len(rest) == 1 or rest[1] not in commands):
        raise InputError(f"expected a command, one of {', '.join(commands)}; --help lists the flags")
    if len(rest) > 1 + bool(commands) and not more:
        raise InputError(f"unexpected argument {rest[1 + bool(commands)]!r}; --help lists the flags")
    return rest


def _check_other_flags(argv: Sequence[str]) -> None:
    """Raises InputError on a bad flag beside --config, before the config file is read: most import jax."""
    if "config" not in flags.FLAGS:
        return
    from llada_jax import config_flag

    others = flags.FlagValues()
    others.set_gnu_getopt(True)
    for name in flags.FLAGS:
        if name not in (config_flag.NAME, flags.FLAGS[name].short_name):
            others[name] = copy.deepcopy(flags.FLAGS[name])
    try:
        others(config_flag.other_arguments(argv))
    except (flags.Error, ValueError) as error:
        raise InputError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{missing.group(1)} is required; --help lists the flags"
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
