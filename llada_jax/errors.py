"""Errors that a user can mend, and the frame every command runs in.

A command prints such an error as one line and exits with code 2; a traceback means a defect of ours.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence

from absl import flags


class InputError(ValueError):
    """The user's input is wrong. The message is one line that names the file, field or value."""


def check_range(
    name: str, value, *, at_least=None, above=None, at_most=None, below=None, infinite: bool = False
) -> None:
    """Raises InputError, naming it, unless `value` is a number in the range: NaN is in none, and infinity only where it
    is allowed.
    """
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    bounds = {
        f"at least {at_least}": at_least is None or number >= at_least,
        f"more than {above}": above is None or number > above,
        f"at most {at_most}": at_most is None or number <= at_most,
        f"below {below}": below is None or number < below,
    }
    if not all(bounds.values()) or not (math.isfinite(number) or (infinite and not math.isnan(number))):
        wanted = " and ".join(text for text in bounds if not text.endswith(" None"))
        raise InputError(f"{name}={value!r}, expected {wanted or 'a finite number'}")


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


def report(error: BaseException) -> int | None:
    """Prints what a user can mend, or meant, and returns the exit code for it; None for any other error."""
    if isinstance(error, InputError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return None


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
