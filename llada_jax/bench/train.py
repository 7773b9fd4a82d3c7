"""The trainer's block-diffusion step, timed on the current device and split into parts.

Each part is a separate program over the step's arrays: the noise; the layers, forward and backward, and of these
attention and the experts alone; the head with its loss; clipping and optimizer. The rest of the step is what the parts
do not add up to. The matrix peak is that of a large product in the step's dtype, measured in turn with the step.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llada_jax import sharding
from llada_jax.attention.paths import attention_of
from llada_jax.attention.visibility import block_diffusion
from llada_jax.bench.timing import least_in_turn
from llada_jax.data.order import Batch
from llada_jax.diffusion import noise, objectives
from llada_jax.diffusion.objectives import Example, Objective
from llada_jax.model import experts, forward, head, parameters
from llada_jax.model.config import ModelConfig, preset
from llada_jax.model.forward import Execution
from llada_jax.model.useful_flops import mean_pairs, useful_flops
from llada_jax.training import train_state
from llada_jax.training.config import default_config
from llada_jax.training.optimizer import make_optimizer
from llada_jax.training.step import denoising_loss, make_train_step

BLOCK_SIZE, REPEATS, PEAK_SIDE = 32, 5, 2048
# The size at which public GPU trainers of block diffusion were timed on two CPU cores.
SMALL = preset("tiny").replace(
    hidden_size=256, num_kv_heads=4, head_dim=64, rotary_dim=64, intermediate_size=1024, tie_word_embeddings=True
)


def programs(model: ModelConfig, rows: int, length: int, execution: Execution) -> dict[str, Callable[[], object]]:
    """{"step", "matmul", parts: runs it once and returns its arrays}, all compiled."""
    config = default_config("tiny")
    optimizer = make_optimizer(config.optimizer, model, 1000)
    params = parameters.initialize(model, jax.random.key(0))
    state = train_state.create(jax.tree.map(jnp.copy, params), optimizer)
    ids = np.random.default_rng(0).integers(0, model.mask_token_id, (rows, length), dtype=np.int32)
    index = np.arange(rows, dtype=np.uint32)
    batch = jax.device_put(Batch(ids, np.ones_like(ids), np.ones_like(ids, bool), index, np.zeros_like(index)))
    block_size, no_noise = jnp.int32(BLOCK_SIZE), jnp.float32(0)
    step = make_train_step(model, denoising_loss(model, Objective(), execution, seed=0), optimizer)
    carried = [state]  # the step donates it

    def run_step():
        carried[0], metrics = step(carried[0], None, batch, block_size, no_noise, "both")
        return metrics

    prepare = jax.jit(functools.partial(_prepare, model))
    example = prepare(batch, block_size)
    parts = {"noise": (prepare, (batch, block_size))} | _passes(model, params, example, execution)
    gradients = jax.tree.map(jnp.ones_like, params)
    parts["optimizer"] = jax.jit(functools.partial(_update, optimizer)), (gradients, optimizer.init(params), params)
    side = jnp.ones((PEAK_SIDE, PEAK_SIDE), execution.dtype or jnp.float32)
    parts["matmul"] = jax.jit(jnp.dot), (side, side)
    return {"step": run_step} | {name: functools.partial(run, *operands) for name, (run, operands) in parts.items()}


def _prepare(model: ModelConfig, batch: Batch, block_size) -> Example:
    keys = noise.example_keys(0, batch.row_ids, batch.epochs)
    return objectives.prepare(batch.ids, batch.segment_ids, batch.supervised, keys, block_size, model, Objective())


def _update(optimizer, gradients, state, params):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _passes(model: ModelConfig, params, example: Example, execution: Execution):
    """{part: (forward and backward pass, operands)}."""
    dtype = execution.dtype or jnp.float32

    def layers(params):
        return forward.denoised_hidden(
            params, model, example.noisy, example.clean, example.layout, example.positions, execution
        )

    def score(hidden, matrix):
        return head.token_scores(hidden, example.clean, example.masked, matrix).nll

    rows, length = example.clean.shape
    key = jax.random.key(1)
    query, own = (jax.random.normal(key, (rows, 2 * length, heads, model.head_dim), dtype)
                  for heads in (model.num_heads, model.num_kv_heads))  # fmt: skip

    def attention(query, own):
        attend, _ = attention_of(model, execution, block_diffusion(example.layout), 2 * length)
        return attend(query, own, own)

    hidden = jax.random.normal(key, (rows, length, model.hidden_size), dtype)
    passes = {
        "layers": (layers, (params,)),
        "attention": (attention, (query, own)),
        "head": (score, (hidden, head.head_matrix(params, model))),
    }
    if model.is_moe:
        weights = {name: w[0] for name, w in params["sparse"].items() if name in forward.EXPERT_WEIGHTS}
        axes = parameters.layer_axes(model, "sparse", weights)
        moe = sharding.over_batch(functools.partial(experts.moe, config=model, execution=execution), axes, None)
        passes["experts"] = (lambda x, w: moe((x, x), w)[0], (jnp.concatenate([hidden, hidden], axis=1), weights))
    return {name: (jax.jit(_with_gradients(function)), operands) for name, (function, operands) in passes.items()}


def _with_gradients(function):
    """Wraps `function` to return its output and gradients, with a cotangent of 1 for every output."""

    def run(*operands):
        out, backward = jax.vjp(function, *operands)
        return out, backward(jnp.ones_like(out))

    return run


def table(model_name: str | None, rows: int, length: int, execution: Execution) -> Iterator[dict]:
    """Prints the parts of a step and yields its values."""
    model = preset(model_name) if model_name else SMALL
    if model.mask_token_id is None:  # an AR parent: any token costs the same
        model = model.replace(mask_token_id=model.vocab_size - 1)
    name = model_name or "small"
    print(
        f"{jax.devices()[0].device_kind}: {name}, {parameters.count(model):,} parameters, {rows} x {length} tokens, "
        f"blocks of {BLOCK_SIZE}, {execution.attention} attention, {execution.dtype or 'float32'}"
    )
    seconds = least_in_turn(programs(model, rows, length, execution), REPEATS)
    step, matmul = seconds.pop("step"), seconds.pop("matmul")
    inside = {"attention": seconds.pop("attention") * model.num_layers}
    if model.is_moe:
        inside["experts"] = seconds.pop("experts") * len(model.layer_groups["sparse"])
    seconds["rest"] = step - sum(seconds.values())
    print(f"part        seconds  of the step   (least of {REPEATS} runs, in turn)")
    for part, value in seconds.items():
        print(f"{part:11} {value:7.4f} {value / step:11.1%}")
        for inner, of_it in inside.items() if part == "layers" else ():
            print(f"  {inner:9} {of_it:7.4f} {of_it / step:11.1%}")
    pairs = mean_pairs(np.ones((1, length), np.int32), BLOCK_SIZE, "both")
    flops = useful_flops(model, rows, length, "both", pairs)
    peak = 2 * PEAK_SIDE**3 / matmul
    print(
        f"step        {step:7.4f}: {rows * length / step:,.0f} clean tokens per second; {flops / step / 1e9:,.1f} "
        f"useful GFLOP/s,\n{flops / step / peak:.0%} of the {peak / 1e9:,.1f} of a {PEAK_SIDE} x {PEAK_SIDE} product"
    )
    yield {
        "model": name, "rows": rows, "length": length, "seconds": step, "tokens_per_second": rows * length / step,
        "parts": seconds | inside, "useful_flops": flops, "matmul_flops_per_second": peak,
    }  # fmt: skip
