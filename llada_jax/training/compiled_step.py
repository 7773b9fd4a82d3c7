"""A compiled training step in a file, so that a launch on a pod need not compile it again.

tools/rehearse.py --save writes it for a slice that is not there; config.compiled_step names it for the trainer. A step
is one for the model, the config, the mesh, the sources of this package and the versions of JAX and of the compiler
that it was made with: anything else is refused. Loading is tested on CPU; a step that was compiled for a TPU pod has
not been run on one. The file is a Python pickle: load your own only.
"""

import functools
import hashlib
import importlib.metadata
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.experimental import serialize_executable
from ml_collections import ConfigDict

from llada_jax.errors import InputError
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.training.config import skips_steps

# What the program depends on.
_SECTIONS = (
    "alignment", "seed", "batch", "schedule", "objective", "editing", "preference", "lora", "optimizer", "execution",
)  # fmt: skip


def identity(config: ConfigDict, model: ModelConfig | Lora, mesh, halves: str) -> dict[str, str]:
    """What a step is compiled for, by the name that a refusal gives it."""
    sections = json.loads(config.to_json())
    parts = {name: sections[name] for name in _SECTIONS} | {"length": config.data.length, "model": repr(model)}
    parts["guard"] = skips_steps(config)
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return {
        "JAX": jax.__version__,
        "sources of llada_jax": _sources(),
        "libtpu": _version("libtpu"),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "mesh": ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        "halves": halves,
        "config and model": digest[:16],
    }


def save(path: str, compiled: jax.stages.Compiled, made_for: dict[str, str]) -> None:
    """Writes a compiled step; the file appears when it is whole.

    A program for CPUs must have been compiled, not loaded from JAX's cache: JAX 0.10.2 to 0.12.0 saves that without a
    word, but what is loaded of it cannot be called (pod/lower.without_cache).
    """
    payload, in_tree, out_tree = serialize_executable.serialize(compiled)
    partial = Path(f"{path}.partial")
    partial.write_bytes(pickle.dumps({"made_for": made_for, "step": (payload, in_tree, out_tree)}))
    partial.replace(path)


def load(path: str, expected: dict[str, str], devices: Sequence[jax.Device]) -> jax.stages.Compiled:
    """The step on the devices of its mesh, a function of the arguments of make_train_step's but `halves`.

    Raises InputError when it cannot be read, or was made for anything else than `expected`.
    """
    try:
        saved = pickle.loads(Path(path).read_bytes())
        made_for, step = saved["made_for"], saved["step"]
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise InputError(f"config.compiled_step={path}: not a compiled step ({error})") from error
    for name, value in expected.items():
        if made_for.get(name) != value:
            raise InputError(
                f"config.compiled_step={path}: compiled for {name} {made_for.get(name)!r}, this run has {value!r}; "
                "rehearse it again with --save, or train without"
            )
    return serialize_executable.deserialize_and_load(*step, execution_devices=list(devices))


@functools.cache
def _sources() -> str:
    """Digest of the package's Python files, which the program was traced from."""
    package = Path(__file__).parent.parent
    files = sorted(package.rglob("*.py"))
    digests = [[str(file.relative_to(package)), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
