"""Options of the XLA compiler that a training step is compiled with, by platform."""

# Gathers of sharded weights, and reductions of their gradients, run on the chip's SparseCores, beside the arithmetic of
# its TensorCores, Pallas kernels included.
_OFFLOADED = ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "nd_reduce_scatter")
_TPU = {f"xla_tpu_enable_sparse_core_collective_offload_{name}": "true" for name in _OFFLOADED}


def xla_options(platform: str) -> dict[str, str]:
    """For jax.jit(compiler_options=...)."""
    return dict(_TPU) if platform == "tpu" else {}
