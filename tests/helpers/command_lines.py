"""Many command lines for the price of one: an interpreter that has imported jax forks for each."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from tests.helpers.environment import process_environment

ROOT = Path(__file__).parents[2]

_DRIVER = """
import json, os, runpy, sys, tempfile
import llada_jax.training.config, llada_jax.monitoring.metrics
results = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if not (child := os.fork()):
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv[:] = arguments
            sys.path.insert(0, os.path.dirname(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
            sys.exit()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        results.append((code, out.read().decode(), err.read().decode()))
print(json.dumps(results))
"""


def run_all(commands: Sequence[Sequence[object]], cwd=ROOT, **environment) -> list[SimpleNamespace]:
    """Runs each [script, argument, ...] as `python script argument ...` would; .returncode, .stdout and .stderr."""
    env = process_environment(PYTHONDONTWRITEBYTECODE="1", **environment)
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER], env=env, cwd=cwd, capture_output=True, text=True, timeout=300,
        input=json.dumps([list(map(str, command)) for command in commands]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(returncode=code, stdout=out, stderr=err) for code, out, err in json.loads(done.stdout)]
