"""A recorded time stands for as many steps as the sampling has in its segment: in the budget and in what is told."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from support import stats
from support.plans import tiny_plan, tiny_schedule

from calibatt.compiler.cli import command
from calibatt.compiler.prediction import CUT, DENSE, Masks, Prediction, predict
from calibatt.compiler.report import UNKNOWN
from calibatt.compiler.stats import SamplingTables, StoreWriter, Table
from calibatt.compiler.steps import of_segments, segments, steps_of
from calibatt.plans import PlanFile

TIMES = (0.2, 0.5, 0.9)
SAMPLING = (1.0, 0.95, 0.9, 0.8, 0.75, 0.71, 0.5, 0.2)
"""Six steps of the segment of 0.9, one of each of the others."""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def write_store(path: Path, *meta: dict[str, Any]) -> Path:
    """A store of three samplings at three of the eight times of `SAMPLING`; meta data of each, or of all."""
    with StoreWriter.open(path, stats.manifest(times=TIMES)) as writer:
        for index, name in enumerate(("s0", "s1", "s2")):
            stats.add_sampling(writer, name, ladder=index > 0, **meta[index % len(meta)])
    return path


def executed(plan: PlanFile, times: tuple[float, ...] = SAMPLING) -> float:
    """Mean density over the steps of a sampling."""
    layers = range(plan.signature.layers)
    return float(np.mean([[plan.schedule(now, layer).density for layer in layers] for now in times]))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
def test_a_sampling_executes_the_density_that_was_asked_for(target: float, tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"times": list(SAMPLING)})
    result = invoke(store, "-o", tmp_path / "p.plan", "--target-density", target, "--report", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    plan, value = PlanFile.read(tmp_path / "p.plan"), json.loads((tmp_path / "r.json").read_text())
    assert target - 0.02 < executed(plan) <= target + 1e-12
    assert plan.predicted["density"] == value["density"] == pytest.approx(executed(plan))
    assert plan.steps == tuple(value["steps"]) == (1, 1, 6)
    assert plan.scheduler_hint == {"times": list(SAMPLING)}
    assert sum(value["dense_ms"]) == pytest.approx(8 * np.sum(plan.predicted["dense_ms"][0]))
    assert f"{value['density']:.4f} of the blocks of dense attention, mean over the steps" in result.output


def test_another_number_of_steps_can_be_asked_for(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"times": list(SAMPLING)})
    for steps in (8, 16, 50):
        result = invoke(store, "-o", tmp_path / f"{steps}.plan", "--target-density", 0.4, "--steps", steps)
        assert result.exit_code == 0, result.output
        plan = PlanFile.read(tmp_path / f"{steps}.plan")
        assert sum(plan.steps) == steps
        assert 0.38 < executed(plan, tuple(plan.scheduler_hint["times"])) <= 0.4 + 1e-12
    refused = invoke(store, "-o", tmp_path / "no.plan", "--steps", 2)
    assert refused.exit_code == 2
    assert "--steps must be enough that every recorded time stands for one" in refused.stderr
    assert "got 2, none at time 0.200" in refused.stderr


def test_one_step_says_nothing_of_a_shift() -> None:
    assert steps_of([0.8], [0.8], 4).times == pytest.approx((0.8, 0.6, 0.4, 0.2))
    assert steps_of([0.0], [0.0], 3).counts.tolist() == [3]


@given(st.integers(3, 60), st.integers(2, 60), st.floats(1, 12), st.booleans())
def test_another_number_of_steps_is_the_schedulers(measured: int, wanted: int, shift: float, ends: bool) -> None:
    """Of flow matching with a shift, whose last step is near 0 or one before it: at most one step is on the other side
    of a border of segments.
    """

    def schedule(steps: int) -> tuple[float, ...]:
        left = np.linspace(1, 1e-3, steps) if ends else 1 - np.arange(steps) / steps
        return tuple((shift * left / (1 + (shift - 1) * left)).tolist())

    recorded = schedule(measured)[:: max(1, measured // 5)][::-1]
    starts = [part.start for part in segments(recorded)]
    counts = np.bincount(np.searchsorted(starts, schedule(wanted), "right") - 1, minlength=len(recorded))
    if counts.all() and wanted > 2 * len(recorded):
        assert np.abs(np.cumsum(steps_of(recorded, schedule(measured), wanted).counts - counts)).max() <= 1


@given(st.lists(st.integers(0, 1000).map(lambda now: now / 1000), min_size=1, max_size=12, unique=True), st.data())
def test_steps_are_counted_where_they_are_executed(times: list[float], data: st.DataObject) -> None:
    chosen = sorted(data.draw(st.lists(st.sampled_from(times), min_size=1, unique=True)))
    of = tiny_plan(
        segments=segments(chosen),
        schedules=[[tiny_schedule(1)] * 2] * len(chosen),
        scheduler_hint={"times": times},
    )
    expected = [sum(of.segment_index(now) == index for now in times) for index in range(len(chosen))]
    assert steps_of(chosen, times).counts.tolist() == list(of.steps) == expected


def test_steps_of_a_segment_count_as_if_they_had_all_been_measured_and_were_alike() -> None:
    """The prediction for three times of which two stand for more steps, against all six in the tables."""
    of, steps = stats.manifest(times=TIMES), [2, 1, 3]
    measured, rng = (0.95, 0.9, 0.85, 0.5, 0.2, 0.1), np.random.default_rng(0)
    few = [stats.tables(of, seed) for seed in range(3)]
    for each in few:
        each.level[:] = 1e-3 * (1 + each.level[0])  # the same at all times: nothing between them to interpolate

    def repeated(values: np.ndarray, axis: int) -> np.ndarray:
        return np.repeat(values, steps, axis)

    every = [
        SamplingTables(**{f.name: repeated(getattr(each, f.name), int(f.name != "level")) for f in fields(each)})
        for each in few
    ]
    table = of_segments(Table(tuple(few)), TIMES, measured)
    shape = (3, 2, 3)
    kind = rng.choice([DENSE, CUT, 0, 1], shape)
    density, error, copied = rng.random((3, *shape)) + 0.1
    share_error, precision = rng.random((3, 2, 3, 3)) + 0.1, rng.integers(0, 3, shape)
    reach = np.array(steps, float)[:, None, None] ** 2
    levels = table.time_level
    np.testing.assert_allclose(levels, Table(tuple(few)).time_level * reach[:, 0, 0])
    masks = Masks(kind, density, error * reach, copied * reach, share_error * reach[..., None], precision)
    # A copy adds up like everything else: each of n steps alike has n times its share of the segment.
    all_masks = Masks(
        *(repeated(x, 0) for x in (kind, density, error, copied * np.sqrt(reach), share_error, precision))
    )
    found = predict(table, levels, of.shares, masks)
    expected = predict(Table(tuple(every)), Table(tuple(every)).time_level, of.shares, all_masks)
    assert isinstance(found, Prediction)
    assert isinstance(expected, Prediction)
    assert found.mean == pytest.approx(expected.mean, abs=1e-4)


def test_the_level_between_recorded_times_is_interpolated() -> None:
    of = stats.manifest(times=(0.2, 0.8))
    table = Table((stats.tables(of),))
    table.samplings[0].level[:] = [1e-4, 1e-2]
    levels = of_segments(table, of.times, (0.8, 0.6, 0.2)).time_level
    between = 1e-2 ** (2 / 3) * 1e-4 ** (1 / 3)
    np.testing.assert_allclose(levels, [1e-4, (0.1 + between**0.5) ** 2], rtol=1e-6)
    assert of_segments(table, of.times, (0.8, 0.2)) is table


def test_a_store_that_does_not_say_its_steps_is_compiled_as_before_and_says_so(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"steps": 8})
    result = invoke(store, "-o", tmp_path / "p.plan", "--target-density", 0.5)
    assert result.exit_code == 0, result.output
    plan = PlanFile.read(tmp_path / "p.plan")
    assert plan.scheduler_hint is None
    assert plan.steps == (1, 1, 1)
    assert plan.predicted["density"] == pytest.approx(executed(plan, TIMES))
    assert UNKNOWN in " ".join(result.output.split())
    refused = invoke(store, "-o", tmp_path / "no.plan", "--steps", 8)
    assert refused.exit_code == 2
    assert "--steps must come with a store that says the times of its steps" in refused.stderr


@pytest.mark.parametrize(
    ("meta", "times"),
    [([{"steps": 3}], TIMES[::-1]), ([{"steps": 8}, {"times": list(SAMPLING)}, {"steps": 8}], SAMPLING)],
)
def test_an_older_store_says_its_steps_if_all_were_measured_or_once_it_is_continued(
    tmp_path: Path, meta: list[dict[str, Any]], times: tuple[float, ...]
) -> None:
    store = write_store(tmp_path / "store", *meta)
    assert invoke(store, "-o", tmp_path / "p.plan").exit_code == 0
    assert PlanFile.read(tmp_path / "p.plan").scheduler_hint == {"times": list(times)}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([{"times": 3}], "sampling 's0' must have times of its steps in [0, 1], the 3 recorded ones among them, got 3"),
        ([{"times": [0.9, 0.5]}], "got [0.9, 0.5]"),
        ([{"times": [1.5, *SAMPLING]}], "got [1.5, 1.0"),
        ([{"times": ["x", *SAMPLING]}], "got ['x', 1.0"),
        (
            [{"times": list(SAMPLING)}, {"times": list(TIMES)}],
            "all samplings must have the same steps, got 8 in 's0' and 3 in 's1': compile them apart",
        ),
    ],
)
def test_steps_that_cannot_be_are_one_line(tmp_path: Path, meta: list[dict[str, Any]], message: str) -> None:
    result = invoke(write_store(tmp_path / "store", *meta), "-o", tmp_path / "p.plan")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "p.plan").exists()
