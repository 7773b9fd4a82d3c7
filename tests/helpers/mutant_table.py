"""The faults that tests/mutants.py plants: one changed line each, and the tests that see it.

`old` occurs once in its file. Tests are named from tests/, quick ones first: a file, or file::test where the file is
slow. Faults that change no result (only speed, or a tie of probability zero) have no place here.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """file and tests are paths from the root of the repository; tests may name one test behind ::."""

    room: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def problems(tree: Path, faults: tuple[Fault, ...] | None = None) -> list[str]:
    """A line for each fault that cannot be planted in the checkout `tree`, or names a test that it has not."""
    return [f"fault {number} ({fault.file}): {wrong}" for number, fault in enumerate(faults or FAULTS, 1)
            if (wrong := _problem(tree, fault))]  # fmt: skip


def _problem(tree: Path, fault: Fault) -> str | None:
    path = tree / fault.file
    if not path.is_file():
        return "no such file"
    if (count := path.read_text(encoding="utf-8").count(fault.old)) != 1:
        return f"{fault.old!r} occurs {count} times, expected once"
    if fault.old == fault.new:
        return f"{fault.old!r} is not changed"
    for test in fault.tests:
        name, _, function = test.partition("::")
        if not (tree / name).is_file():
            return f"{name} does not exist"
        if function and not re.search(rf"^def {function}\(", (tree / name).read_text(encoding="utf-8"), re.MULTILINE):
            return f"{name} has no test {function}"
    return None if fault.tests else "no test is named"


def _room(name: str, *rows: tuple[str, str, str, str]) -> Iterator[Fault]:
    """Faults of (file in llada_jax/, old, new, tests in tests/ separated by blanks)."""
    for file, old, new, tests in rows:
        yield Fault(name, f"llada_jax/{file}", old, new, tuple(f"tests/{test}" for test in tests.split()))


_EQ3, _CACHED = "attention/test_attention.py::test_mask_is_equation_3", "attention/decoding/test_cached.py"
_BLOCKWISE = "attention/test_attention.py::test_blockwise_equals_dense"
_FUSED = "model/test_fused_experts.py"
_PLAN, _KERNEL = "attention/test_plan.py", "attention/test_kernel.py::test_kernel_equals_dense"

_MASK = _room(
    "mask",
    # Padding positions see each other.
    ("attention/visibility.py", "| (segment_ids[:, 1:] == 0)", "| (segment_ids[:, 1:] < 0)", _EQ3),
    # Blocks of a document count from the start of the row.
    ("attention/visibility.py", "(index - origin) // block_size", "index // block_size", _EQ3),
    # A block goes on beyond its document.
    ("attention/visibility.py", "jnp.minimum(end, block + ", "jnp.minimum(length, block + ", _EQ3),
    # A noisy token sees the clean copy of its own block: the answer.
    ("attention/visibility.py", "clean_end=both(", "clean_end=(lambda _, clean: both(clean, clean))(", _EQ3),
    # A block sees one position of its cache too many.
    ("attention/visibility.py", "zeros + starts[:, None]", "zeros + starts[:, None] + 1", _CACHED),
    ("attention/visibility.py", "jnp.maximum(starts - block_size, 0)", "jnp.maximum(starts, 0)", _CACHED),
    # The last chunk of a run is not read.
    ("attention/plan.py", "last = -(-jnp.max(end, axis=-1) // chunk)", "last = jnp.max(end, axis=-1) // chunk", _PLAN),
    # A chunk that some queries see in part counts as one that all see whole.
    ("attention/plan.py", "full_end = jnp.min(end, axis=-1) // chunk", "full_end = -(-jnp.min(end, axis=-1) // chunk)",
     _PLAN),
    ("attention/blockwise.py", "(key >= start) & (key < end)", "(key >= start) & (key <= end)", _BLOCKWISE),
    # The gradient of the scores lacks the scale.
    ("attention/blockwise.py", "(d_weights - delta[..., None]) * scale)", "(d_weights - delta[..., None]))",
     _BLOCKWISE),
    # The chunk that overlaps the one before counts its keys twice.
    ("attention/decoding/cached.py", "jnp.where(position >= i * chunk, position, -1)",
     "jnp.where(position >= 0, position, -1)", _CACHED),
    ("attention/decoding/cached.py", "visibility.clean_end.min() // chunk", "-(-visibility.clean_end.min() // chunk)",
     _CACHED),
    # Rows past the end of an expert's add the last one's result again.
    ("model/fused_experts.py", "jnp.where(inside, self.weights[place], 0.0)", "self.weights[place]",
     _FUSED),
    # The scales of another expert's channels, and of the first layer's.
    ("model/fused_experts.py", "(refs.down_scale, at, refs.down_scale_ring)",
     "(refs.down_scale, (self.layer, 0), refs.down_scale_ring)",
     f"{_FUSED}::test_int8_equals_sorted_matmuls_and_the_float_weights"),
    ("model/grouped_matmul.py", "product *= scale[first + group[t]]", "product *= scale[group[t]]",
     f"{_FUSED}::test_sorted_matmuls_of_int8_equal_those_of_the_float_weights"),
    # The chunk that overlaps the one before, in the kernel.
    ("attention/decoding/cached_kernel.py", "jnp.maximum(refs.bounds[0, 2:3], number * self.chunk) - base",
     "refs.bounds[0, 2:3] - base", "attention/decoding/test_cached_kernel.py"),
    ("attention/context.py", "start // stripe != (end - 1) // stripe", "start // stripe == (end - 1) // stripe",
     "attention/test_context.py::test_attention_of_the_ranks_is_that_of_the_row"),
)  # fmt: skip

_KERNELS = _room(
    "kernels",
    ("attention/kernel_walk.py", "visible = (key >= start) & (key < end)", "visible = (key > start) & (key < end)",
     _KERNEL),
    ("attention/kernel_forward.py", "decay = jnp.exp2(old - new)", "decay = jnp.exp(old - new)",
     "attention/test_kernel.py::test_rows_longer_than_the_ring_of_copies"),
    ("attention/kernel_backward.py", "(d_weights - projection)", "(d_weights + projection)", _KERNEL),
    # The gradient of the keys stays in units of log 2.
    ("attention/kernel.py", ", math.log(2), interpret)", ", 1.0, interpret)", _KERNEL),
    ("attention/rotary.py", "first * cos - second * sin", "first * cos + second * sin",
     "model/test_goldens.py::test_causal_logits"),
    # Ties go to the later expert.
    ("model/router_kernel.py", "pairs[0][:, 1] > pairs[0][:, 0]", "pairs[0][:, 1] >= pairs[0][:, 0]",
     "model/test_router_kernel.py::test_ties_and_extremes_go_as_in_the_plain_router"),
    ("model/router_kernel.py", "d_scores * scores * (1 - scores)", "d_scores * scores * scores",
     "model/test_router_kernel.py::test_equals_the_plain_router"),
    ("model/rows_kernel.py", "(lane < column)", "(lane <= column)",
     "model/test_router_kernel.py::test_sorting_by_counting_equals_sorting"),
    # A row of the next group takes part in the gradient of a group's matrix.
    ("model/grouped_matmul.py", "jnp.arange(tile) < stop[t]", "jnp.arange(tile) <= stop[t]",
     "model/test_layers.py::test_grouped_matmul_is_a_matmul_by_group"),
    ("model/activation.py", "sigmoid + silu * (1 - sigmoid)", "sigmoid + silu * sigmoid",
     "model/test_activation.py::test_activation_is_its_formula"),
)  # fmt: skip

_GOLDENS, _LAYERS = "model/test_goldens.py::test_causal_logits", "model/test_layers.py"

_MODEL = _room(
    "model",
    # The bias that steers the selection weighs the experts too.
    ("model/router.py", "jnp.where(chosen, scores[None], 0)", "jnp.where(chosen, ranking[None], 0)",
     f"{_LAYERS}::test_sigmoid_router_selects_with_bias_and_weighs_without"),
    ("model/router.py", "weights.sum(0, keepdims=True) + 1e-20", "weights.sum(1, keepdims=True) + 1e-20", _GOLDENS),
    ("model/router.py", "load.mean(axis=1, keepdims=True) - load)", "load - load.mean(axis=1, keepdims=True))",
     f"{_LAYERS}::test_bias_moves_towards_the_experts_with_little_load"),
    # YaRN interpolates the fast channels.
    ("model/layers.py", "scaling.factor * ramp + inverse * (1 - ramp)",
     "scaling.factor * (1 - ramp) + inverse * ramp", _GOLDENS),
    ("model/layers.py", "1.0 / config.rope_theta **", "1.0 / 10_000.0 **", _GOLDENS),
    ("model/head.py", "* (log_p + entropy[:, None]) / temperature", "* (log_p + entropy[:, None])",
     f"{_LAYERS}::test_token_scores_equal_the_full_softmax"),
    # A shifted model is asked for the first token of a document, which has no predecessor.
    ("model/alignment.py", "< jnp.arange(segment_ids.shape[1])[None])", "<= jnp.arange(segment_ids.shape[1])[None])",
     f"{_LAYERS}::test_what_a_model_can_be_asked_for"),
    ("model/alignment.py", "else jnp.roll(clean, 1, axis=1)", "else jnp.roll(clean, -1, axis=1)",
     "diffusion/test_objectives.py::test_shifted_block_size_1_is_the_ar_model"),
    ("model/useful_flops.py", "return 3.0 * rows", "return 2.0 * rows",
     "pod/test_rehearse.py::test_useful_flops_of_mini"),
)  # fmt: skip

_NOISE = "diffusion/test_noise.py"
_GROUPS, _EDITING, _DRAFTS = (f"diffusion/test_{name}.py" for name in ("groups", "editing", "drafts"))

_OBJECTIVE = _room(
    "objectives",
    ("diffusion/noise.py", "scores < rate)", "scores < 1 - rate)", _NOISE),
    # The noise of a row is the same in every epoch.
    ("diffusion/noise.py", "jax.random.fold_in(jax.random.fold_in(root, e), d)", "jax.random.fold_in(root, e)", _NOISE),
    # Times and masks are made of the same numbers.
    ("diffusion/noise.py", "jax.random.uniform(jax.random.fold_in(key, use), (length,))",
     "jax.random.uniform(key, (length,))", _NOISE),
    ("diffusion/noise.py", "place - start < count", "place - start <= count", _NOISE),
    ("diffusion/noise.py", "1 - masking.rate)", "masking.rate)",
     "diffusion/test_objectives.py::test_complementary_pair_covers_each_token_once"),
    ("diffusion/noise.py", ".index + u) / ", ".index * 0 + u) / ", _NOISE),
    # The ELBO's weight is t instead of 1 / t.
    ("diffusion/objectives.py", "weights / jnp.where(masked, example.rate, 1)",
     "weights * jnp.where(masked, example.rate, 1)",
     "diffusion/test_objectives.py::test_uniform_model_has_nelbo_log_vocab"),
    ("diffusion/objectives.py", 'if objective.normalizer == "tokens"', 'if objective.normalizer != "tokens"',
     "diffusion/test_objectives.py::test_uniform_weight_and_masked_normalizer"),
    # The confidence term counts tokens that are predicted wrongly.
    ("diffusion/objectives.py", "(scores.correct * scores.entropy * example.masked).sum()",
     "(scores.entropy * example.masked).sum()",
     "diffusion/test_objectives.py::test_confidence_loss_is_the_mean_entropy_of_correct_tokens_and_moves_nothing_else"),
    ("diffusion/objectives.py", "sums.correct_entropy / jnp.maximum(sums.correct, 1.0)",
     "sums.correct_entropy / jnp.maximum(sums.masked, 1.0)",
     "diffusion/test_objectives.py::test_confidence_loss_is_the_mean_entropy_of_correct_tokens_and_moves_nothing_else"),
    # A document without an answer is all tail.
    ("diffusion/objectives.py", "(before < end)", "(before <= end)", "diffusion/test_tails.py"),
    ("diffusion/objectives.py", "std * unit, 0.0)", "std * unit, std * unit)",
     "diffusion/test_objectives.py::test_embedding_noise_moves_masked_tokens_only_and_stops_at_zero"),
    # Groups: the first one is as long as the others; a group reaches into the prompt; rates start anew in each block.
    ("diffusion/groups.py", "(ordinal - groups.shift[:, None])", "ordinal", _GROUPS),
    ("diffusion/groups.py", "answered & at(answered, before)", "answered", _GROUPS),
    ("diffusion/noise.py", "jnp.multiply, first, factors", "jnp.multiply, layout.block_start == index, factors",
     _GROUPS),
    # Editing: the right token counts as a wrong one; a clean token has no label.
    ("diffusion/editing.py", "(rank >= tokens - at)", "(rank > tokens - at)", _EDITING),
    ("diffusion/objectives.py", "unmasked = example.eligible & ~example.hidden",
     "unmasked = example.eligible & ~example.hidden & (example.noisy != example.clean)", _EDITING),
    ("diffusion/objectives.py", "weight *= _count(masked) / _count(unmasked)", "weight *= 1.0", _EDITING),
    # Drafts: sure tokens stay masked; the least confident token is forced; the mask may be written.
    ("diffusion/drafts.py", "confidence > threshold)", "confidence < threshold)", _DRAFTS),
    ("diffusion/drafts.py", "_over_block(jnp.maximum, scores", "_over_block(jnp.minimum, scores", _DRAFTS),
    ("model/head.py", "jnp.where(jnp.isin(index, jnp.array(barred)), -jnp.inf, z)", "z", _DRAFTS),
    ("diffusion/preference.py", "-nll * weights", "nll * weights", "diffusion/test_preference.py"),
    ("diffusion/preference.py", "segment_ids % 2 == 0", "segment_ids % 2 == 1", "diffusion/test_preference.py"),
    ("diffusion/preference.py", "gain[..., 0] - gain[..., 1]", "gain[..., 1] - gain[..., 0]",
     "diffusion/test_preference.py"),
    ("diffusion/preference.py", ">= 2 * (jnp.arange(max_pairs)[None] + 1)", "> 2 * (jnp.arange(max_pairs)[None] + 1)",
     "diffusion/test_preference.py"),
    # A match that lies beyond the last one is taken.
    ("diffusion/levenshtein.py", "match & (index < end) & ", "match & ", "diffusion/test_levenshtein.py"),
    ("diffusion/levenshtein.py", "(aligned >= next_target)", "(aligned > next_target)",
     "diffusion/test_levenshtein.py"),
    ("diffusion/schedule.py", "if step < phase.steps", "if step <= phase.steps", "diffusion/test_schedule.py"),
    ("diffusion/schedule.py", '"noisy" if block_size == length else "both"', '"both"', "diffusion/test_schedule.py"),
)  # fmt: skip

_ACCEPT, _PREDICT = "sampling/test_accept.py", "sampling/test_predict.py"
_LEVENSHTEIN = "sampling/test_levenshtein.py"

_SAMPLING = _room(
    "sampling",
    ("sampling/accept.py", "step < block_length % steps", "step <= block_length % steps", _ACCEPT),
    ("sampling/accept.py", "confidence > threshold[:, None]", "confidence >= threshold[:, None]", _ACCEPT),
    ("sampling/accept.py", "masked & ~predicts_mask", "masked & predicts_mask", _ACCEPT),
    # The largest entropy counts too.
    ("sampling/accept.py", "jnp.cumsum(ascending, axis=-1)[:, :-1], ((0, 0), (1, 0))",
     "jnp.cumsum(ascending, axis=-1), ((0, 0), (0, 0))", _ACCEPT),
    ("sampling/accept.py", "rank < count[:, None]", "rank <= count[:, None]", _ACCEPT),
    ("sampling/accept.py", "(predicted != current)", "(predicted == current)", _ACCEPT),
    # The mask token can be predicted.
    ("sampling/predict.py", "jnp.where(_is_among(banned, ids), -jnp.inf, score)", "score", _PREDICT),
    ("sampling/predict.py", ".top_k - 0.5", ".top_k + 0.5", _PREDICT),
    # All blocks of an answer are drawn with the same numbers.
    ("sampling/denoise.py", "jax.random.fold_in(jax.random.fold_in(key, start), step)", "jax.random.fold_in(key, step)",
     "sampling/test_batching.py::test_blocks_of_an_answer_share_no_draws"),
    ("sampling/progress.py", "post_steps + 1 > state.requests.max", "post_steps > state.requests.max",
     "sampling/test_goldens.py"),
    ("sampling/levenshtein.py", "end[..., None, :] <= ", "end[..., None, :] < ", _LEVENSHTEIN),
    # What stood there before an insertion is lost.
    ("sampling/levenshtein.py", "at(insert), at(before), at(written)", "at(insert), at(written), at(written)",
     _LEVENSHTEIN),
    ("sampling/levenshtein.py", "jnp.where(left > 0, 0, post_steps + 1)", "post_steps + 1", _LEVENSHTEIN),
    ("sampling/levenshtein.py", "tried &= untried", "tried &= True", _LEVENSHTEIN),
    ("sampling/levenshtein.py", "settled = ~left.any(-1) & (edited", "settled = (edited",
     "sampling/test_levenshtein_decoding.py"),
    # Several blocks at once: one must accept something too early; they are committed to the wrong place; an end of
    # sequence in a later block ends an answer whose first blocks have gaps, or blocks go on behind it.
    ("sampling/denoise.py", "requests.semi_complete_threshold", "requests.add_block_threshold",
     "sampling/test_several_blocks.py"),
    ("sampling/several_blocks.py", "(n - state.pending) * block", "(n - 1) * block",
     "sampling/test_several_blocks.py::test_what_is_committed_is_exact"),
    ("sampling/progress.py", "position < lead[:, None] * settings.block_length", "position >= 0",
     "sampling/test_several_blocks.py"),
    ("sampling/progress.py", "enough & fits & ~(ends.any(-1) & stops)", "enough & fits",
     "sampling/test_several_blocks.py::test_positions_evaluated_alone"),
    # Of a trajectory, only the last write to each position.
    ("sampling/denoise.py", "jnp.where(written, place, capacity)", "jnp.where(written, window, capacity)",
     "sampling/test_history.py"),
    ("sampling/batches/admission.py", "x[first:] for x in known", "x for x in known",
     "sampling/test_batching.py::test_tells_of_new_tokens_as_blocks_are_finished"),
    # Requests that decode wait until a long prompt is computed.
    ("sampling/batching.py", "passes = 1 if self._filling else passes or", "passes = passes or",
     "sampling/test_prefill.py::test_rows_decode_between_two_chunks"),
    # A cancelled row goes on.
    ("sampling/batching.py", "self._state.finished | (np.arange(self.rows) == row)", "self._state.finished",
     "sampling/test_batching.py::test_a_cancelled_row_is_free_and_disturbs_no_other"),
    # A chunk is known by its own tokens, whatever came before; or whatever the blocks are. The first chunk of a prompt
    # is given up before its last.
    ("sampling/batches/prefixes.py", "digest.update(", "digest = hashlib.sha256(",
     "sampling/test_prefixes.py::test_another_token_at_the_start_is_another_prompt"),
    ("sampling/batches/prefixes.py", 'f"{settings.block_length} {size} {canvas} "', 'f"{size} {canvas} "',
     "sampling/test_prefixes.py::test_blocks_of_another_length_are_other_keys"),
    ("sampling/batches/prefixes.py", "reversed(keys[:count])", "keys[:count]",
     "sampling/test_prefixes.py::test_what_was_used_least_recently_is_given_up"),
    # A chunk at the end of the canvas is written elsewhere than its tokens are.
    ("sampling/prefill.py", "jnp.minimum(first, canvas - size)", "first",
     "sampling/test_prefill.py::test_a_chunk_that_would_end_beyond_the_canvas"),
    # A row decodes from its first chunk on.
    ("sampling/prefill.py", "(last >= 0) & (last < size)", "(last >= 0)", "sampling/test_prefill.py"),
    ("sampling/quantize.py", "jnp.round(w / scale)", "jnp.trunc(w / scale)",
     "sampling/test_quantize.py::test_each_weight_is_off_by_half_a_scale_of_its_channel_at_most"),
    ("sampling/cost.py", "return two / one - 1", "return two / one", "sampling/test_cost.py"),
)  # fmt: skip

_ENGINE = "serving/test_engine.py"

_SERVING = _room(
    "serving",
    # What was cancelled keeps its row, or hears of its end.
    ("serving/engine.py", "self._batch.cancel(ticket._number)", "pass",
     f"{_ENGINE}::test_a_cancelled_request_frees_its_row_and_hears_no_more"),
    ("serving/engine.py", "if self._cancel(ticket, count):", "if self._cancel(ticket, count) or True:",
     f"{_ENGINE}::test_a_cancelled_request_frees_its_row_and_hears_no_more"),
    # Grace has no end.
    ("serving/engine.py", "min(self._end_at, time.monotonic() + grace)", "self._end_at", f"{_ENGINE}::test_stopping"),
    # An error of the device keeps the arrays of its batch.
    ("serving/engine.py", "error = error.with_traceback(None)", "error = error",
     f"{_ENGINE}::test_after_an_error_of_the_device_it_goes_on_with_a_fresh_batch"),
)  # fmt: skip

_TRAINING = _room(
    "training",
    # The first step of the decay has the full rate.
    ("training/optimizer.py", "peak + (end - peak) / max(decay, 1)", "peak", "training/test_optimizer.py"),
    ("training/optimizer.py", "config.b1, config.b2, config.eps", "config.b2, config.b1, config.eps",
     "training/test_optimizer.py"),
    # Norms and biases are decayed.
    ("model/declarations.py", 'return self.init == "normal" or self.matrix', "return True",
     "training/test_optimizer.py"),
    ("model/lora.py", "xp.float32(scale) * low_rank", "low_rank",
     "training/test_lora.py::test_merging_keeps_the_dtype_of_the_base"),
    # A guarded step is applied where the loss is too large, and not where it is not.
    ("training/step.py", "(loss <= largest_loss)", "(loss > largest_loss)", "training/test_step.py"),
    ("training/step.py", "sums.squared_difference / total - mean**2", "sums.squared_difference / total",
     "training/test_step.py"),
    # The level of a step includes the step before, whose loss is not always read yet.
    ("training/faults.py", "s < step - 1", "s < step",
     "training/test_faults.py::test_verdicts_do_not_depend_on_when_metrics_are_read_or_where_a_run_was_resumed"),
    ("training/faults.py", "step * (before - rows_per_step)", "step * (rows_per_step - before)",
     "training/test_faults.py::test_a_run_that_goes_on_with_other_rows_meets_each_once_an_epoch"),
    # A rewind meets the rows of the bad step again.
    ("training/faults.py", "(bad_step + 1 - to_step)", "(bad_step - to_step)",
     "training/test_faults.py::test_a_rewind_and_then_other_rows"),
    ("runtime/retry.py", "2 ** (failures - 1)", "2 ** failures",
     "runtime/test_workdir_lock.py::test_attempts_are_patient_but_not_for_ever"),
    ("monitoring/mfu.py", "].peak_bf16 / chips[device.device_kind].devices", "].peak_bf16", "monitoring/test_mfu.py"),
)  # fmt: skip

_DATA = _room(
    "data",
    # Epoch 1 of seed 0 is epoch 0 of seed 1.
    ("data/order.py", "SeedSequence((seed, epoch))", "SeedSequence((seed + epoch,))", "data/test_order.py"),
    ("data/order.py", "offset + step * rows_per_step + np", "step * rows_per_step + np", "data/test_order.py"),
    # What continues a document in the next row begins with an unsupervised token too.
    ("data/pack.py", "begin + given * first", "begin + given", "data/test_bos.py"),
    ("data/pack.py", "start += len(part) + -len(part) % align", "start += len(part)", "data/test_pack.py"),
    ("data/rows.py", "supervised &= inside", "supervised |= inside", "data/test_pack.py::test_row_records_round_trip"),
    # A part begins in the middle of a line.
    ("data/parts.py", "stream.readline()", "stream.read(0)", "data/test_parts.py"),
    ("data/mixture.py", "self._first_ids[component] + row_id, epoch", "row_id, epoch", "data/test_mixture.py"),
    ("data/pack_examples.py", 'count if tail == "none" else size', "size", "data/test_pack_chat.py"),
    ("data/pack_examples.py", "row.used + _size(example) <= length", "row.used + _size(example) < length",
     "data/test_pack_chat.py"),
    # A token that begins where a turn does is left out.
    ("data/chat.py", "np.searchsorted(starts, span)", 'np.searchsorted(starts, span, "right")', "data/test_chat.py"),
    ("data/chat.py", "sum(end <= len(prompt)", "sum(end < len(prompt)", "data/test_bos.py data/test_chat.py"),
    ("data/conversation/token_rows.py", "np.arange(len(ids)) >= value", "np.arange(len(ids)) > value",
     "data/conversation/test_token_rows.py"),
    # A short text is found in what another turn says.
    ("data/conversation/said.py", "text.count(bare) >= times", "text.count(bare) >= 1",
     "data/conversation/test_said.py"),
)  # fmt: skip

_DIGEST, _SAVER = "checkpoint/test_digest.py", "checkpoint/test_saver.py"

_CHECKPOINT = _room(
    "checkpoint",
    ("checkpoint/digest.py", "(h1 + key) * _C4", "h1 * _C4", _DIGEST),
    ("checkpoint/digest.py", "_salt(row, place >> _U15)", "_salt(row, place)", _DIGEST),
    # Every replica of a shard is counted.
    ("checkpoint/digest.py", "shard.replica_id == 0", "shard.replica_id >= 0", _DIGEST),
    ("checkpoint/merge.py", "for each in slabs[1:]:", "for each in slabs[2:]:", "checkpoint/test_merge.py"),
    ("checkpoint/saver.py", "step % keep_every == 0", "step % keep_every != 0", f"{_SAVER}::test_keeps_every_so_many"),
    ("checkpoint/saver.py", "sorted((score.value, step)", "sorted((-score.value, step)",
     f"{_SAVER}::test_keeps_the_best"),
    # The oldest intact step stands for a workdir.
    ("checkpoint/weights.py", "for step in reversed(", "for step in list(",
     "checkpoint/test_weights.py::test_resolve_passes_over_damaged_and_incomplete_steps"),
    ("checkpoint/weights.py", 'name.endswith("expert_bias") or ', "",
     "checkpoint/test_weights.py::test_dtype_casts_all_but_the_expert_bias"),
)  # fmt: skip

_HUGGINGFACE = "interop/test_huggingface.py"

_CONVERTER = _room(
    "converter",
    ("interop/huggingface.py", "(transposed(value) if parameter.matrix else value)", "value",
     f"{_HUGGINGFACE}::test_goldens_bit_for_bit"),
    ("interop/huggingface.py", "('gate', 'up')[part % 2]", "('up', 'gate')[part % 2]",
     f"{_HUGGINGFACE}::test_fused_experts"),
    # The values are read from the rows of the keys.
    ("model/declarations.py", "(c.num_heads + c.num_kv_heads, c.num_kv_heads)", "(c.num_heads, c.num_kv_heads)",
     f"{_HUGGINGFACE}::test_goldens_bit_for_bit"),
    ("interop/gguf.py", ".swapaxes(1, 2).reshape(rows.shape)", ".reshape(rows.shape)",
     "interop/test_gguf.py::test_tensors_and_config"),
    ("interop/hf_config.py", 'head_dim // 2 if architecture == "llada2_moe" else head_dim', "head_dim",
     "interop/test_hf_config.py"),
    ("interop/hf_config.py", '"same" if architecture == "llada2_moe" else "shifted"',
     '"shifted" if architecture == "llada2_moe" else "same"', "interop/test_hf_config.py interop/test_convert.py"),
    ("interop/hf_config.py", 'defaults.get("rope_theta", 10_000.0)', "10_000.0", "interop/test_hf_config.py"),
    ("interop/rope_config.py", "0.1 * weight * math.log(factor) + 1", "0.1 * weight * math.log(factor)",
     "interop/test_rope_config.py"),
    ("tokenizer.py", "ids[: len(prefix)] == prefix else prefix + ids", "ids[: len(prefix)] == prefix else ids",
     "interop/test_bos.py"),
)  # fmt: skip

_SHARDING = _room(
    "sharding",
    # The gradient of a sum over ranks is their share of it only.
    ("sharding.py", "(cotangent * jax.lax.axis_size(axis),)", "(cotangent,)",
     "test_sharding.py::test_a_mesh_computes_what_one_device_does"),
    # The copies of the key/value heads lie head after head, not each beside its own.
    ("sharding.py", "jnp.repeat(x, copies, axis=2)", "jnp.tile(x, (1, 1, copies, 1))",
     "test_sharding.py::test_a_mesh_computes_what_one_device_does"),
    ("model/head.py", 'jax.lax.axis_index("tensor") * part.shape[0]', 'jax.lax.axis_index("tensor")',
     "test_sharding.py::test_a_mesh_computes_what_one_device_does"),
    ("sampling/predict.py", "jax.lax.axis_index(head_axes) * columns", "jax.lax.axis_index(head_axes)",
     "sampling/test_predict.py::test_parts_of_the_vocabulary_agree_with_the_whole"),
    ("sampling/predict.py", " | (column >= vocabulary.end)", "",
     "sampling/test_predict.py::test_parts_of_the_vocabulary_agree_with_the_whole"),
    ("attention/decoding/projections.py", "tile < self.firsts[2], turned, y", "tile < self.firsts[1], turned, y",
     "attention/decoding/test_projections.py::test_project_heads"),
    ("attention/decoding/cache_write.py", "pl.when(selected[row] > 0)", "pl.when(selected[row] >= 0)",
     "attention/decoding/test_cache_write.py::test_writes_the_selected_rows"),
)  # fmt: skip

_ESTIMATOR = _room(
    "estimator",
    ("pod/operations.py", "return 2 * math.sqrt(", "return math.sqrt(",
     "pod/test_step_cost.py::test_a_matmul_costs_its_flops"),
    ("pod/hlo.py", "-(-padded * _bits(self.dtype) // 8)", "-(-padded * _bits(self.dtype) // 4)",
     "pod/test_operations.py::test_padded_bytes_are_those_of_whole_tiles"),
    ("pod/step_cost.py", "min(line.seconds, flight.behind)", "flight.behind",
     "pod/test_step_cost.py::test_a_collective_is_hidden_by_what_runs_between_its_start_and_its_done"),
    # Both directions of a ring are one link.
    ("pod/collectives.py", "        2 if extent == devices.topology.shape[i]",
     "        1 if extent == devices.topology.shape[i]",
     "pod/test_step_cost.py::test_an_all_gather_costs_its_ring_over_the_links_of_its_axes"),
    ("pod/collectives.py", '"all-reduce": 2 * full * (n - 1) / n', '"all-reduce": full * (n - 1) / n',
     "pod/test_step_cost.py::test_each_kind_of_collective_sends_its_share_of_the_operand"),
    # A tile on the border of two groups counts once.
    ("pod/experts_cost.py", "-(-ends // tile) - starts // tile", "-(-(ends - starts) // tile)",
     "pod/test_experts_cost.py::test_tile_visits_are_the_kernel_s_own"),
    ("pod/stream_cost.py", "max(cycles / chip.bundle_rate", "min(cycles / chip.bundle_rate", "pod/test_stream_cost.py"),
    ("pod/schedule_reader.py", "(steps / cores if main.loop else 1)", "(steps if main.loop else 1)",
     "pod/test_stream_cost.py"),
)  # fmt: skip

_LIKELIHOOD = "evaluation/test_likelihood.py"

_EVALUATION = _room(
    "evaluation",
    ("evaluation/likelihood.py", "real / (real - 1)) / tokens", "real / real) / tokens", _LIKELIHOOD),
    ("evaluation/likelihood.py", "mirrored=bool(draw % 2)", "mirrored=False", _LIKELIHOOD),
    ("evaluation/likelihood.py", "nats.astype(np.float64) / draws.samples", "nats.astype(np.float64)", _LIKELIHOOD),
    # The whole part of a decimal fraction is a number of the text.
    ("evaluation/grading.py", r"(?![A-Za-z0-9_])(?![.,]\d)", "(?![A-Za-z0-9_])", "evaluation/test_grading.py"),
    ("evaluation/grading.py", "values[0] == values[1]", "values[0] != values[1]", "evaluation/test_grading.py"),
    ("evaluation/report.py", "ddof=1", "ddof=0", "evaluation/test_report.py"),
)  # fmt: skip

_REWARDS, _QUESTIONS = "reinforcement/test_rewards.py", "reinforcement/test_questions.py"
_POLICY = "reinforcement/test_policy.py"

_REINFORCEMENT = _room(
    "reinforcement",
    ("reinforcement/policy.py", "jnp.minimum(log_ratio, high)", "jnp.maximum(log_ratio, high)", _POLICY),
    ("reinforcement/policy.py", "-jnp.minimum(ratio * advantage, cut)", "-cut", _POLICY),
    ("reinforcement/policy.py", "rewards.shape[1] / (rewards.shape[1] - 1)", "1", _POLICY),
    ("reinforcement/copies.py", "return Copies(hidden | (rollouts.in_replay & ~rollouts.in_answer), weights)",
     "return Copies(hidden, weights)", _POLICY),
    ("reinforcement/copies.py", "np.floor(level * sizes[cells]).astype(np.int64) + 1",
     "np.floor(level * sizes[cells]).astype(np.int64)", _POLICY),
    ("reinforcement/copies.py", "(written & (rounds >= index))", "(written & (rounds > index))", _POLICY),
    ("reinforcement/scoring.py", "((logp * weights).sum(axis=1) * slope).sum()", "(logp * weights).sum()",
     "reinforcement/test_scoring.py"),
    ("reinforcement/passes.py", "weights[len(row) - empty :] = 0", "weights[len(row) :] = 0",
     "reinforcement/test_passes.py"),
    ("reinforcement/passes.py", "(rows.weights > 0).any(axis=2).T", "(rows.weights > 0).all(axis=2).T",
     "reinforcement/test_passes.py"),
    # A question that is held out is trained on.
    ("reinforcement/questions.py", "not in self._refused", "not in ()", _QUESTIONS),
    ("reinforcement/questions.py", "rows[: len(rows) - held_out]", "rows", _QUESTIONS),
    ("reinforcement/questions.py", "(self._seed, group, draw)", "(self._seed, group)", _QUESTIONS),
    ("reinforcement/rewards.py", "rewards[place] = value", "rewards[number] = value", _REWARDS),
    ("reinforcement/rewards.py", "os.killpg(self._process.pid, signal", "os.kill(self._process.pid, signal", _REWARDS),
    # A worker outlives its killed parent.
    ("reinforcement/reward_worker.py", "F_SETFL, os.O_ASYNC", "F_SETFL, 0", _REWARDS),
    # A program passes by ending early.
    ("evaluation/programs.py", "randrange(100, 250)", "randrange(1)", "evaluation/test_programs.py"),
)  # fmt: skip

_TEXT, _LIMITS, _ASKED = "serving/test_text.py", "serving/test_limits.py", "serving/test_asked.py"
_HTTP = _room(
    "http",
    # Text that a stop text begins with is given out.
    ("serving/text.py", "else min(sure, stop)", "else len(self._written)", _TEXT),
    ("serving/text.py", "max(size - longest + 1, 0)", "size", _TEXT),
    # A character is cut.
    ("token_text.py", "while count and _incomplete(text):", "while False:", _TEXT),
    # Half of a marker is given out as text.
    ("serving/tool_calls.py", "may_begin(held, [begin])", "len(held)", "serving/test_tool_calls.py"),
    # A call of an object with more members loses them.
    ("serving/tool_calls.py", "len(members) != 2 or ", "", "serving/test_tool_calls.py"),
    # Who leaves keeps the row.
    ("serving/job.py", "            ticket.cancel()", "            pass",
     f"{_LIMITS}::test_a_client_that_leaves_a_stream_frees_the_row"),
    ("serving/guard.py", "and any(found)", "and all(found)", f"{_LIMITS}::test_only_who_has_a_key_is_served"),
    ("serving/guard.py", "scope[\"path\"] not in self._open and ", "", f"{_LIMITS}::test_only_who_has_a_key_is_served"),
    # A field that asks for something is dropped.
    ("serving/asked.py", "if name in neutral and not any", "if False and not any", _ASKED),
    ("serving/app.py", "app.router.redirect_slashes = False", "pass", "serving/test_garbage.py"),
    ("serving/listen.py", "socket.socket(family, kind, protocol)", "socket.socket(family, kind)",
     f"{_LIMITS}::test_small_pieces_are_sent_at_once"),
)  # fmt: skip

_BROWSER = "serving/test_page.py"
_PAGE = _room(
    "page",
    # A token ends the element that holds the trajectory.
    ("serving/page.py", '.replace("<", "\\\\u003c")', "", "serving/test_replay.py"),
    ("sampling/trajectory.py", "passes[span] += before", "pass", "sampling/test_trajectory.py"),
    ("sampling/trajectory.py", "history.position < len(tokens)", "history.position >= 0",
     "sampling/test_trajectory.py"),
    # Stopping hides the answer, and the model writes on.
    ("serving/page.html", "abort?.abort();", "",
     f"{_BROWSER}::test_stop_cancels_the_request_and_keeps_what_is_committed"),
    # Boxes of a lost connection stay.
    ("serving/page.html", "  turn.block = [];", "", _BROWSER),
    # What may still change is read aloud.
    ("serving/page.html", 'span.setAttribute("aria-hidden", "true")', "0", _BROWSER),
    # The page overrules the server's own settings.
    ("serving/page.html", "sliders().filter((s) => s.moved)", "sliders()", _BROWSER),
    ("serving/page.html", ' || tokens[i].text.includes("\\ufffd")', "",
     f"{_BROWSER}::test_characters_cut_between_tokens_and_text_that_comes_late"),
    ("serving/page.html", "if (step <= last) return;", "return;", _BROWSER),
    ("serving/page.html", "!turn.failed && ", "", f"{_BROWSER}::test_half_an_answer_is_not_sent_along"),
)  # fmt: skip

_GROUND = _room(
    "ground",
    ("errors.py", "number >= at_least", "number > at_least", "test_errors.py"),
    ("errors.py", "isinstance(value, bool | str | bytes)", "isinstance(value, str | bytes)", "test_errors.py"),
)

FAULTS: tuple[Fault, ...] = (
    *_MASK, *_KERNELS, *_MODEL, *_OBJECTIVE, *_SAMPLING, *_SERVING, *_HTTP, *_TRAINING, *_DATA, *_CHECKPOINT,
    *_CONVERTER, *_SHARDING, *_ESTIMATOR, *_EVALUATION, *_REINFORCEMENT, *_PAGE, *_GROUND,
)  # fmt: skip
