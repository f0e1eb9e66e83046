"""A model with a plan on a GPU: compiled with CUDA graphs, offloaded, large and small plans, no waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.schedules import random_schedule
from torch.profiler import ProfilerActivity, profile

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import Plan, resident
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.bench.trace import traced

pytestmark = pytest.mark.gpu

GRID = TokenGrid(frames=5, height=16, width=26)
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 0.8, 0.7), Segment(0.8, 1.0, 0.9))
LAYERS, HEADS, HEAD_DIM = 3, 2, 128
TIMESTEPS = (950, 900, 700, 600, 300, 100)


def make_model() -> Any:
    """On the CPU, in bfloat16; attention matters."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=64, num_layers=LAYERS, rope_max_seq_len=64,
    )  # fmt: skip
    for block in model.blocks:
        block.scale_shift_table.data.normal_(std=0.5)
    return model.eval().requires_grad_(False).to(torch.bfloat16)


def make_plan(model: Any) -> Plan:
    rng = np.random.default_rng(0)
    layers = [
        tuple(random_schedule(rng, GRID, Blocks(128, 128), HEADS, 0.3, anchored_heads=[1]) for _ in range(LAYERS))
        for _ in SEGMENTS
    ]
    return Plan(
        PlanFile(adapter_for(model).signature(model), GRID, Blocks(128, 128), SEGMENTS, StoredLayers.of(layers))
    )


def run(model: Any, timestep: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 4, GRID.frames, 2 * GRID.height, 2 * GRID.width, generator=generator)
    text = torch.randn(1, 7, 16, generator=generator)
    values = [x.to("cuda", torch.bfloat16) for x in (hidden, text)]
    with torch.no_grad():
        return model(values[0], torch.tensor([timestep], device="cuda"), values[1], return_dict=False)[0].clone()


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm())


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("large", [False, True], ids=["lists", "bits"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models_follow_the_time(mode: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where CUDA graphs replay: in every segment, and when the plan was taken away."""
    torch._dynamo.reset()
    if large:
        monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)
    model = make_model().to("cuda")
    plan, dense = make_plan(model), [run(model, at) for at in TIMESTEPS]
    with plan.attach(model):
        expected = [run(model, at) for at in TIMESTEPS]
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):  # graphs are warmed up, captured, replayed
            found = [run(compiled, at) for at in TIMESTEPS]
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            run(compiled, TIMESTEPS[0])
    replayed = sum("GraphLaunch" in event.name for event in profiler.events())
    assert (replayed > 0) == (mode == "reduce-overhead"), f"{replayed} CUDA graphs were launched"
    for mine, wanted, plain in zip(found, expected, dense, strict=True):
        assert far(mine, wanted) < 0.02
        assert far(wanted, plain) > 0.05, "the plan matters"
    for at, plain in zip(TIMESTEPS, dense, strict=True):
        assert far(run(compiled, at), plain) < 0.02


def by_group(model: Any) -> None:
    model.enable_group_offload(torch.device("cuda"), torch.device("cpu"), offload_type="leaf_level", use_stream=True)


def by_block(model: Any) -> None:
    model.enable_group_offload(
        torch.device("cuda"), torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )


def sequentially(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload(model, execution_device=torch.device("cuda", 0))


def whole(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(model, torch.device("cuda", 0))


def casting(model: Any) -> None:
    model.to("cuda").enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("change", [by_group, by_block, sequentially, whole, casting])
def test_offloading(change: Callable[[Any], None], attach_first: bool) -> None:
    """Weights wait on the CPU, or in eight bits; the plan runs where attention does."""
    model, stock = make_model(), make_model()
    plan = make_plan(model)
    change(stock)
    with plan.attach(stock):
        expected = [run(stock, at) for at in TIMESTEPS]
    dense = run(stock, TIMESTEPS[0])
    if not attach_first:
        change(model)
    with plan.attach(model) as attachment:
        if attach_first:
            change(model)
        found = [run(model, at) for at in TIMESTEPS]
        assert "backend on cuda:0, bfloat16" in attachment.explain()
    for mine, wanted in zip(found, expected, strict=True):
        assert far(mine, wanted) < 0.01
    assert far(expected[0], dense) > 0.05
    assert far(run(model, TIMESTEPS[0]), dense) < 0.01


def test_a_large_plan_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the one value that says the time."""
    monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)
    model = make_model().to("cuda")
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


def test_times_of_a_scheduler_are_read_once_a_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are parts of one tensor on the device, which the first forward reads; the others wait for nothing."""
    monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)
    model = make_model().to("cuda")
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    hidden = torch.randn(1, 4, GRID.frames, 2 * GRID.height, 2 * GRID.width, device="cuda", dtype=torch.bfloat16)
    text = torch.randn(1, 7, 16, device="cuda", dtype=torch.bfloat16)

    def forward(now: torch.Tensor) -> None:
        with torch.no_grad():
            model(hidden, now.expand(1), text)

    with make_plan(model).attach(model):
        for steps in (5, 8):
            scheduler.set_timesteps(steps, device="cuda")
            first, *others = scheduler.timesteps
            forward(first)
            found = [traced(partial(forward, now), torch.device("cuda")) for now in others]
            assert [each["planned_calls"] for each in found] == [LAYERS] * (steps - 1)
            assert [each["waits"] for each in found] == [{}] * (steps - 1)
