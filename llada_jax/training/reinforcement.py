"""Reinforcement learning on verifiable rewards: what a step is. Sampler and learner share one set of weights.

A step answers its questions, each `rl.group` times, by the weights that it begins with; scores the answers' rewards;
draws the noisy copies (reinforcement/copies.py); and makes rl.epochs * rl.updates updates of the optimizer, each on
its part of the answers. Questions, draws and masks are functions of (seed, step), so that a resumed run is the
uninterrupted one: a step that was not saved is done again from its beginning.
"""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from llada_jax import sharding
from llada_jax.checkpoint.weights import Model
from llada_jax.diffusion.schedule import Phase
from llada_jax.errors import InputError
from llada_jax.evaluation.report import mean_error, with_error
from llada_jax.evaluation.tasks import answer_questions
from llada_jax.model import parameters
from llada_jax.model.config import ModelConfig
from llada_jax.model.lora import Lora
from llada_jax.monitoring.metrics import MetricsWriter, drop_later_rows
from llada_jax.reinforcement import scoring
from llada_jax.reinforcement.copies import Copies, elbo_copies, trajectory_copies
from llada_jax.reinforcement.own_devices import decoding_mesh, logical_axes, on_own_devices
from llada_jax.reinforcement.passes import as_passes, as_rows, few_sizes, with_gradient
from llada_jax.reinforcement.policy import advantages, policy_metrics
from llada_jax.reinforcement.rewards import RewardPool
from llada_jax.reinforcement.rollouts import Rollouts, sample
from llada_jax.reinforcement.scoring import ScoredRows, Scoring
from llada_jax.runtime.global_arrays import from_own_rows, own_rows
from llada_jax.runtime.preemption import Stop
from llada_jax.runtime.xla_options import xla_options
from llada_jax.sampling.generate import GenerateConfig, prefill_execution
from llada_jax.training.config import execution, policy_loss
from llada_jax.training.inputs import Inputs
from llada_jax.training.reference import Reference
from llada_jax.training.sections import TrainConfig
from llada_jax.training.step import whole
from llada_jax.training.train_state import TrainState

ANSWERS = "answers.jsonl"  # in the workdir: sample answers


class Asked(NamedTuple):
    """row_ids: numbers of a step's questions, one per answer."""

    row_ids: np.ndarray


@contextlib.contextmanager
def reinforcement(config, inputs, reference, optimizer, batch_sharding, stop, workdir) -> Iterator["Reinforcement"]:
    """Yields the work of a run, with its pool of rewards open on process 0. Raises InputError where answers cannot be
    shared out, or there is no such reward.
    """
    c, pool = config.rl, contextlib.nullcontext()
    share, rest = divmod(config.batch.rows, jax.process_count())
    if rest:
        raise InputError(f"config.batch.rows={config.batch.rows} cannot be shared by {jax.process_count()} processes")
    decoding = decoding_mesh(inputs.model, min(c.rows, share))
    if jax.process_index() == 0:
        pool = RewardPool(inputs.rows, c.reward, c.reward_seconds, c.reward_default, c.reward_workers)
    with pool as rewards:
        yield Reinforcement(config, inputs, reference, optimizer, batch_sharding, decoding, rewards, stop, workdir)


@dataclasses.dataclass(frozen=True)
class Reinforcement:
    """batch_sharding: of answers over the mesh of the updates. decoding: the mesh of this process's devices. rewards:
    the open pool, on process 0.
    """

    config: TrainConfig
    inputs: Inputs
    reference: Reference
    optimizer: optax.GradientTransformation
    batch_sharding: NamedSharding
    decoding: Mesh
    rewards: RewardPool | None
    stop: Stop
    workdir: Path

    def batches(self, first_step: int, last_step: int, offset: int) -> Iterator[tuple[int, Asked]]:
        """Yields (step, the numbers of its questions); a generator."""
        del offset  # such a run is not rewound
        if jax.process_index() == 0:
            drop_later_rows(self.workdir / ANSWERS, first_step)  # they come again
        group = self.config.rl.group
        for step in range(first_step, last_step):
            numbers = self.inputs.rows.numbers(step, self.config.batch.rows // group)
            yield step, Asked(np.repeat(numbers, group))

    def step(
        self, state: TrainState, step: int, batch: Asked, phase: Phase, scalars: tuple
    ) -> tuple[TrainState, dict | None]:
        """Metrics are None, and the state is as it was, when SIGTERM came before the first update."""
        del phase, scalars
        begun = time.monotonic()
        params = whole(state.params, self.reference.frozen, self.inputs.trained)
        answers = self._answers(params, step, batch.row_ids)
        if answers is None:
            return state, None
        answered = time.monotonic()
        rewards, metrics = self._rewards(step, batch.row_ids, answers)
        rewarded = time.monotonic()
        advantage = advantages(rewards.reshape(-1, self.config.rl.group), self.config.rl.advantage).reshape(-1)
        copies = self._copies(answers, step)
        if self.config.rl.drift_rows and self.config.rl.rule != "llada2.1":  # edits have no step
            metrics |= self._drift(params, answers)
        parts = [self._passes(answers, copies, advantage, part) for part in self._parts(step)]
        first = jax.tree.map(lambda x: x[: self._micro_rows], parts[0])
        metrics["entropy"] = self._programs.mean_entropy(params, self._placed(first))
        parts = [self._with_old(params, self._placed(part)) for part in parts]
        del params  # the state that they are of is donated
        of_updates = []
        for _ in range(self.config.rl.epochs):
            for rows in parts:
                state, of_update = self._programs.update(state, self.reference.frozen, rows)
                of_updates.append(of_update)
        means = {name: np.mean([float(one[name]) for one in jax.device_get(of_updates)]) for name in of_updates[0]}
        metrics |= {"seconds_answers": answered - begun, "seconds_rewards": rewarded - answered}
        metrics["seconds_updates"] = time.monotonic() - rewarded
        means["largest_log_ratio_variance"] = max(float(one["log_ratio_variance"]) for one in of_updates)
        return state.replace(step=state.step + 1), metrics | means

    def _answers(self, params, step: int, numbers: np.ndarray) -> Rollouts | None:
        """Of all questions, on every process; each has decoded its share, on its own devices."""
        config, rows = self.config, self.config.batch.rows
        share = rows // jax.process_count()
        mine = range(jax.process_index() * share, (jax.process_index() + 1) * share)
        prompts = [self._prompt(int(numbers[row])) for row in mine]
        seeds = [(config.seed, step * rows + row) for row in mine]
        alone = jax.process_count() == 1
        with self._decoding(params) as weights:
            answers = sample(
                weights, self.inputs.model, prompts, self._settings, seeds, config.rl.rows, config.data.length,
                self._decoding_execution, lambda: alone and self.stop.is_set,
            )  # fmt: skip
        return answers if alone else multihost_utils.process_allgather(answers, tiled=True)

    def _prompt(self, number: int) -> np.ndarray:
        """Raises InputError where the answer to a question has no room."""
        prompt = np.asarray(self.inputs.rows.question(number).encode(self.inputs.tokenizer), np.int32)
        block, room = self.config.schedule.block_size, self.config.data.length
        if -(-(len(prompt) + self.config.rl.gen_length) // block) * block > room:
            raise InputError(
                f"question {number} of {self.config.rl.questions}: {len(prompt)} tokens and rl.gen_length="
                f"{self.config.rl.gen_length}, in blocks of {block}, do not fit in config.data.length={room}; the run "
                "can go on with another"
            )
        return prompt

    @functools.cached_property
    def _settings(self) -> GenerateConfig:
        c = self.config.rl
        return GenerateConfig(
            gen_length=c.gen_length, block_length=self.config.schedule.block_size, steps=c.steps, rule=c.rule,
            threshold=c.threshold, temperature=c.temperature, entropy_bound=c.entropy_bound, eos_early_stop=True,
        )  # fmt: skip

    @functools.cached_property
    def _decoding_execution(self):
        how = prefill_execution(self.config.data.length)
        return dataclasses.replace(how, dtype=self.config.execution.dtype)

    def _decoding(self, params):
        """A context of weights to decode with."""
        axes = logical_axes(self.inputs.trained)
        return on_own_devices(params, axes, self.decoding, self.config.execution.dtype)

    def _rewards(self, step: int, numbers: np.ndarray, answers: Rollouts) -> tuple[np.ndarray, dict]:
        """(float64 [answers], metrics): the same on every process, as process 0 alone runs the rewards."""
        texts = self._texts(answers)
        rewards, faults = np.zeros(len(numbers)), 0
        if jax.process_index() == 0:
            scored = self.rewards.score(list(zip(map(int, numbers), texts, strict=True)))
            rewards, faults = scored.rewards, len(scored.faults)
            for fault in scored.faults[:3]:
                print(f"step {step + 1}  reward: {fault}", flush=True)
            if step % self.config.rl.answers_every_steps == 0:
                self._write_answers(step, numbers, texts, rewards, answers)
        if jax.process_count() > 1:
            rewards, faults = multihost_utils.broadcast_one_to_all((rewards, np.int64(faults)))
        mean, error = mean_error(rewards.reshape(-1, self.config.rl.group).mean(axis=1))
        tokens = answers.answer_tokens
        spread = np.ptp(rewards.reshape(-1, self.config.rl.group), axis=1)
        return rewards, {
            "reward": mean,
            "reward_stderr": math.nan if error is None else error,
            "reward_faults": float(faults),
            "answer_tokens": float(tokens.mean()),
            "tokens_per_forward": float(tokens.sum() / max(answers.passes.sum(), 1)),
            "groups_without_signal": float((spread == 0).mean()),
        }

    def _texts(self, answers: Rollouts) -> list[str]:
        return [
            self.inputs.tokenizer.decode_after(row[:begin], row[begin:end])
            for row, begin, end in zip(answers.tokens, answers.prompt_length, answers.stop_length, strict=True)
        ]

    def _write_answers(self, step: int, numbers, texts: list[str], rewards, answers: Rollouts) -> None:
        """Appends the first group's."""
        with open(self.workdir / ANSWERS, "a", encoding="utf-8") as file:
            for row in range(self.config.rl.group):
                record = {
                    "step": step + 1,
                    "question": int(numbers[row]),
                    "prompt": self.inputs.rows.question(int(numbers[row])).prompt(self.inputs.tokenizer),
                    "answer": texts[row],
                    "reward": float(rewards[row]),
                    "tokens": int(answers.answer_tokens[row]),
                    "forward_passes": int(answers.passes[row]),
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _copies(self, answers: Rollouts, step: int) -> Copies:
        c = self.config.rl
        if c.estimator == "elbo":
            return elbo_copies(answers, self.config.schedule.block_size, c.copies, (self.config.seed, step))
        return trajectory_copies(answers, self.config.schedule.block_size, c.shrink, c.token_weights)

    def _drift(self, params, answers: Rollouts) -> dict[str, jax.Array]:
        """Of the first answers: how far apart sampler and learner are on the sampler's own steps."""
        devices = sharding.num_parts("batch", self.config.batch.rows)
        rows = min(-(-self.config.rl.drift_rows // devices) * devices, self.config.batch.rows)
        own = own_rows(self.batch_sharding, rows)
        first = jax.tree.map(lambda x: x[:rows], answers)
        copies = self._replayed(first)
        first, copies = jax.tree.map(lambda x: x[own], first), jax.tree.map(lambda x: x[:, own], copies)
        scored = as_rows(first, copies, np.zeros(len(own), np.float32)), first.confidence
        mean, largest = self._programs.drift(params, *from_own_rows(scored, self.batch_sharding, rows))
        return {"drift": mean, "drift_max": largest}

    def _replayed(self, answers: Rollouts) -> Copies:
        """trajectory_copies of each step, in few numbers."""
        replay = functools.partial(trajectory_copies, answers, self.config.schedule.block_size)
        number = len(replay().hidden)
        return replay(copies=few_sizes(number, 1, 2 * number))

    def _parts(self, step: int) -> list[np.ndarray]:
        """Rows of each update: a shuffle of the step's answers."""
        random = np.random.default_rng((self.config.seed, step, 1))
        return np.split(random.permutation(self.config.batch.rows), self.config.rl.updates)

    @property
    def _micro_rows(self) -> int:
        return self.config.batch.rows // self.config.rl.updates // self.config.batch.micro_batches

    def _passes(self, answers: Rollouts, copies: Copies, advantage: np.ndarray, part: np.ndarray) -> ScoredRows:
        """What an update passes over, in numpy: of all processes."""
        devices = sharding.num_parts("batch", len(part))
        if not self.config.rl.kl_weight:
            part = with_gradient(part, advantage, devices * self.config.batch.micro_batches)
        chosen = jax.tree.map(lambda x: x[part], answers)
        rows = as_rows(chosen, jax.tree.map(lambda x: x[:, part], copies), advantage[part])
        return rows if self.config.rl.estimator == "elbo" else as_passes(rows, self._micro_rows, devices)

    def _placed(self, rows: ScoredRows) -> ScoredRows:
        """On the devices."""
        count = len(rows.tokens)
        own = own_rows(self.batch_sharding, count)
        return from_own_rows(jax.tree.map(lambda x: x[own], rows), self.batch_sharding, count)

    def _with_old(self, params, rows: ScoredRows) -> ScoredRows:
        """With the scores of the policy as it answered, unless it is the one that is updated, and of the reference."""
        old = self._programs.score(params, rows) if needs_old(self.config) else None
        reference = self._programs.score(self.reference.frozen, rows) if self.config.rl.kl_weight else None
        return rows.replace(old=old, reference=reference)

    @functools.cached_property
    def _programs(self) -> "Programs":
        return programs(self.config, self.inputs.model, self.inputs.trained, self.optimizer)

    def evaluate(self, params, writer: MetricsWriter, step: int) -> None:
        """Answers the held-out questions greedily. Nothing ranks the checkpoints of such a run."""
        greedy = dataclasses.replace(self._settings, temperature=0.0)
        with self._decoding(params) as weights:
            model = Model(self.inputs.model, weights, self.inputs.tokenizer, {})
            result, _ = answer_questions(model, self.inputs.held_out, greedy, self.config.rl.rows)
        row = {"step": step, "score": result.score, "score_stderr": result.score_stderr}
        row |= {"tokens_per_forward": result.tokens_per_forward, "scorer_errors": result.scorer_errors}
        writer.write(row, "held_out_questions")
        print(
            f"step {step}  held-out questions  score {with_error(result.score, result.score_stderr, '.3f')}  "
            f"tokens per forward {result.tokens_per_forward:.2f}",
            flush=True,
        )


def needs_old(config) -> bool:
    """Whether updates need the scores of the policy that answered; a single update is of that policy itself."""
    return config.rl.updates * config.rl.epochs > 1


class Programs(NamedTuple):
    """Compiled. score(params, rows): of the estimator. drift(params, rows, confidence). mean_entropy(params, rows).
    update(state, frozen, rows) -> (state, metrics); the state is donated, and its step stays.
    """

    score: object
    drift: object
    mean_entropy: object
    update: object


def programs(
    config: TrainConfig, model: ModelConfig, trained: ModelConfig | Lora, optimizer, platform: str | None = None
) -> Programs:
    """platform: that they are compiled for, by default the one at hand."""
    loss, on = policy_loss(config), execution(config, platform)
    answers = config.batch.rows // config.rl.updates  # of an update
    jit = functools.partial(jax.jit, compiler_options=xla_options(platform or jax.default_backend()))
    temperature = config.rl.temperature if loss.estimator == "trajectory" else 1.0
    how = Scoring(model, config.schedule.block_size, temperature, on, config.batch.micro_batches)
    # dInfer's confidence is that of softmax(logits) at any temperature (sampling/predict.py).
    drawn_at = 1.0 if config.rl.rule == "dinfer" else config.rl.temperature
    once = dataclasses.replace(how, micro_batches=1)
    seen = dataclasses.replace(once, temperature=drawn_at)
    micro_rows = answers // config.batch.micro_batches

    def by(rows: ScoredRows) -> Scoring:
        """Rows of the elbo have all its copies; those of trajectories have one, and there are more of them or fewer."""
        if loss.estimator == "elbo":
            return how
        return dataclasses.replace(how, micro_batches=max(len(rows.tokens) // micro_rows, 1))

    def update(state: TrainState, frozen, rows: ScoredRows):
        gradients, sums = scoring.policy_gradient(
            lambda params: whole(params, frozen, trained), state.params, by(rows), rows, loss, answers
        )
        gradients = jax.tree.map(sharding.constrain, gradients, parameters.logical_axes(trained))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = policy_metrics(sums, answers) | {"gradient_norm": optax.global_norm(gradients)}
        return TrainState(state.step, params, optimizer_state), metrics

    score = scoring.elbo if loss.estimator == "elbo" else scoring.scores
    return Programs(
        score=jit(lambda params, rows: score(params, by(rows), rows)),
        drift=jit(lambda params, rows, confidence: scoring.drift(params, seen, rows, confidence)),
        mean_entropy=jit(lambda params, rows: scoring.mean_entropy(params, once, rows)),
        update=jit(update, donate_argnums=0),
    )
