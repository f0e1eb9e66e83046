"""merge-heads: what is kept only grows, by no more than was allowed, and for the best."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.jobs import Compiled, compiled, mask

from calibatt.compiler.bits import count
from calibatt.compiler.errors import PassError
from calibatt.compiler.passes.merge_heads import pairs

SELECT = "select{target-density=0.6}"
MERGE = "merge-heads{max-growth=0.3}"


def kept(found: Compiled) -> list[np.ndarray]:
    return [unit.tile_bits(head) for unit in found.all for head in range(unit.heads)]


@given(seed=st.integers(0, 20))
def test_the_kept_set_only_grows_and_time_stays_below_its_bound(seed: int) -> None:
    select = f"{SELECT},anchors"
    before, start = compiled(select, seed=seed, copies=0.1)
    after, accounts = compiled(f"{select},{MERGE},schedule,lower", seed=seed, copies=0.1)
    for old, new in zip(kept(before), kept(after), strict=True):
        assert old.shape == new.shape
        assert not (old & ~new).any()
        assert count(new).all()
    assert accounts[-1].predicted_ms <= start[-1].predicted_ms * 1.3
    assert after.findings["merge-heads"]["blocks_added"] == accounts[-1].blocks - start[-1].blocks


def test_merging_pays_and_is_told() -> None:
    of = stats.manifest(times=(0.2, 0.4, 0.6, 0.8))
    found = [compiled(f"{SELECT},{MERGE.replace('0.3', growth)},lower", of) for growth in ("0", "3")]
    assert found[0][0].findings["merge-heads"]["blocks_added"] == 0
    assert found[1][0].findings["merge-heads"]["blocks_added"] > 0
    listed = [sum(len(unit.lowered.list_bits) for unit in each.all) for each, _ in found]
    assert listed[1] < listed[0]


def test_like_heads_are_paired_for_most_weight() -> None:
    size = np.array([100, 100, 100, 50])
    union = np.zeros((4, 4), np.int64)
    union[0, 1], union[0, 2], union[1, 2], union[2, 3] = 101, 100, 100, 100
    free = np.ones(4, bool)
    assert pairs(size, union + np.triu(union == 0) * 999, free, 0.01) in ([(0, 2)], [(1, 2)])
    free[2] = False
    assert pairs(size, union + np.triu(union == 0) * 999, free, 0.01) == [(0, 1)]
    assert pairs(size, union + np.triu(union == 0) * 999, free, 0.0) == []


def matchings(edges: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    if not edges:
        return [[]]
    (one, other), rest = edges[0], edges[1:]
    apart = [edge for edge in rest if not {one, other} & set(edge)]
    return matchings(rest) + [[(one, other), *more] for more in matchings(apart)]


@given(st.integers(0, 2**32), st.integers(2, 6), st.floats(0, 0.6))
def test_pairs_are_a_matching_of_most_weight(seed: int, heads: int, growth: float) -> None:
    """Against every matching of the heads that may be paired."""
    rng = np.random.default_rng(seed)
    keeps = rng.random((heads, 40)) < rng.random((heads, 1))
    size, free = keeps.sum(1), rng.random(heads) < 0.8
    union = (keeps[:, None] | keeps).sum(2)
    both = size[:, None] + size
    weight = both - (2 * union - both)
    allowed = [
        (one, other)
        for one, other in combinations(range(heads), 2)
        if free[one] and free[other] and 2 * union[one, other] - both[one, other] <= growth * both[one, other]
    ]
    found = pairs(size, union, free, growth)
    assert set(found) <= set(allowed)
    assert len({head for pair in found for head in pair}) == 2 * len(found)
    best = max(sum(weight[pair] for pair in each) for each in matchings(allowed))
    assert sum(weight[pair] for pair in found) == best


def test_what_merging_requires() -> None:
    with pytest.raises(PassError, match="merge-heads: merge-heads must come before schedule, got it after"):
        compiled(f"{SELECT},schedule,merge-heads,lower")
    with pytest.raises(PassError, match=r"merge-heads: max-growth must not be negative, got -1\.0"):
        compiled(f"{SELECT},merge-heads{{max-growth=-1}}")


def test_pairs_are_counted_over_all_times_of_a_layer() -> None:
    """Against the masks themselves."""
    growth = 0.3
    before, _ = compiled(SELECT, seed=1)
    after, _ = compiled(f"{SELECT},merge-heads{{max-growth={growth}}}", seed=1)
    layers, heads = before.manifest.model.layers, before.manifest.model.heads
    for layer in range(layers):
        keeps = np.stack([[mask(unit, head) for head in range(heads)] for unit in before.all[layer::layers]])
        size, union = keeps.sum((0, 2, 3)), (keeps[:, :, None] | keeps[:, None]).sum((0, 3, 4))
        expected = keeps.copy()
        for one, other in pairs(size, union, np.ones(heads, bool), growth):
            expected[:, one] = expected[:, other] = keeps[:, one] | keeps[:, other]
        found = np.stack([[mask(unit, head) for head in range(heads)] for unit in after.all[layer::layers]])
        np.testing.assert_array_equal(found, expected)
