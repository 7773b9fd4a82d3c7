"""The real XPK, in an environment of its own: it pins PyYAML, packaging, urllib3 and (by google-api-core) protobuf to
versions older than ours, so it cannot be one of the test extras. Installed once a machine, in about a minute.
"""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "1.16.0"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llada_jax"


@pytest.fixture(scope="session")
def xpk():
    """The bin folder of an environment with XPK."""
    folder = _CACHE / f"xpk-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    _CACHE.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            subprocess.run([folder / "bin" / "pip", "install", "--quiet", f"xpk=={VERSION}"], check=True)
            (folder / "installed").touch()
    return folder / "bin"


def environment(home: Path) -> dict[str, str]:
    """Of XPK: it writes to its home, and would report each use."""
    return os.environ | {"HOME": str(home), "CLOUDSDK_CONFIG": str(home / "gcloud"), "TELEMETRY_ENABLED": "false"}


_TABLE = """
import json
from xpk.core.system_characteristics import AcceleratorType, UserFacingNameToSystemCharacteristics as table
print(json.dumps({name: row.topology for name, row in table.items() if row.accelerator_type == AcceleratorType.TPU}))
"""


def tpu_types(xpk: Path, home: Path) -> dict[str, str]:
    """{--tpu-type: topology}"""
    command = [xpk / "python", "-c", _TABLE]
    done = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


_MANIFEST = """
import json, sys, yaml
print(json.dumps(yaml.safe_load(open(sys.argv[1]))))
"""


def manifest(xpk: Path, home: Path, command: list[str]) -> dict:
    """What `xpk workload create ...` would apply to its cluster."""
    script = [
        xpk / "xpk",
        *command[1:],
        "--dry-run",
        "--skip-validation",
        f"--output-manifest-file={home / 'job.yaml'}",
    ]
    done = subprocess.run(script, env=environment(home), cwd=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    read = [xpk / "python", "-c", _MANIFEST, home / "job.yaml"]
    return json.loads(subprocess.run(read, capture_output=True, text=True, check=True).stdout)
