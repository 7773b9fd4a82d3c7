"""The rows that a learner passes over: those alone that a gradient comes from, in few sizes, as each is a program.

A row of the elbo is an answer with all its copies, whose sum the loss needs. The loss of trajectories is a sum over
tokens, so that there each pair of answer and copy is a row of its own, and answers with few steps cost few passes.
"""

import numpy as np

from llada_jax.reinforcement.copies import Copies
from llada_jax.reinforcement.rollouts import Rollouts
from llada_jax.reinforcement.scoring import ScoredRows


def as_rows(answers: Rollouts, copies: Copies, advantage: np.ndarray) -> ScoredRows:
    """A row for each answer. advantage: float32 [rows]."""
    hidden, weights = (np.ascontiguousarray(np.moveaxis(x, 0, 1)) for x in (copies.hidden, copies.weights))
    scored = answers.answer_tokens.astype(np.float32)
    return ScoredRows(answers.tokens, answers.segment_ids, hidden, weights, advantage, scored)


def as_passes(rows: ScoredRows, micro_rows: int, least: int) -> ScoredRows:
    """A row of one copy for each copy that scores a token, the first copies of all answers leading; behind them, rows
    that score none. Their number is a multiple of `least`, and of micro_rows if it is more than micro_rows.
    """
    copy, row = np.nonzero((rows.weights > 0).any(axis=2).T)
    empty = num_passes(max(len(row), 1), micro_rows, least) - len(row)
    copy, row = (np.pad(index, (0, empty)) for index in (copy, row))
    weights = rows.weights[row, copy]
    weights[len(row) - empty :] = 0
    return ScoredRows(
        rows.tokens[row], rows.segment_ids[row], rows.hidden[row, copy][:, None], weights[:, None],
        rows.advantage[row], rows.tokens_scored[row],
    )  # fmt: skip


def num_passes(number: int, micro_rows: int, least: int) -> int:
    """Rows for so many passes, those that score nothing included; micro_rows is a multiple of least."""
    if number <= micro_rows:
        return few_sizes(number, least, micro_rows)
    return few_sizes(number, micro_rows, 2 * number)  # never so many: whole micro-batches


def with_gradient(part: np.ndarray, advantage: np.ndarray, least: int) -> np.ndarray:
    """Of the rows `part` those with an advantage, and so many others behind them that the number is one of few."""
    ordered = part[np.argsort(advantage[part] == 0, kind="stable")]
    return ordered[: few_sizes(max(int(np.count_nonzero(advantage[part])), 1), least, len(part))]


def few_sizes(number: int, unit: int, most: int) -> int:
    """At least `number`, and at most `most`: as many units as have three significant bits, a quarter more at worst."""
    units = -(-number // unit)
    step = 1 << max(units.bit_length() - 3, 0)
    return min(-(-units // step) * step * unit, most)
