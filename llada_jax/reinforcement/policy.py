"""Advantages, the clipped policy loss and its KL term: functions of rewards and of log probabilities alone.

    sequence loss (EBPO, L-EBPO's Eq. 5 without edits; LLaDA2.1 report):  - mean_rows A exp(clip(log r))
        log r = E - E_old (divided by the answer's length: ESPO, arXiv 2512.03759); the clip is one-sided in log space,
        min(log r, log(1 + high)) where A >= 0, max(log r, log(1 - low)) where A < 0
    token loss (TraceRL, arXiv 2509.06949; PPO):  - mean_rows sum_i w_i min(r_i A, clip(r_i, 1 - low, 1 + high) A)
        log r_i is kept within +-10

E is the ELBO estimate of an answer's log probability, w of copies.py. KL estimators are Schulman's k1, k2 and k3 of
d = log p - log p_reference: d, d^2 / 2, exp(-d) - 1 + d.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from llada_jax.errors import InputError, check_range

ADVANTAGES = ("mean", "std", "leave_one_out")
KL_ESTIMATORS = ("k1", "k2", "k3")
_LARGEST_LOG_RATIO = 10.0


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """estimator: "elbo" has a ratio per answer, "trajectory" one per token. clip_low, clip_high: the ratio counts as
    at least 1 - clip_low and at most 1 + clip_high. per_token: "elbo" alone: divide E - E_old by the answer's length.
    kl_weight: of the KL term against the frozen reference; 0: there is none. Raises InputError naming the field.
    """

    estimator: str = "elbo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    per_token: bool = False
    kl_weight: float = 0.0
    kl_estimator: str = "k2"

    def __post_init__(self):
        check_range("rl.clip_low", self.clip_low, above=0, below=1)
        check_range("rl.clip_high", self.clip_high, above=0)
        check_range("rl.kl_weight", self.kl_weight, at_least=0)


@flax.struct.dataclass
class PolicySums:
    """float32 sums over answers ("elbo") or scored tokens ("trajectory"): loss already has its weights; count,
    log_ratio and its square, ratio, clipped (how many the clip has cut off), kl (zero without a reference).
    """

    loss: jax.Array
    count: jax.Array
    log_ratio: jax.Array
    squared_log_ratio: jax.Array
    ratio: jax.Array
    clipped: jax.Array
    kl: jax.Array


def advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """Advantages within groups: rewards [questions, answers] -> float32 of that shape.

    "mean": less the group's mean (Dr. GRPO). "std": and over its standard deviation (GRPO). "leave_one_out": less the
    mean of the others (RLOO). All are zero where a group's rewards are equal. Raises InputError on an unknown kind, or
    on a group of one.
    """
    if kind not in ADVANTAGES or rewards.shape[1] < 2:
        raise InputError(
            f"rl.advantage={kind!r} of groups of {rewards.shape[1]}, expected one of {ADVANTAGES}, 2 or more"
        )
    rewards = rewards.astype(np.float64)
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    centred[np.ptp(rewards, axis=1) == 0] = 0.0  # a mean of equal numbers may round
    if kind == "std":
        spread = rewards.std(axis=1, keepdims=True)
        centred = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    if kind == "leave_one_out":
        centred *= rewards.shape[1] / (rewards.shape[1] - 1)
    return centred.astype(np.float32)


def sequence_loss(
    elbo: jax.Array, old: jax.Array, reference: jax.Array | None, advantage: jax.Array, length: jax.Array,
    settings: PolicyLoss,
) -> PolicySums:  # fmt: skip
    """Of answers: all arguments float32 [rows]; length: scored tokens. Not yet divided by the number of rows."""
    scale = jnp.maximum(length, 1) if settings.per_token else 1.0
    log_ratio = (elbo - old) / scale
    high, low = jnp.log1p(settings.clip_high), jnp.log1p(-settings.clip_low)
    cut = jnp.where(advantage >= 0, jnp.minimum(log_ratio, high), jnp.maximum(log_ratio, low))
    kl = jnp.zeros_like(elbo) if reference is None else kl_of((elbo - reference) / scale, settings.kl_estimator)
    loss = -advantage * jnp.exp(cut) + settings.kl_weight * kl
    return _sums(loss, jnp.ones_like(elbo), log_ratio, cut != log_ratio, kl)


def token_loss(
    logp: jax.Array, old: jax.Array, reference: jax.Array | None, advantage: jax.Array, weights: jax.Array,
    settings: PolicyLoss,
) -> PolicySums:  # fmt: skip
    """Of tokens: logp, old, reference, weights float32 [rows, length], advantage [rows]. weights: zero where no token
    is scored. Not yet divided by the number of rows.
    """
    scored = weights > 0
    log_ratio = jnp.where(scored, jnp.clip(logp - old, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO), 0)
    ratio, advantage = jnp.exp(log_ratio), advantage[:, None]
    cut = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high) * advantage
    kl = jnp.zeros_like(logp)
    if reference is not None:
        difference = jnp.clip(logp - reference, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
        kl = kl_of(jnp.where(scored, difference, 0), settings.kl_estimator)
    loss = weights * (-jnp.minimum(ratio * advantage, cut) + settings.kl_weight * kl)
    return _sums(loss, scored.astype(jnp.float32), log_ratio, cut < ratio * advantage, kl)


def kl_of(difference: jax.Array, estimator: str) -> jax.Array:
    """difference: log p of the policy less that of the reference, of what the policy has drawn."""
    if estimator == "k1":
        return difference
    return difference**2 / 2 if estimator == "k2" else jnp.expm1(-difference) + difference


def _sums(loss, counted, log_ratio, clipped, kl) -> PolicySums:
    return PolicySums(
        loss=loss.sum(),
        count=counted.sum(),
        log_ratio=(counted * log_ratio).sum(),
        squared_log_ratio=(counted * log_ratio**2).sum(),
        ratio=(counted * jnp.exp(log_ratio)).sum(),
        clipped=(counted * clipped).sum(),
        kl=(counted * kl).sum(),
    )


def policy_metrics(sums: PolicySums, rows: int) -> dict[str, jax.Array]:
    """float32 scalars; sums over all `rows` answers of an update."""
    count = jnp.maximum(sums.count, 1)
    mean = sums.log_ratio / count
    return {
        "loss": sums.loss / rows,
        "ratio": sums.ratio / count,
        "log_ratio_variance": jnp.maximum(sums.squared_log_ratio / count - mean**2, 0),
        "clip_share": sums.clipped / count,
        "kl": sums.kl / count,
    }
