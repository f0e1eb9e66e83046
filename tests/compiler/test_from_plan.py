"""A plan from a plan: the same masks, larger blocks that keep what their parts keep, and refusals with their reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from support import stats

from calibatt.compiler.bits import pack, unpack
from calibatt.compiler.cli import command
from calibatt.compiler.from_plan import coarser
from calibatt.plans import FRAMES, ROWS, PlanFile

PASSES = "protect,select{target-density=0.55},anchors{safety=3,max-group-rows=2},schedule,lower"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    store = stats.write_store(folder / "store", stats.manifest())
    assert invoke(store, "-o", folder / "old.plan", "--passes", PASSES).exit_code == 0
    return folder / "old.plan"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_same_blocks_are_the_same_schedules(plan: Path, tmp_path: Path) -> None:
    found = invoke("--from-plan", plan, "-o", tmp_path / "new.plan")
    assert found.exit_code == 0, found.output
    old, new = PlanFile.read(plan), PlanFile.read(tmp_path / "new.plan")
    assert new.provenance["from_plan"] == old.digest
    assert new.segments == old.segments
    axes: set[int] = set()
    for segment in range(2):
        for layer in range(2):
            one, other = old.packed(segment, layer), new.packed(segment, layer)
            assert (one.head_anchor >= 0).any() or segment or layer
            for head in range(3):
                for a, b in zip(
                    old.schedules[segment][layer].dense(head), new.schedules[segment][layer].dense(head), strict=False
                ):
                    np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(one.tile_order, other.tile_order)
            axes |= set(one.anchor_axis.tolist())
    assert axes == {ROWS, FRAMES}


def test_larger_blocks_keep_what_their_parts_keep(plan: Path, tmp_path: Path) -> None:
    found = invoke("--from-plan", plan, "--block-size", 32, "-o", tmp_path / "new.plan")
    assert found.exit_code == 0, found.output
    old, new = PlanFile.read(plan), PlanFile.read(tmp_path / "new.plan")
    assert new.blocks.block_q == new.blocks.block_k == 32
    key_of = np.arange(new.grid.tokens)
    for segment in range(2):
        for layer in range(2):
            for head in range(3):
                source, keep = old.schedules[segment][layer].dense(head)
                new_source, new_keep = new.schedules[segment][layer].dense(head)
                np.testing.assert_array_equal(source, new_source)
                assert not (keep[:, key_of // 16] & ~new_keep[:, key_of // 32]).any()


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 2, 4]))
def test_a_coarser_mask_is_the_union_of_its_parts(seed: int, rows: int, columns: int, times: int) -> None:
    keep = np.random.default_rng(seed).random((rows, columns)) < 0.3
    found = unpack(coarser(pack(keep), columns, times, times), -(-columns // times))
    for row in range(len(found)):
        for column in range(found.shape[1]):
            part = keep[row * times : (row + 1) * times, column * times : (column + 1) * times]
            assert found[row, column] == part.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--passes", "select,lower"], "passes of --from-plan must be fill-gaps, merge-times, merge-heads, schedule, "),
        (["--block-size", "128"], None),
        (["--block-size", "8"], "blocks.block_q must be one of"),
        (["--target-density", "0.3"], "a budget must have a select in --passes"),
    ],
)
def test_what_a_plan_cannot_tell_is_refused(
    plan: Path, tmp_path: Path, arguments: list[str], message: str | None
) -> None:
    found = invoke("--from-plan", plan, "-o", tmp_path / "new.plan", *arguments)
    assert found.exit_code == (2 if message else 0), found.output
    assert (message or "") in found.stderr
    assert (tmp_path / "new.plan").exists() == (message is None)


def test_smaller_blocks_are_refused_with_the_reason(plan: Path, tmp_path: Path) -> None:
    large = tmp_path / "large.plan"
    assert invoke("--from-plan", plan, "--block-size", 64, "-o", large).exit_code == 0
    found = invoke("--from-plan", large, "--block-size", 32, "-o", tmp_path / "small.plan")
    assert found.exit_code == 2
    assert (
        "must be multiples of the plan's 64 and 64 (what a smaller block would keep was never recorded)" in found.stderr
    )


def test_statistics_or_a_plan(plan: Path, tmp_path: Path) -> None:
    assert "must come from statistics or --from-plan, got neither" in invoke("-o", tmp_path / "p").stderr
    both = invoke(plan.parent / "store", "--from-plan", plan, "-o", tmp_path / "p")
    assert "must come from statistics or --from-plan, got both" in both.stderr
