"""Public training runs of MaxText on TPUs whose step was timed: what was run, and what was measured.

The runs of rows with an odd number fit the constants of llada_jax/chips.py, those of rows with an even number only test
them: chosen before any was estimated. `settings` and `flags` are those of the source, less what does not change the
program (profiler, paths, number of steps). Where no seconds are published, estimate.measured_seconds takes them from
the rate and MaxText's count of FLOPs.
"""

import dataclasses
from pathlib import Path

from recipes import (
    ALL_REDUCE_LAYOUT,
    DENSE_VMEM,
    FLASH,
    FUSE_GATHERS,
    FUSED,
    GEMMA4_TILES,
    GEMMA_12B,
    HOST_OFFLOAD,
    IRONWOOD_SPARSECORE,
    LLAMA_8B,
    MOE_VMEM,
    NO_COLLECTIVE_MATMUL,
    OFFLOADED_QKV,
    OVER_SLICES,
    OVERLAP_DATA_PARALLEL,
    TOKAMAX_SPLASH,
    TRILLIUM_DENSE,
    V5E_FLAGS,
    V5P_FLAGS,
    blocks,
)

_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes training/"
_MAXTEXT = "github.com/AI-Hypercomputer/maxtext "
_READ = "2026-08-07"  # the commit of tpu-recipes, c8cfe2f

# MaxText as released shortly after the runs, with the packages of that day: {month: (requirements, day)}. They bring
# JAX 0.7.2 and libtpu 0.0.23, 0.9.2 and 0.0.38, 0.10.2 and 0.0.42.1, 0.12.0.1 and 0.0.52. 0.1.0 names not all it needs.
COMPILERS = {
    "2025-09": (("maxtext[tpu]==0.1.0", "qwix"), "2025-09-20"),
    "2026-03": (("maxtext[tpu]==0.2.1",), "2026-03-28"),
    "2026-06": (("maxtext[tpu]==0.2.3",), "2026-06-20"),
    "2026-11": (("maxtext[tpu]==0.2.5",), "2026-11-28"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A public run. row: of the list it was chosen from; runs of one source share it.

    compiler: of COMPILERS, the closest to that of the run that knows its settings.
    measured_bytes: of a device, as the compiler of the run gave it. apart: compiled by a compiler more than a year
    newer than the run; neither fits nor tests.
    """

    row: int
    compiler: str
    topology: str  # of one slice, as llada_jax.chips names it
    slices: int = 1
    settings: dict
    flags: str = ""
    seconds: float | None = None  # neither seconds nor tflops: not timed
    tflops: float | None = None  # per second and device, where the seconds are not published
    attention_in_full: bool = False  # in `tflops`: as MaxText counted it before its pull request 1988
    mfu: float | None = None
    measured_bytes: float | None = None
    jax: str = ""  # of the measurement, where its source names it
    source: str
    date: str
    apart: bool = False

    @property
    def half(self) -> str:
        """fit, test, apart or untimed."""
        if self.seconds is None and self.tflops is None:
            return "untimed"
        return "apart" if self.apart else "fit" if self.row % 2 else "test"


RUNS = {
    "deepseek2_16b_v5p_4": Run(
        row=1,
        compiler="2025-09",
        topology="v5p:2x2x1",
        settings={"model_name": "deepseek2-16b", "per_device_batch_size": 24, "max_target_length": 2048},
        seconds=5.667,
        mfu=0.294,
        measured_bytes=100.4 * 2**30,  # the log's GB are GiB: 15.9 G parameters x 12 bytes / 4 are its 44.5
        jax="0.7.2.dev20250826",
        source=_MAXTEXT + "docs/guides/monitoring_and_debugging/understand_logs_and_metrics.md",
        date="2026-08-22",
    ),
    "llama31_8b_v6e_8": Run(
        row=2,
        compiler="2025-09",
        topology="v6e:2x4",
        settings=LLAMA_8B | {"per_device_batch_size": 3},
        flags=f"{TRILLIUM_DENSE} {NO_COLLECTIVE_MATMUL}",
        seconds=3.443,
        mfu=0.450,
        jax="0.6.1",
        source=_RECIPES + "trillium/Llama3.1-8B-MaxText/v6e-8",
        date=_READ,
    ),
    "llama31_8b_v6e_64": Run(
        row=3,
        compiler="2025-09",
        topology="v6e:8x8",
        settings=LLAMA_8B | {"per_device_batch_size": 5},
        flags=TRILLIUM_DENSE,
        seconds=5.652,
        mfu=0.457,
        jax="0.6.1",
        source=_RECIPES + "trillium/Llama3.1-8B-MaxText/v6e-64",
        date=_READ,
    ),
    "llama31_8b_v6e_256": Run(
        row=3,
        compiler="2025-09",
        topology="v6e:16x16",
        settings=LLAMA_8B | {"per_device_batch_size": 4},
        flags=TRILLIUM_DENSE,
        seconds=4.546,
        mfu=0.455,
        jax="0.6.1",
        source=_RECIPES + "trillium/Llama3.1-8B-MaxText/v6e-256",
        date=_READ,
    ),
    "mistral_7b_v6e_8": Run(
        row=4,
        compiler="2025-09",
        topology="v6e:2x4",
        settings=LLAMA_8B | {"model_name": "mistral-7b", "per_device_batch_size": 6},
        flags=f"{TRILLIUM_DENSE} {NO_COLLECTIVE_MATMUL}",
        seconds=6.320,
        mfu=0.471,
        jax="0.5.2",
        source=_RECIPES + "trillium/Mistral-7B-MaxText",
        date=_READ,
    ),
    "llama31_70b_v6e_32": Run(
        row=5,
        compiler="2025-09",
        topology="v6e:4x8",
        settings={"model_name": "llama3.1-70b", "per_device_batch_size": 2, "max_target_length": 8192}
        | {"ici_fsdp_parallelism": -1, "weight_dtype": "bfloat16"}
        | OFFLOADED_QKV
        | FLASH
        | FUSED
        | blocks(*[2048] * 8),
        flags=" ".join(
            (
                DENSE_VMEM,
                ALL_REDUCE_LAYOUT,
                OVERLAP_DATA_PARALLEL,
                FUSE_GATHERS,
                HOST_OFFLOAD,
                NO_COLLECTIVE_MATMUL,
            )
        ),
        seconds=17.790,
        mfu=0.483,
        jax="0.6.1",
        source=_RECIPES + "trillium/Llama3.1-70B-MaxText/v6e-32",
        date=_READ,
    ),
    "mixtral_8x7b_v6e_256": Run(
        row=7,
        compiler="2025-09",
        topology="v6e:16x16",
        settings={"model_name": "mixtral-8x7b", "per_device_batch_size": 12, "max_target_length": 4096}
        | {"ici_fsdp_parallelism": -1, "out_proj": "offload", "megablox": False, "sparse_matmul": False}
        | {"capacity_factor": 1.25, "sa_block_q": 2048, "sa_block_q_dkv": 2048, "sa_block_q_dq": 2048}
        | OFFLOADED_QKV
        | FLASH,
        flags=f"{MOE_VMEM} {FUSE_GATHERS} {OVERLAP_DATA_PARALLEL}",
        seconds=13.484,
        mfu=0.329,
        jax="0.5.2",
        source=_RECIPES + "trillium/Mixtral-8x7B-MaxText",
        date=_READ,
    ),
    "gemma3_12b_v6e_256": Run(
        row=10,
        compiler="2026-03",  # 0.1.0 has no num_vocab_tiling
        topology="v6e:16x16",
        settings=GEMMA_12B | {"ici_fsdp_parallelism": -1},
        flags="--xla_tpu_scoped_vmem_limit_kib=122880",
        seconds=7.318,
        mfu=0.381,
        jax="0.6.1",
        source=_RECIPES + "trillium/Gemma3-12B-MaxText/v6e-256",
        date=_READ,
    ),
    "gemma3_12b_v6e_256_x2": Run(
        row=10,
        compiler="2026-03",  # 0.1.0 has no num_vocab_tiling
        topology="v6e:16x16",
        slices=2,
        settings=GEMMA_12B | OVER_SLICES,
        flags="--xla_tpu_scoped_vmem_limit_kib=122880",
        seconds=7.793,
        mfu=0.357,
        jax="0.6.1",
        source=_RECIPES + "trillium/Gemma3-12B-MaxText/2x-v6e-256",
        date=_READ,
    ),
    "gemma3_12b_v6e_256_x4": Run(
        row=10,
        compiler="2026-03",  # 0.1.0 has no num_vocab_tiling
        topology="v6e:16x16",
        slices=4,
        settings=GEMMA_12B | OVER_SLICES,
        flags="--xla_tpu_scoped_vmem_limit_kib=122880",
        seconds=8.390,
        mfu=0.332,
        jax="0.6.1",
        source=_RECIPES + "trillium/Gemma3-12B-MaxText/4x-v6e-256",
        date=_READ,
    ),
    "dense_32b_v5p_64": Run(
        row=14,
        compiler="2025-09",
        topology="v5p:4x4x4",
        settings={"per_device_batch_size": 6, "remat_policy": "minimal", "global_parameter_scale": 32}
        | {"ici_fsdp_parallelism": -1, "ici_tensor_parallelism": 4, "max_target_length": 2048, "quantization": ""}
        | FLASH,
        flags=V5P_FLAGS,
        tflops=328,
        attention_in_full=True,
        mfu=0.715,
        source=_MAXTEXT + "MaxText/configs/v5p/32b.sh and README.md at 04262f3",
        date="2024-03-22",
        apart=True,
    ),
    "dense_16b_v5e_256": Run(
        row=15,
        compiler="2025-09",
        topology="v5e:16x16",
        settings={"per_device_batch_size": 6, "remat_policy": "full", "global_parameter_scale": 16}
        | {"max_target_length": 2048}
        | FLASH,
        flags=V5E_FLAGS,
        tflops=120,
        attention_in_full=True,
        mfu=0.611,
        source=_MAXTEXT + "MaxText/configs/v5e/16b.sh and README.md at 04262f3",
        date="2024-03-22",
        apart=True,
    ),
    "dense_32b_v5e_256": Run(
        row=15,
        compiler="2025-09",
        topology="v5e:16x16",
        settings={"per_device_batch_size": 4, "global_parameter_scale": 32, "max_target_length": 2048}
        | {"remat_policy": "full"}
        | FLASH,
        flags=V5E_FLAGS,
        tflops=132,
        attention_in_full=True,
        mfu=0.669,
        source=_MAXTEXT + "MaxText/configs/v5e/32b.sh and README.md at 04262f3",
        date="2024-03-22",
        apart=True,
    ),
    "dense_64b_v5e_256": Run(
        row=15,
        compiler="2025-09",
        topology="v5e:16x16",
        settings={"per_device_batch_size": 2, "global_parameter_scale": 64, "max_target_length": 2048}
        | {"remat_policy": "full"}
        | FLASH,
        flags=V5E_FLAGS,
        tflops=118,
        attention_in_full=True,
        mfu=0.599,
        source=_MAXTEXT + "MaxText/configs/v5e/64b.sh and README.md at 04262f3",
        date="2024-03-22",
        apart=True,
    ),
    "dense_16b_v5e_256_x2": Run(
        row=15,
        compiler="2025-09",
        topology="v5e:16x16",
        slices=2,
        settings={"per_device_batch_size": 6, "global_parameter_scale": 16, "max_target_length": 2048}
        | {"remat_policy": "full"}
        | FLASH,
        flags=V5E_FLAGS,
        tflops=117,
        attention_in_full=True,
        mfu=0.594,
        source=_MAXTEXT + "MaxText/configs/v5e/16b.sh and README.md at 04262f3",
        date="2024-03-22",
        apart=True,
    ),
    "dense_64b_v5p_64": Run(
        row=14,
        compiler="2025-09",
        topology="v5p:4x4x4",
        settings={"per_device_batch_size": 3, "global_parameter_scale": 64, "max_target_length": 2048}
        | {"remat_policy": "minimal", "ici_fsdp_parallelism": -1, "ici_tensor_parallelism": 4, "quantization": ""}
        | FLASH,
        flags=V5P_FLAGS,
        tflops=323,
        attention_in_full=True,
        mfu=0.703,
        source=_MAXTEXT + "MaxText/configs/v5p/64b.sh and README.md at 04262f3",
        date="2024-03-22",
        apart=True,
    ),
    "gemma4_26b_tpu7x_64": Run(
        row=16,
        compiler="2026-06",
        topology="tpu7x:4x4x4",
        settings={"model_name": "gemma4-26b", "per_device_batch_size": 16, "max_target_length": 4096}
        | {"num_vocab_tiling": 1, "remat_policy": "full", "decoder_layer_input": "offload", "dtype": "bfloat16"}
        | {"allow_split_physical_axes": True, "ici_fsdp_transpose_parallelism": 1, "ici_fsdp_parallelism": -1}
        | {"megablox": True, "sparse_matmul": True, "use_custom_sort_vjp": True}
        | GEMMA4_TILES
        | TOKAMAX_SPLASH
        | blocks(1024, 1024, 512, 1024, 1024, 256),
        flags=IRONWOOD_SPARSECORE,
        seconds=5.54,
        mfu=0.257,
        jax="0.10.2.dev20260603",
        source=_RECIPES + "ironwood/gemma4-26b/4k-bf16-tpu7x-4x4x4",
        date=_READ,
    ),
    "gemma4_e4b_tpu7x_64": Run(
        row=20,
        compiler="2026-06",
        topology="tpu7x:4x4x4",
        settings={"model_name": "gemma4-e4b", "scan_layers": False, "per_device_batch_size": 2, "dtype": "bfloat16"}
        | {"max_target_length": 8192, "num_vocab_tiling": 8, "remat_policy": "full"}
        | {"allow_split_physical_axes": True, "ici_data_parallelism": 4, "ici_fsdp_parallelism": -1}
        | TOKAMAX_SPLASH
        | blocks(1024, 1024, 512, 1024, 1024, 256),
        flags=IRONWOOD_SPARSECORE,
        seconds=0.97,
        mfu=0.435,
        jax="0.10.2.dev20260603",
        source=_RECIPES + "ironwood/gemma4-4b/8k-bf16-tpu7x-4x4x4",
        date=_READ,
    ),
    "llama31_70b_tpu7x_64": Run(
        row=21,
        compiler="2026-03",
        topology="tpu7x:4x4x4",
        settings={"model_name": "llama3.1-70b", "per_device_batch_size": 2, "max_target_length": 8192}
        | {"dtype": "bfloat16", "remat_policy": "custom", "mu_dtype": "bfloat16", "ici_fsdp_parallelism": -1}
        | dict.fromkeys(
            ("decoder_layer_input", "context", "query_proj", "key_proj", "value_proj", "qkv_proj"), "device"
        )
        | {"sa_q_layout": "SEQ_MINOR", "sa_k_layout": "SEQ_MINOR", "sa_v_layout": "HEAD_DIM_MINOR"}
        | TOKAMAX_SPLASH
        | blocks(*[2048] * 6),
        flags="--xla_tpu_scoped_vmem_limit_kib=61440 --xla_tpu_bf16_emission_mode=NATIVE_EMISSION "
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
        "--xla_tpu_use_single_sparse_core_for_all_gather_offload=true",
        seconds=12.20,
        mfu=0.523,
        jax="0.8.2.dev20251215",
        source=_RECIPES + "ironwood/llama3.1-70b/8k-bf16-tpu7x-4x4x4",
        date=_READ,
    ),
    "qwen3_235b_tpu7x_256": Run(
        row=18,
        compiler="2026-03",
        topology="tpu7x:4x8x8",
        settings={"model_name": "qwen3-235b-a22b", "per_device_batch_size": 16, "max_target_length": 4096}
        | {"dtype": "bfloat16", "weight_dtype": "float32", "remat_policy": "custom", "decoder_layer_input": "offload"}
        | {"use_custom_sort_vjp": True, "use_random_routing": True, "megablox": False, "sparse_matmul": True}
        | {"use_tokamax_gmm": True, "ici_fsdp_transpose_parallelism": 1, "ici_fsdp_parallelism": -1}
        | {"use_tokamax_splash": True, "attention": "flash"}
        | FUSED
        | {"sa_q_layout": "HEAD_DIM_MINOR", "sa_k_layout": "SEQ_MINOR", "sa_v_layout": "HEAD_DIM_MINOR"}
        | blocks(1024, 1024, 512, 2048, 2048, 1024, 1024, 1024),
        flags="--xla_tpu_scoped_vmem_limit_kib=61440 "
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
        f"--xla_tpu_use_single_sparse_core_for_all_gather_offload=true {HOST_OFFLOAD}",
        seconds=30.87,
        mfu=0.273,
        jax="0.9.2.dev20260306",
        source=_RECIPES + "ironwood/qwen3-235b-a22b/4k-bf16-tpu7x-4x8x8",
        date=_READ,
    ),
}
# Not timed by anyone: its estimate stands beside that of our own step of the model (llada_jax/pod/README.md).
RUNS["qwen3_30b_a3b_v5p_64"] = Run(
    row=0,
    compiler="2026-11",
    topology="v5p:4x4x4",
    settings={"model_name": "qwen3-30b-a3b", "per_device_batch_size": 2, "max_target_length": 4096}
    | {"remat_policy": "full"},
    source=_MAXTEXT + "0.2.5, defaults and full remat",
    date="2026-10-02",
)
for _name in ("deepseek2_16b_v5p_4", "dense_16b_v5e_256"):
    RUNS[f"{_name}_today"] = dataclasses.replace(RUNS[_name], compiler="2026-11", apart=True)


def recorded(name: str) -> tuple[Path, Path]:
    """The files of a compiled run: its scheduled program, and what is known of its kernels. A folder per chip."""
    folder = Path(__file__).resolve().parent / "compiled" / RUNS[name].topology.partition(":")[0]
    return folder / f"{name}.hlo.xz", folder / f"{name}.json"
