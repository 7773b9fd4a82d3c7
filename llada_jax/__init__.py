"""Block-diffusion language models (LLaDA2.0, arXiv 2512.15745) in JAX, from AR checkpoints, on TPU pods.

The names of `__all__` are the public surface, everything else may move. Each has a docstring with an example. They are
imported when they are first asked for: `import llada_jax` alone imports neither JAX nor NumPy.

    import_checkpoint, export_checkpoint    from Hugging Face or GGUF, and back to Hugging Face
    load_checkpoint, load_params, save_params, merge_checkpoints
    ModelConfig, preset, init               a model's values, those published, and random weights
    forward, denoise, block_diffusion_mask  logits of one pass, of [x_t | x_0], and the mask of Eq. 3
    Objective, loss, wsd_schedule           BDLM, MDLM, SFT, CAP; block sizes of Warmup-Stable-Decay
    train, stages                           the trainer, and configs of ar, wsd, sft, cap and dpo for it
    generate, GenerateConfig                answers to prompts
    serve, Request                          answers by continuous batching
    make_batch, block_nelbo                 rows of tokens, and their likelihood
    InputError                              what the user can mend
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING

from llada_jax import _moved

if TYPE_CHECKING:
    from llada_jax.attention.visibility import block_diffusion_mask as block_diffusion_mask
    from llada_jax.checkpoint.merge import merge_checkpoints as merge_checkpoints
    from llada_jax.checkpoint.weights import load_checkpoint as load_checkpoint
    from llada_jax.checkpoint.weights import load_params as load_params
    from llada_jax.checkpoint.weights import save_params as save_params
    from llada_jax.data.order import make_batch as make_batch
    from llada_jax.diffusion.loss import loss as loss
    from llada_jax.diffusion.objectives import Objective as Objective
    from llada_jax.diffusion.schedule import wsd as wsd_schedule  # noqa: F401
    from llada_jax.errors import InputError as InputError
    from llada_jax.evaluation.likelihood import block_nelbo as block_nelbo
    from llada_jax.interop.convert import import_checkpoint as import_checkpoint
    from llada_jax.interop.export import export_checkpoint as export_checkpoint
    from llada_jax.model.config import ModelConfig as ModelConfig
    from llada_jax.model.config import preset as preset
    from llada_jax.model.forward import denoise as denoise
    from llada_jax.model.forward import forward as forward
    from llada_jax.model.parameters import initialize as init  # noqa: F401
    from llada_jax.sampling.batching import Request as Request
    from llada_jax.sampling.batching import serve as serve
    from llada_jax.sampling.generate import GenerateConfig as GenerateConfig
    from llada_jax.sampling.generate import generate as generate
    from llada_jax.training import stages as stages
    from llada_jax.training.loop import train as train

_NAMES = {  # public name -> module within the package, and :name there where that is another; ":" alone is the module
    "GenerateConfig": "sampling.generate",
    "InputError": "errors",
    "ModelConfig": "model.config",
    "Objective": "diffusion.objectives",
    "Request": "sampling.batching",
    "block_diffusion_mask": "attention.visibility",
    "block_nelbo": "evaluation.likelihood",
    "denoise": "model.forward",
    "export_checkpoint": "interop.export",
    "forward": "model.forward",
    "generate": "sampling.generate",
    "import_checkpoint": "interop.convert",
    "init": "model.parameters:initialize",
    "load_checkpoint": "checkpoint.weights",
    "load_params": "checkpoint.weights",
    "loss": "diffusion.loss",
    "make_batch": "data.order",
    "merge_checkpoints": "checkpoint.merge",
    "preset": "model.config",
    "save_params": "checkpoint.weights",
    "serve": "sampling.batching",
    "stages": "training.stages:",
    "train": "training.loop",
    "wsd_schedule": "diffusion.schedule:wsd",
}

__all__ = list(_NAMES)


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place, colon, attribute = _NAMES[name].partition(":")
    value = importlib.import_module(f"{__name__}.{place}")
    if attribute or not colon:
        value = getattr(value, attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Keeps `llada_jax.train` the function.

    The module llada_jax.train is the command. The import system sets a submodule as an attribute of its package, and so
    the command would take the function's place in a process that imports both.
    """

    @property
    def train(self):
        return __getattr__("train")

    @train.setter
    def train(self, module) -> None:
        pass


sys.modules[__name__].__class__ = _Package
_moved.install()
