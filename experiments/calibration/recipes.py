"""XLA flags and settings of MaxText that several of the public recipes share, as their sources have them."""

# benchmarks/xla_flags_library.py of MaxText at tag tpu-recipes-v0.1.4; its chip_config_name is that of another runtime.
DENSE_VMEM = "--xla_tpu_scoped_vmem_limit_kib=98304"
MOE_VMEM = "--xla_tpu_scoped_vmem_limit_kib=81920"
FUSE_GATHERS = (
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
SPARSECORE_ALL_REDUCE = (
    "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
    "--xla_tpu_enable_all_reduce_offload_tracing=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_sc_enable_instruction_fusion=false --xla_sc_disjoint_spmem=false --xla_sc_disable_megacore_partitioning=true"
)
ALL_REDUCE_LAYOUT = (
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 --xla_tpu_assign_all_reduce_scatter_layout=true"
)
OVERLAP_DATA_PARALLEL = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
)
HOST_OFFLOAD = (
    "--xla_tpu_enable_all_experimental_scheduler_features=true "
    "--xla_tpu_enable_scheduler_memory_pressure_tracking=true --xla_tpu_host_transfer_overlap_limit=24 "
    "--xla_tpu_aggressive_opt_barrier_removal=ENABLED --xla_lhs_prioritize_async_depth_over_stall=ENABLED "
    "--xla_tpu_enable_ag_backward_pipelining=true --xla_should_allow_loop_variant_parameter_in_chain=ENABLED "
    "--xla_should_add_loop_invariant_op_in_chain=ENABLED --xla_max_concurrent_host_send_recv=100 "
    "--xla_tpu_scheduler_percent_shared_memory_limit=100 --xla_latency_hiding_scheduler_rerun=2"
)
NO_COLLECTIVE_MATMUL = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"
TRILLIUM_DENSE = " ".join(
    (DENSE_VMEM, ALL_REDUCE_LAYOUT, OVERLAP_DATA_PARALLEL, FUSE_GATHERS, SPARSECORE_ALL_REDUCE, HOST_OFFLOAD)
)

SPLASH_BLOCKS = (
    "sa_block_q", "sa_block_kv", "sa_block_kv_compute", "sa_block_q_dkv", "sa_block_kv_dkv", "sa_block_kv_dkv_compute",
    "sa_block_q_dq", "sa_block_kv_dq",
)  # fmt: skip


def blocks(*sizes: int) -> dict:
    return dict(zip(SPLASH_BLOCKS, sizes, strict=False))


FLASH = {"attention": "flash", "use_iota_embed": True}
FUSED = {"sa_use_fused_bwd_kernel": True}
OFFLOADED_QKV = {
    "remat_policy": "custom", "decoder_layer_input": "offload", "query_proj": "offload", "key_proj": "offload",
    "value_proj": "offload",
}  # fmt: skip
LLAMA_8B = (
    {"model_name": "llama3.1-8b", "ici_fsdp_parallelism": -1, "max_target_length": 8192, "out_proj": "offload"}
    | OFFLOADED_QKV | FLASH | FUSED | blocks(*[2048] * 8)
)  # fmt: skip
GEMMA_12B = (
    {"model_name": "gemma3-12b", "per_device_batch_size": 1, "num_vocab_tiling": 16, "remat_policy": "custom"}
    | {"decoder_layer_input": "device", "query_proj": "remat", "key_proj": "remat", "value_proj": "remat"}
    | {"max_target_length": 32768} | FLASH | blocks(1024, 1024, 1024, 512, 2048, 512, 1024, 1024)
)  # fmt: skip
OVER_SLICES = {"ici_fsdp_parallelism": 1, "ici_fsdp_transpose_parallelism": -1}
V5E_FLAGS = f"{OVERLAP_DATA_PARALLEL} {FUSE_GATHERS}"
V5P_FLAGS = (
    f"{V5E_FLAGS} --xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
    "--xla_tpu_enable_ag_backward_pipelining=true"
)
IRONWOOD_SPARSECORE = (
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
TOKAMAX_SPLASH = {"use_tokamax_splash": True} | FLASH | FUSED
GEMMA4_TILES = {
    f"{matrix}_tile_{direction}_{side}_dim": size
    for matrix in ("wi", "wo")
    for direction in ("fwd", "dlhs", "drhs")
    for side, size in (("embed", 2816), ("mlp", 704))
}
