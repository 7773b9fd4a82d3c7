"""The training configuration: every field with its default, and its translation into the objects of the package.

A file in configs/ starts from `default_config` and changes fields; flags override them, as in
--config.optimizer.learning_rate=1e-4.
"""

import importlib.util
import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from llada_jax.attention.context import stripe_size
from llada_jax.diffusion import schedule
from llada_jax.diffusion.noise import NoiseSpec
from llada_jax.diffusion.objectives import Objective
from llada_jax.diffusion.preference import Preference
from llada_jax.errors import InputError
from llada_jax.model.config import PRESETS, ModelConfig
from llada_jax.model.forward import Execution
from llada_jax.model.parameters import adaptable
from llada_jax.monitoring.profiling import parse_steps
from llada_jax.training import fields

FROM_CHECKPOINT = ("init_from", "auto", "")  # names of no preset: the model is that of config.init_from


def default_config(model: str) -> ConfigDict:
    """All fields. model: a preset, or one of FROM_CHECKPOINT. Raises InputError on an unknown preset."""
    if model not in (*PRESETS, *FROM_CHECKPOINT):
        raise InputError(
            f'config: unknown model {model!r}; presets: {", ".join(PRESETS)}; "init_from" is the model of the '
            "checkpoint that config.init_from names"
        )
    config = ConfigDict()
    config.model = model
    config.stage = ""  # what the run calls itself, in its checkpoints and in what the next stage says of them
    config.alignment = ""  # "same" or "shifted"; "" is the checkpoint's (or the preset's)
    config.yarn_factor = 0.0  # YaRN to so many times the length that the model knows; 0: its rotary embedding as it is
    config.init_from = ""  # a checkpoint whose weights to start from; "" starts from random weights
    config.seed = 0
    config.compiled_step = ""  # a file of tools/rehearse.py --save: the program of the steps with ...
    config.compiled_halves = "both"  # ... these halves (schedule.Phase); others are compiled here

    config.data = data = ConfigDict()
    data.path = ""  # rows made by tools/pack_data.py
    data.mixture = ""  # or: several of those, with weights: "ROWS_A:0.7,ROWS_B:0.3"
    data.source = ""  # or: a folder of text, packed once into data.cache
    data.patterns = ()  # more files of data.source to read as plain text, e.g. ("*.py", "*.md")
    data.tokenizer = ""  # for data.source: a folder; "" is init_from's; "bytes": one token a byte
    data.add_bos = (
        "auto"  # a beginning of sequence, "true" or "false"; "auto": as init_from, else the tokenizer, has it
    )
    data.cache = ""  # "" is WORKDIR/data
    data.length = 256
    data.held_out_rows = 16  # the last rows of each dataset are for evaluation only
    data.corrupt_share = 0.0  # stored rows that may turn out to be corrupt; they are read as padding

    config.batch = ConfigDict(dict(rows=8, micro_batches=1))

    config.schedule = blocks = ConfigDict()
    blocks.kind = "wsd"  # "wsd", "constant" (block_size) or "ar"
    blocks.warmup_blocks = (1, 4, 32, 64)
    blocks.warmup_steps = (20, 20, 20, 20)
    blocks.stable_steps = 60
    blocks.decay_blocks = (128, 64, 32)
    blocks.decay_steps = (20, 20, 20)
    blocks.block_size = 32
    blocks.steps = 200

    config.objective = objective = ConfigDict()
    objective.time_weight = "elbo"  # -alpha'_t / (1 - alpha_t) = 1/t; or "uniform"
    objective.normalizer = "tokens"  # or "masked"
    objective.times = "block"  # one t per block, or per "sequence"
    objective.rate_low = 1e-3
    objective.rate_high = 1.0
    objective.masking = "bernoulli"  # or "fixed_count"
    objective.spread_times = False
    objective.complementary = False
    objective.block_origin = "global"  # Eq. 3, or "document"
    objective.document_mask = True  # of Eq. 3 and 4; without it the documents of a row are one
    objective.confidence_weight = 0.0  # lambda of CAP (Eq. 6)
    objective.confidence_temperature = 1.0
    objective.embedding_noise_std = 0.0  # Gaussian noise on masked embeddings (Section 7.1) ...
    objective.embedding_noise_steps = 0  # ... for that many first steps

    config.preference = preference = ConfigDict()  # DPO (Eq. 7, 8), when enabled, instead of the objective's loss
    preference.enabled = False
    preference.beta = 0.1
    preference.draws = 1
    preference.shared_noise = True
    preference.max_pairs = 16
    preference.reference = "frozen"  # the weights of init_from; or "precomputed": their scores, made before training

    config.lora = lora = ConfigDict()  # low-rank adapters on frozen weights of init_from (arXiv 2106.09685)
    lora.rank = 0  # 0 trains all weights
    lora.alpha = 16.0  # the adapters' term is scaled by alpha / rank
    # All dense projections, () where the checkpoint says which there are; routed experts stay frozen.
    lora.targets = adaptable(PRESETS[model]) if model in PRESETS else ()

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3  # 0 is the rate at which the run of init_from ended
    optimizer.warmup_steps = 10
    optimizer.decay_steps = 40  # the last steps, linearly down to learning_rate * end_fraction
    optimizer.end_fraction = 0.1
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    optimizer.clip_norm = 1.0
    optimizer.expert_bias_rate = 0.0  # of the routers' loss-free balancing (Ling 2.0 trains with 1e-3); 0 freezes it

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, expert=1, context=1, tensor=1))
    config.execution = execution = ConfigDict()
    execution.attention = "dense"  # "blockwise", "kernel" (TPU), or "auto": the kernel on a TPU, blockwise elsewhere
    execution.experts = "auto"  # "xla", "megablox" (TPU), or "auto": megablox on a TPU, xla elsewhere
    execution.exchange = "weights"  # how experts and tokens meet over mesh.expert: "weights" or "tokens" are gathered
    execution.remat = "none"
    execution.dtype = "float32"
    execution.reduce_dtype = ""  # of gradients of gathered weights, summed over ranks; "" is execution.dtype

    config.checkpoint = kept = ConfigDict()
    kept.directory = ""  # "" is WORKDIR/checkpoints
    kept.every_steps = 50
    kept.every_minutes = 0.0  # and when so many have passed since the last save; 0: by steps only
    kept.keep_last = 2  # 0 keeps all
    kept.keep_every = 0  # besides the last, the steps that are multiples of it; 0 keeps none for that
    kept.keep_best = 0  # besides the last, so many of the least held-out NELBO ...
    kept.best_block_size = 0  # ... at this one of evaluation.block_sizes; 0 is the last of them
    kept.retries = 5  # saves that fail in a row before the run ends ...
    kept.retry_seconds = 5.0  # ... with so long a pause after the first, twice as long after each other

    config.faults = faults = ConfigDict()  # training/faults.py: "stop", "skip" or "rewind"
    faults.on_nonfinite = "stop"  # a loss or a gradient that is not finite
    faults.on_spike = "stop"  # a loss above ...
    faults.spike_factor = 0.0  # ... so many times the median of ...
    faults.spike_window = 32  # ... the last losses of its phase, when there are so many; factor 0: nothing is a spike
    faults.max_skips = 100  # of a run; the next one stops it
    faults.max_rewinds = 10
    faults.hang_minutes = 60.0  # without a step, an evaluation or a save ending: the run ends; 0: it waits for ever

    config.evaluation = evaluation = ConfigDict()
    evaluation.every_steps = 100
    evaluation.block_sizes = (1, 4, 32, 256)
    evaluation.rows = 8
    evaluation.samples = 1
    evaluation.preference_draws = 8  # DPO: noise samples that each held-out score averages over
    config.log_every_steps = 10
    config.profile = ConfigDict(dict(steps=""))  # "10:13": an xprof trace of steps 10, 11 and 12 in WORKDIR/profile
    return config.lock()


def is_large(model: str) -> bool:
    """A mixture of experts of 100B, not one of 16B or 30B."""
    return model in PRESETS and _is_large(PRESETS[model])


def _is_large(model: ModelConfig) -> bool:
    return model.is_moe and model.hidden_size > 2048


def split_over_pod(config: ConfigDict) -> None:
    """Splits the weights of a mixture of experts, their gradients and the optimizer's state over the chips of a pod.

    They are split over no more chips than there are experts, so that whole experts are gathered (sharding.RULES); more
    chips hold copies. Dense models stay as they are. Where the checkpoint says which model it is, the sizes are 0 until
    it has been read (run_model.fitted).
    """
    if config.model not in PRESETS:
        config.mesh.data = config.mesh.fsdp = 0
    elif (model := PRESETS[config.model]).is_moe:
        config.execution.remat = "hidden"
        config.mesh.data, config.mesh.fsdp = pod_mesh(model)


def pod_mesh(model: ModelConfig) -> tuple[int, int]:
    """(mesh.data, mesh.fsdp) of split_over_pod."""
    if not model.is_moe:
        return -1, 1
    return (-1, model.num_experts) if _is_large(model) else (1, -1)


def load_sibling(file: str, name: str):
    """The config NAME.py in the folder of `file`, as a module: configs/ is a folder of programs, not a package."""
    path = Path(file).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"configs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extended(config: ConfigDict, model: ModelConfig) -> ModelConfig:
    """The model with the rotary embedding of config.yarn_factor. Raises InputError where it has a scaling already."""
    if not (factor := config.yarn_factor):
        return model
    try:
        return model.extended(factor)
    except InputError as error:
        raise InputError(f"config.yarn_factor={factor}: {error}") from None


def phases(config: ConfigDict) -> tuple[schedule.Phase, ...]:
    """The block-size schedule. Raises InputError naming the field."""
    c, length = config.schedule, config.data.length
    if c.kind == "ar":
        result = schedule.autoregressive(length, c.steps)
    elif c.kind == "constant":
        result = schedule.constant(length, c.block_size, c.steps)
    elif c.kind == "wsd":
        result = schedule.wsd(length, _pairs(c, "warmup"), c.stable_steps, _pairs(c, "decay"))
    else:
        raise InputError(f'config.schedule.kind={c.kind!r}, expected "wsd", "constant" or "ar"')
    if not result:
        raise InputError("config.schedule: no steps")
    return result


def _pairs(c: ConfigDict, phase: str) -> list[tuple[int, int]]:
    blocks, steps = c[f"{phase}_blocks"], c[f"{phase}_steps"]
    if len(blocks) != len(steps):
        raise InputError(
            f"config.schedule.{phase}_steps has {len(steps)} entries, {phase}_blocks has {len(blocks)}: one each"
        )
    return list(zip(blocks, steps, strict=True))


def objective(config: ConfigDict) -> Objective:
    c = config.objective
    noise = NoiseSpec(c.times, c.rate_low, c.rate_high, c.masking, c.spread_times)
    return Objective(
        noise,
        c.time_weight,
        c.normalizer,
        c.complementary,
        c.block_origin,
        c.confidence_weight,
        c.confidence_temperature,
        c.document_mask,
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
    if c.reference not in ("frozen", "precomputed"):
        raise InputError(f'config.preference.reference={c.reference!r}, expected "frozen" or "precomputed"')
    return Preference(c.beta, c.draws, c.shared_noise, c.max_pairs)


def skips_steps(config: ConfigDict) -> bool:
    """Whether the compiled step decides if its update is applied (step.guarded)."""
    c = config.faults
    return c.on_nonfinite == "skip" or (c.on_spike == "skip" and c.spike_factor > 0)


def evaluation_block_sizes(config: ConfigDict) -> tuple[int, ...]:
    """Block sizes of the held-out NELBO; an AR model has one."""
    return (1,) if config.schedule.kind == "ar" else tuple(config.evaluation.block_sizes)


def ranking_block_size(config: ConfigDict) -> int:
    """The block size whose held-out NELBO ranks the steps."""
    sizes = evaluation_block_sizes(config)
    return config.checkpoint.best_block_size if config.checkpoint.best_block_size in sizes else sizes[-1]


def execution(config: ConfigDict, platform: str | None = None) -> Execution:
    """How to compute on a platform ("tpu", "gpu", "cpu"), by default the one at hand."""
    if config.execution.dtype not in ("float32", "bfloat16"):
        raise InputError(f'config.execution.dtype={config.execution.dtype!r}, expected "float32" or "bfloat16"')
    values, tpu = dict(config.execution), (platform or jax.default_backend()) == "tpu"
    for field, on_tpu, elsewhere in (("attention", "kernel", "blockwise"), ("experts", "megablox", "xla")):
        if values[field] == "auto":
            values[field] = on_tpu if tpu else elsewhere
    return Execution(**values | {"reduce_dtype": values["reduce_dtype"] or None})


def check(config: ConfigDict) -> None:
    """Raises InputError naming the first field whose type is not its default's, or whose value is out of range."""
    fields.check(config, default_config(config.model))
    if config.lora.rank and not config.init_from:
        raise InputError(f'config.init_from="": config.lora.rank={config.lora.rank} adapts the model of a checkpoint')
    phases(config), objective(config), preference(config), execution(config), parse_steps(config.profile.steps)
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
    if config.alignment not in ("", "same", "shifted"):
        raise InputError(f'config.alignment={config.alignment!r}, expected "same", "shifted" or ""')
    if config.checkpoint.best_block_size not in (0, *config.evaluation.block_sizes):
        raise InputError(
            f"config.checkpoint.best_block_size={config.checkpoint.best_block_size}, expected one of "
            f"evaluation.block_sizes={config.evaluation.block_sizes}, or 0"
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
    c = config.faults
    for field in ("on_nonfinite", "on_spike"):
        if c[field] not in ("stop", "skip", "rewind"):
            raise InputError(f'config.faults.{field}={c[field]!r}, expected "stop", "skip" or "rewind"')
        if c[field] == "rewind" and config.preference.enabled and config.preference.reference == "precomputed":
            raise InputError(
                f'config.faults.{field}="rewind": precomputed scores are of the rows of each step, which a rewind '
                'changes; set config.preference.reference="frozen"'
            )
    if 0 < c.spike_factor <= 1:
        raise InputError(f"config.faults.spike_factor={c.spike_factor}, expected more than 1, or 0")


def check_rows(config: ConfigDict, mesh) -> None:
    """Raises InputError when the devices of the mesh cannot share the rows of a step, or a row's tokens, evenly."""
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    if config.batch.rows // config.batch.micro_batches % (mesh.size // (context * tensor)):
        raise InputError(f"config.batch.rows={config.batch.rows} cannot be shared by {mesh.size} devices")
    if context > 1:
        stripe_size(config.data.length, context)


def write(config: ConfigDict, path: Path) -> None:
    """Writes the resolved config; on a later run says which fields changed since."""
    new = json.loads(config.to_json())
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except json.JSONDecodeError:
            old = {}
        for field in sorted(set(_flatten(old)) | set(_flatten(new))):
            before, after = _flatten(old).get(field), _flatten(new).get(field)
            if before != after:
                print(f"config.{field} was {before!r}, is now {after!r}", flush=True)
    temporary = path.with_name("config.json.partial")
    temporary.write_text(json.dumps(new, indent=2) + "\n")
    temporary.replace(path)


def _flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
