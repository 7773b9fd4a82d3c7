"""Trains a model by the stages of LLaDA2.0.

python -m llada_jax.train --config=configs/wsd.py:MODEL --workdir=DIR [--config.FIELD=VALUE ...]

MODEL is a preset (tiny, tiny_moe, smollm2_135m, llada2_mini, ...); the config file says which options it takes.
A second run with the same DIR resumes from its newest checkpoint. On several hosts, every host runs this command with a
DIR that all share. TPU VMs find each other; other machines need --coordinator, --processes and --process.
"""

from absl import flags
from ml_collections import config_flags

from llada_jax import command_line, errors
from llada_jax.config_flag import resolved

_CONFIG = config_flags.DEFINE_config_file("config", None, "Training config, FILE.py:MODEL[,option=N].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints and metrics; made if it does not exist.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; by default found on TPU VMs.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes of the run; as --coordinator.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0; as --coordinator.")
_PEER_TIMEOUT = flags.DEFINE_integer("peer_timeout", 100, "Seconds of silence after which a process counts as dead.")
_START_TIMEOUT = flags.DEFINE_integer("start_timeout", 300, "Seconds that processes wait for each other to start.")


def main(argv) -> None:
    del argv
    if _CONFIG.value is None or not _WORKDIR.value:
        raise errors.InputError("--config=FILE.py:MODEL and --workdir=DIR are required; see --help")
    config = resolved(_CONFIG)
    if config.rl.enabled and __name__ == "__main__":
        command_line.fix_string_hashes()
    from llada_jax.runtime import distributed  # importing jax takes seconds: not before the flags are right

    peers = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    distributed.connect(*peers, peer_timeout=_PEER_TIMEOUT.value, start_timeout=_START_TIMEOUT.value)
    from llada_jax.runtime.failure import failing_together
    from llada_jax.training.loop import train

    with failing_together(_PEER_TIMEOUT.value):
        train(config, _WORKDIR.value)


if __name__ == "__main__":
    command_line.run(main)
