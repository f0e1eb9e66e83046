"""Precisions from one end to the other: measured, chosen, run, and as wrong as was predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.jobs import EIGHT
from support.sampler import TinyVideoSampler, tiny_store

from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.language import parse_passes
from calibatt.compiler.stats import Store
from calibatt.plans import BF16, INT8_FP8, PlanFile, write_plan
from calibatt.runtime import load_plan
from calibatt.tools.evaluate.metrics import latent_db
from calibatt.tools.studies.in_memory import compile_in_memory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

HELD_OUT = tuple(("h" * length, 100 + length) for length in range(3, 9))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_store(tmp_path_factory.mktemp("stats") / "store")


def plan_of(store: Store, budget: float, precision: str) -> PlanFile:
    select = f"select{{target-density={budget},precision={precision}}}"
    passes = parse_passes(f"{select},anchors,{select},schedule,lower")
    return compile_in_memory(store, StatisticsSource(store), passes, EIGHT)


def precisions_of(plan: PlanFile) -> np.ndarray:
    found = [[layer.head_precision for layer in layers] for layers in plan.schedules]
    return np.array(found)


def mean_db(path: Path, plan: PlanFile, backend: str) -> float:
    """Signal-to-noise of the final latent on prompts that were never calibrated on, by the plan's file."""
    write_plan(path, plan)
    sampler = TinyVideoSampler()
    dense = [sampler.run(*each) for each in HELD_OUT]
    with load_plan(path).attach(sampler.transformer, backend=backend):
        planned = [sampler.run(*each) for each in HELD_OUT]
    return float(torch.stack([latent_db(one, other) for one, other in zip(planned, dense, strict=True)]).mean())


@pytest.mark.parametrize(("budget", "least"), [(0.875, BF16), (0.755, INT8_FP8), (0.6, BF16)])
def test_plans_with_heads_in_8_bits_are_as_wrong_as_predicted(
    store: Store, tmp_path: Path, budget: float, least: int
) -> None:
    """All heads dense in 8 bits, mostly int8; all with e4m3; and with masks, which then cost most of the quality."""
    plan = plan_of(store, budget, "auto")
    precisions = precisions_of(plan)
    assert precisions.any()
    assert precisions.min() >= least
    assert plan.predicted["cost"] <= budget < plan.predicted["density"]
    told = plan.predicted["latent_db"]
    true = mean_db(tmp_path / "a.plan", plan, "torch")
    assert abs(true - told["mean"]) < max(3, 2 * told["standard_error"])
    assert abs(true - mean_db(tmp_path / "b.plan", plan, "reference")) < 1
    plain = plan_of(store, budget, "bf16")
    assert not precisions_of(plain).any()
    assert told["mean"] > plain.predicted["latent_db"]["mean"] + 1
    assert true > mean_db(tmp_path / "c.plan", plain, "torch") + 1
