"""Choices under one budget: against every combination where there are few, against the bound where there are many."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibatt.compiler.budget import choose, reach


def table(seed: int, things: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Random losses and integer uses; more use, mostly less loss; some candidates missing, never the first."""
    rng = np.random.default_rng(seed)
    use = rng.integers(0, 20, (things, candidates)).astype(float)
    loss = rng.random((things, candidates)) * 2.0 ** (-use / rng.integers(1, 9, (things, 1)))
    loss[rng.random(loss.shape) < 0.1] = np.inf
    loss[:, 0], use[:, 0] = 0.0, 20.0
    return loss, use


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.floats(0, 1))
def test_within_the_gap_of_the_best_combination(seed: int, things: int, candidates: int, share: float) -> None:
    loss, use = table(seed, things, candidates)
    limit = share * 20 * things
    rows = np.arange(things)
    every = [np.array(pick) for pick in product(range(candidates), repeat=things)]
    losses = [loss[rows, pick].sum() for pick in every if use[rows, pick].sum() <= limit]
    losses = [value for value in losses if np.isfinite(value)]
    found = choose(loss, use, limit)
    if not losses:
        assert found is None
        return
    assert found is not None
    assert found.use == use[rows, found.pick].sum() <= limit
    assert found.loss == pytest.approx(loss[rows, found.pick].sum())
    assert found.loss - found.gap <= min(losses) + 1e-12
    assert found.loss >= min(losses) - 1e-12
    assert found.gap >= 0


@given(st.integers(0, 2**32))
def test_the_gap_is_small_where_there_are_many(seed: int) -> None:
    loss, use = table(seed, 300, 12)
    limit = 300 * 5.0
    found = choose(loss, use, limit)
    assert found is not None
    assert found.use <= limit
    assert found.gap <= 0.02 * found.loss
    assert found.multiplier > 0


def test_a_budget_that_does_not_bind_costs_nothing() -> None:
    loss, use = np.array([[0.0, 0.0, 1.0]]), np.array([[9.0, 4.0, 1.0]])
    found = choose(loss, use, 9.0)
    assert found is not None
    assert (found.pick.tolist(), found.multiplier, found.gap) == ([1], 0.0, 0.0)


def test_no_choice_fits() -> None:
    assert choose(np.array([[0.0, 1.0]]), np.array([[9.0, 4.0]]), 3.0) is None
    assert choose(np.array([[0.0, np.inf]]), np.array([[9.0, 1.0]]), 3.0) is None


def test_real_uses_stay_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        loss, use = rng.integers(1, 50, (40, 6)).astype(float), rng.random((40, 6)) ** 8
        use[:, 0] = 0.0
        limit = float(rng.random() * 3)
        found = choose(loss, use, limit)
        assert found is not None
        assert found.use <= limit


@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(0, 1), st.sampled_from([1.0, 0.77]))
def test_enough_is_reached_with_little_use(seed: int, things: int, share: float, unit: float) -> None:
    loss, use = table(seed, things, 5)
    use *= unit
    rows = np.arange(things)
    most = share * float(np.where(np.isfinite(loss), loss, 0).max(1).sum())

    def enough(pick: np.ndarray) -> bool:
        return float(loss[rows, pick].sum()) <= most

    found = reach(loss, use, enough)
    assert found is not None
    assert enough(found.pick)
    assert found.use == use[rows, found.pick].sum()
    fewer = choose(loss, use, found.use - 1)
    assert fewer is None or not enough(fewer.pick)


def test_nothing_is_enough() -> None:
    assert reach(np.array([[0.0, 1.0]]), np.array([[9.0, 4.0]]), lambda _: False) is None
    found = reach(np.array([[0.0, 1.0]]), np.array([[9.0, 4.0]]), lambda _: True)
    assert found is not None
    assert found.use == 4
