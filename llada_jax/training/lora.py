"""The adapters that a config asks for, on the checkpoint that a run starts from."""

from etils import epath
from ml_collections import ConfigDict

from llada_jax.checkpoint import files
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora


def open_lora(config: ConfigDict, model: ModelConfig, base: epath.Path) -> Lora:
    """The adapters that config.lora asks for on the checkpoint in directory `base`.

    Raises InputError naming a target that is no dense projection of the model.
    """
    targets, known = tuple(config.lora.targets), parameters.adaptable(model)
    if not targets:
        raise InputError(f"config.lora.targets=(), expected some of {', '.join(known)}")
    for name in targets:
        if name not in known:
            raise InputError(f"config.lora.targets: {name!r} takes no adapter, expected some of {', '.join(known)}")
    identity = files.read_digests(base).sha256
    return Lora(model, config.lora.rank, config.lora.alpha, targets, str(files.absolute(base)), identity)


def describe(adapters: Lora) -> str:
    train = parameters.count(adapters)
    total = train + parameters.count(adapters.model)
    targets = ", ".join(adapters.targets)
    return f"LoRA rank {adapters.rank} on {targets}: {train:,} of {total:,} parameters train"
