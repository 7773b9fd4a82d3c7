"""The --config flag of ml_collections, as a value."""

from ml_collections import ConfigDict

from llada_jax.errors import InputError


def resolved(flag) -> ConfigDict:
    """The config of a parsed DEFINE_config_file flag. Raises InputError when the file cannot be read."""
    try:
        flag.value.lock()  # a file that could not be read shows at the first use
        return flag.value
    except OSError as error:
        raise InputError(f"--config: {str(error).strip().splitlines()[-1].strip()}") from error
