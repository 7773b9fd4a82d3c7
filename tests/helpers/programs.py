"""Functions of the package as compiled programs: run op by op, a small model's pass compiles hundreds of them."""

import jax

from llada_jax.diffusion import noise, objectives
from llada_jax.model import forward

draw_masking = jax.jit(noise.draw_masking, static_argnames=("spec",))
prepare = jax.jit(objectives.prepare, static_argnames=("config", "objective", "halves", "noise_source"))
score = jax.jit(objectives.score, static_argnames=("config", "halves", "execution", "entropy_temperature"))
hidden_states = jax.jit(forward.hidden_states, static_argnames=("config", "execution"))
denoised_hidden = jax.jit(forward.denoised_hidden, static_argnames=("config", "execution"))
