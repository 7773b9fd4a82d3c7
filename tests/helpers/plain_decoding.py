"""Decoding as its rules are written, one row at a time in numpy, with no cache: every pass is over all tokens."""

import functools
from typing import NamedTuple

import jax
import numpy as np

import llada_jax
from llada_jax.sampling.predict import _gumbel


class Write(NamedTuple):
    position: int  # in the canvas
    token: int
    step: int
    forward: int
    confidence: float


class Trace(NamedTuple):
    """states: the canvas before each pass. writes: in order. end: of the last decoded block. answer: token ids.
    evaluated: positions that passes with a cache need: of blocks to commit, and of active ones.
    """

    states: list
    writes: list
    end: int
    answer: np.ndarray
    evaluated: int


@functools.partial(jax.jit, static_argnames=("config", "block"))
def _logits(params, config, tokens, block):
    return llada_jax.forward(params, config, tokens[None], mask=("block_causal", block))[0]


def plain_decode(params, config, prompt, g, canvas: int, key=None) -> Trace:
    """g: a GenerateConfig. key: of the row, for temperature > 0 (without top-k and top-p)."""
    b, p, mask = g.block_length, len(prompt), config.mask_token_id
    row_end = -(-(p + g.gen_length) // b) * b
    tokens = np.full(canvas, mask)
    tokens[:p] = prompt
    masked = np.arange(canvas) >= p
    blocks, trace = [_Block(p // b * b)], Trace([], [], 0, None, 0)
    finished, evaluated = 0, 0
    while True:
        trace.states.append(tokens.copy())
        evaluated += (finished + len(blocks)) * b
        logits = np.asarray(_logits(params, config, tokens, b), np.float64)
        if config.alignment == "shifted":
            logits = np.roll(logits, 1, axis=0)  # token i from what stands before it
        forward, written, before = len(trace.states) - 1, set(), masked.copy()
        filled = [int((~masked[k.places(b)]).sum()) for k in blocks]
        for i, block in enumerate(blocks):
            forced = i == 0 or filled[i - 1] >= g.semi_complete_threshold * b - 1e-6
            chosen = _choose(block, forced, logits, tokens, before, p, g, mask, key)
            block.was_full, block.edited = not before[block.places(b)].any(), False
            for position, token, confidence in chosen:
                block.edited |= not before[position]
                tokens[position], masked[position] = token, False
                trace.writes.append(Write(position, token, block.step, forward, confidence))
                written.add(position)
            block.step += 1
            block.forced += forced
        lead = _leading(blocks, masked, g)
        window = [i for k in blocks for i in range(k.start, k.start + b)]
        eos = (config.eos_token_id if g.eos_id is None else g.eos_id,)
        ends = [i for i in window if i >= p and not masked[i] and tokens[i] in eos]
        done = {i for k in blocks[:lead] for i in range(k.start, k.start + b)}
        between = any(i in done for i in ends)
        if g.rule == "llada2.1":
            stops = between and g.eos_early_stop
        else:
            inside = bool(ends) and not masked[window[0] : ends[0]].any() and g.eos_early_stop
            if g.rule == "llada2":
                inside = inside and (lead > 0 or any(i in written for i in ends))
            stops = between or inside
        last = ends[0] // b * b + b if stops else blocks[lead - 1].start + b if lead else 0
        if stops or last >= row_end:
            answer = tokens[p : min(p + g.gen_length, last)]
            first = np.flatnonzero(np.isin(answer, eos))
            trace = trace._replace(evaluated=evaluated)
            return trace._replace(end=last, answer=answer[: first[0] + 1] if len(first) else answer)
        newest = blocks[-1]
        share = (~masked[newest.places(b)]).sum()
        blocks, finished = blocks[lead:], lead
        may_end = bool(ends) and (g.rule != "llada2.1" or g.eos_early_stop)
        room = len(blocks) < g.active_blocks and newest.start + b < row_end
        if not blocks or (room and share >= g.add_block_threshold * b - 1e-6 and not may_end):
            blocks.append(_Block(newest.start + b))


class _Block:
    def __init__(self, start):
        self.start, self.step, self.forced, self.post, self.edited, self.was_full = start, 0, 0, 0, False, False

    def places(self, b):
        return slice(self.start, self.start + b)


def _leading(blocks, masked, g) -> int:
    """How many of the first blocks need no more passes."""
    for i, block in enumerate(blocks):
        full = not masked[block.places(g.block_length)].any()
        if g.rule == "llada2.1":
            block.post += block.was_full and i == 0
            settled = block.was_full and not block.edited
            full = full and (settled or block.post + 1 > g.max_post_steps)
        if not full:
            return i
    return len(blocks)


def _choose(block, forced, logits, tokens, masked, p, g, mask, key):
    """[(position, token, confidence)] that one pass writes in a block."""
    b, found = g.block_length, []
    at = np.arange(block.start, block.start + b)
    z = logits[at]
    temperature = g.temperature or 1.0
    norm = np.logaddexp.reduce(z / temperature, axis=-1)
    probability = np.exp(z / temperature - norm[:, None])
    score = z / temperature
    if g.temperature:
        score = score + np.asarray(_noise(key, block.start, block.step, b, z.shape[1]), np.float64)
    mask_first = score.argmax(-1) == mask
    score[:, mask] = -np.inf
    token = score.argmax(-1)
    entropy = -(probability * np.log(np.maximum(probability, 1e-300))).sum(-1)
    if g.rule == "dinfer":
        probability = np.exp(z - np.logaddexp.reduce(z, axis=-1)[:, None])
    confidence = probability[np.arange(b), token]
    open_ = [i for i in range(b) if masked[at[i]]]
    surest = sorted(open_, key=lambda i: (-confidence[i], i))
    passed = [i for i in open_ if confidence[i] > g.threshold]
    steps = min(g.steps, g.gen_length)
    due = (b // steps + (block.forced < b % steps)) if forced else 0
    if g.rule in ("llada2.1", "sglang"):
        due = min(due, 1) if not forced else 1
    if g.rule in ("llada2", "llada2.1", "sglang"):
        chosen = passed if len(passed) >= due else surest[:due]
    elif g.rule == "fixed":
        chosen = surest[:due]
    elif g.rule == "dinfer":
        sure = [i for i in open_ if not mask_first[i]]
        sure = sure or (open_ if forced else [])
        most = max((confidence[i] for i in sure), default=0)
        edge = min(g.threshold, most - 1e-5) if forced else g.threshold
        chosen = [i for i in sure if confidence[i] >= edge]
    else:
        chosen, spent = [], 0.0
        for i in sorted(open_, key=lambda i: (entropy[i], i)):
            if (spent if forced else spent + entropy[i]) > g.entropy_bound:
                break
            chosen.append(i)
            spent += entropy[i]
    found = [(at[i], token[i], confidence[i]) for i in chosen]
    if g.rule == "llada2.1":
        for i in range(b):
            other = not masked[at[i]] and at[i] >= p and token[i] != tokens[at[i]]
            if other and confidence[i] > g.editing_threshold:
                found.append((at[i], token[i], confidence[i]))
    return sorted(found)


@functools.partial(jax.jit, static_argnames=("b", "vocab"))
def _noise(key, start, step, b, vocab):
    key = jax.random.fold_in(jax.random.fold_in(key, start), step)
    return _gumbel(jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(b)), np.arange(vocab))
