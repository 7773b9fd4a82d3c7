"""Command lines for the price of a fork: one interpreter, which has imported what they import, forks for each."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

from tests.helpers.environment import process_environment

ROOT = Path(__file__).parents[2]

# Reads requests, a line each: a command to start, answered by its process id, or an id, answered by its exit code or
# null while it runs. A forked process ends as those of multiprocessing do: to take down what was imported costs more
# than most commands.
_FORKER = """
import atexit, gc, json, os, runpy, sys, threading, traceback
import llada_jax.data.pack, llada_jax.evaluation.likelihood, llada_jax.evaluation.needle, llada_jax.interop.convert
import llada_jax.sampling.batching, llada_jax.training.loop


def run(command, environment, streams, cwd):
    for number, name in enumerate(streams):
        stream = os.open(name, os.O_RDWR | (os.O_CREAT | os.O_APPEND if number else 0))
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = open(0, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv[:] = command
    try:
        if sys.argv[0] == "-c":
            del sys.argv[1]
            exec(command[1], {"__name__": "__main__"})
        elif sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(sys.argv[0])
            runpy.run_path(sys.argv[0], run_name="__main__")
        return 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()


answers = os.dup(1)
os.set_inheritable(answers, False)
gc.collect()
gc.freeze()
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, int):
        ended, status = os.waitpid(request, os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if ended else None
    elif not (answer := os.fork()):
        os.close(answers)
        os._exit(run(**request))
    os.write(answers, f"{json.dumps(answer)}\\n".encode())
"""


@functools.cache
def _forker() -> subprocess.Popen:
    env = process_environment(PYTHONDONTWRITEBYTECODE="1")
    pipe = subprocess.PIPE
    forker = subprocess.Popen([sys.executable, "-c", _FORKER], env=env, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)

    @atexit.register
    def end():
        forker.stdin.close()
        forker.wait()

    return forker


def _ask(request):
    forker = _forker()
    forker.stdin.write(f"{json.dumps(request)}\n")
    forker.stdin.flush()
    return json.loads(forker.stdout.readline())


class Process:
    """`python COMMAND...`, where COMMAND is a script, -m and a module or -c and code; used as a subprocess.Popen is.

    out, err: files that what it prints is appended to. stdin: a file. Its environment's JAX_ variables are those of
    this process: jax reads them when it is imported.
    """

    def __init__(
        self, command: Sequence[object], env: Mapping[str, str], out: Path, err: Path, stdin=os.devnull, cwd=ROOT
    ):
        for file in (out, err):
            file.touch()  # the child opens them later than this returns
        streams = [str(stdin), str(out), str(err)]
        request = dict(command=list(map(str, command)), environment=dict(env), streams=streams, cwd=str(cwd))
        self.pid, self.returncode = _ask(request), None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[object], cwd=ROOT, stdin: str = "", timeout: float = 300, **environment: str
) -> SimpleNamespace:
    """Runs [script, argument, ...] as `python script argument ...` would; .returncode, .stdout and .stderr."""
    env = process_environment(PYTHONDONTWRITEBYTECODE="1", **environment)
    with tempfile.TemporaryDirectory() as folder:
        out, err, given = (Path(folder) / name for name in ("out", "err", "in"))
        given.write_text(stdin)
        process = Process(command, env, out, err, given, cwd)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return SimpleNamespace(returncode=code, stdout=out.read_text(), stderr=err.read_text())


def run_all(commands: Sequence[Sequence[object]], cwd=ROOT, **environment: str) -> list[SimpleNamespace]:
    """`run` of each command, in order."""
    return [run(command, cwd, **environment) for command in commands]
