"""fill-gaps, merge-times and merge-heads: what is kept only grows, by no more than was allowed, and for the best."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.jobs import Compiled, compiled

from calibatt.compiler.bits import count, pack, unpack
from calibatt.compiler.errors import PassError
from calibatt.compiler.passes.fill_gaps import filled
from calibatt.compiler.passes.merge_heads import pairs
from calibatt.compiler.passes.merge_times import WORTHS, groups

SELECT = "protect,select{target-density=0.6}"
MERGES = ["fill-gaps{max-gap-blocks=2,max-growth=0.3}", "merge-times{max-growth=0.3}", "merge-heads{max-growth=0.3}"]


def kept(found: Compiled) -> list[np.ndarray]:
    return [unit.tile_bits(head) for unit in found.all for head in range(unit.heads)]


@pytest.mark.parametrize("merge", MERGES)
@given(seed=st.integers(0, 20))
def test_the_kept_set_only_grows_and_time_stays_below_its_bound(merge: str, seed: int) -> None:
    select = f"{SELECT},anchors{{safety=0.1}}"
    before, start = compiled(select, seed=seed)
    after, accounts = compiled(f"{select},{merge},schedule,lower", seed=seed)
    for old, new in zip(kept(before), kept(after), strict=True):
        assert old.shape == new.shape
        assert not (old & ~new).any()
        assert count(new).all()
    assert accounts[-1].predicted_ms <= start[-1].predicted_ms * 1.3
    name = merge.split("{")[0]
    assert after.findings[name]["blocks_added"] == accounts[-1].blocks - start[-1].blocks


@pytest.mark.parametrize("merge", MERGES)
def test_merging_pays_and_is_told(merge: str) -> None:
    of = stats.manifest(times=(0.2, 0.4, 0.6, 0.8))
    found = [compiled(f"{SELECT},{merge.replace('0.3', growth)},lower", of) for growth in ("0", "3")]
    name = merge.split("{")[0]
    assert found[0][0].findings[name]["blocks_added"] == 0
    assert found[1][0].findings[name]["blocks_added"] > 0
    listed = [sum(len(unit.lowered.list_bits) for unit in each.all) for each, _ in found]
    assert listed[1] < listed[0] or name != "merge-heads"


@given(st.integers(0, 2**32), st.integers(0, 5), st.floats(0, 1))
def test_short_gaps_are_filled_and_no_others(seed: int, most: int, density: float) -> None:
    keep = np.random.default_rng(seed).random((4, 30)) < density
    found = unpack(filled(pack(keep), 30, most), 30)
    for row, out in zip(keep, found, strict=True):
        expected = row.copy()
        at = np.flatnonzero(row)
        for left, right in pairwise(at):
            if right - left - 1 <= most:
                expected[left:right] = True
        np.testing.assert_array_equal(out, expected)


def partitions(times: int, most: int) -> list[list[tuple[int, int]]]:
    found = []
    for size in range(times):
        for cuts in combinations(range(1, times), size):
            edges = [0, *cuts, times]
            parts = [(a, b - 1) for a, b in pairwise(edges)]
            if all(last - first < most for first, last in parts):
                found.append(parts)
    return found


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4), st.floats(0, 0.5), st.booleans())
def test_times_are_merged_for_the_best(seed: int, times: int, most: int, growth: float, anchored: bool) -> None:
    """Against every partition, for the worth that was taken."""
    rng = np.random.default_rng(seed)
    start = rng.random((5, 9)) < 0.5
    keeps = [start ^ (rng.random((5, 9)) < 0.1 * time) for time in range(times)]
    masks = [pack(keep) for keep in keeps]
    free = [not (anchored and time == times // 2) for time in range(times)]
    size = sum(int(keep.sum()) for keep in keeps)

    def cost(parts: list[tuple[int, int]]) -> tuple[float, int]:
        added = sum(
            (last - first + 1) * int(np.any(keeps[first : last + 1], axis=0).sum())
            - sum(int(keep.sum()) for keep in keeps[first : last + 1])
            for first, last in parts
        )
        return added, sum(int((keeps[last] ^ keeps[last + 1]).sum()) for _, last in parts[:-1])

    allowed = [
        parts
        for parts in partitions(times, most)
        if all(first == last or all(free[first : last + 1]) for first, last in parts)
    ]
    found = groups(masks, free, growth, most)
    assert found in allowed
    added, ends = cost(found)
    assert added <= growth * size
    for worth in WORTHS:
        best = min(worth * cost(parts)[0] + cost(parts)[1] for parts in allowed)
        if worth * added + ends <= best + 1e-9:
            return
    assert added == 0  # no worth was enough: every time on its own


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


@given(st.integers(0, 2**32), st.integers(0, 4))
def test_filling_twice_is_filling_once(seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    once = filled(pack(rng.random((5, 21)) < rng.random()), 21, most)
    np.testing.assert_array_equal(filled(once, 21, most), once)


@pytest.mark.parametrize("name", ["merge-times", "merge-heads"])
def test_what_merging_requires(name: str) -> None:
    with pytest.raises(PassError, match=f"{name}: masks must be chosen before, got time 0, layer 0"):
        compiled(f"{name},lower")
    with pytest.raises(PassError, match=f"{name}: schedule must come after, got time 0, layer 0"):
        compiled(f"{SELECT},schedule,{name},lower")
    with pytest.raises(PassError, match=f"{name}: max-growth must not be negative, got -1.0"):
        compiled(f"{SELECT},{name}{{max-growth=-1}}")
