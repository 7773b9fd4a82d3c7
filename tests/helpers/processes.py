"""Trainers of several processes, each with fake CPU devices of its own."""

import contextlib
import random
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

from llada_jax.runtime import distributed
from tests.helpers.command_lines import Process
from tests.helpers.environment import process_environment

ROOT = Path(__file__).parents[2]
TRAINER = (str(ROOT / "tests" / "helpers" / "small_trainer.py"),)


def small_run(last_steps: int = 8, save_every: int = 4) -> list[str]:
    """A model, and a curriculum of 6 + last_steps steps, that take seconds; no data, no workdir."""
    return [
        f"--config={ROOT}/configs/wsd.py:tiny_hosts,length=32",
        "--config.batch.rows=8",
        "--config.data.held_out_rows=4",
        "--config.schedule.warmup_blocks=(1,4)",
        "--config.schedule.warmup_steps=(2,2)",
        "--config.schedule.stable_steps=0",  # another program
        "--config.schedule.decay_blocks=(16,8)",
        f"--config.schedule.decay_steps=(2,{last_steps})",
        f"--config.checkpoint.every_steps={save_every}",
        "--config.checkpoint.keep_last=None",
        "--config.evaluation.every_steps=10",
        "--config.evaluation.block_sizes=(8,)",
        "--config.evaluation.rows=4",
        "--config.log_every_steps=1",
    ]


def start(
    arguments: Sequence[str],
    logs: Path,
    processes: int = 2,
    devices: int = 2,
    program: Sequence[str] = TRAINER,
    own: dict[int, Sequence[str]] | None = None,
    missing: Sequence[int] = (),
    **environment: str,
) -> list[Process]:
    """Starts the processes of one run. Process i appends to LOGS/i.out and LOGS/i.err; own: more arguments of some.

    devices: of each process. missing: processes that are not started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    env = process_environment(devices, **environment)
    peers = [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"] if processes > 1 else []
    running = []
    for i in sorted({*range(processes)} - {*missing}):
        which = [f"--process={i}"] if processes > 1 else []
        command = [*program, *arguments, *peers, *which, *(own or {}).get(i, ())]
        running.append(Process(command, env, logs / f"{i}.out", logs / f"{i}.err"))
    return running


def run(*arguments, **more) -> list[int]:
    """Exit codes of what `start` starts; again, as a supervisor does, when the processes lost each other.

    Gloo waits 30 seconds for a process that a busy machine holds up.
    """
    for _ in range(3):
        found = codes(start(*arguments, **more), 300)
        if distributed.LOST_PEER not in found:
            break
    return found


def free_port() -> int:
    """None of those that the system gives to whoever asks for any, and so perhaps to another test meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("localhost", port))
            return port


def codes(running: Sequence[Process], seconds: float = 300) -> list[int]:
    """Exit codes; what is left after `seconds` is killed and counts as -9."""
    try:
        return [process.wait(seconds) for process in running]
    except subprocess.TimeoutExpired:
        return [kill(process) for process in running]
    finally:
        for process in running:
            kill(process)


def kill(process: Process) -> int:
    process.kill()
    return process.wait()


def text(logs: Path, process: int, stream: str) -> str:
    """Without the lines that gloo prints, whose threads break into each other's: a number of theirs may stand alone."""
    lines = (logs / f"{process}.{stream}").read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r"\[Gloo\]|connected peer ranks|^\d*$", line))
