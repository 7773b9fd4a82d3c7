"""The training configuration as the command line sees it, and its translation into the objects of the package.

A stage (training/stages.py) starts from `default_config` and changes fields; flags override them, as in
--config.optimizer.learning_rate=1e-4. The fields are those of training/sections.py;

    python -m llada_jax.training.config > configs/README.md

writes their table.
"""

import dataclasses
import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from llada_jax import config_fields, config_renames
from llada_jax.attention.context import stripe_size
from llada_jax.diffusion import schedule
from llada_jax.diffusion.editing import Editing
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.diffusion.preference import Preference
from llada_jax.errors import InputError
from llada_jax.model.config import PRESETS, ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.monitoring.profiling import parse_steps
from llada_jax.reinforcement.policy import PolicyLoss
from llada_jax.sampling.state import RULES
from llada_jax.tokenizer import Tokenizer
from llada_jax.training.sections import EditingConfig, TrainConfig, default_config

_FIELDS = {each.name: each for each in config_fields.fields_of(TrainConfig)}


def extended(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The model with the rotary embedding of config.yarn_factor. Raises InputError where it has a scaling already."""
    if (factor := config.yarn_factor) is None:
        return model
    try:
        return model.extended(factor)
    except InputError as error:
        raise InputError(f"config.yarn_factor={factor}: {error}") from None


def phases(config: ConfigDict) -> tuple[schedule.Phase, ...]:
    """The block-size schedule. Raises InputError naming the field."""
    c, length = config.schedule, config.data.length
    config_fields.check_limits(_FIELDS["schedule.kind"], c.kind)
    if c.kind == "ar":
        result = schedule.autoregressive(length, c.steps)
    elif c.kind == "constant":
        result = schedule.constant(length, c.block_size, c.steps)
    else:
        warmup = _pairs("warmup", c.warmup_blocks, c.warmup_steps)
        result = schedule.wsd(length, warmup, c.stable_steps, _pairs("decay", c.decay_blocks, c.decay_steps))
    if not result:
        raise InputError("config.schedule: no steps")
    return result


def _pairs(phase: str, blocks: tuple[int, ...], steps: tuple[int, ...]) -> list[tuple[int, int]]:
    if len(blocks) != len(steps):
        raise InputError(
            f"config.schedule.{phase}_steps has {len(steps)} entries, {phase}_blocks has {len(blocks)}: one each"
        )
    return list(zip(blocks, steps, strict=True))


def objective(config: ConfigDict, tokenizer: Tokenizer | None = None) -> Objective:
    """tokenizer: of the model; ids that are none of its texts' are never written as wrong tokens."""
    c = config.objective
    ids = {"block_size": config.schedule.block_size} if config.editing.labels == "levenshtein" else {}
    if tokenizer is not None and config.editing.replace_high:
        ids["vocab_size"] = max(tokenizer.text_ids, default=0) + 1
        ids["special_ids"] = tuple(sorted(set(range(ids["vocab_size"])) - tokenizer.text_ids))
    edits = {each.name: getattr(config.editing, each.name) for each in dataclasses.fields(EditingConfig)}
    noise = NoiseSpec(times=c.times, rate_low=c.rate_low, rate_high=c.rate_high, masking=c.masking, spread=c.spread)
    return Objective(
        noise=noise,
        time_weight=c.time_weight,
        normalizer=c.normalizer,
        complementary=c.complementary,
        block_origin=c.block_origin,
        confidence_weight=c.confidence_weight,
        confidence_temperature=c.confidence_temperature,
        document_mask=c.document_mask,
        group_blocks=c.group_blocks,
        editing=Editing(**edits, **ids),
    )


def check_editing(config: ConfigDict, editing: Editing) -> None:
    """Raises InputError where a run does nothing with what its config says of editing."""
    c = config.objective
    if editing.turns > 1 and not editing.draft_share:
        raise InputError(
            f"config.editing.draft_share=0.0, expected more with editing.turns={editing.turns}: none drafts"
        )
    asked = editing.weight or editing.replaces or editing.turns > 1
    if asked and (config.preference.enabled or config.schedule.kind == "ar"):
        other = "preference.enabled" if config.preference.enabled else "schedule.kind"
        raise InputError(f"config.editing: not with config.{other}={config.preference.enabled or 'ar'}")
    if c.group_blocks > 1 and all(phase.halves == "noisy" for phase in phases(config)):
        raise InputError(f"config.objective.group_blocks={c.group_blocks}, expected 1 where a row is one block")
    if (blocks := c.group_blocks) > 1 and (config.preference.enabled or config.schedule.kind == "ar"):
        raise InputError(f"config.objective.group_blocks={blocks}, expected 1 in a run of DPO or of an AR model")
    if editing.labels == "levenshtein" and (config.schedule.kind, c.block_origin) != ("constant", "global"):
        raise InputError(
            f'config.editing.labels="levenshtein": not with schedule.kind={config.schedule.kind!r} and objective.'
            f'block_origin={c.block_origin!r}, expected "constant" and "global": its blocks have one size'
        )
    if editing.replaces and config.compiled_step:
        raise InputError(
            f"config.compiled_step={config.compiled_step}: it knows no tokenizer, so that config.editing.replace_high="
            f"{editing.replace_high} would write special tokens; expected 0 or no compiled step"
        )


def preference(config: ConfigDict) -> Preference | None:
    """Settings of DPO, or None when the run is not one."""
    c = config.preference
    if not c.enabled:
        return None
    if not config.init_from:
        raise InputError('config.init_from="": DPO needs the model of the stage before, as policy and as reference')
    noised = config.objective
    if noised.complementary or noised.confidence_weight or not noised.document_mask:
        raise InputError(
            "config.preference.enabled: not with objective.complementary or objective.confidence_weight, nor without "
            "objective.document_mask"
        )
    config_fields.check_limits(_FIELDS["preference.reference"], c.reference)
    return Preference(beta=c.beta, draws=c.draws, shared_noise=c.shared_noise, max_pairs=c.max_pairs)


def policy_loss(config: ConfigDict) -> PolicyLoss:
    """What a run of reinforcement learning optimises."""
    return PolicyLoss(**{each.name: getattr(config.rl, each.name) for each in dataclasses.fields(PolicyLoss)})


def updates_per_step(config: ConfigDict) -> int:
    """Of the optimizer."""
    return config.rl.epochs * config.rl.updates if config.rl.enabled else 1


_NOT_OF_RL = (  # what such a run would not do
    "data.path", "data.mixture", "data.source", "data.patterns", "data.tokenizer", "preference", "objective", "editing",
    "compiled_step", "checkpoint.keep_best", "optimizer.expert_bias_rate", "faults.on_nonfinite", "faults.on_spike",
)  # fmt: skip


def check_rl(config: ConfigDict) -> None:
    """Raises InputError where a run of reinforcement learning cannot do what its config says."""
    c, rows = config.rl, config.batch.rows
    if not c.enabled:
        return
    for name, value in config_fields.flat(json.loads(config.to_json())):
        if name.startswith(_NOT_OF_RL) and value != _plain(_FIELDS[name].default):
            raise InputError(f"config.{name}={value!r}: not in a run of reinforcement learning (config.rl.enabled)")
    if not config.init_from or not c.questions:
        missing = "rl.questions" if config.init_from else "init_from"
        raise InputError(f'config.{missing}="", expected one in a run of reinforcement learning')
    for field, divisor, divided, of in (
        ("rl.group", c.group, rows, "batch.rows"),
        ("rl.updates", c.updates, rows, "batch.rows"),
        ("batch.micro_batches", config.batch.micro_batches, rows // c.updates, "batch.rows / rl.updates"),
    ):
        if divided % divisor:
            raise InputError(f"config.{field}={divisor} does not divide {of}={divided}")
    if config.schedule.kind != "constant":
        raise InputError(f'config.schedule.kind={config.schedule.kind!r}, expected "constant" with rl.enabled')
    known = tuple(rule for rule in RULES if rule != "llada2.2")
    known = tuple(rule for rule in known if rule != "llada2.1") if c.estimator == "trajectory" else known
    if c.rule not in known:
        raise InputError(
            f"config.rl.rule={c.rule!r}, expected one of {', '.join(known)} with rl.estimator={c.estimator!r}"
        )


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def skips_steps(config: ConfigDict) -> bool:
    """Whether the compiled step decides if its update is applied (step.guarded)."""
    c = config.faults
    return c.on_nonfinite == "skip" or (c.on_spike == "skip" and c.spike_factor is not None)


def evaluation_block_sizes(config: ConfigDict) -> tuple[int, ...]:
    """Block sizes of the held-out NELBO; an AR model has one."""
    return (1,) if config.schedule.kind == "ar" else tuple(config.evaluation.block_sizes)


def ranking_block_size(config: ConfigDict) -> int:
    """The block size whose held-out NELBO ranks the steps."""
    sizes = evaluation_block_sizes(config)
    return config.checkpoint.best_block_size if config.checkpoint.best_block_size in sizes else sizes[-1]


def execution(config: ConfigDict, platform: str | None = None) -> Execution:
    """How to compute on a platform ("tpu", "gpu", "cpu"), by default the one at hand."""
    c, tpu = config.execution, (platform or jax.default_backend()) == "tpu"
    config_fields.check_limits(_FIELDS["execution.dtype"], c.dtype)
    attention, experts = ("kernel", "megablox") if tpu else ("blockwise", "xla")
    return Execution(
        attention=attention if c.attention == "auto" else c.attention,
        experts=experts if c.experts == "auto" else c.experts,
        expert_parallel=c.expert_parallel,
        remat=c.remat,
        dtype=c.dtype,
        reduce_dtype=c.reduce_dtype or None,
    )


def check(config: ConfigDict) -> None:
    """Raises InputError naming the first field whose type is not its default's, or whose value is out of range."""
    default_config(config.model)  # a model that there is
    config_fields.check(config, TrainConfig)
    if config.lora.rank and not config.init_from:
        raise InputError(f'config.init_from="": config.lora.rank={config.lora.rank} adapts the model of a checkpoint')
    check_rl(config)
    phases(config), preference(config), execution(config), parse_steps(config.profile.steps)
    check_editing(config, objective(config).editing)
    if config.model in PRESETS:
        check_expert_bias(config, PRESETS[config.model])
    elif not config.init_from:
        raise InputError(
            f'config.init_from="": config.model={config.model!r} is the model of a checkpoint; set it, or name a '
            f"preset, as in --config=FILE.py:MODEL ({', '.join(PRESETS)})"
        )
    _check_faults(config)
    if config.batch.rows % config.batch.micro_batches:
        raise InputError(
            f"config.batch.micro_batches={config.batch.micro_batches} does not divide batch.rows={config.batch.rows}"
        )
    if config.checkpoint.best_block_size not in (None, *config.evaluation.block_sizes):
        raise InputError(
            f"config.checkpoint.best_block_size={config.checkpoint.best_block_size}, expected one of "
            f"evaluation.block_sizes={config.evaluation.block_sizes}, or None"
        )
    if not config.evaluation.block_sizes:
        raise InputError("config.evaluation.block_sizes=(), expected at least one")
    for block_size in config.evaluation.block_sizes:
        if block_size < 1 or config.data.length % block_size:
            raise InputError(
                f"config.evaluation.block_sizes: {block_size} does not divide data.length={config.data.length}"
            )


def check_expert_bias(config: ConfigDict, model: ModelConfig) -> None:
    if config.optimizer.expert_bias_rate and (not model.expert_bias or config.lora.rank or config.preference.enabled):
        raise InputError(
            f"config.optimizer.expert_bias_rate={config.optimizer.expert_bias_rate}, expected 0: the model has no "
            "expert bias, or the run is of adapters or DPO"
        )


def _check_faults(config: ConfigDict) -> None:
    """Precomputed scores are of the rows of each step."""
    for field in ("on_nonfinite", "on_spike"):
        rewinds = getattr(config.faults, field) == "rewind"
        if rewinds and config.preference.enabled and config.preference.reference == "precomputed":
            raise InputError(
                f'config.faults.{field}="rewind": precomputed scores are of the rows of each step, which a rewind '
                'changes; set config.preference.reference="frozen"'
            )


def check_rows(config: ConfigDict, mesh) -> None:
    """Raises InputError when the devices of the mesh cannot share the rows of a step, or a row's tokens, evenly."""
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    updates = config.rl.updates if config.rl.enabled else 1
    if config.batch.rows // updates // config.batch.micro_batches % (mesh.size // (context * tensor)):
        raise InputError(f"config.batch.rows={config.batch.rows} cannot be shared by {mesh.size} devices")
    if context > 1:
        stripe_size(config.data.length, context)


def write(config: ConfigDict | TrainConfig, path: Path) -> None:
    """Writes the resolved config; on a later run says which fields changed since."""
    new = json.loads(config.to_json())
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError:
            old = {}
        before, renamed = config_renames.current(dict(config_fields.flat(old)))
        if renamed:
            fields = ", ".join(f"{field}={value!r}" for field, value in renamed.items())
            print(f"{path}: of an older version, read as {fields}", flush=True)
        now = dict(config_fields.flat(new))
        for field in sorted(set(before) | set(now)):
            is_new = field not in before and field in _FIELDS and now[field] == _FIELDS[field].default
            if before.get(field) != now.get(field) and not is_new:  # a field that an older version did not have
                print(f"config.{field} was {before.get(field)!r}, is now {now.get(field)!r}", flush=True)
    temporary = path.with_name("config.json.partial")
    temporary.write_text(json.dumps(new, indent=2) + "\n")
    temporary.replace(path)


def readme() -> str:
    """configs/README.md."""
    return _README + config_fields.tables(TrainConfig)


_README = """# Configs

Each file here is the command line of a stage of `llada_jax.training.stages`: `ar`, `wsd`, `sft`, `cap`, `edit`, `dpo`,
`rl`.
Its docstring holds the command.

    python -m llada_jax.train --config=configs/sft.py:MODEL,length=2048 --workdir=DIR --config.batch.rows=32

`MODEL` is a preset (`tiny`, `smollm2_135m`, `llada2_mini`, ...) or `init_from`: the model of the checkpoint that
`--config.init_from` names. Options of the stage follow it. `--config.SECTION.KEY=VALUE` sets any key of the tables. A
tuple is written `1,4,32`. `None` is a value where the type says so. Each stage sets some keys of its own: the defaults
here are those before it does.

This file is written by `python -m llada_jax.training.config > configs/README.md`; a test keeps it equal.

"""


if __name__ == "__main__":
    print(readme(), end="")
