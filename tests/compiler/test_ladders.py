"""Ladders: nested masks from the statistics alone, and what select makes of their errors."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.jobs import (
    SHARES,
    MemoryStore,
    check_packed_blocks,
    compile_store,
    errors_of,
    memory_store,
    random_anchors,
    refine_store,
    write_store,
)

from calibatt.compiler.bits import Votes, pack, unpack
from calibatt.compiler.cost import device_named
from calibatt.compiler.emit import compile_in_memory
from calibatt.compiler.errors import PassError
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.ladders import Bands, by_row, by_size, by_votes, levels_of
from calibatt.compiler.language import parse_passes
from calibatt.compiler.menu import Menu
from calibatt.compiler.stats import (
    Ladders,
    Manifest,
    RefinementError,
    Store,
    StoreWriter,
    code_values,
    fast_codes,
    quantise,
    window_keep,
)
from calibatt.plans import FRAMES, ROWS

ALL = ("row", "own", "votes", "mass")


@given(st.integers(0, 10**6), st.sampled_from([2, 5, 300]), st.floats(0, 0.3))
def test_levels_are_nested_and_hit_their_densities(seed: int, different: int, kept: float) -> None:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, different, (9, 11))
    always = rng.random((9, 11)) < kept
    number = np.bincount(keys[~always], minlength=different)
    of_rank, blocks = levels_of(number, int(always.sum()), SHARES)
    levels = np.where(always, 0, of_rank[keys])
    assert levels.max() <= len(SHARES)
    assert blocks.tolist() == [np.count_nonzero(levels <= level) for level in range(len(SHARES))]
    order = np.where(always, -1, keys)
    for level, share in enumerate(SHARES):
        keep = levels <= level
        assert keep[always].all()
        assert order[keep].max(initial=-1) < order[~keep].min(initial=different)
        assert keep.sum() <= max(share * keys.size, always.sum())
        following = order[~keep].min(initial=different)
        assert keep.sum() + (order == following).sum() > share * keys.size or keep.all()


def test_sizes_come_largest_first() -> None:
    values = np.geomspace(1e-3, 1e3, 600).astype(np.float32).reshape(20, 30)
    keys = by_size(values).astype(int).reshape(-1)
    assert (np.diff(keys) <= 0).all()
    groups = [values.reshape(-1)[keys == key] for key in np.unique(keys)]
    assert max(group.max() / group.min() for group in groups) < 1.0626
    assert by_size(np.zeros((1, 1), np.float32)) > keys.max()


def test_votes_come_before_errors() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((6, 2, 4, 10)) < 0.5  # samples, planes
    votes = Votes()
    for mask in masks:
        votes.add(pack(mask))
    codes = rng.integers(0, 256, (4, 10)).astype(np.uint8)
    keys = by_votes(votes, 10, codes)
    number = masks.sum((0, 1))
    for a, b in np.ndindex(40, 40):
        first = (-number.flat[a], codes.flat[a]) < (-number.flat[b], codes.flat[b])
        assert first == (keys.flat[a] < keys.flat[b])


def test_rows_give_up_what_adds_least_to_their_errors() -> None:
    """Dropping blocks in the order of the keys, last first, each adds to its row what the key says, in rising steps."""
    rng = np.random.default_rng(1)
    codes = np.stack([rng.permutation(256)[:40] for _ in range(5)]).astype(np.uint8)
    size = np.sqrt(code_values(1.0).astype(np.float64))[codes]
    classes, number, rank = by_row(codes)
    assert np.array_equal(number, np.bincount(classes.reshape(-1), minlength=len(number)))
    order = np.argsort(-rank[classes].astype(int), axis=None, kind="stable")
    sums, added = np.zeros(5), []
    for at in order.tolist():
        row = at // 40
        added.append((sums[row] + size.flat[at]) ** 2 - sums[row] ** 2)
        sums[row] += size.flat[at]
    assert (np.diff(added) >= -0.07 * np.array(added[1:])).all()


def test_few_samples_are_drawn_to_what_is_typical_of_the_distance() -> None:
    of = stats.manifest(grid=stats.TokenGrid(4, 8, 8), blocks=stats.Blocks(16, 16))
    rng = np.random.default_rng(0)
    error = rng.random((16, 16), np.float32) ** 8
    codes, apart = fast_codes(error, error.max()), np.zeros((16, 16), bool)
    apart[:, 3] = True
    band = np.zeros((16, 16))
    for row, column in np.ndindex(16, 16):
        same = [error[i, i + column - row] for i in range(16) if 0 <= i + column - row < 16 and i + column - row != 3]
        band[row, column] = np.mean(same) if same else 0
    for samples in (1, 4, 10**6):
        found = Bands(of, apart).steady(error, codes, samples)
        wanted = (codes.astype(float) * samples + quantise(band, error.max())) / (samples + 1)
        assert np.abs(found - wanted).max() <= 1
    np.testing.assert_array_equal(found, codes)


class Refined(MemoryStore):
    """A store in memory with random errors of ladders: smaller the more is kept."""

    def __init__(self, of: Manifest, units: Any, ladders: Ladders, seed: int = 0) -> None:
        super().__init__(of, units)
        self.ladders = ladders
        self.rng_seed = seed

    def check_refinement(self) -> tuple[str, ...]:
        return ()

    def refined_error(self, time_index: int, layer: int) -> np.ndarray:
        rng = np.random.default_rng([self.rng_seed, time_index, layer])
        shape = len(self.ladders.kinds), len(self.ladders.shares), self.manifest.model.heads
        rungs = np.sort(rng.random(shape), 1)[:, ::-1].reshape(-1, shape[2])
        return np.concatenate([rungs, rng.random((len(self.manifest.windows), shape[2]))])


def refined(seed: int = 0, kinds: tuple[str, ...] = ALL, **changes: Any) -> Refined:
    of = stats.manifest(**changes)
    plain = memory_store(of, seed=seed)
    return Refined(of, plain.units, Ladders(plain.samples, kinds, SHARES), seed)


def test_masks_and_prices_are_those_of_the_rungs() -> None:
    store, seen = refined(), set()
    for density in (0.5, 0.65, 0.8, 0.9):
        found, _ = compile_store(store, f"protect,select{{target-density={density},menu=windows+ladders}}")
        of = store.manifest
        for unit in found.all:
            levels = StatisticsSource(store).levels(store.ladders, unit.time_index, unit.layer)
            errors = store.refined_error(unit.time_index, unit.layer)
            for head, choice in enumerate(unit.choice):
                keep, required = (unpack(bits[head], of.k_blocks) for bits in (unit.keep, unit.required))
                if choice == "dense":
                    assert keep.all()
                    assert unit.error[head] == 0
                elif choice.startswith("ladder"):
                    kind = ALL.index(choice.split()[1])
                    rungs = [(levels[kind, head] <= level) | required for level in range(len(SHARES))]
                    prices = [errors[kind * len(SHARES) + level, head] for level in range(len(SHARES))]
                    assert any(
                        np.array_equal(keep, rung) and unit.error[head] == price
                        for rung, price in zip(rungs, prices, strict=True)
                    )
                    seen.add(kind)
                else:
                    index = [str(window) for window in of.windows].index(choice)
                    window = window_keep(of.windows[index], of.grid, of.blocks)
                    np.testing.assert_array_equal(keep, window | required)
                    assert unit.error[head] == errors[len(ALL) * len(SHARES) + index, head]
    assert seen == set(range(len(ALL)))


def test_what_each_rung_computes_with_anchors_is_counted_without_making_it() -> None:
    found, _ = compile_store(refined(), "protect,select{target-density=0.8,menu=windows+ladders}")
    rng = np.random.default_rng(0)
    for unit, axis in zip(found.all, (ROWS, FRAMES) * 2, strict=True):
        menu = Menu(found, *unit.menu[0])
        for head in range(unit.heads):
            check_packed_blocks(menu, unit, head, random_anchors(rng, axis, unit.grid))


def test_some_kinds_of_ladders() -> None:
    store = refined()
    text = "protect,select{target-density=0.6,menu=ladders,ladder-kinds=votes+own}"
    found, accounts = compile_store(store, text)
    chosen = {choice for unit in found.all for choice in unit.choice}
    assert {"ladder votes", "ladder own"} <= chosen <= {"dense", "ladder votes", "ladder own"}
    for unit in found.all:
        levels = StatisticsSource(store).levels(store.ladders, unit.time_index, unit.layer)
        errors = store.refined_error(unit.time_index, unit.layer)
        for head, choice in enumerate(unit.choice):
            if choice != "dense":
                kind = ALL.index(choice.split()[1])
                level = errors[:, head].tolist().index(unit.error[head]) - kind * len(SHARES)
                keep, required = (unpack(bits[head], unit.k_blocks) for bits in (unit.keep, unit.required))
                np.testing.assert_array_equal(keep, (levels[kind, head] <= level) | required)
    assert accounts[-1].error >= compile_store(store, text.split(",ladder")[0] + "}")[1][-1].error
    with pytest.raises(PassError, match=r"ladder-kinds must be some of those measured, row\+own.*, got size"):
        compile_store(store, "select{menu=ladders,ladder-kinds=size}")


@given(st.sampled_from([0.3, 0.45, 0.7]), st.integers(0, 5))
def test_the_budget_holds_and_no_other_choice_loses_less(density: float, seed: int) -> None:
    """What an unrefined store would choose among windows costs at least as much by the measured errors."""
    store = refined(seed, grid=stats.TokenGrid(4, 8, 8), has_mass=False, kinds=("row", "votes"))
    text = f"protect,select{{target-density={density},menu=%s}},anchors,select{{target-density={density},menu=%s}}"
    found, accounts = compile_store(store, text.replace("%s", "windows+ladders"))
    assert accounts[-1].density <= density
    plain, spent = compile_store(
        MemoryStore(store.manifest, store.units), f"protect,select{{target-density={density},menu=windows}}"
    )
    assert spent[-1].density <= density
    names = [str(window) for window in store.manifest.windows]
    theirs = 0.0
    for unit in plain.all:
        errors = store.refined_error(unit.time_index, unit.layer)[-len(names) :]
        theirs += sum(errors[names.index(choice), head] for head, choice in enumerate(unit.choice) if choice != "dense")
    once, alone = compile_store(store, f"protect,select{{target-density={density},menu=windows+ladders}}")
    assert alone[-1].error <= theirs + once.findings["select"]["duality_gap"] + 1e-12
    assert (
        found.findings["select"]["error_estimate"]
        == "measured errors of 2 ladders of 4 masks and windows, on 3 samples"
    )


def test_the_menu_is_settled_by_the_store() -> None:
    store = refined()
    source = StatisticsSource(store)
    job = source.make_job(device_named("h200-hopper"))
    settled = source.settle(job, parse_passes("protect,select,anchors,select{menu=cuts},lower"))
    assert [getattr(each, "menu", None) for each in settled] == [None, "windows+ladders", None, "cuts", None]
    plain = StatisticsSource(MemoryStore(store.manifest, store.units))
    settled = plain.settle(plain.make_job(job.device), parse_passes("select,lower"))
    assert settled[0].menu == "windows+cuts"
    with pytest.raises(PassError, match=r"ladders must have been measured \(calibatt-calibrate --refine\), got time 0"):
        compile_store(plain.store, "select{menu=ladders}")


PASSES = "protect,select{target-density=0.6},anchors,select{target-density=0.6},schedule,lower"


def compiled(store: Store, text: str = PASSES) -> bytes:
    plan = compile_in_memory(store, StatisticsSource(store), parse_passes(text), device_named("h200-hopper"))
    return plan.passes.encode() + b"".join(
        plan.schedule(segment.time, layer).col_idx.tobytes()
        for segment in plan.segments
        for layer in range(plan.signature.layers)
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_store(tmp_path / "store", stats.manifest(grid=stats.TokenGrid(4, 8, 8)))


def test_a_refined_store_on_disk(path: Path) -> None:
    before = compiled(Store.open(path))
    store = refine_store(path)
    ladders = store.ladders
    assert len(store.check_refinement()) == 3
    assert ladders is not None
    each = [errors_of(store, ladders, seed) for seed in range(3)]
    np.testing.assert_allclose(store.refined_error(1, 1), np.mean([e[1, 1] for e in each], 0, dtype=np.float64))
    after = compiled(store)
    assert after != before
    assert b"menu=windows+ladders" in after
    assert compiled(store, PASSES.replace("0.6", "0.6,menu=windows+cuts")) == before
    assert compiled(Store.open(path)) == after


def test_errors_written_anew_are_read_anew(path: Path) -> None:
    store = refine_store(path)
    assert store.ladders is not None
    before = store.refined_error(1, 1).copy()
    shutil.rmtree(path / "refinement")
    with StoreWriter.open(path, store.manifest) as writer:
        writer.refine(store.ladders)
        for name in store.samples:
            writer.write_errors(name, errors_of(store, store.ladders, 9), store.ladders)
            os.utime(store.refined[name], (1, 1))  # not within one tick of a coarse clock
    expected = errors_of(store, store.ladders, 9)[1, 1]
    np.testing.assert_allclose(store.refined_error(1, 1), expected)
    assert not np.allclose(before, expected)


def test_an_unfinished_refinement_is_refused_and_goes_on(path: Path) -> None:
    store = refine_store(path, count=1)
    with pytest.raises(RefinementError, match=r"hold the errors of 3 samples, got none of s1, s2; go on \(calibatt"):
        compiled(store)
    assert compiled(store, PASSES.replace("0.6", "0.6,menu=windows+cuts"))
    whole = refine_store(path)
    assert sorted(whole.refined) == list(whole.samples)
    assert compiled(whole)


def test_a_stale_refinement_is_refused(path: Path) -> None:
    refine_store(path)
    with StoreWriter.open(path, Store.open(path).manifest) as writer:
        sample = writer.begin("s9")
        for time_index, layer in np.ndindex(2, 2):
            sample.write(time_index, layer, stats.unit(writer.manifest, 99))
        sample.finish({})
        with pytest.raises(RefinementError, match=r"must be deleted before other samples are refined, got 3 samples"):
            writer.refine(Ladders(writer.done(), ("row", "votes"), SHARES))
    with pytest.raises(RefinementError, match="must be of the samples that are compiled, got a refinement not of s9"):
        compiled(Store.open(path))


def test_refinements_of_several_stores_are_of_no_use_together(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(path, other)
    for name in ("s0", "s1", "s2"):
        (other / "samples" / name).rename(other / "samples" / f"x{name}")
        text = (other / "samples" / f"x{name}" / "sample.json").read_text()
        (other / "samples" / f"x{name}" / "sample.json").write_text(text.replace(f'"{name}"', f'"x{name}"'))
    refine_store(path)
    refine_store(other)
    both = Store.open([path, other])
    with pytest.raises(
        RefinementError, match="of the samples that are compiled, got a refinement not of xs0, xs1, xs2"
    ):
        both.check_refinement()


def changed(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: damage(r / "s1.refined"), r"s1\.refined: section 't001'"),
        (lambda r: shutil.copy(r / "s0.refined", r / "s2.refined"), r"the header must say .*'s2'"),
        (lambda r: (r / "ladders.json").write_text("{"), r"ladders\.json: ladders must be JSON"),
        (lambda r: (r / "ladders.json").write_text("{}"), r"ladders must have the fields"),
        (lambda r: (r / "ladders.json").unlink(), "must have ladders.json, got only s0.refined, s1"),
        (lambda r: (r / "s1.refined").unlink(), "got none of s1"),
        (lambda r: (r / "notes").write_text(""), "must hold only ladders.json and errors, got 'notes'"),
        (
            lambda r: changed(r / "ladders.json", "0.25", "0.26"),
            r"the header must say .*refine again",
        ),
        (
            lambda r: (r / "ladders.json").write_text(
                (r / "ladders.json").read_text().replace('"rule": 1', '"rule": 0')
            ),
            "must be of rule 1",
        ),
    ],
)
def test_damaged_refinements_are_one_error(path: Path, spoil: Any, message: str) -> None:
    refine_store(path)
    spoil(path / "refinement")
    with pytest.raises((RefinementError, PassError), match=message):
        compiled(Store.open(path), PASSES.replace("0.6", "0.6,menu=windows+ladders"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": ("size",)}, "kinds must be some of row, own, votes, mass"),
        ({"kinds": ()}, "kinds must be some of"),
        ({"shares": (0.5, 0.2)}, "ascending floats in"),
        ({"shares": (0.5, 1.0)}, "ascending floats in"),
        ({"shares": ()}, "1 to 254 ascending"),
        ({"samples": ("b", "a")}, "samples must be ascending names"),
    ],
)
def test_ladders_refuse(changes: Any, message: str) -> None:
    with pytest.raises(RefinementError, match=message):
        replace(Ladders(("a",)), **changes)


def test_ladders_need_their_statistics() -> None:
    with pytest.raises(RefinementError, match="must do without 'mass' in a store without block mass"):
        Ladders(("a",), ("mass",)).check(stats.manifest(has_mass=False))
    with pytest.raises(RefinementError, match="must do without 'row' in a store without block error"):
        Ladders(("a",), ("row",)).check(stats.manifest(has_block_error=False))
