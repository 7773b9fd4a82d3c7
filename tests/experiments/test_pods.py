"""The configs of pod launches: they fit their slices, and say what was rehearsed."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from llada_jax import config_flag
from llada_jax.chips import parse_topology
from llada_jax.errors import InputError
from llada_jax.training.config import check
from tests.helpers.experiments import load

ROOT = Path(__file__).resolve().parents[2]
PODS = load("pods", "rehearse")
CONFIG = load("pods", "config")


@pytest.mark.parametrize("name", CONFIG.LAUNCHES)
def test_a_config_shares_its_rows_out_over_its_slices(name):
    launch = CONFIG.LAUNCHES[name]
    config = CONFIG.get_config(name)
    check(config)
    devices = parse_topology(launch.topology).num_devices * launch.slices
    sizes = dict(config.mesh)
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    assert math.prod(sizes.values()) == devices and sizes["data"] % launch.slices == 0
    assert config.batch.rows % (devices // sizes["tensor"]) == 0


@pytest.mark.parametrize("name", CONFIG.LAUNCHES)
def test_what_the_docstring_says_was_rehearsed(name):
    values, launch = PODS.recorded()[name], CONFIG.LAUNCHES[name]
    words = " ".join(CONFIG.__doc__.split())
    assert f"python {' '.join(PODS.command(name))} {PODS.summary(values)}" in words
    assert values["fits"] and (values["topology"], values["slices"]) == (launch.topology, launch.slices)
    config = config_flag.load([f"--config={ROOT / 'experiments' / 'pods' / 'config.py'}:{name}"])
    assert values["global_clean_tokens"] == config.batch.rows * config.data.length


def test_the_readme_has_the_table():
    assert PODS.table(PODS.recorded()) in (ROOT / "llada_jax" / "pod" / "README.md").read_text()


def test_an_unknown_name_is_one_line():
    command = [sys.executable, str(ROOT / "experiments" / "pods" / "rehearse.py"), "mini_v4"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "error: mini_v4: no such config here; there are mini_v5p, mini_v6e, mini_v5e, mini_tpu7x, flash_v5p, "
        "flash_v6e, flash_tpu7x\n"
    )


def test_an_unknown_launch_is_named():
    with pytest.raises(InputError, match="'mini_v4', expected one of mini_v5p, mini_v6e"):
        CONFIG.get_config("mini_v4")
