"""What the rows of the adapter table read from a forward's arguments, beyond the usual call of each family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.masked import masked
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import Plan, PlanMismatchError
from calibatt.runtime.adapters import ADAPTERS, NOT_DENSE, Adapter, UnknownModelError, adapter_for

diffusers = pytest.importorskip("diffusers")
GRID = TokenGrid(frames=3, height=4, width=6)


def row(architecture: str) -> Adapter:
    return next(each for each in ADAPTERS if each.architecture == architecture)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_text_is_counted_exactly_in_every_type(dtype: torch.dtype) -> None:
    """A sum in bfloat16 is off from 257 on."""
    valid = torch.tensor([0, 200, 257, 301, 333, 400])
    arguments = {
        "hidden_states": torch.zeros(len(valid), 4, 3, 8, 12),
        "encoder_hidden_states": torch.zeros(len(valid), 400, 16),
        "encoder_attention_mask": (torch.arange(400) < valid[:, None]).to(dtype),
    }
    config = SimpleNamespace(patch_size=2, patch_size_t=1)
    assert row("HunyuanVideoTransformer3DModel").lengths(config, arguments).tolist() == (valid + GRID.tokens).tolist()


def ltx() -> Any:
    torch.manual_seed(0)
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=16,
    ).eval()  # fmt: skip


def coordinates(*starts: int) -> torch.Tensor:
    """Of two samples, whole frames that start there, as LTXConditionPipeline makes them."""
    one = torch.cartesian_prod(torch.tensor(starts) / 25, torch.arange(4.0) * 32, torch.arange(6.0) * 32).T
    return one[None].repeat(2, 1, 1)


def arguments(coords: torch.Tensor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, coords.shape[2], 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 7, 16, generator=generator),
        "timestep": torch.full((2, 1), 700.0),
        "encoder_attention_mask": torch.ones(2, 7),
        "video_coords": coords,
    }


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ((0, 1, 9), (3, 0)),
        ((0,), (1, 0)),
        ((16, 0, 1, 9), (3, 24)),
        ((8, 16, 0, 1, 9, 17), (4, 48)),
        ((0, 1, 9, 17, 25, 0, 1), (5, 0)),
        ((16, 0, 1, 9, -1), (3, 24)),
    ],
)
def test_the_grid_of_ltx_from_coordinates(starts: tuple[int, ...], expected: tuple[int, int]) -> None:
    """Given images stand before the video and are no part of its grid."""
    model, coords = ltx(), coordinates(*starts)
    frames, start = expected
    assert adapter_for(model).token_grid(model, arguments(coords)) == TokenGrid(frames, 4, 6)
    assert adapter_for(model).video_start(model, arguments(coords)) == start
    coords[0] = coords[0].flip(1)
    with pytest.raises(PlanMismatchError, match=f"must end with a whole frame, row by row, got {coords.shape[2]} "):
        adapter_for(model).token_grid(model, arguments(coords))


def test_coordinates_are_read_from_their_device_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, coords, reads = ltx(), coordinates(0, 1, 9), []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(1) or cpu(self))
    for _ in range(3):
        assert adapter_for(model).token_grid(model, arguments(coords)) == GRID
    assert len(reads) == 1


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_plan_runs_with_coordinates(compiled: bool) -> None:
    model = ltx()
    rng, segment = np.random.default_rng(0), Segment(0.0, 1.0, 0.5)
    schedule = random_schedule(rng, GRID, Blocks(16, 16), 2, anchored_heads=[1])
    signature = adapter_for(model).signature(model)
    plan = Plan(PlanFile(signature, GRID, Blocks(16, 16), (segment,), StoredLayers.of([[schedule]])))
    frames = (0, 1, 9), (16, 0, 1, 9), (17, 16, 0, 1, 9)  # none, one and two given images
    with masked(model, plan):
        expected = [model(**arguments(coordinates(*starts))).sample for starts in frames]
    called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with plan.attach(model):
        for starts, wanted in zip(frames, expected, strict=True):
            found = called(**arguments(coordinates(*starts))).sample
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        with pytest.raises(PlanMismatchError, match="frames=2"):
            called(**arguments(coordinates(0, 1)))
        for lacking, message in (("video_coords", r"'num_frames'.*timestep"), ("timestep", "'timestep'.*video_coords")):
            del (given := arguments(coordinates(0, 1, 9)))[lacking]
            message = f"row of LTXVideoTransformer3DModel needs the argument {message}"
            with pytest.raises(PlanMismatchError, match=message):
                model(**given)


def test_attention_that_is_not_dense_is_refused_with_its_kind() -> None:
    model = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=4, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1
    )
    assert adapter_for(model).architecture == "SkyReelsV2Transformer3DModel"
    model._set_ar_attention(2)
    with pytest.raises(UnknownModelError, match=r"dense.*, that of SkyReelsV2Transformer3DModel is causal"):
        adapter_for(model)
    for name, kind in NOT_DENSE.items():
        assert hasattr(diffusers, name)
        with pytest.raises(UnknownModelError, match=f"that of {name} is {kind}"):
            adapter_for(type(name, (torch.nn.Module,), {})())
