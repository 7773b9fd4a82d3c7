"""The trainer's flags, checked where they cost nothing: what the trainer would refuse at once is refused here."""

from collections.abc import Sequence

from absl import flags

from llada_jax.errors import InputError

# Of llada_jax/train.py beside --config: those that a launch leaves to its user, and those that it settles itself.
FREE = ("peer_timeout", "start_timeout")
SETTLED = {
    "workdir": "before the --, not among the trainer's flags",
    **dict.fromkeys(("coordinator", "processes", "process"), "the hosts of a slice find each other; leave it out"),
}


def check_text(what: str, text: str) -> None:
    """Raises InputError on what a command that gcloud or XPK hands on would not say in the end."""
    if wrong := sorted({c for c in text if c == "$" or not c.isprintable()}):
        raise InputError(
            f"{what}: {wrong[0]!r} would not reach the hosts as it is; systemd and Kubernetes expand $NAME"
        )


def check(train_flags: Sequence[str], rows: str) -> None:
    """rows: the packed rows of --rows, or "". Raises InputError naming the flag that is missing or wrong."""
    if not any(flag.lstrip("-").partition("=")[0] == "config" for flag in train_flags):
        raise InputError("the trainer's flags follow --, as in -- --config=configs/wsd.py:llada2_mini")
    for flag in train_flags:
        name = flag.partition("=")[0].lstrip("-")
        if flag.startswith("-") and name in SETTLED:
            raise InputError(f"--{name}: {SETTLED[name]}")
        check_text(f"the trainer's flag {flag!r}", flag)
    config = _config(train_flags)
    import llada_jax.training.config

    llada_jax.training.config.check(config)
    if not (rows or config.data.path or config.data.cache):
        raise InputError("--rows or --config.data.path: a run on a bucket needs packed rows")


def _config(train_flags: Sequence[str]):
    import jax

    jax.config.update("jax_platforms", "cpu")
    from ml_collections import config_flags

    from llada_jax import config_flag

    values = flags.FlagValues()
    try:
        arguments = config_flag.checked(["train", *train_flags])
    except InputError as error:
        raise InputError(f"the trainer's flags: {error}") from error
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    for name in FREE:
        flags.DEFINE_integer(name, None, "", flag_values=values)
    values.set_gnu_getopt(True)
    try:
        unknown = [flag for flag in values(arguments, known_only=True)[1:] if not _of_absl(flag)]
        config = config_flag.resolved(config)
    except flags.Error as error:
        raise InputError(f"the trainer's flags: {error}") from error
    if unknown:
        raise InputError(f"the trainer's flags: unknown {unknown[0]!r}")
    return config


def _of_absl(flag: str) -> bool:
    """Whether it is one of those that every program of absl has, such as --verbosity=1."""
    name = flag.partition("=")[0].lstrip("-")
    module = flags.FLAGS.find_module_defining_flag(name, "") if flag.startswith("-") else ""
    return module.startswith("absl")
