"""Block-diffusion language models (LLaDA2.0, arXiv 2512.15745) in JAX, from AR checkpoints, on TPU pods.

The public surface; everything else may move.
"""

from llada_jax.attention.visibility import block_diffusion_mask
from llada_jax.checkpoint.weights import load_checkpoint
from llada_jax.model.forward import denoise, forward
from llada_jax.sampling.generate import GenerateConfig, generate

__all__ = ["GenerateConfig", "block_diffusion_mask", "denoise", "forward", "generate", "load_checkpoint"]
