"""Errors that a user can fix: a command prints one line and exits with code 2. A traceback is a bug of this package."""

import math
import sys


class InputError(ValueError):
    """The user's input is wrong. The message is one line that names the file, field or value.

    Example:
        >>> import llada_jax
        >>> try:
        ...     llada_jax.preset("huge")
        ... except llada_jax.InputError as error:
        ...     print(error)
        unknown model 'huge'; presets: ...
    """


def check_range(
    name: str, value, *, at_least=None, above=None, at_most=None, below=None, infinite: bool = False
) -> None:
    """Raises InputError naming `name` unless `value` is a number in the range. NaN never is; infinity only with
    `infinite`.
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
        expected = " and ".join(text for text in bounds if not text.endswith(" None"))
        raise InputError(f"{name}={value!r}, expected {expected or 'a finite number'}")


def report(error: BaseException) -> int | None:
    """Prints an InputError or interrupt in one line and returns the exit code; None for any other error."""
    if isinstance(error, InputError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return None
