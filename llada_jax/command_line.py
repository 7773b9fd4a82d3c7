"""The frame that every command runs in: absl flags, --help, one line for what the user can mend, the exit code."""

import re
import sys
from collections.abc import Callable, Sequence

from absl import flags

from llada_jax.errors import InputError, report


def run(main: Callable[[Sequence[str]], int | None], commands: Sequence[str] = (), more: bool = False) -> None:
    """Parses absl flags, calls `main(argv)` and exits: 0 (or main's int), 2 on bad input, 130 on Ctrl-C.

    With `commands`, the first argument is one of them, argv[1] of main. more: others may follow.
    """
    sys.exit(_run(main, commands, more))


def _run(main: Callable[[Sequence[str]], int | None], commands: Sequence[str], more: bool) -> int:
    try:
        argv = _parse_flags(sys.argv, commands, more)
        if argv is None:
            return 0
        return main(argv) or 0
    except (InputError, KeyboardInterrupt) as error:
        return report(error)


def _parse_flags(argv: Sequence[str], commands: Sequence[str], more: bool) -> Sequence[str] | None:
    """Returns the positional arguments, or None once --help has been answered. Raises InputError on a bad flag."""
    flags.FLAGS.set_gnu_getopt(True)
    if any(arg in ("-h", "-help", "--help", "--helpfull") for arg in argv[1:]):
        main_module = sys.modules["__main__"]
        print((main_module.__doc__ or "").strip() + "\n")
        print(_flags_help(main_module))
        return None
    if "config" in flags.FLAGS:
        from llada_jax import config_flag  # ml_collections, which only these commands need

        argv = config_flag.checked(argv)
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(_first_line(error)) from error
    if commands and (len(rest) == 1 or rest[1] not in commands):
        raise InputError(f"expected a command, one of {', '.join(commands)}; --help lists the flags")
    if len(rest) > 1 + bool(commands) and not more:
        raise InputError(f"unexpected argument {rest[1 + bool(commands)]!r}; --help lists the flags")
    return rest


def _flags_help(main_module) -> str:
    path = getattr(main_module, "__file__", None) or sys.argv[0]
    return "Flags:\n" + (flags.FLAGS.module_help(path) or flags.FLAGS.main_module_help())


def _first_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{missing.group(1)} is required; --help lists the flags"
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
