"""The prices, the menu and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.jobs import EIGHT, Compiled, MemoryStore, compile_store, compiled, gathered, mask, memory_store

from calibatt.compiler.bits import pack, unpack
from calibatt.compiler.error_model import (
    PRIOR,
    Bands,
    HeadPrices,
    at_shares,
    copy_prices,
    cuts,
    mask_errors,
    trust,
)
from calibatt.compiler.errors import PassError
from calibatt.compiler.ir import UnitIR
from calibatt.compiler.stats import dequantise, window_keep
from calibatt.plans import BF16, INT8, INT8_FP8, PRECISIONS, ModelSignature, TokenGrid

COARSE = 2 ** (1 / 16) - 1


def prices(unit: UnitIR) -> np.ndarray:
    return dequantise(unit.means.error_code, unit.means.error_peak[:, None, None])


def raw(unit: UnitIR, head: int, keep: np.ndarray) -> float:
    """Sum over query blocks of the squared sum of the roots of what is dropped."""
    return float((np.where(keep, 0, np.sqrt(prices(unit)[head])).sum(1) ** 2).sum())


def drawn(values: np.ndarray, count: float) -> np.ndarray:
    """Values drawn to the mean of their distance, by definition; equal blocks of queries and keys."""
    found = values.astype(np.float64).copy()
    for row, column in np.ndindex(values.shape):
        places = [(r, c) for r, c in np.ndindex(values.shape) if c - r == column - row]
        mean = np.mean([values[at] for at in places])
        found[row, column] = (values[row, column] * count + mean) / (count + 1)
    return found


@pytest.mark.parametrize("grid", [TokenGrid(2, 5, 7), TokenGrid(1, 5, 11)])
def test_prices_blend_what_was_measured_with_what_is_known_without(grid: TokenGrid) -> None:
    """By definition: effects and errors drawn along their bands, a factor for each head, windows, copies."""
    of = stats.manifest(grid=grid, frame_radius=0)
    store, (job, units) = memory_store(of), gathered(of)
    table = store.table()
    w = 3 * stats.VECTORS / (3 * stats.VECTORS + PRIOR)
    keeps = [window_keep(window, grid, of.blocks) for window in of.windows]

    def of_windows(values: np.ndarray) -> np.ndarray:
        return np.array([(np.where(keep, 0, np.sqrt(values)).sum(1) ** 2).sum() for keep in keeps])

    for unit in units:
        at, level = (unit.time_index, unit.layer), job.levels[unit.time_index]
        parts = [store.parts[(name, *at)] for name in store.samplings]
        windows, heads = table.window_error[at], range(unit.heads)
        errors = [drawn(np.mean([part.error_values()[head] for part in parts], 0), 3) for head in heads]
        ratios = []
        for head in heads:
            price = of_windows(errors[head])
            known = price > 0
            ratios.append(np.log(windows[known, head] / price[known]).mean() if known.any() else 0.0)
        for head in heads:
            effect = drawn(np.mean([part.effect_values()[head] for part in parts], 0), 3 * stats.VECTORS)
            factor = np.exp(w * ratios[head] + (1 - w) * np.mean(ratios))
            expected = effect ** (w / 2) * (errors[head] * factor) ** (1 - w / 2)
            np.testing.assert_allclose(prices(unit)[head], expected * level, rtol=COARSE * 1.05)
            model = of_windows(expected)
            blend = np.where(model > 0, windows[:, head] ** w * np.maximum(model, 1e-300) ** (1 - w), windows[:, head])
            np.testing.assert_allclose(unit.means.window_error[:, head], blend * level, rtol=1e-4)
        rows = np.mean([part.row_effect for part in parts], 0)
        expected = (w * rows + (1 - w) * np.nanmean(rows, 1, keepdims=True)) * level
        np.testing.assert_allclose(unit.means.row_error, expected, rtol=1e-5)


@given(st.floats(0.1, 1e6))
def test_the_more_is_measured_the_less_is_borrowed(measurements: float) -> None:
    effect = np.array([[[1.0, np.nan], [3.0, 5.0]]])
    found = copy_prices(effect, measurements)
    assert np.isnan(found[0, 0, 1])
    assert found[0, :, 0].mean() == pytest.approx(2.0)
    assert found[0, 1, 0] - found[0, 0, 0] == pytest.approx(2 * trust(measurements))
    assert found[0, 1, 1] == pytest.approx(5.0)


def test_levels_are_geometric_means() -> None:
    store = memory_store(stats.manifest())
    levels = np.stack([each.level for each in store.tables.values()])
    np.testing.assert_allclose(gathered()[0].levels, np.exp(np.log(levels).mean(0)))


@given(st.integers(0, 2**32), st.floats(0.5, 1e4))
def test_drawing_keeps_what_is_the_same_along_a_band(seed: int, count: float) -> None:
    of = stats.manifest(grid=TokenGrid(2, 5, 7))
    band = np.random.default_rng(seed).random(9).astype(np.float32)
    values = band[np.arange(5)[None] - np.arange(5)[:, None] + 4]
    np.testing.assert_allclose(Bands(of).steady(values, count), values, rtol=1e-5)


def test_prices_follow_the_scale_of_measured_windows() -> None:
    """Twice the measured price of windows makes blocks dearer, by less than twice; nothing known is a factor of 1."""
    of, rng = stats.manifest(), np.random.default_rng(0)
    effect, error = rng.random((2, 5, 5)).astype(np.float32)
    w = trust(6)
    made = [
        HeadPrices([error], np.array(by, float)[:, None], 3, 6, of).of(0, effect)[0] for by in ([1, 2], [2, 4], [0, 0])
    ]
    np.testing.assert_allclose(made[1], made[0] * 2 ** (1 - w / 2), rtol=1e-5)
    bands = Bands(of)
    np.testing.assert_allclose(
        made[2], bands.steady(effect, 6) ** (w / 2) * bands.steady(error, 3) ** (1 - w / 2), rtol=1e-5
    )


def test_cuts_are_all_masks_by_level_and_masks_are_priced_alike() -> None:
    units = gathered()[1]
    for unit in units:
        for head in range(unit.heads):
            required = unpack(unit.required[head], unit.k_blocks)
            blocks, error = cuts(unit, head)
            for code in (0, 3, 17, 40, 255):
                keep = (unit.means.error_code[head] < code) | required
                assert blocks[code] == keep.sum()
                assert error[code] == pytest.approx(raw(unit, head, keep), rel=1e-5)
                bits = np.repeat(pack(keep)[None], unit.heads, 0)
                assert mask_errors(unit, bits)[head] == pytest.approx(raw(unit, head, keep), rel=1e-5)
            dense = float(unit.dense_blocks)
            found = at_shares(blocks, error, (0.3, 0.6, 0.9), unit.dense_blocks)
            assert (np.diff(found) <= 0).all()
            np.testing.assert_allclose(at_shares(blocks, error, (blocks[20] / dense,), unit.dense_blocks), error[20])


def test_rows_may_be_sampled() -> None:
    of = stats.manifest(grid=TokenGrid(2, 48, 28), row_radius=0, frame_radius=0, windows=())
    unit = gathered(of, samples=1)[1][0]
    assert unit.q_blocks == 168
    keep = unit.means.error_code < 20
    exact = [raw(unit, head, keep[head]) for head in range(3)]
    np.testing.assert_allclose(mask_errors(unit, pack(keep)), exact, rtol=0.1)


@given(st.sampled_from([0.52, 0.55, 0.6, 0.77, 0.95, 1.0]), st.integers(0, 5))
def test_the_executed_density_never_exceeds_the_target(target: float, seed: int) -> None:
    text = f"select{{target-density={target}}},anchors,schedule,lower"
    found, accounts = compiled(text, seed=seed, copies=0.1)
    executed = [unit.lowered.computed_blocks(head) / 25 for unit in found.all for head in range(unit.heads)]
    assert np.mean(executed) <= target + 1e-12
    assert accounts[1].blocks <= target * accounts[0].blocks
    assert accounts[-1].blocks == round(np.sum(executed) * 25)


def test_more_density_is_less_error() -> None:
    errors = [compiled(f"select{{target-density={d}}}")[1][-1].error for d in (0.5, 0.6, 0.7, 0.9, 1.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def chosen(found: Compiled) -> list[tuple[UnitIR, int, str, np.ndarray]]:
    return [
        (unit, head, unit.choice[head], unpack(unit.keep[head], unit.k_blocks))
        for unit in found.all
        for head in range(unit.heads)
    ]


def test_masks_and_prices_are_those_of_the_choices() -> None:
    of = stats.manifest()
    seen = set()
    for menu, density in product(("windows", "cuts", "windows+cuts"), (0.9, 0.95)):
        found, _ = compiled(f"select{{target-density={density},menu={menu}}}", of)
        for unit, head, choice, keep in chosen(found):
            kind = choice.split("(")[0]
            seen.add(kind)
            required = unpack(unit.required[head], of.k_blocks)
            price = unit.error[head]
            if kind == "dense":
                assert keep.all()
                assert price == 0
            elif kind == "cut":
                assert price == pytest.approx(raw(unit, head, keep), rel=1e-5)
                error = prices(unit)[head]
                if not (keep | required).all():
                    assert error[keep & ~required].min(initial=np.inf) > error[~keep].max()
            else:
                index = [str(window) for window in of.windows].index(choice)
                window = window_keep(of.windows[index], of.grid, of.blocks)
                np.testing.assert_array_equal(keep, window | required)
                assert price == unit.means.window_error[index, head]
    assert seen >= {"dense", "cut", "frames"}


def brute_force(found: Compiled, limit: float, precisions: Sequence[int] = (BF16,)) -> float:
    """Least error over every combination of windows, some cuts, dense and precisions within a cost in blocks."""
    options = []
    for unit in found.all:
        for head in range(unit.heads):
            mine = [(unit.dense_blocks, 0.0)]
            for index, window in enumerate(found.manifest.windows):
                bits = pack(window_keep(window, unit.grid, unit.blocks)) | unit.required[head]
                mine.append((int(unpack(bits, unit.k_blocks).sum()), float(unit.means.window_error[index, head])))
            blocks, error = cuts(unit, head)
            codes = (8, 16, 24, 48) if len(precisions) == 1 else (8, 24)
            mine += [(int(blocks[code]), float(error[code])) for code in codes]
            prices = unit.means.precision_error[:, head]
            options.append([(found.cost(b, each), e + prices[each]) for b, e in mine for each in precisions])
    sums = [(sum(blocks for blocks, _ in each), sum(error for _, error in each)) for each in product(*options)]
    return min(error for blocks, error in sums if blocks <= limit)


@pytest.mark.parametrize("seed", range(6))
def test_as_good_as_every_combination_within_the_gap(seed: int) -> None:
    of = stats.manifest(model=ModelSignature("TinyModel", layers=1, heads=2, head_dim=8))
    found, accounts = compiled("select{target-density=0.7}", of, seed=seed)
    select = found.findings["select"]
    assert select["predicted_error"] - select["duality_gap"] <= brute_force(found, 0.7 * accounts[0].blocks)
    assert select["predicted_error"] == pytest.approx(accounts[-1].error)


@pytest.mark.parametrize("seed", range(6))
def test_as_good_as_every_combination_with_precisions_within_the_gap(seed: int) -> None:
    of = stats.manifest(model=ModelSignature("TinyModel", layers=1, heads=2, head_dim=8))
    store = rounded(memory_store(of, seed=seed), 0.25)
    found, accounts = compile_store(store, "select{target-density=0.6,precision=auto}", EIGHT)
    select = found.findings["select"]
    least = brute_force(found, 0.6 * accounts[0].blocks, tuple(PRECISIONS))
    assert select["predicted_error"] - select["duality_gap"] <= least
    assert select["predicted_error"] == pytest.approx(accounts[-1].error)
    assert select["cost"] == pytest.approx(accounts[-1].cost)
    assert accounts[-1].cost <= 0.6
    assert accounts[-1].blocks == select["density"] * accounts[0].blocks


def rounded(store: MemoryStore, by: float) -> MemoryStore:
    """The same store with effects of precisions so many times as large."""
    tables = {
        name: replace(each, precision_effect=each.precision_effect * np.float32(by))
        for name, each in store.tables.items()
    }
    return MemoryStore(store.manifest, store.parts, tables)


@given(st.floats(0.45, 1.0), st.integers(0, 5), st.sampled_from([0.01, 0.1, 1.0]), st.sampled_from([0.1, 1.0]))
def test_the_budget_is_of_cost_and_precisions_are_priced(
    target: float, seed: int, rounding: float, copies: float
) -> None:
    budget = f"select{{target-density={target},precision=auto}}"
    store = rounded(memory_store(stats.manifest(), seed=seed, copies=copies), rounding)
    found, accounts = compile_store(store, f"{budget},anchors,{budget},schedule,lower", EIGHT)
    spent = 0.0
    speeds = {BF16: (1, 0), INT8: (0.875, 0), INT8_FP8: (0.75, 70 * 8 * 0.01e-6 / found.block_ms)}
    for unit in found.all:
        assert unit.lowered.head_precision.tolist() == unit.precision.tolist()
        errors = unit.means.precision_error[unit.precision, np.arange(unit.heads)]
        np.testing.assert_array_equal(unit.precision_error, errors)
        assert (unit.error >= errors * (1 - 1e-12)).all()
        for head, precision in enumerate(unit.precision.tolist()):
            factor, prepass = speeds[precision]
            spent += unit.lowered.computed_blocks(head) * factor + prepass
    assert spent <= target * accounts[0].blocks * (1 + 1e-12)
    assert accounts[-1].predicted_ms == pytest.approx(spent * found.block_ms)
    assert accounts[-1].cost == pytest.approx(spent / accounts[0].blocks)


def test_precisions_are_chosen_where_they_are_worth_it() -> None:
    """Free, all heads take the fastest; dear, none does, and masks are those of bf16; auto never loses more."""
    plain = "select{target-density=0.55}"
    auto = plain.replace("}", ",precision=auto}")
    store = memory_store(stats.manifest())
    free, _ = compile_store(rounded(store, 0), auto, EIGHT)
    assert {each for unit in free.all for each in unit.precision.tolist()} == {INT8_FP8}
    (dear, _), (bf16, least) = compile_store(rounded(store, 1e6), auto, EIGHT), compile_store(store, plain, EIGHT)
    for unit, other in zip(dear.all, bf16.all, strict=True):
        assert unit.precision.tolist() == other.precision.tolist() == [BF16] * 3
        np.testing.assert_array_equal(unit.keep, other.keep)
    _, some = compile_store(rounded(store, 0.1), auto, EIGHT)
    assert some[-1].error < least[-1].error
    assert some[-1].density > 0.55 >= some[-1].cost


def test_a_price_of_a_precision_is_drawn_to_the_layers_heads() -> None:
    store, (job, units) = memory_store(stats.manifest()), gathered()
    w = trust(3 * stats.VECTORS)
    for unit in units:
        at = unit.time_index, unit.layer
        each = [(x.precision_effect[:, at[0], at[1]] ** 2).mean(0) / x.level[at[0]] for x in store.tables.values()]
        measured = np.mean(each, 0)
        expected = (w * measured + (1 - w) * measured.mean(1, keepdims=True)) * job.levels[unit.time_index]
        np.testing.assert_allclose(unit.means.precision_error[1:], expected, rtol=1e-5)
        assert not unit.means.precision_error[BF16].any()


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("select{precision=auto}", "precision must be bf16 on a device whose 8 bits were not measured, got auto, test"),
        ("select,schedule,select", "select: select must come before schedule, got it after"),
        ("select{target-density=0.1}", "leave room for the least that the menu can keep, density 0.2"),
    ],
)
def test_what_select_requires(passes: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        compiled(passes)


def test_blocks_without_effect_cost_nothing_to_drop() -> None:
    store = memory_store(stats.manifest())
    blank = {key: replace(part, effect_peak=part.effect_peak * 0) for key, part in store.parts.items()}
    _, accounts = compile_store(MemoryStore(store.manifest, blank, store.tables), "select{target-density=0.55},lower")
    assert accounts[-1].error == 0
    assert accounts[-1].density <= 0.55


def test_the_level_moves_blocks_to_the_times_that_matter() -> None:
    store = memory_store(stats.manifest())
    by = np.array([1e-3, 1.0])
    tables = {
        name: replace(
            each,
            level=each.level * by,
            window_effect=(each.window_effect * np.sqrt(by)[:, None, None, None]).astype(np.float32),
        )
        for name, each in store.tables.items()
    }
    found, _ = compile_store(MemoryStore(store.manifest, store.parts, tables), "select{target-density=0.6}")
    early = np.mean([mask(unit, head).mean() for unit in found.at_time(1) for head in range(3)])
    late = np.mean([mask(unit, head).mean() for unit in found.at_time(0) for head in range(3)])
    assert early > late + 0.2
