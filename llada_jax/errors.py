"""Errors that a user can mend: a command prints one line and exits with code 2. A traceback is a defect of ours."""

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


def report(error: BaseException) -> int | None:
    """Prints what a user can mend, or meant, and returns the exit code for it; None for any other error."""
    if isinstance(error, InputError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    return None
