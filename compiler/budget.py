"""One choice for each of many things under one budget: Lagrangian relaxation, then greedy use of what is left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibatt.compiler.ir import Float64, Int64

STEPS = 100
TOLERANCE = 1e-3
"""Relative distance to the least use at which `reach` stops."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The result of `choose` and `reach`.

    Args:
        pick: int64 ``(things,)``, the candidate of each thing.
        multiplier: Price of a unit of use, in units of loss; 0 where the budget does not bind.
        loss: Sum of the losses picked.
        use: Sum of the uses picked.
        gap: `loss` minus a lower bound on the loss of any choice within the budget.
    """

    pick: Int64
    multiplier: float
    loss: float
    use: float
    gap: float


def choose(loss: Float64, use: Float64, limit: float) -> Choice | None:
    """Picks one candidate a thing so that the uses sum to at most `limit` and the losses to as little as possible.

    The multiplier m is found by bisection: every thing picks the least ``loss + m * use`` (the first of equals). What
    the best m leaves unused is spent on single changes, most loss saved per use first.

    Args:
        loss: ``(things, candidates)``, non-negative; infinite where there is no such candidate.
        use: The same shape, non-negative and finite.
        limit: The budget.

    Returns:
        The choice, or None if the least use is above the limit.
    """
    rows = np.arange(len(loss))

    def total(values: Float64, pick: Int64) -> float:
        return float(values[rows, pick].sum())

    def at(multiplier: float) -> Int64:
        best: Int64 = (loss + multiplier * use).argmin(1)
        return best

    least_loss = loss.min(1, keepdims=True)
    free = np.where(loss <= least_loss, use, np.inf).argmin(1)
    if total(use, free) <= limit:
        return Choice(free, 0.0, total(loss, free), total(use, free), 0.0)
    possible = np.where(np.isfinite(loss), use, np.inf)
    thrifty = np.where(possible <= possible.min(1, keepdims=True), loss, np.inf).argmin(1)
    if total(use, thrifty) > limit:
        return None
    finite = loss[np.isfinite(loss)]
    low, high = _range(float(finite.max()), use)
    pick, eager = thrifty, at(low)
    for _ in range(STEPS):
        middle = float(np.sqrt(low * high))
        middle_pick = at(middle)
        if total(use, middle_pick) <= limit:
            high, pick = middle, middle_pick
        else:
            low, eager = middle, middle_pick
    bound = max(float((loss + m * use).min(1).sum()) - m * limit for m in (low, high))
    pick = _spend(loss, use, limit, pick, eager)
    spent = total(loss, pick)
    return Choice(pick, high, spent, total(use, pick), max(0.0, spent - bound))


def reach(loss: Float64, use: Float64, enough: Callable[[Int64], bool]) -> Choice | None:
    """Picks one candidate a thing so that the picks are `enough` and the uses sum to as little as can be found.

    First the multiplier is bisected, which looks at all candidates once a step; then the budget, between the two
    neighbouring picks, if they are far apart.

    Args:
        loss: As in `choose`.
        use: As in `choose`.
        enough: Whether picks suffice. If some do, those of more use mostly do, too.

    Returns:
        The choice, or None if not even the least loss is enough.
    """
    rows = np.arange(len(loss))

    def of(pick: Int64, multiplier: float) -> Choice:
        return Choice(pick, multiplier, float(loss[rows, pick].sum()), float(use[rows, pick].sum()), 0.0)

    best = choose(loss, use, np.inf)
    if best is None or not enough(best.pick):
        return None
    low, high = _range(float(loss[np.isfinite(loss)].max()), use)
    least = float(np.where(np.isfinite(loss), use, np.inf).min(1).sum())
    for _ in range(STEPS):
        if high / low < 1 + TOLERANCE:
            break
        middle = float(np.sqrt(low * high))
        choice = of((loss + middle * use).argmin(1), middle)
        if enough(choice.pick):
            low, best = middle, choice if choice.use <= best.use else best
        else:
            high, least = middle, choice.use
    top = best.use
    while top - least > max(1.0, TOLERANCE * top):
        middle = (top + least) / 2
        limit = float(np.floor(middle)) if np.floor(middle) > least else middle  # uses need not be integers
        between = choose(loss, use, limit)
        if between is not None and enough(between.pick):
            best, top = between, limit
        else:
            least = limit
    return best


def _range(most_loss: float, use: Float64) -> tuple[float, float]:
    """Multipliers below and above all that can change a pick."""
    steps = np.unique(use)
    least = float(np.diff(steps).min()) if len(steps) > 1 else 1.0
    top = 2 * most_loss / max(least, 1e-300) + 1e-300
    return min(top, 1e-30) * 1e-10, min(top, 1e290)


def _spend(loss: Float64, use: Float64, limit: float, pick: Int64, eager: Int64) -> Int64:
    """Changes single picks while the budget lasts: first to those of a smaller multiplier, then to any that fits."""
    pick = pick.copy()
    rows = np.arange(len(pick))
    gain = loss[rows, pick] - loss[rows, eager]
    more = use[rows, eager] - use[rows, pick]
    worth = np.where(gain > 0, gain / np.maximum(more, 1e-300), -1.0)
    left = limit - float(use[rows, pick].sum())
    for row in np.argsort(-worth, kind="stable"):
        if worth[row] > 0 and more[row] <= left:
            pick[row] = eager[row]
            left -= float(more[row])
    for row in np.argsort(-loss[rows, pick], kind="stable"):
        fits = np.where(use[row] - use[row, pick[row]] <= left, loss[row], np.inf)
        best = int(fits.argmin())
        if fits[best] < loss[row, pick[row]]:
            left -= float(use[row, best] - use[row, pick[row]])
            pick[row] = best
    if float(use[rows, pick].sum()) > limit:  # `left` was rounded; happens only if uses are not integers
        return _repay(use, limit, pick, loss)
    return pick


def _repay(use: npt.NDArray[np.float64], limit: float, pick: Int64, loss: Float64) -> Int64:
    """Takes back the cheapest uses until the budget holds."""
    rows = np.arange(len(pick))
    for row in np.argsort(loss[rows, pick], kind="stable"):
        if float(use[rows, pick].sum()) <= limit:
            break
        pick[row] = int(np.where(np.isfinite(loss[row]), use[row], np.inf).argmin())
    return pick
