"""The menu, the prices and the budget."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.jobs import Compiled, MemoryStore, compile_store, compiled, gathered, memory_store

from calibatt.compiler.bits import pack, unpack
from calibatt.compiler.error_model import coherence, mask_errors, ratios
from calibatt.compiler.errors import PassError
from calibatt.compiler.ir import UnitIR, query_weights
from calibatt.compiler.stats import dequantise, quantise, window_keep
from calibatt.plans import Blocks, ModelSignature, TokenGrid


def mean_error(unit: UnitIR) -> np.ndarray:
    return dequantise(unit.means.error_code, unit.means.error_peak[:, None, None])


def raw(unit: UnitIR, head: int, keep: np.ndarray) -> float:
    """Mean over queries of the squared sum of the roots of the mean block errors dropped."""
    queries = query_weights(unit.grid, unit.blocks)
    return float(np.where(keep, 0, np.sqrt(mean_error(unit)[head])).sum(1) ** 2 @ queries)


def test_means_are_over_the_samples() -> None:
    of = stats.manifest()
    store = memory_store(of)
    for unit in gathered(of)[1]:
        units = [store.unit(name, unit.time_index, unit.layer) for name in store.samples]
        assert [votes.voters for votes in unit.means.votes] == [3] * 3
        np.testing.assert_allclose(mean_error(unit), np.mean([each.error() for each in units], 0), rtol=0.045)
        for name in ("menu_error", "menu_residual_error", "output_size", "row_residual_error"):
            expected = np.mean([getattr(each, name).astype(np.float64) for each in units], 0)
            np.testing.assert_allclose(getattr(unit.means, name), expected)
        queries = query_weights(of.grid, of.blocks)
        for index in range(len(of.menu)):
            predicted = []
            for each in units:
                if index < len(of.thresholds):
                    keep = each.keep(index, of)
                else:
                    keep = window_keep(of.windows[index - len(of.thresholds)], of.grid, of.blocks)
                # planes are those of a sample, and so are their errors; windows are priced as any other mask is
                error = each.error() if index < len(of.thresholds) else np.mean([other.error() for other in units], 0)
                predicted.append(np.where(keep, 0, np.sqrt(error)).sum(2) ** 2 @ queries)
            np.testing.assert_allclose(unit.means.menu_predicted[index], np.mean(predicted, 0), rtol=1e-5)


def test_query_weights_are_shares_of_tokens() -> None:
    np.testing.assert_allclose(query_weights(TokenGrid(1, 1, 40), Blocks(16, 16)), [0.4, 0.4, 0.2])


@given(st.sampled_from([0.5, 0.51, 0.6, 0.77, 0.95, 1.0]), st.integers(0, 5), st.sampled_from([None, (2.0, 1e-3)]))
def test_the_executed_density_never_exceeds_the_target(target: float, seed: int, weights: Any) -> None:
    text = f"vote,protect,select{{target-density={target}}},anchors{{safety=0.1}},schedule,lower"
    found, accounts = compiled(text, seed=seed, weights=weights)
    executed = [unit.lowered.computed_blocks(head) / 25 for unit in found.all for head in range(unit.heads)]
    assert np.mean(executed) <= target + 1e-12
    assert accounts[3].blocks <= target * accounts[0].blocks
    assert accounts[-1].blocks == round(np.sum(executed) * 25)


@given(st.floats(0, 20), st.integers(0, 5))
def test_the_error_never_exceeds_the_most(most: float, seed: int) -> None:
    found, accounts = compiled(f"vote,select{{max-error={most}}},lower", seed=seed)
    assert accounts[-1].error <= most
    assert accounts[-1].error == pytest.approx(found.findings["select"]["predicted_error"])
    tighter = compiled(f"vote,select{{max-error={most / 2}}},lower", seed=seed)[1]
    assert tighter[-1].blocks >= accounts[-1].blocks


def test_no_error_allowed_is_no_error() -> None:
    _, accounts = compiled("vote,select{max-error=0},lower")
    assert accounts[-1].error == 0


def test_more_density_is_less_error() -> None:
    errors = [compiled(f"vote,select{{target-density={d}}}")[1][-1].error for d in (0.3, 0.5, 0.7, 0.9, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def chosen(found: Compiled) -> list[tuple[UnitIR, int, str, np.ndarray]]:
    return [
        (unit, head, unit.choice[head], unpack(unit.keep[head], unit.k_blocks))
        for unit in found.all
        for head in range(unit.heads)
    ]


def test_masks_and_prices_are_those_of_the_choices() -> None:
    of = stats.manifest(versions={})
    seen = set()
    for menu, density in product(("planes", "windows", "cuts", "planes+windows+cuts"), (0.88, 0.95)):
        found, _ = compiled(f"vote,protect,select{{target-density={density},menu={menu}}}", of)
        for unit, head, choice, keep in chosen(found):
            kind = choice.split()[0].split("(")[0]
            seen.add(kind)
            required = unpack(unit.required[head], of.k_blocks)
            price = unit.error[head]
            if kind == "dense":
                assert keep.all()
                assert price == 0
            elif kind == "plane":
                plane = of.thresholds.index(float(choice.split()[1]))
                np.testing.assert_array_equal(keep, unpack(unit.voted[plane, head], of.k_blocks) | required)
                assert price == pytest.approx(found.error_factor * raw(unit, head, keep), rel=1e-5)
            elif kind == "cut":
                assert price == pytest.approx(found.error_factor * raw(unit, head, keep), rel=1e-5)
                error = mean_error(unit)[head]
                if not (keep | required).all():
                    assert error[keep & ~required].min(initial=np.inf) > error[~keep].max()
            else:
                index = [str(window) for window in of.windows].index(choice)
                window = window_keep(of.windows[index], of.grid, of.blocks)
                np.testing.assert_array_equal(keep, window | required)
                assert price == unit.means.menu_residual_error[len(of.thresholds) + index, head]
    assert seen >= {"dense", "plane", "cut", "frames"}


def test_one_level_cuts_heads_and_times_alike() -> None:
    """Where the raw sum is exact, a cut job keeps the blocks of most weighted error, whoever they belong to."""
    of = stats.manifest(has_mass=False, windows=(), grid=TokenGrid(2, 8, 8))
    store = memory_store(of, samples=1)
    for key, unit in store.units.items():
        rng = np.random.default_rng(10 * key[1] + key[2])
        error = rng.permutation(np.geomspace(1e-4, 1.0, 3 * 64)).reshape(3, 8, 8)
        peak = error.max((1, 2)).astype(np.float32) * np.float32(1.001)
        codes = quantise(error, peak[:, None, None])
        nothing = np.zeros_like(unit.menu_residual_error)
        store.units[key] = replace(unit, block_error=codes, block_error_peak=peak, menu_residual_error=nothing)
    text = "vote,select{target-density=0.5,menu=cuts,levels-per-octave=8}"
    found, _ = compile_store(MemoryStore(of, store.units, (4.0, 1.0)), text)
    kept, dropped = [], []
    for unit, head, _, keep in chosen(found):
        required = unpack(unit.required[head], of.k_blocks)
        error = mean_error(unit)[head] * unit.weight
        kept.append(error[keep & ~required])
        dropped.append(error[~keep])
    low, high = np.concatenate(kept), np.concatenate(dropped)
    level = np.median([part.min() for part in kept if part.size])
    wrong = (low < level / 2**0.25).sum() + (high > level * 2**0.25).sum()
    assert wrong <= 0.02 * (low.size + high.size)
    assert sum(unit.lowered is None for unit in found.all) == 4


def brute_force(found: Compiled, limit: float) -> float:
    """Least weighted error over every combination of planes, windows and dense within a number of blocks."""
    options = []
    for unit in found.all:
        for head in range(unit.heads):
            mine = [(unit.dense_blocks, 0.0)]
            for plane in range(len(found.manifest.thresholds)):
                keep = unpack(unit.voted[plane, head] | unit.required[head], unit.k_blocks)
                mine.append((int(keep.sum()), unit.weight * found.error_factor * raw(unit, head, keep)))
            for index, window in enumerate(found.manifest.windows, len(found.manifest.thresholds)):
                bits = pack(window_keep(window, unit.grid, unit.blocks)) | unit.required[head]
                error = unit.weight * float(unit.means.menu_residual_error[index, head])
                mine.append((int(unpack(bits, unit.k_blocks).sum()), error))
            options.append(mine)
    sums = [(sum(blocks for blocks, _ in each), sum(error for _, error in each)) for each in product(*options)]
    return min(error for blocks, error in sums if blocks <= limit)


@pytest.mark.parametrize("seed", range(6))
def test_as_good_as_every_combination_within_the_gap(seed: int) -> None:
    of = stats.manifest(model=ModelSignature("TinyModel", layers=1, heads=2, head_dim=8), thresholds=(0.8, 0.95))
    text = "vote,select{target-density=0.8,menu=planes+windows}"
    found, accounts = compiled(text, of, seed=seed, weights=(1.0, 0.25))
    best = brute_force(found, 0.8 * accounts[0].blocks)
    select = found.findings["select"]
    assert select["predicted_error"] >= best * (1 - 1e-6)
    assert select["predicted_error"] - select["duality_gap"] <= best * (1 + 1e-6)


def test_one_factor_brings_predictions_to_what_was_measured() -> None:
    units = gathered()[1]
    means = [unit.means for unit in units]
    factor = coherence(ratios(each) for each in means)
    assert factor != 1
    measured = np.concatenate([unit.menu_residual_error[unit.menu_predicted > 0] for unit in means])
    predicted = np.concatenate([unit.menu_predicted[unit.menu_predicted > 0] for unit in means])
    above = (measured > factor * predicted).mean()
    assert abs(above - 0.5) <= 1 / len(measured)
    keep = units[0].required
    plain, scaled = (mask_errors(units[0], keep, by, 0) for by in (1.0, factor))
    np.testing.assert_allclose(scaled, factor * plain)
    expected = [raw(units[0], head, unpack(keep[head], units[0].k_blocks)) for head in range(3)]
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    assert coherence([ratios(replace(means[0], menu_predicted=None))]) == 1


def test_without_block_error_planes_cost_what_was_measured_and_cuts_are_refused() -> None:
    of = stats.manifest(has_block_error=False)
    found, _ = compiled("vote,select{target-density=0.9,menu=planes}", of)
    for unit, head, choice, _ in chosen(found):
        if choice != "dense":
            plane = of.thresholds.index(float(choice.split()[1]))
            assert unit.error[head] == unit.means.menu_residual_error[plane, head]
    assert found.findings["select"]["error_estimate"] == "measured errors of planes and windows"
    with pytest.raises(
        PassError, match=r"cuts must have block error in the store \(menu=planes\+windows does without\), got"
    ):
        compiled("vote,select", of)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            "select{menu=planes}",
            r"select: planes must have been voted \(vote comes before select\), got time 0, layer 0",
        ),
        ("vote,select,schedule,select", "select: schedule must come after, got time 0, layer 0"),
        ("vote,protect,select{target-density=0.1}", "leave room for the least that the menu can keep, density 0.4"),
    ],
)
def test_what_select_requires(passes: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        compiled(passes)


def test_block_errors_of_zero_cost_nothing_to_drop() -> None:
    of = stats.manifest()
    store = memory_store(of)
    blank = {key: replace(unit, block_error=unit.block_error | 255) for key, unit in store.units.items()}
    _, accounts = compile_store(MemoryStore(of, blank), "vote,select{target-density=0.2},lower")
    assert accounts[-1].error == 0
    assert accounts[-1].density <= 0.2


def test_a_speed_up_is_a_density_by_the_share_of_attention() -> None:
    found, accounts = compiled("vote,select{target-speedup=1.25,attention-share=0.5},lower")
    assert accounts[-1].density <= 0.6
    assert accounts[-1].density > 0.55
    assert found.forward_speedup(0.6, 0.5) == pytest.approx(1.25)
    with pytest.raises(
        PassError, match=r"target-speedup must leave room for .* keep, a speed-up of 1\.[0-9]+, got 2\.0"
    ):
        compiled("vote,select{target-speedup=2,attention-share=0.5},lower")


def test_the_weight_moves_blocks_to_the_times_that_matter() -> None:
    found, _ = compiled("vote,select{target-density=0.6}", weights=(1e-3, 1.0))
    early = np.mean([unit.head_keep(head).mean() for unit in found.at_time(1) for head in range(3)])
    late = np.mean([unit.head_keep(head).mean() for unit in found.at_time(0) for head in range(3)])
    assert early > late + 0.2
    assert found.findings["select"]["weights"] == "probed"
    assert gathered()[0].weights_source == "time weight: never probed, 1 at every time"
    assert compiled("vote,select")[0].findings["select"]["weights"] == "never probed: 1 at every time"


def test_a_range_of_times_has_its_own_budget() -> None:
    text = "select{to-time=0.5,target-density=0.9},select{from-time=0.6,target-density=0.5},schedule,lower"
    found, _ = compiled(text)
    for time, target in ((0, 0.9), (1, 0.5)):
        density = np.mean([unit.lowered.density for unit in found.at_time(time)])
        assert target - 0.05 < density <= target
    alone, _ = compiled("select{from-time=0.6,target-density=0.5},lower")
    assert {unit.lowered.density for unit in alone.at_time(0)} == {1.0}
    with pytest.raises(PassError, match=r"from-time and to-time must leave a recorded time, got 0\.8, None"):
        compiled("select{from-time=0.8}")
