"""The environment of the tests' processes: fake CPU devices, and programs that are compiled in little time."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def xla_flags(devices: int) -> str:
    """What runs for a moment is not worth optimising: most of the suite's time is compiling."""
    return " ".join(
        [
            f"--xla_force_host_platform_device_count={devices}",
            # Devices on two busy cores are slow to meet, not stuck.
            "--xla_cpu_collective_call_terminate_timeout_seconds=600",
            "--xla_backend_optimization_level=0",
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_parallel_codegen_split_count=1",
            # JAX 0.10's new emitters of fused loops take two thirds of the time; 0.12 has no others and ignores this.
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true",
        ]
    )


def process_environment(devices: int = 1, **more: str) -> dict[str, str]:
    """The environment of a process with so many devices that imports this package."""
    own = {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices), "PYTHONHASHSEED": "0"}  # no program starts again
    # One that another process is just writing: it is compiled then. Tests read what processes say.
    own |= {"PYTHONWARNINGS": "ignore:Error reading persistent compilation cache entry"}
    return os.environ | own | more


def examples(few: int, many: int) -> int:
    """How many examples of a property the suite tries, and how many with --soak (where each compiles a program)."""
    return many if os.environ.get("LLADA_JAX_SOAK") else few
