"""Two readers of one page, `calibatt.plans` and `support.second_reader`: a file means the same to both, or nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import fuzz, hostile, judge, mutations, second_reader
from support.plans import frames_plan, random_plan, tiny_plan

from calibatt.plans import PlanFile, errors, write_plan
from calibatt.plans.header import MAX_DEPTH, MAX_ITEMS, MAX_KEY_BYTES, MAX_VALUES

ROOT = Path(__file__).parents[2]
PLANS = [ROOT / "plans" / "demo.plan", *sorted((Path(__file__).parent / "golden").glob("*.plan"))]


def both(path: Path) -> PlanFile | errors.PlanError:
    """What both say.

    Raises:
        Disagreement: They say different things.
    """
    judge.judge(path, found := judge.first(path))
    return found


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_plans_of_this_repository_mean_the_same_to_both(path: Path) -> None:
    assert isinstance(both(path), PlanFile)


def test_what_is_written_means_the_same_to_both(tmp_path: Path) -> None:
    for plan in (tiny_plan(), frames_plan(), *map(random_plan, range(40))):
        write_plan(path := tmp_path / "a.plan", plan)
        assert isinstance(both(path), PlanFile)


@pytest.mark.slow
def test_hostile_plans_are_refused_by_both(tmp_path: Path) -> None:
    for write, kind, _ in hostile.plans().values():
        write(path := tmp_path / "a.plan")
        assert type(both(path)).__name__ == kind


def levels(count: int) -> Any:
    """A value below so many lists."""
    return [levels(count - 1)] if count else 0


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (levels(MAX_DEPTH - 3), levels(MAX_DEPTH - 2)),  # below header and provenance, and what it is called
        ({"k" * MAX_KEY_BYTES: 0}, {"k" * (MAX_KEY_BYTES + 1): 0}),
        ([0] * MAX_ITEMS, [0] * (MAX_ITEMS + 1)),
        ([[0] * (MAX_ITEMS // 2)] * 15, [[0] * (MAX_ITEMS // 2)] * (MAX_VALUES // MAX_ITEMS * 2)),
    ],
    ids=["levels", "keys", "entries", "values"],
)
def test_the_edges_of_a_header_are_where_both_have_them(tmp_path: Path, right: Any, wrong: Any) -> None:
    path = tmp_path / "a.plan"
    path.write_bytes(hostile.with_header(lambda header: header["provenance"].update(a=right)))
    assert isinstance(both(path), PlanFile)
    path.write_bytes(hostile.with_header(lambda header: header["provenance"].update(a=wrong)))
    assert isinstance(both(path), errors.HeaderError)


def test_a_section_that_is_skipped_has_its_length_all_the_same(tmp_path: Path) -> None:
    """Of a later minor version: what cannot be decoded is skipped, what contradicts itself is not."""
    header, sections = hostile.dense_parts()
    sections["x"] = np.zeros(3, np.int32)
    path = tmp_path / "a.plan"
    for shape, dtype, kind in (
        ([3], "int32", PlanFile),
        ([2], "float128", PlanFile),
        ([2], "int32", errors.SectionError),
    ):

        def change(entries: Any, shape: Any = shape, dtype: str = dtype) -> Any:
            entries[-1] |= {"shape": shape, "dtype": dtype}
            return entries

        path.write_bytes(hostile.rebuilt(header, sections, version=(5, 1), entries_to=change))
        assert isinstance(both(path), kind)


def test_the_second_reader_is_no_copy_of_the_first() -> None:
    """It knows nothing of calibatt, and each of its rules is reached."""
    assert "calibatt" not in set(vars(second_reader))
    imported = {getattr(value, "__module__", "") or "" for value in vars(second_reader).values()}
    assert not any(name.startswith("calibatt") for name in imported)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "executions"), [("plans", 500), ("stores", 250)])
def test_changed_files_end_in_their_error_or_are_safe(tmp_path: Path, kind: str, executions: int) -> None:
    """`support.fuzz` for a moment; docs/reliability.md has what it found when it ran long."""
    run = fuzz.Run(kind, tmp_path, seed=random.Random(kind).randrange(1000), keep=tmp_path)
    for _ in range(executions):
        run.once(run.rng)
    assert not run.findings, run.examples
    assert run.executions > executions * 0.9
    assert len(run.counts) > 5  # many ends


def test_a_disagreement_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge and the fuzzer themselves: a reader that accepts anything is found out."""
    monkeypatch.setattr(judge, "first", lambda path, threads=True: tiny_plan())
    monkeypatch.setattr(fuzz.Plans, "files", 0)
    monkeypatch.setattr(fuzz.Plans, "_parts", lambda self, plan: hostile.dense_parts())
    run = fuzz.Run("plans", tmp_path, seed=0)
    for _ in range(20):
        run.once(run.rng)
    assert run.findings.total() > 10


def test_any_change_can_be_drawn() -> None:
    """None of the mutations is dead: each writes another file than the one it was given."""
    header, sections = hostile.dense_parts()
    whole, rng = hostile.rebuilt(header, sections), random.Random(0)
    different = 0
    for _ in range(100):
        try:
            different += mutations.file(rng, header, sections) != whole
        except OverflowError:
            different += 1
    assert different > 85
