"""The model of a run: a preset, or that of the checkpoint which the run starts from, of whatever size."""

from ml_collections import ConfigDict

from llada_jax.checkpoint import weights
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig, preset
from llada_jax.training.config import check_expert_bias
from llada_jax.training.sections import FROM_CHECKPOINT, pod_mesh

# Fields that a preset and a checkpoint agree on. Others are the checkpoint's: import may add a token or name a mask.
_SHAPE = (
    "architecture", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
    "num_experts", "num_experts_per_token", "moe_intermediate_size",
)  # fmt: skip


def named(config: ConfigDict) -> ModelConfig:
    """The preset of config.model or, where it names none, the model of config.init_from, of which config.json alone is
    read. Raises InputError when there is no such preset or checkpoint.
    """
    if config.model not in FROM_CHECKPOINT:
        return preset(config.model)
    return weights.read_config(weights.locate(config.init_from))[0]


def fitted(config: ConfigDict) -> ConfigDict:
    """`config` with what follows from the model of its checkpoint, where that says which model it is: lora.targets, the
    mesh and what is recomputed, each unless it was set.
    """
    if config.model not in FROM_CHECKPOINT:
        return config
    model, config = named(config), config.copy_and_resolve_references()
    check_expert_bias(config, model)
    config.lora.targets = tuple(config.lora.targets) or parameters.adaptable(model)
    data, fsdp = pod_mesh(model)
    if model.is_moe and not config.mesh.fsdp and config.execution.remat == "full":
        config.execution.remat = "hidden"
    config.mesh.data, config.mesh.fsdp = config.mesh.data or data, config.mesh.fsdp or fsdp
    return config


def check_preset(config: ConfigDict, model: ModelConfig) -> None:
    """Raises InputError naming the fields in which `model`, the checkpoint's, is not the preset of config.model."""
    if config.model in FROM_CHECKPOINT:
        return
    expected = preset(config.model)
    if differing := [field for field in _SHAPE if getattr(model, field) != getattr(expected, field)]:
        fields = ", ".join(f"{field}={getattr(model, field)!r}" for field in differing)
        others = ", ".join(repr(getattr(expected, field)) for field in differing)
        raise InputError(
            f"config.init_from={config.init_from}: {fields}, but model {config.model!r} has {others}; "
            "--config=FILE.py:init_from trains the model of the checkpoint"
        )


def length_notice(config: ConfigDict, model: ModelConfig) -> str:
    """A line about rows that are longer than what the model has been trained on; "" when they are not."""
    length, known = config.data.length, model.max_position_embeddings
    if length <= known:
        return ""
    extended = "" if model.rope_scaling else f"; config.yarn_factor={-(-length // known)} extends its rotary embedding"
    return f"config.data.length={length}: the model has seen {known} positions (max_position_embeddings){extended}"
