"""Old names of modules: scripts that import them get the module of the new name, and a DeprecationWarning.

The finder comes last on sys.meta_path, so it is asked only for what no file answers: it cannot hide a module.
"""

import importlib
import importlib.machinery
import sys
import warnings

_PACKAGE = __package__ + "."
MOVED = {  # old name -> new name, both within the package
    "training.digest": "checkpoint.digest",
    "training.checkpoint_files": "checkpoint.files",
    "training.checkpoint_arrays": "checkpoint.arrays",
    "training.checkpoint_stream": "checkpoint.stream",
    "training.checkpoint": "checkpoint.weights",
    "training.saver": "checkpoint.saver",
    "training.merge": "checkpoint.merge",
    "training.describe": "checkpoint.describe",
    "training.progress": "checkpoint.progress",
    "training.hosts": "runtime.distributed",
    "training.process_data": "runtime.global_arrays",
    "training.ending": "runtime.failure",
    "training.watchdog": "runtime.watchdog",
    "training.preemption": "runtime.preemption",
    "training.workdir": "runtime.workdir_lock",
    "training.mirror": "runtime.remote_workdir",
    "training.patience": "runtime.retry",
    "training.metrics": "monitoring.metrics",
    "training.events": "monitoring.tensorboard",
    "training.goodput": "monitoring.goodput",
    "training.profiling": "monitoring.profiling",
    "training.curves": "monitoring.curves",
    "training.speed": "monitoring.mfu",
    "training.keeper": "training.save_policy",
    "training.saved_step": "training.compiled_step",
    "training.state": "training.train_state",
    "training.score_file": "checkpoint.score_file",
    "training.held_out": "training.supervised",
    "training.xla_options": "runtime.xla_options",
    "interop.tokenizer": "tokenizer",
    "interop.folder": "folder",
    "interop.token_text": "token_text",
    "interop.chat_template": "chat_template",
    "pod.chips": "chips",
    "pod.useful_flops": "model.useful_flops",
    "bench.rows": "pod.packings",
    "bench.kernel": "pod.attention_program",
    "attention.kernel_turn": "attention.kernel_rotary",
    "pictures": "plots",
    "sampling.flags": "sampling.decoding_flags",
}


class _Finder:
    def find_spec(self, fullname, path=None, target=None):
        new = MOVED.get(fullname.removeprefix(_PACKAGE)) if fullname.startswith(_PACKAGE) else None
        return None if new is None else importlib.machinery.ModuleSpec(fullname, _Loader(_PACKAGE + new))


class _Loader:
    def __init__(self, new: str):
        self.new = new

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        old = module.__name__
        # The import machinery's own frames are not counted: the warning points at the line that imports the old name.
        warnings.warn(f"{old} is now {self.new}", DeprecationWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(self.new)  # importers get what stands there when this returns


def install() -> None:
    """Lets old names be imported. A second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
