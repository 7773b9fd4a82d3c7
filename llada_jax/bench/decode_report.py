"""What `tools/bench.py decode` prints: the measurements of bench/decode.py and the cost model of sampling/cost.py."""

import dataclasses

import jax

from llada_jax.bench import decode
from llada_jax.chips import Chip
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig, preset
from llada_jax.sampling import cost

GEN_LENGTH, STEPS = 128, 12  # 2.7 tokens per step, as LLaDA2.0-mini at threshold 0.95 (its paper, Figure 4)
REQUESTS, SLOTS = 200, 16
CHUNKS = 32, 64, 128  # tokens of a long prompt that are computed, and known, at once


def report(name: str, parts: list[str], batches: list[int], cost_config: ModelConfig, chip: Chip) -> dict:
    """Prints the parts and returns their numbers."""
    config = preset(name)
    print(f"{jax.devices()[0].device_kind}, {name}, random weights, blocks of {decode.BLOCK}", flush=True)
    params = parameters.initialize(config, jax.random.key(0))
    params = jax.tree.map(lambda w: 5 * w if w.ndim > 2 else w, params)  # logits with some spread: few near ties
    arguments = dict(params=params, config=config, batches=batches, cost_config=cost_config, chip=chip)
    return {"model": name} | {part: PARTS[part](**arguments) for part in parts}


def _recompute(params, config, **_) -> dict:
    cached, recomputed, same = decode.cached_against_recomputed(params, config)
    print(
        f"\n512 tokens, one per forward: {cached:.3f} s with the cache, {recomputed:.3f} s with the prefix computed "
        f"again at every step by a jitted forward: {recomputed / cached:.1f}x; the first {same:.0%} of tokens agree",
        flush=True,
    )
    return {"cached": cached, "recomputed": recomputed, "agreeing": same}


def _prefix(params, config, **_) -> dict:
    seconds = decode.step_seconds(params, config)
    none, long = seconds[0], seconds[512]
    print(f"\na step: {none * 1e3:.2f} ms after no prefix, {long * 1e3:.2f} ms after 512 tokens: {long / none:.2f}x")
    return {str(prefix): value for prefix, value in seconds.items()}


def _known(params, config, **_) -> list[dict]:
    print("\nseconds to the first block after 2,048 tokens and 64 more: all computed, and the 2,048 known")
    result = []
    for chunk in CHUNKS:
        computed, known = decode.question_seconds(params, config, chunk)
        print(f"chunks of {chunk:4}: {computed:.3f}, {known:.3f}: {computed / known:.1f} times as fast", flush=True)
        result.append({"chunk": chunk, "computed": computed, "known": known})
    return result


def _commit(params, config, batches, **_) -> list[dict]:
    print("\n  rows  one block, ms  two blocks, ms  price of the second block")
    result = []
    for rows in batches:
        one, two = decode.pass_seconds(params, config, rows)
        print(f"{rows:6} {one * 1e3:14.2f} {two * 1e3:15.2f} {two / one - 1:26.2f}", flush=True)
        result.append({"rows": rows, "one_block": one, "two_blocks": two})
    return result


def _batches(params, config, batches, **_) -> list[dict]:
    print(f"\nragged prompts, answers of {GEN_LENGTH} tokens, a block in {STEPS} steps")
    print("  rows  commits    tokens/s  ms a pass  passes  commit passes a row  positions a token")
    result = []
    for rows in batches:
        for commit in ("fused", "separate", "chosen"):
            measured = decode.throughput(params, config, rows, commit, GEN_LENGTH, STEPS)
            print(
                f"{rows:6}  {commit:9} {measured.tokens_per_second:9.0f} {measured.seconds_per_pass * 1e3:10.2f} "
                f"{measured.passes:7} {measured.commit_passes:20.2f} {measured.positions:18.1f}",
                flush=True,
            )
            result.append(dataclasses.asdict(measured))
    return result


def _continuous(params, config, **_) -> dict:
    usage, seconds, tokens = decode.continuous(params, config, REQUESTS, SLOTS)
    positions = (usage.decoding_positions + usage.prefill_positions) / tokens
    print(
        f"\n{REQUESTS} ragged requests over {SLOTS} rows, batched continuously: {usage.busy:.1%} of rows busy, "
        f"{tokens} tokens in {usage.iterations} passes and {usage.prefill_passes} prefills, {positions:.1f} positions "
        f"a token, {seconds:.1f} s with compilation",
        flush=True,
    )
    return dataclasses.asdict(usage) | {"busy": usage.busy, "seconds": seconds, "tokens": tokens}


def _cost(params, config, batches, cost_config, chip, **_) -> dict:
    hits, result = {}, {}
    if config.is_moe:
        print("\nexperts of a layer that a pass reads: measured over the layers, and were routing uniform")
        for rows in batches:
            tokens = rows * decode.BLOCK
            hits[tokens] = float(decode.expert_hits(params, config, tokens).mean())
            print(f"{rows:6} rows {hits[tokens]:8.1f} {cost.uniform_hits(config, tokens):8.1f} of {config.num_experts}")
        result["expert_hits"] = hits

    def measured(model: ModelConfig, tokens: int) -> float:
        """Scales the measured share of uniform routing's experts to a model with another number of experts."""
        share = hits[tokens] / cost.uniform_hits(config, tokens) if tokens in hits else 1.0
        return share * cost.uniform_hits(model, tokens)

    print(
        f"\ncost of a pass of {cost_config.num_layers} layers of {cost_config.hidden_size} on one {chip.name}'s peaks,"
    )
    print("a roofline, not a measurement: bfloat16, half of the positions masked, caches of 1024 tokens")
    print("  rows  GB read  TFLOP  ms at least  bound by  price of a second block")
    rows_of = []
    for rows in batches:
        tokens = rows * decode.BLOCK
        roofline = cost.pass_cost(cost_config, tokens, tokens // 2, rows * 1024, 1024, measured)
        price = cost.second_block_price(cost_config, rows, decode.BLOCK, chip.device_kind)
        seconds = roofline.seconds(chip)
        print(
            f"{rows:6} {roofline.bytes / 1e9:8.1f} {roofline.flops / 1e12:6.2f} {seconds * 1e3:12.2f}  "
            f"{roofline.bound(chip):8} {price:24.2f}"
        )
        rows_of.append({"rows": rows, "price": price, "seconds": seconds} | dataclasses.asdict(roofline))
    bound = cost.compute_bound_rows(cost_config, decode.BLOCK, chip)
    print(f"compute-bound from {bound} rows on" if bound else "never compute-bound")
    return result | {"chip": chip.name, "passes": rows_of, "compute_bound_rows": bound}


PARTS = {
    "recompute": _recompute,
    "prefix": _prefix,
    "known": _known,
    "commit": _commit,
    "batches": _batches,
    "continuous": _continuous,
    "cost": _cost,
}
