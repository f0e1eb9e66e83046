"""Sets of plans: one model at several resolutions, and pipelines of two experts."""

from __future__ import annotations

import dataclasses
import itertools
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid, write_plan
from calibatt.runtime import Plan, PlanMismatchError, PlanSet, attach, load_plan, load_plans, ops
from calibatt.runtime.adapters import adapter_for

diffusers = pytest.importorskip("diffusers")

HEADS = 2
SMALL, LARGE = TokenGrid(2, 3, 4), TokenGrid(2, 4, 4)


def make_model(layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval().requires_grad_(False)


def make_plan(model: Any, grid: TokenGrid, segments: int = 2, seed: int = 0) -> Plan:
    rng, blocks = np.random.default_rng(seed), Blocks(16, 16)
    signature = adapter_for(model).signature(model)
    edges = np.linspace(0, 1, segments + 1)
    parts = tuple(Segment(float(start), float(stop), float(stop)) for start, stop in itertools.pairwise(edges))
    schedules = tuple(
        tuple(random_schedule(rng, grid, blocks, HEADS, 0.2) for _ in range(signature.layers)) for _ in parts
    )
    return Plan(PlanFile(signature, grid, blocks, parts, StoredLayers.of(schedules)))


def run(model: Any, grid: TokenGrid, timestep: int = 900) -> torch.Tensor:
    torch.manual_seed(1)
    latents = torch.randn(1, 4, grid.frames, 2 * grid.height, 2 * grid.width)
    with torch.no_grad():
        return model(latents, torch.tensor([timestep]), torch.randn(1, 5, 16), return_dict=False)[0]


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "AUTO", ("reference",))
    torch._dynamo.reset()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Plans of two resolutions, and one of another model."""
    model = make_model()
    write_plan(tmp_path / "small.plan", make_plan(model, SMALL, 2).file)
    write_plan(tmp_path / "large.plan", make_plan(model, LARGE, 3).file)
    write_plan(tmp_path / "other.plan", make_plan(make_model(layers=3), SMALL).file)
    return tmp_path


@pytest.mark.parametrize("compiled", [False, True])
def test_every_forward_gets_the_plan_of_its_resolution(folder: Path, compiled: bool) -> None:
    model = make_model()
    cases = [(name, grid, t) for t in (999, 400, 100) for name, grid in (("small", SMALL), ("large", LARGE))]
    expected = []
    for name, grid, timestep in cases:
        with load_plan(folder / f"{name}.plan").attach(model):
            expected.append(run(model, grid, timestep))
    with load_plans(folder).attach(model) as attachment:
        call = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
        for (_, grid, timestep), wanted in zip(cases, expected, strict=True):
            torch.testing.assert_close(run(call, grid, timestep), wanted, rtol=0, atol=5e-6)
        told = attachment.explain()
    assert str(SMALL) in told
    assert str(LARGE) in told
    assert "reference (4 schedules)" in told
    assert "reference (6 schedules)" in told


def test_a_resolution_without_a_plan_is_an_error_or_dense_and_told_once(folder: Path) -> None:
    model, plans, other = make_model(), load_plans(folder), dataclasses.replace(SMALL, width=5)
    stock = run(model, other)
    with plans.attach(model), pytest.raises(PlanMismatchError, match=r"height=4.* or .*height=3.*, got .*width=5"):
        run(model, other)
    with plans.attach(model, on_mismatch="dense"):
        with pytest.warns(UserWarning, match=r"got .*width=5.* own attention"):
            assert torch.equal(run(model, other), stock)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(run(model, other), stock)
            run(model, SMALL)


def test_what_a_set_refuses(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanMismatchError, match=r"got none: large\.plan: .*layers must be 2, got 4.* \| other\.plan: "):
        load_plans(folder).attach(make_model(layers=4))
    twice = PlanSet({"a": make_plan(make_model(), SMALL), "b": make_plan(make_model(), SMALL)})
    with pytest.raises(PlanMismatchError, match=r"one plan at most .*height=3.*, got a and b; load the one"):
        twice.attach(make_model())
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none must be a folder with \.plan files, got none"):
        load_plans(tmp_path / "none")


def test_the_two_experts_of_a_pipeline() -> None:
    """As in Wan 2.2 A14B: transformers of one signature, each with plans of its own."""
    models = {"transformer": make_model(seed=1), "transformer_2": make_model(seed=2)}
    pipeline = types.SimpleNamespace(components={**models, "vae": torch.nn.Linear(1, 1), "scheduler": None})
    plans = {name: make_plan(model, SMALL, seed=seed) for seed, (name, model) in enumerate(models.items())}
    stock = {name: run(model, SMALL) for name, model in models.items()}
    expected = {}
    for name, model in models.items():
        with plans[name].attach(model):
            expected[name] = run(model, SMALL)
    with attach(pipeline, plans) as attachment:
        for name, model in models.items():
            torch.testing.assert_close(run(model, SMALL), expected[name], rtol=0, atol=5e-6)
        assert "transformer_2: WanTransformer3DModel" in attachment.explain()
    assert all(torch.equal(run(model, SMALL), stock[name]) for name, model in models.items())

    with pytest.raises(PlanMismatchError, match=r"\['transformer', 'transformer_2'\], got .*\['transformer'\]"):
        attach(pipeline, {"transformer": plans["transformer"]})
    with pytest.raises(PlanMismatchError, match=r"got them for \['transformer', 'transformer_2', 'unet'\]"):
        attach(pipeline, {**plans, "unet": plans["transformer"]})
    with pytest.raises(PlanMismatchError, match="layers must be 3, got 2"):
        attach(pipeline, {**plans, "transformer_2": make_plan(make_model(layers=3), SMALL)})
    assert torch.equal(run(models["transformer"], SMALL), stock["transformer"]), "all or nothing"


def test_one_verb_attaches_to_a_model_and_to_a_pipeline() -> None:
    model = make_model()
    plan, pipeline = make_plan(model, SMALL), types.SimpleNamespace(components={"transformer": model, "vae": None})
    stock = run(model, SMALL)
    with plan.attach(model):
        expected = run(model, SMALL)
    assert not torch.equal(stock, expected)
    for target in (model, pipeline):
        for plans in (plan, PlanSet({"small": plan})):
            with attach(target, plans, backend="reference"):
                assert torch.equal(run(model, SMALL), expected)
            assert torch.equal(run(model, SMALL), stock)

    pipeline.components["transformer_2"] = make_model(seed=2)
    with pytest.raises(PlanMismatchError, match=r"each of the transformers \['transformer', 'transformer_2'\], by the"):
        attach(pipeline, plan)
    with pytest.raises(TypeError, match="attached to a model or a pipeline, got str"):
        attach("Wan", plan)
    with pytest.raises(TypeError, match="a pipeline, whose transformers the plans name, got WanTransformer3DModel"):
        attach(model, {"transformer": plan})
