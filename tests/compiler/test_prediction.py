"""The predicted signal-to-noise: where the truth is known, and as a target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.jobs import DEVICE, EIGHT, MemoryStore, compile_store, memory_store

from calibatt.compiler.bits import unpack
from calibatt.compiler.errors import PassError
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.language import parse_passes
from calibatt.compiler.prediction import CUT, DENSE, Masks, Prediction, predict
from calibatt.compiler.stats import SamplingTables, Table, Unit, window_keep
from calibatt.plans import BF16, EIGHT_BITS, PRECISIONS, TokenGrid
from calibatt.tools.studies.in_memory import compile_in_memory

T, L, H, C, W = 3, 2, 4, 3, 2
SHARES = (0.2, 0.4, 0.8)


def table(rng: np.random.Generator, samplings: int, vectors: int, signal: np.ndarray) -> Table:
    """Effects of masks whose joint effect has a known variance: `signal` ``(samplings,)`` in all, equal parts."""

    def effects(index: int, masks: int) -> np.ndarray:
        scale = np.sqrt(signal[index] / (T * L * H))
        return (rng.normal(size=(vectors, T, L, masks, H)) * scale).astype(np.float32)

    each = [
        SamplingTables(np.full(T, 2.0), *(effects(index, masks) for masks in (W, C, len(EIGHT_BITS))))
        for index in range(samplings)
    ]
    return Table(tuple(each))


def masks(
    kind: Any, density: float = 0.4, error: float = 1.0, own: float = 1.0, copied: float = 0.0, precision: Any = BF16
) -> Masks:
    shape = (T, L, H)
    full = [np.full(shape, value) for value in (density, error, copied)]
    of = np.broadcast_to(np.asarray(precision), shape)
    return Masks(np.broadcast_to(np.asarray(kind), shape), *full, np.full((T, L, C, H), own), of)


def told(found: Prediction | str) -> float:
    assert isinstance(found, Prediction)
    return found.mean


@pytest.mark.parametrize("vectors", [1, 2, 8])
def test_the_mean_over_samplings_is_the_truth(vectors: int) -> None:
    """Also with few vectors, whose logarithm alone would be too low."""
    rng = np.random.default_rng(vectors)
    signal = 10 ** -rng.uniform(1, 4, 3000)
    found = predict(table(rng, 3000, vectors, signal), np.ones(T), SHARES, masks(0))
    assert isinstance(found, Prediction)
    truth = -10 * np.log10(signal)
    assert abs(found.mean - truth.mean()) < 4 * (found.standard_error**2 + truth.var() / 3000) ** 0.5
    assert found.samplings == 3000


@given(st.integers(0, 2**32), st.floats(1e-4, 1e4))
def test_a_cut_is_the_ladder_at_the_nearest_share_by_the_root_of_its_price(seed: int, ratio: float) -> None:
    rng = np.random.default_rng(seed)
    of = table(rng, 4, 8, np.full(4, 1e-3))
    for density, share in ((0.05, 0), (0.27, 0), (0.3, 1), (0.55, 1), (0.6, 2), (1.0, 2)):
        joint = [each.ladder_effect[:, :, :, share].astype(float).sum((1, 2, 3)) for each in of.samplings]
        level = np.mean([10 * np.log10((each**2).mean()) for each in joint]) + 10 * np.log10(ratio)
        found = told(predict(of, np.ones(T), SHARES, masks(CUT, density, ratio, 1.0)))
        near = told(predict(of, np.ones(T), SHARES, masks(CUT, density, 1.0, 1.0)))
        assert found == pytest.approx(near - 10 * np.log10(ratio))
        assert -found == pytest.approx(level + 10 * np.log10(1 / _bias(8)), abs=1e-4)


def _bias(vectors: int) -> float:
    """exp E log of a mean of squares of normal numbers."""
    rng = {8: 0.8765}  # digamma(4) - log(4) = -0.13018, Abramowitz and Stegun 6.3: digamma(4) = 11 / 6 - 0.57722
    assert abs(np.exp(11 / 6 - 0.5772157 - np.log(4)) - rng[vectors]) < 2e-3
    return float(np.exp(11 / 6 - 0.5772156649 - np.log(4)))


def test_kinds_and_precisions_are_mixed_and_copies_add_up() -> None:
    rng = np.random.default_rng(1)
    of = table(rng, 3, 4, np.full(3, 1e-3))
    kind = rng.integers(-2, W, (T, L, H))
    precision = rng.integers(0, len(PRECISIONS), (T, L, H))
    chosen = masks(kind, 0.4, 4.0, 1.0, copied=1e-5, precision=precision)
    found = predict(of, np.array([1.0, 2.0, 4.0]), SHARES, chosen)
    decibels = []
    bias = np.exp(1 - 0.5772156649 - np.log(2))
    for each in of.samplings:
        joint = np.zeros(4)
        for at in np.ndindex(T, L, H):
            if kind[at] >= 0:
                joint += each.window_effect[:, at[0], at[1], kind[at], at[2]]
            elif kind[at] == CUT:
                joint += 2 * each.ladder_effect[:, at[0], at[1], 1, at[2]]
            if precision[at] != BF16:
                joint += each.precision_effect[:, at[0], at[1], EIGHT_BITS.index(precision[at]), at[2]]
        copies = sum(L * H * 1e-5 / level * 2.0 for level in (1.0, 2.0, 4.0))
        decibels.append(-10 * np.log10((joint**2).mean() / bias + copies))
    assert isinstance(found, Prediction)
    assert found.mean == pytest.approx(np.mean(decibels), abs=1e-4)
    assert found.standard_error == pytest.approx(np.std(decibels, ddof=1) / 3**0.5, abs=1e-4)


def test_what_cannot_be_said_is_said() -> None:
    rng = np.random.default_rng(0)
    of = table(rng, 3, 2, np.ones(3))
    assert told(predict(of, np.ones(T), SHARES, masks(DENSE))) == np.inf
    assert str(predict(of, np.ones(T), SHARES, masks(DENSE))) == "infinite: nothing changes"
    assert told(predict(of, np.ones(T), SHARES, masks(CUT, error=0.0))) == np.inf
    assert np.isfinite(told(predict(of, np.ones(T), SHARES, masks(CUT, error=1.0, own=0.0))))
    unmeasured = replace(of.samplings[0], ladder_effect=of.samplings[0].ladder_effect * np.float32(np.nan))
    two = replace(of, samplings=(unmeasured, *of.samplings[1:]))
    found = predict(two, np.ones(T), SHARES, masks(0))
    assert isinstance(found, Prediction)
    assert found.samplings == 2
    one = replace(of, samplings=(unmeasured, unmeasured, of.samplings[2]))
    assert predict(one, np.ones(T), SHARES, masks(0)) == "needs 2 samplings with a measured ladder, got 1"


PASSES = "select{BUDGET},anchors,select{BUDGET},schedule,lower"


def test_a_plan_tells_what_select_predicted() -> None:
    for budget in ("target-density=0.5", "target-density=0.8"):
        store = memory_store(stats.manifest(), seed=3)
        job, _ = compile_store(store, PASSES.replace("BUDGET", budget))
        plan = compile_in_memory(store, StatisticsSource(store), parse_passes(PASSES.replace("BUDGET", budget)), DEVICE)
        found = plan.predicted["latent_db"]
        assert set(found) == {"mean", "standard_error", "samplings"}
        assert str(Prediction(**found)) == job.findings["select"]["predicted_snr"]
        assert np.shape(plan.predicted["head_price"]) == (2, 2, 3)
        assert np.sum(plan.predicted["head_price"]) == pytest.approx(job.findings["select"]["predicted_error"])
        assert any(groups is not None for unit in job.all for groups in unit.anchors)


def coherent(seed: int) -> MemoryStore:
    """Effects that all have one sign, so that more blocks are always better."""
    store = memory_store(stats.manifest(windows=()), seed=seed)
    lost = 0.01 * (1 - np.array(store.manifest.shares, np.float32))[:, None]
    tables = {
        name: replace(each, ladder_effect=np.broadcast_to(lost, each.ladder_effect.shape).copy())
        for name, each in store.tables.items()
    }
    return MemoryStore(store.manifest, store.parts, tables)


@given(st.floats(12, 30), st.integers(0, 5))
def test_a_target_of_decibels_is_reached_with_few_blocks(target: float, seed: int) -> None:
    store = coherent(seed)

    def plan(budget: str) -> tuple[float, float]:
        passes = parse_passes(f"select{{{budget}}},lower")
        found = compile_in_memory(store, StatisticsSource(store), passes, DEVICE).predicted
        return found["density"], found["latent_db"]["mean"] if found["latent_db"] else np.inf

    density, decibels = plan(f"target-db={target}")
    assert decibels >= target
    if density > 0.55:  # well above the least that the menu can keep
        assert plan(f"target-density={density - 0.03}")[1] < target


class World:
    """A model that is linear in what its masks drop: every query block's dropped blocks act together, on one random
    number a sampling, vector, time, layer, head and query block; levels of samplings differ."""

    def __init__(self, seed: int) -> None:
        self.of = stats.manifest(grid=TokenGrid(2, 10, 16), shares=(0.1, 0.2, 0.35, 0.5, 0.7))
        of, rng = self.of, np.random.default_rng(seed)
        shape = (len(of.times), of.model.layers, of.model.heads)
        distance = np.abs(np.arange(of.q_blocks)[:, None] - np.arange(of.k_blocks))
        size = np.exp(-distance * rng.uniform(0.05, 1, (*shape, 1, 1)) + rng.normal(size=(*shape, 20, 20)))
        size *= np.exp(rng.normal(0, 1, (*shape, 1, 1)))
        self.size = size / np.sqrt((size**2).sum((1, 2, 3, 4), keepdims=True)) * 0.1
        """Root of the mean squared effect of each block, ``(T, L, H, Q, K)``, at level 0.01."""
        self.rounding = np.exp(rng.normal(-4.5, 2, (shape[0], shape[1], len(EIGHT_BITS), shape[2])))
        """Of each precision, ``(T, L, 2, H)``."""

    def noise(self, rng: np.random.Generator, vectors: int) -> np.ndarray:
        """``(V, T, L, H, Q)``, by the root of the sampling's level."""
        strength = np.exp(rng.normal(0, 0.25))
        return rng.normal(size=(vectors, *self.size.shape[:4])) * strength

    def effect(self, noise: np.ndarray, keep: np.ndarray) -> np.ndarray:
        """Signed effects ``(V, T, L, H)`` of masks that broadcast to ``(T, L, H, Q, K)``."""
        return np.einsum("vtlhq,tlhq->vtlh", noise, (self.size * ~keep).sum(-1))

    def rounded(self, noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Signed effects ``(V, T, L, 2, H)`` of precisions, in a sampling of some `noise`, of which they are not."""
        strength = np.sqrt((noise**2).mean())
        return rng.normal(size=(len(noise), *self.rounding.shape)) * self.rounding * strength

    def measured(self, samplings: int, vectors: int, seed: int) -> MemoryStore:
        of, rng, other = self.of, np.random.default_rng(seed), np.random.default_rng([seed, 1])
        windows = [window_keep(window, of.grid, of.blocks) for window in of.windows]
        parts, tables = {}, {}
        rank = (-self.size).reshape(*self.size.shape[:3], -1).argsort(-1).argsort(-1).reshape(self.size.shape)
        for name in (f"s{index:02d}" for index in range(samplings)):
            noise = self.noise(rng, vectors)
            block = (noise[..., None] * self.size) ** 2
            level = block.mean(0).sum((1, 2, 3, 4))
            ladder = [self.effect(noise, rank < share * 400) for share in of.shares]
            tables[name] = SamplingTables(
                level,
                np.stack([self.effect(noise, keep) for keep in windows], 3).astype(np.float32),
                np.stack(ladder, 3).astype(np.float32),
                self.rounded(noise, other).astype(np.float32),
            )
            for time, layer in np.ndindex(self.size.shape[:2]):
                copies = stats.measured(of, copies=1e9)
                effect, error = block[:, time, layer].mean(0) / level[time], self.size[time, layer] ** 2 * 3
                arrays = {"effect": effect.astype(np.float32), "error": error.astype(np.float32)}
                parts[name, time, layer] = Unit.of(name, **{**copies, **arrays})
        return MemoryStore(of, parts, tables)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("target", "precision"), [(15.0, "bf16"), (25.0, "bf16"), (35.0, "bf16"), (35.0, "auto")])
def test_the_prediction_is_right_on_samplings_that_were_never_seen(seed: int, target: float, precision: str) -> None:
    world = World(seed)
    budget = f"target-db={target},precision={precision}"
    job, _ = compile_store(world.measured(16, 8, seed), PASSES.replace("BUDGET", budget), EIGHT)
    keep = np.stack([unpack(unit.keep, 20) for unit in job.all]).reshape(world.size.shape)
    chosen = np.stack([unit.precision for unit in job.all]).reshape(world.size.shape[:3])
    assert (len(np.unique(chosen)) > 1) == (precision == "auto"), "heads differ"
    eight = chosen[:, :, None] == np.array(EIGHT_BITS)[:, None]
    rng, joint = np.random.default_rng(seed + 100), []
    for _ in range(300):
        noise = world.noise(rng, 1000)
        joint.append(world.effect(noise, keep).sum((1, 2, 3)))
        if eight.any():
            joint[-1] += world.rounded(noise, rng)[:, eight].sum(1)
    truth = np.mean([-10 * np.log10((each**2).mean()) for each in joint])
    told = float(job.findings["select"]["predicted_snr"].split()[0])
    assert abs(truth - told) < 2
    assert told >= target
    assert told < target + 0.5 or np.mean(keep) <= 0.051  # a block for each query block


def test_a_second_select_spends_what_anchors_bring() -> None:
    found, accounts = compile_store(memory_store(stats.manifest()), PASSES.replace("BUDGET", "target-db=15"))
    assert accounts[3].blocks < accounts[1].blocks
    assert float(found.findings["select"]["predicted_snr"].split()[0]) >= 15


def test_a_target_that_cannot_be_reached_names_the_best() -> None:
    store = memory_store(stats.manifest(), samples=1)
    with pytest.raises(PassError, match=r"target-db must have a prediction .* got 20.0: it needs 2 samp"):
        compile_store(store, "select{target-db=20}")
    store = memory_store(stats.manifest())
    tables = {name: replace(each, window_effect=each.window_effect) for name, each in store.tables.items()}
    blank = {key: replace(part, effect_peak=part.effect_peak * 0) for key, part in store.parts.items()}
    silent = MemoryStore(store.manifest, blank, tables)
    found, accounts = compile_store(silent, "select{target-db=100}")
    assert found.findings["select"]["predicted_snr"] == "infinite: nothing changes"
    assert accounts[-1].error == 0
