"""Public training runs of MaxText on TPUs whose step was timed: what was run, and what was measured.

RUNS has a row per run. The rows with an odd number fit the constants of llada_jax/chips.py, those with an even number
only test them: chosen before any was estimated. `settings` and `flags` are those of the source, less what does not
change the program (profiler, paths, number of steps).

MaxText's rate in TFLOP/s per device, where no seconds are published, gives them by `counted_flops`.
"""

import dataclasses

# benchmarks/xla_flags_library.py of MaxText at tag tpu-recipes-v0.1.4; its chip_config_name is that of another runtime.
_DENSE_VMEM = "--xla_tpu_scoped_vmem_limit_kib=98304"
_MOE_VMEM = "--xla_tpu_scoped_vmem_limit_kib=81920"
_FUSE_GATHERS = (
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
_SPARSECORE_ALL_REDUCE = (
    "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
    "--xla_tpu_enable_all_reduce_offload_tracing=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_sc_enable_instruction_fusion=false --xla_sc_disjoint_spmem=false --xla_sc_disable_megacore_partitioning=true"
)
_ALL_REDUCE_LAYOUT = (
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 --xla_tpu_assign_all_reduce_scatter_layout=true"
)
_OVERLAP_DATA_PARALLEL = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
_HOST_OFFLOAD = (
    "--xla_tpu_enable_all_experimental_scheduler_features=true "
    "--xla_tpu_enable_scheduler_memory_pressure_tracking=true --xla_tpu_host_transfer_overlap_limit=24 "
    "--xla_tpu_aggressive_opt_barrier_removal=ENABLED --xla_lhs_prioritize_async_depth_over_stall=ENABLED "
    "--xla_tpu_enable_ag_backward_pipelining=true --xla_should_allow_loop_variant_parameter_in_chain=ENABLED "
    "--xla_should_add_loop_invariant_op_in_chain=ENABLED --xla_max_concurrent_host_send_recv=100 "
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 --xla_latency_hiding_scheduler_rerun=2"
)
_NO_COLLECTIVE_MATMUL = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
_TRILLIUM_DENSE = " ".join(
    (_DENSE_VMEM, _ALL_REDUCE_LAYOUT, _OVERLAP_DATA_PARALLEL, _FUSE_GATHERS, _SPARSECORE_ALL_REDUCE, _HOST_OFFLOAD)
)

_SPLASH_BLOCKS = (
    "sa_block_q", "sa_block_kv", "sa_block_kv_compute", "sa_block_q_dkv", "sa_block_kv_dkv", "sa_block_kv_dkv_compute",
    "sa_block_q_dq", "sa_block_kv_dq",
)  # fmt: skip


def _blocks(*sizes: int) -> dict:
    return dict(zip(_SPLASH_BLOCKS, sizes, strict=False))


_FLASH = {"attention": "flash", "use_iota_embed": True}
_FUSED = {"sa_use_fused_bwd_kernel": True}
_OFFLOADED_QKV = {
    "remat_policy": "custom", "decoder_layer_input": "offload", "query_proj": "offload", "key_proj": "offload",
    "value_proj": "offload",
}  # fmt: skip
_LLAMA_8B = (
    {"model_name": "llama3.1-8b", "ici_fsdp_parallelism": -1, "max_target_length": 8192, "out_proj": "offload"}
    | _OFFLOADED_QKV | _FLASH | _FUSED | _blocks(*[2048] * 8)
)  # fmt: skip
_GEMMA_12B = (
    {"model_name": "gemma3-12b", "per_device_batch_size": 1, "num_vocab_tiling": 16, "remat_policy": "custom"}
    | {"decoder_layer_input": "device", "query_proj": "remat", "key_proj": "remat", "value_proj": "remat"}
    | {"max_target_length": 32768} | _FLASH | _blocks(1024, 1024, 1024, 512, 2048, 512, 1024, 1024)
)  # fmt: skip
_OVER_SLICES = {"ici_fsdp_parallelism": 1, "ici_fsdp_transpose_parallelism": -1}
_V5E_FLAGS = f"{_OVERLAP_DATA_PARALLEL} {_FUSE_GATHERS}"
_IRONWOOD_SPARSECORE = (
    "--xla_tpu_scoped_vmem_limit_kib=65536 --xla_tpu_bf16_emission_mode=NATIVE_EMISSION "
    "--xla_tpu_enable_sparse_core_reduce_scatter_v2=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true "
    "--xla_tpu_use_single_sparse_core_for_all_gather_offload=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_sc_disable_megacore_partitioning=true --xla_enable_async_all_gather=true "
    "--xla_tpu_prefer_async_allgather_to_allreduce=true --xla_tpu_enable_latency_hiding_layer_scheduler=true "
    "--xla_tpu_enable_layer_scheduler_for_dependent_collectives=true "
    "--xla_tpu_scheduler_percent_shared_memory_limit=150 --xla_tpu_enable_sparse_core_collective_aggregator=true "
    "--xla_tpu_enable_all_gather_offload_tracing=true"
)
_TOKAMAX_SPLASH = {"use_tokamax_splash": True} | _FLASH | _FUSED
_GEMMA4_TILES = {
    f"{matrix}_tile_{direction}_{side}_dim": size
    for matrix in ("wi", "wo")
    for direction in ("fwd", "dlhs", "drhs")
    for side, size in (("embed", 2816), ("mlp", 704))
}
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
    """A public run. row: of the list it was chosen from. compiler: of COMPILERS, the closest to that of the run.
    measured_bytes: of a device, as the compiler of the run gave it. apart: compiled by a much newer compiler, to see
    what that changes; neither fits nor tests.
    """

    row: int
    compiler: str
    topology: str  # of one slice, as llada_jax.chips names it
    slices: int = 1
    settings: dict
    flags: str = ""
    seconds: float | None = None
    tflops: float | None = None  # per second and device, where the seconds are not published
    attention_in_full: bool = False  # in `tflops`: as MaxText counted it before its pull request 1988
    mfu: float
    measured_bytes: float | None = None
    jax: str  # of the measurement
    source: str
    date: str
    apart: bool = False

    @property
    def half(self) -> str:
        """fit, test or apart."""
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
        settings=_LLAMA_8B | {"per_device_batch_size": 3},
        flags=f"{_TRILLIUM_DENSE} {_NO_COLLECTIVE_MATMUL}",
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
        settings=_LLAMA_8B | {"per_device_batch_size": 5},
        flags=_TRILLIUM_DENSE,
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
        settings=_LLAMA_8B | {"per_device_batch_size": 4},
        flags=_TRILLIUM_DENSE,
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
        settings=_LLAMA_8B | {"model_name": "mistral-7b", "per_device_batch_size": 6},
        flags=f"{_TRILLIUM_DENSE} {_NO_COLLECTIVE_MATMUL}",
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
        | _OFFLOADED_QKV
        | _FLASH
        | _FUSED
        | _blocks(*[2048] * 8),
        flags=" ".join(
            (
                _DENSE_VMEM,
                _ALL_REDUCE_LAYOUT,
                _OVERLAP_DATA_PARALLEL,
                _FUSE_GATHERS,
                _HOST_OFFLOAD,
                _NO_COLLECTIVE_MATMUL,
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
        | _OFFLOADED_QKV
        | _FLASH,
        flags=f"{_MOE_VMEM} {_FUSE_GATHERS} {_OVERLAP_DATA_PARALLEL}",
        seconds=13.484,
        mfu=0.329,
        jax="0.5.2",
        source=_RECIPES + "trillium/Mixtral-8x7B-MaxText",
        date=_READ,
    ),
    "gemma3_12b_v6e_256": Run(
        row=10,
        compiler="2025-09",
        topology="v6e:16x16",
        settings=_GEMMA_12B | {"ici_fsdp_parallelism": -1},
        flags="--xla_tpu_scoped_vmem_limit_kib=122880",
        seconds=7.318,
        mfu=0.381,
        jax="0.6.1",
        source=_RECIPES + "trillium/Gemma3-12B-MaxText/v6e-256",
        date=_READ,
    ),
    "gemma3_12b_v6e_256_x2": Run(
        row=10,
        compiler="2025-09",
        topology="v6e:16x16",
        slices=2,
        settings=_GEMMA_12B | _OVER_SLICES,
        flags="--xla_tpu_scoped_vmem_limit_kib=122880",
        seconds=7.793,
        mfu=0.357,
        jax="0.6.1",
        source=_RECIPES + "trillium/Gemma3-12B-MaxText/2x-v6e-256",
        date=_READ,
    ),
    "gemma3_12b_v6e_256_x4": Run(
        row=10,
        compiler="2025-09",
        topology="v6e:16x16",
        slices=4,
        settings=_GEMMA_12B | _OVER_SLICES,
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
        | _FLASH,
        flags=_OVERLAP_DATA_PARALLEL + " "
        "--xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
        "--xla_tpu_enable_ag_backward_pipelining=true --xla_tpu_enable_async_collective_fusion=true "
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
        "--xla_enable_async_all_gather=true --xla_sc_disable_megacore_partitioning=true "
        "--xla_tpu_use_tc_device_shape_on_sc=true "
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false",
        tflops=328,
        attention_in_full=True,
        mfu=0.715,
        jax="",
        source=_MAXTEXT + "src/maxtext/configs/tpu/v5p/32b.sh, README.md",
        date="2026-08-22",
    ),
    "dense_16b_v5e_256": Run(
        row=15,
        compiler="2025-09",
        topology="v5e:16x16",
        settings={"per_device_batch_size": 6, "remat_policy": "full", "global_parameter_scale": 16}
        | {"max_target_length": 2048}
        | _FLASH,
        flags=_V5E_FLAGS,
        tflops=120,
        attention_in_full=True,
        mfu=0.611,
        jax="",
        source=_MAXTEXT + "src/maxtext/configs/tpu/v5e/16b.sh, README.md",
        date="2026-08-22",
    ),
    "gemma4_26b_tpu7x_64": Run(
        row=16,
        compiler="2026-06",
        topology="tpu7x:4x4x4",
        settings={"model_name": "gemma4-26b", "per_device_batch_size": 16, "max_target_length": 4096}
        | {"num_vocab_tiling": 1, "remat_policy": "full", "decoder_layer_input": "offload", "dtype": "bfloat16"}
        | {"allow_split_physical_axes": True, "ici_fsdp_transpose_parallelism": 1, "ici_fsdp_parallelism": -1}
        | {"megablox": True, "sparse_matmul": True, "use_custom_sort_vjp": True}
        | _GEMMA4_TILES
        | _TOKAMAX_SPLASH
        | _blocks(1024, 1024, 512, 1024, 1024, 256),
        flags=_IRONWOOD_SPARSECORE,
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
        | _TOKAMAX_SPLASH
        | _blocks(1024, 1024, 512, 1024, 1024, 256),
        flags=_IRONWOOD_SPARSECORE,
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
        | _TOKAMAX_SPLASH
        | _blocks(*[2048] * 6),
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
        | _FUSED
        | {"sa_q_layout": "HEAD_DIM_MINOR", "sa_k_layout": "SEQ_MINOR", "sa_v_layout": "HEAD_DIM_MINOR"}
        | _blocks(1024, 1024, 512, 2048, 2048, 1024, 1024, 1024),
        flags="--xla_tpu_scoped_vmem_limit_kib=61440 "
        "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
        "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
        f"--xla_tpu_use_single_sparse_core_for_all_gather_offload=true {_HOST_OFFLOAD}",
        seconds=30.87,
        mfu=0.273,
        jax="0.9.2.dev20260306",
        source=_RECIPES + "ironwood/qwen3-235b-a22b/4k-bf16-tpu7x-4x8x8",
        date=_READ,
    ),
}
for _name in ("deepseek2_16b_v5p_4", "dense_16b_v5e_256"):
    RUNS[f"{_name}_today"] = dataclasses.replace(RUNS[_name], compiler="2026-11", apart=True)
