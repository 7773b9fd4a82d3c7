"""Options of the XLA compiler that a training step is compiled with, by platform."""

# The gathers of sharded weights run behind arithmetic instead of before it; and over an axis that spans three sides of
# a torus they are gathers at all: by default XLA makes each an all-reduce of zero-padded shards, at twice the bytes.
_TPU = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}


def xla_options(platform: str) -> dict[str, str]:
    """For jax.jit(compiler_options=...)."""
    return dict(_TPU) if platform == "tpu" else {}
