"""A model with a plan on a GPU: compiled with CUDA graphs, large and small plans, no waiting for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, TokenGrid
from calibatt.runtime import Plan, resident
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.bench.trace import traced

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.gpu

GRID = TokenGrid(frames=5, height=16, width=26)
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 0.8, 0.7), Segment(0.8, 1.0, 0.9))
LAYERS, HEADS, HEAD_DIM = 3, 2, 128
TIMESTEPS = (950, 900, 700, 600, 300, 100)


def make_model() -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=64, num_layers=LAYERS, rope_max_seq_len=64,
    )  # fmt: skip
    return model.eval().requires_grad_(False).to("cuda", torch.bfloat16)


def make_plan(model: Any) -> Plan:
    rng = np.random.default_rng(0)
    layers = [
        tuple(random_schedule(rng, GRID, Blocks(128, 128), HEADS, 0.3, anchored_heads=[1]) for _ in range(LAYERS))
        for _ in SEGMENTS
    ]
    return Plan(PlanFile(adapter_for(model).signature(model), GRID, Blocks(128, 128), SEGMENTS, tuple(layers)))


def run(model: Any, timestep: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 4, GRID.frames, 2 * GRID.height, 2 * GRID.width, generator=generator)
    text = torch.randn(1, 7, 16, generator=generator)
    values = [x.to("cuda", torch.bfloat16) for x in (hidden, text)]
    with torch.no_grad():
        return model(values[0], torch.tensor([timestep], device="cuda"), values[1], return_dict=False)[0].clone()


@pytest.mark.parametrize("large", [False, True], ids=["lists", "bits"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models_follow_the_time(mode: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where CUDA graphs replay: every segment, out of order, and after the plan was changed and taken away."""
    torch._dynamo.reset()
    if large:
        monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)
    model = make_model()
    plan, dense = make_plan(model), [run(model, at) for at in TIMESTEPS]
    with plan.attach(model):
        expected = [run(model, at) for at in TIMESTEPS]
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):  # graphs are warmed up, captured, replayed
            found = [run(compiled, at) for at in TIMESTEPS]
        skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert skipped == 0
    scale = dense[0].float().norm()
    for mine, wanted, plain in zip(found, expected, dense, strict=True):
        assert (mine - wanted).float().norm() < 0.02 * scale
        assert (mine - plain).float().norm() > 3 * (mine - wanted).float().norm(), "the plan matters"
    for at, plain in zip(TIMESTEPS, dense, strict=True):
        assert (run(compiled, at) - plain).float().norm() < 0.02 * scale


def test_a_large_plan_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the one value that says the time."""
    monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)
    model = make_model()
    with make_plan(model).attach(model):
        for at in TIMESTEPS:
            run(model, at)
        hidden = torch.randn(1, 4, GRID.frames, 2 * GRID.height, 2 * GRID.width, device="cuda", dtype=torch.bfloat16)
        text = torch.randn(1, 7, 16, device="cuda", dtype=torch.bfloat16)
        when = torch.tensor([950])

        def forward() -> None:
            with torch.no_grad():
                model(hidden, when.to("cuda", non_blocking=True), text)

        forward()
        found = traced(forward, torch.device("cuda"))
    assert found["planned_calls"] == LAYERS
    assert all(count == 1 for count in found["waits"].values()), found["waits"]
