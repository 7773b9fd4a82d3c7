"""The checkpoint that a run starts from: which one it is, and what the run that wrote it was doing."""

import dataclasses
import hashlib
import json
import math
import os

from etils import epath
from ml_collections import ConfigDict

from llada_jax.checkpoint import files, weights
from llada_jax.checkpoint.lora import stored_entries
from llada_jax.diffusion import schedule
from llada_jax.errors import InputError
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.training.config import phases
from llada_jax.training.optimizer import learning_rate


@dataclasses.dataclass(frozen=True)
class Source:
    """directory: of one checkpoint, never of a workdir; step: None unless a training run wrote it; weights: the first
    12 hex digits of a sha256 over the digests of its tensors (of a LoRA step also its scale and its base); dtype: of
    most of its weights, as stored. The model of a LoRA step is the merged one.
    """

    directory: epath.Path
    model: ModelConfig
    lineage: dict
    step: int | None
    weights: str
    dtype: str

    @property
    def stage(self) -> str:
        """What made the checkpoint, such as "stage sft"."""
        if "config" in self.lineage:
            return f"stage {self.lineage['config'].get('stage') or 'without a name'}"
        if "merged" in self.lineage:
            return f"the mean of {len(self.lineage['merged'])} checkpoints"
        return f"imported from {self.lineage.get('source', 'an unknown source')}"

    def record(self) -> dict:
        """What the lineage of a run says of the checkpoint that it started from."""
        return {
            "path": os.fspath(self.directory),
            "step": self.step,
            "stage": self.stage,
            "parameters": parameters.count(self.model),
            "alignment": self.model.alignment,
            "dtype": self.dtype,
            "weights": self.weights,
        }

    def describe(self) -> str:
        """The same as a line to print."""
        step = "" if self.step is None else f"step {self.step} of "
        return (
            f"init_from {self.directory}: {step}{self.stage}, {parameters.count(self.model):,} parameters, "
            f"alignment {self.model.alignment}, {self.dtype}, weights {self.weights}"
        )


def open_source(path: str | os.PathLike) -> Source:
    """Reads config and digests, no weights. Raises InputError when `path` is neither checkpoint nor workdir."""
    directory = weights.locate(path)
    model, lineage = weights.read_config(directory)
    digests = files.read_digests(directory)
    identity = sorted((name, entry.digest) for name, entry in digests.tensors["params"].items())
    if isinstance(adapters := weights.read_stored_config(directory), Lora):
        identity += [adapters.scale, adapters.base_digest]
    sizes: dict[str, int] = {}
    for entry in stored_entries(weights.open_weights(directory)).values():
        sizes[entry.dtype.name] = sizes.get(entry.dtype.name, 0) + math.prod(entry.shape)
    step = None
    if "train_state.json" in digests.files:
        step = json.loads(files.read_file(directory, digests, "train_state.json"))["step"]
    identity_hex = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
    return Source(directory, model, lineage, step, identity_hex, max(sizes, key=sizes.get))


def last_learning_rate(source: Source) -> float:
    """The rate of the last step before the checkpoint. Raises InputError when no run of ours has recorded one."""
    try:
        config = ConfigDict(source.lineage["config"])
        rates = learning_rate(config.optimizer, schedule.total_steps(phases(config)))
        rate = float(rates(source.step - 1))
    except (KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"config.optimizer.learning_rate=None goes on at the rate of the stage before, but {source.directory} "
            f"({source.stage}) has no recorded schedule; set the rate"
        ) from error
    if not rate > 0:
        raise InputError(
            f"config.optimizer.learning_rate=None goes on at the rate of the stage before, but {source.directory} "
            f"ended at {rate}; set the rate"
        )
    return rate


def continue_learning_rate(config: ConfigDict, source: Source | None) -> ConfigDict:
    """`config` with a rate: that of the stage before where it asks for it, which is printed. Raises InputError."""
    if config.optimizer.learning_rate is not None:
        return config
    if source is None:
        raise InputError('config.optimizer.learning_rate=None is that of the stage before, but config.init_from=""')
    resolved = config.copy_and_resolve_references()
    resolved.optimizer.learning_rate = last_learning_rate(source)
    print(f"learning rate {resolved.optimizer.learning_rate:.3g}, at which {source.directory} ended", flush=True)
    return resolved
