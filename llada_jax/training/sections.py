"""All fields of the training configuration: type, default, meaning and range, each in one place.

configs/README.md is made from this file (training/config.py). What one field allows beside another is checked there.
This module does without JAX, so that a wrong flag is answered before JAX is imported.
"""

import dataclasses
import json

from ml_collections import ConfigDict

from llada_jax.config_fields import config_dict, field, from_config_dict, section
from llada_jax.errors import InputError
from llada_jax.model.config import PRESETS, ModelConfig
from llada_jax.model.declarations import adaptable

FROM_CHECKPOINT = ("init_from", "auto", "")  # names of no preset: the model is that of config.init_from
_ACTIONS = ("stop", "skip", "rewind")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The rows. One of path, mixture and source is set."""

    path: str = field("", "Rows made by tools/pack_data.py.")
    mixture: str = field("", 'Several of those, with weights: "ROWS_A:0.7,ROWS_B:0.3".')
    source: str = field("", "A folder of text, packed once into data.cache.")
    patterns: tuple[str, ...] = field((), 'More files of data.source to read as plain text, e.g. ("*.py", "*.md").')
    tokenizer: str = field("", 'For data.source: a folder; "" is that of init_from; "bytes" is one token per byte.')
    add_bos: str = field(
        "auto",
        'Documents begin with a beginning of sequence: "true", "false", or "auto": as init_from, else the tokenizer.',
    )
    cache: str = field("", '"" is WORKDIR/data.')
    length: int = field(256, "Tokens per row.", above=0)
    held_out_rows: int = field(16, "The last rows of each dataset, which are for evaluation only.", above=0)
    corrupt_share: float = field(
        0.0, "Share of the stored rows that may be corrupt; they are read as padding.", at_least=0, below=1
    )


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The batch of an optimizer step."""

    rows: int = field(8, "Rows per step.", above=0)
    micro_batches: int = field(1, "Parts of a step's rows that pass one after the other; divides rows.", above=0)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Block sizes and steps of the run."""

    kind: str = field("wsd", "A curriculum, one block_size, or autoregressive.", choices=("wsd", "constant", "ar"))
    warmup_blocks: tuple[int, ...] = field((1, 4, 32, 64), "wsd: block sizes of the warm-up.")
    warmup_steps: tuple[int, ...] = field((20, 20, 20, 20), "wsd: steps at each of them.")
    stable_steps: int = field(60, "wsd: steps with the row as one block.")
    decay_blocks: tuple[int, ...] = field((128, 64, 32), "wsd: block sizes of the decay.")
    decay_steps: tuple[int, ...] = field((20, 20, 20), "wsd: steps at each of them.")
    block_size: int = field(32, "constant: the block size.")
    steps: int = field(200, "constant, ar: steps.")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """The denoising loss and its noise (diffusion/objectives.py, diffusion/noise.py)."""

    time_weight: str = field("elbo", '"elbo" is -alpha\'_t / (1 - alpha_t) = 1 / t; "uniform" is 1.')
    normalizer: str = field("tokens", 'The loss is divided by the "tokens" that could be masked, or by those "masked".')
    times: str = field(
        "block", 'One t per "block", or per "sequence"; "chain": per block, rising along a group (group_blocks).'
    )
    rate_low: float = field(1e-3, "t is uniform in [rate_low, rate_high].")
    rate_high: float = field(1.0, "See rate_low.")
    masking: str = field(
        "bernoulli",
        '"bernoulli": each token by itself; "fixed_count", "floor_count": ceil(t n), floor(t n) of n.',
    )
    spread: bool = field(False, "The times of a row's blocks are a low-discrepancy sequence, not independent.")
    complementary: bool = field(False, "Each row is trained under its mask and under the inverse mask.")
    block_origin: str = field("global", 'Blocks begin with the row ("global", Eq. 3) or with each "document".')
    document_mask: bool = field(True, "Attention ends where a document does (Eq. 3, 4); else a row is one document.")
    group_blocks: int = field(
        1, "Most blocks of an answer that are denoised together, for decoders of several blocks (arXiv 2606.29215).",
        above=0,
    )  # fmt: skip
    confidence_weight: float = field(0.0, "lambda of CAP (Eq. 6).")
    confidence_temperature: float = field(1.0, "The temperature of the entropy of CAP.")
    embedding_noise_std: float = field(0.0, "Gaussian noise on masked embeddings (Section 7.1).", at_least=0)
    embedding_noise_steps: int = field(0, "The first steps, which have that noise.", at_least=0)


@dataclasses.dataclass(frozen=True)
class EditingConfig:
    """Wrong tokens in x_t, which the model learns to correct (diffusion/editing.py, diffusion/drafts.py)."""

    weight: float = field(0.0, "w: of the loss of all unmasked answer tokens, beside that of the masked ones.")
    replace_low: float = field(
        0.0, "Per block, a share in [replace_low, replace_high] of the unmasked answer tokens becomes random ones."
    )
    replace_high: float = field(0.0, "See replace_low.")
    turns: int = field(1, "K: passes per step. All but the last write as the decoder does, without a gradient.")
    draft_share: float = field(1.0, "q: share of the rows that are so drafted.")
    threshold_low: float = field(0.5, "Each row's threshold of drafting is uniform in [threshold_low, threshold_high].")
    threshold_high: float = field(0.95, "See threshold_low.")
    editing_low: float = field(
        0.0, "Each row's editing threshold of drafting is uniform in [editing_low, editing_high]; 1 edits nothing."
    )
    editing_high: float = field(0.9, "See editing_low.")
    labels: str = field(
        "target", 'Of drafted rows: "target", their tokens, or "levenshtein", edits that delete and insert (LLaDA2.2).'
    )


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """DPO (Eq. 7, 8), which takes the place of the objective's loss when it is enabled."""

    enabled: bool = field(False, "Whether the run is DPO.")
    beta: float = field(0.1, "beta of Eq. 8.")
    draws: int = field(1, "Noise samples per score.")
    shared_noise: bool = field(True, "Both answers to a prompt have the same noise.")
    max_pairs: int = field(16, "Most pairs in a row.")
    reference: str = field(
        "frozen",
        "The weights of init_from, or their scores, made before the first step.",
        choices=("frozen", "precomputed"),
    )


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Reinforcement learning on verifiable rewards (training/reinforcement.py), which takes the place of data and
    objective when it is enabled. batch.rows are the answers of a step.
    """

    enabled: bool = field(False, "Whether the run is of reinforcement learning.")
    questions: str = field("", '"reasoning_gym:NAME", or JSONL as tools/evaluate.py --task=FILE takes it.')
    settings: str = field("{}", "JSON: settings of the reasoning-gym task.")
    held_out: int = field(200, "Questions that are for evaluation only.", above=0)
    reward: str = field(
        "task", 'The questions\' own score ("task"), programs that pass their tests ("code"), or MODULE:FUNCTION.'
    )
    reward_seconds: float = field(10.0, "Most time of a reward, after which it counts as failed.", above=0)
    reward_default: float = field(0.0, "The reward of an answer whose reward has failed.")
    reward_workers: int = field(2, "Processes that compute rewards.", above=0)
    group: int = field(8, "Answers to each question; divides batch.rows.", above=1)
    advantage: str = field(
        "std", "Less the group's mean, and over its deviation, or less the mean of the others.",
        choices=("mean", "std", "leave_one_out"),
    )  # fmt: skip
    estimator: str = field(
        "elbo", "Of ratios: of an answer's ELBO (EBPO), or of each token in the step that wrote it (TraceRL).",
        choices=("elbo", "trajectory"),
    )  # fmt: skip
    copies: int = field(16, "elbo: noisy copies of each answer.", above=0)
    per_token: bool = field(False, "elbo: the log ratio is divided by the answer's length (ESPO).")
    shrink: int = field(1, "trajectory: neighbouring steps of a block that are scored in one pass.", above=0)
    token_weights: str = field(
        "answer", "trajectory: a mean over the tokens of an answer, or over those of each step and then its steps.",
        choices=("answer", "step"),
    )  # fmt: skip
    clip_low: float = field(0.2, "Ratios count as at least 1 - clip_low.", above=0, below=1)
    clip_high: float = field(0.2, "Ratios count as at most 1 + clip_high.", above=0)
    kl_weight: float = field(0.0, "Of the KL term against init_from; 0 holds no second model.", at_least=0)
    kl_estimator: str = field("k2", "Schulman's k1, k2 or k3.", choices=("k1", "k2", "k3"))
    epochs: int = field(1, "Times that a step's answers are gone through.", above=0)
    updates: int = field(1, "Updates of the optimizer in each, on so many parts of the answers.", above=0)
    gen_length: int = field(256, "Most tokens of an answer.", above=0)
    rows: int = field(64, "Answers decoded together.", above=0)
    rule: str = field("sglang", "The acceptance rule, as --rule of tools/generate.py.")
    threshold: float = field(0.95, "Of the rule.", at_least=0)
    temperature: float = field(1.0, "Of the draws.", above=0)
    steps: int = field(32, 'Of the rules "llada2" and "fixed".', above=0)
    entropy_bound: float = field(0.15, 'Of the rule "entropy".', at_least=0)
    drift_rows: int = field(
        8, "Answers whose probabilities by sampler and learner are compared in each step; 0: none.", at_least=0
    )
    answers_every_steps: int = field(10, "Steps between sample answers in WORKDIR/answers.jsonl.", above=0)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the frozen weights of init_from (arXiv 2106.09685)."""

    rank: int = field(0, "Rank of the adapters; 0 trains all weights.", at_least=0)
    alpha: float = field(16.0, "The adapters' term is scaled by alpha / rank.", above=0)
    targets: tuple[str, ...] = field(
        (), "Adapted projections; by default all dense projections of the model. Routed experts stay frozen."
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate: linear warm-up, constant, linear decay."""

    learning_rate: float | None = field(1e-3, "None is the rate at which the run of init_from ended.", above=0)
    warmup_steps: int = field(10, "Steps of the warm-up.", at_least=0)
    decay_steps: int = field(40, "The last steps, linearly down to learning_rate * end_fraction.", at_least=0)
    end_fraction: float = field(0.1, "See decay_steps.", at_least=0)
    b1: float = field(0.9, "Decay of the first moment.", at_least=0, below=1)
    b2: float = field(0.95, "Decay of the second moment.", at_least=0, below=1)
    eps: float = field(1e-8, "Added to the root of the second moment.", above=0)
    weight_decay: float = field(0.1, "Of matrices; norms and biases are not decayed.", at_least=0)
    clip_norm: float = field(1.0, "Largest global norm of the gradient; inf clips nothing.", above=0, infinite=True)
    expert_bias_rate: float = field(
        0.0, "Of the routers' loss-free balancing (Ling 2.0 trains with 1e-3); 0 leaves the bias as it is.", at_least=0
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. One of them may be -1: all that are left. 0 with model init_from: as the model asks."""

    data: int = field(-1, "Copies of the weights; rows are shared out.")
    fsdp: int = field(1, "Shards of the weights, gathered before use; rows are shared out.")
    expert: int = field(1, "Shards of the experts; rows are shared out.")
    context: int = field(1, "Parts of each row.")
    tensor: int = field(1, "Shards of heads, of the hidden layer and of the vocabulary.")


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a pass is computed, never what it computes (model/forward.py, Execution)."""

    attention: str = field(
        "dense", '"dense", "blockwise", "kernel" (TPU), or "auto": the kernel on a TPU, blockwise elsewhere.'
    )
    experts: str = field("auto", '"xla", "megablox" (TPU), or "auto": megablox on a TPU, xla elsewhere.')
    expert_parallel: str = field(
        "gather_weights", 'How experts and tokens meet over mesh.expert: "gather_weights" or "gather_tokens".'
    )
    remat: str = field("none", "What the backward pass computes again: a name in REMAT_POLICIES of model/forward.py.")
    dtype: str = field("float32", "Of activations and of gathered weights.", choices=("float32", "bfloat16"))
    reduce_dtype: str = field(
        "", 'Of gradients of gathered weights, summed over ranks: "float32", or "": execution.dtype.'
    )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When steps are saved, and which of them stay. The last one always does."""

    directory: str = field("", '"" is WORKDIR/checkpoints.')
    every_steps: int = field(50, "Steps between saves.", above=0)
    every_minutes: float | None = field(
        None, "Also save when so many have passed since the last save; None: never.", above=0
    )
    keep_last: int | None = field(2, "The newest steps that stay; None keeps all steps.", above=0)
    keep_every: int | None = field(None, "The multiples of it stay as well; None: no step for that.", above=0)
    keep_best: int = field(0, "So many steps of the least held-out NELBO stay as well.", at_least=0)
    best_block_size: int | None = field(None, "Which of evaluation.block_sizes ranks them; None is the last of these.")
    retries: int = field(5, "Saves that may fail in a row before the run ends.", at_least=0)
    retry_seconds: float = field(5.0, "Pause after the first of them; it doubles after each other.", at_least=0)


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """What the run does about a bad step (training/faults.py)."""

    on_nonfinite: str = field("stop", "A loss or a gradient that is not finite.", choices=_ACTIONS)
    on_spike: str = field("stop", "A loss far above its level.", choices=_ACTIONS)
    spike_factor: float | None = field(
        None, "A loss above so many times the median of the last ones is a spike; None: no loss is one.", above=1
    )
    spike_window: int = field(32, "Losses of the same phase in that median; with fewer no loss is a spike.", above=0)
    max_skips: int = field(100, "Skipped steps of a run; the next one stops it.", at_least=0)
    max_rewinds: int = field(10, "Rewinds of a run; the next one stops it.", at_least=0)
    hang_minutes: float | None = field(
        60.0, "The run ends when no step, evaluation or save has ended for so long; None: it waits.", above=0
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The held-out NELBO."""

    every_steps: int = field(100, "Steps between evaluations.", above=0)
    block_sizes: tuple[int, ...] = field((1, 4, 32, 256), "Block sizes, each of which divides data.length.")
    rows: int = field(8, "Held-out rows of each dataset that are read.", above=0)
    samples: int = field(1, "Noise samples per row.", above=0)
    preference_draws: int = field(8, "DPO: noise samples that each held-out score averages over.", above=0)


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """An xprof trace."""

    steps: str = field("", '"10:13" traces steps 10, 11 and 12 into WORKDIR/profile; "" none.')


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run, and what it starts from."""

    model: str = field(dataclasses.MISSING, 'A preset, or "init_from": that of the checkpoint in init_from.')
    stage: str = field("", "What the run calls itself, in its checkpoints and for the next stage.")
    alignment: str = field("", '"" is that of the checkpoint or of the preset.', choices=("same", "shifted", ""))
    yarn_factor: float | None = field(
        None, "YaRN to so many times the length that the model knows; None: its rotary embedding as it is.", at_least=0
    )
    init_from: str = field("", 'A checkpoint whose weights to start from; "" starts from random weights.')
    seed: int = field(0, "Of weights, noise and the order of rows.", at_least=0, bits=32)
    compiled_step: str = field("", "A file of tools/rehearse.py --save: the program of the steps with compiled_halves.")
    compiled_halves: str = field("both", "See compiled_step; steps of other halves (schedule.Phase) are compiled.")
    data: DataConfig = section(DataConfig)
    batch: BatchConfig = section(BatchConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    objective: ObjectiveConfig = section(ObjectiveConfig)
    editing: EditingConfig = section(EditingConfig)
    preference: PreferenceConfig = section(PreferenceConfig)
    rl: RLConfig = section(RLConfig)
    lora: LoraConfig = section(LoraConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    mesh: MeshConfig = section(MeshConfig)
    execution: ExecutionConfig = section(ExecutionConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    faults: FaultsConfig = section(FaultsConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    log_every_steps: int = field(10, "Steps between lines of the log and rows of metrics.jsonl.", above=0)
    profile: ProfileConfig = section(ProfileConfig)

    @classmethod
    def from_config_dict(cls, config: ConfigDict) -> "TrainConfig":
        """The frozen values of a config that `training.config.check` has accepted."""
        return from_config_dict(cls, config)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def default_config(model: str) -> ConfigDict:
    """All fields. model: a preset, or one of FROM_CHECKPOINT. Raises InputError on an unknown preset."""
    if model not in (*PRESETS, *FROM_CHECKPOINT):
        raise InputError(
            f'config: unknown model {model!r}; presets: {", ".join(PRESETS)}; "init_from" is the model of the '
            "checkpoint that config.init_from names"
        )
    targets = adaptable(PRESETS[model]) if model in PRESETS else ()  # () where the checkpoint says which there are
    return config_dict(TrainConfig(model, lora=LoraConfig(targets=targets))).lock()


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
