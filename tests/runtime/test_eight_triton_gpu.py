"""Heads of 8 bits by the triton backend on a GPU, at real sizes; `test_eight_triton` runs there, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.adverse import KINDS, inputs
from support.budget import check_against_oracle
from support.schedules import random_schedule

from calibatt.plans import BF16, INT8, INT8_FP8, Blocks, TokenGrid
from calibatt.runtime import eight_bits
from calibatt.runtime.backends.triton import E4M3_SINCE, device_sm
from calibatt.runtime.ops import attend, planned_attention
from calibatt.runtime.schedule import ListedSchedule

pytestmark = pytest.mark.gpu

SMALL = TokenGrid(frames=9, height=15, width=31)
WAN_480P = TokenGrid(frames=21, height=30, width=52)


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "verdict", lambda *_: (True, ""))


def precisions() -> tuple[int, ...]:
    """What this device multiplies in, in a plan's most adverse order."""
    return (INT8_FP8, INT8, BF16, INT8_FP8) if device_sm(torch.device("cuda")) >= E4M3_SINCE else (INT8, BF16, INT8)


def made(grid: TokenGrid = SMALL, block_k: int = 128, density: float = 0.4, **options: object) -> ListedSchedule:
    """Listed heads, the first one dense."""
    heads = precisions()
    core = random_schedule(
        np.random.default_rng(0), grid, Blocks(128, block_k), len(heads), density, dense_heads=[0], precisions=heads,
        **options,
    )  # fmt: skip
    core.check()
    return ListedSchedule(core)


def check(
    schedule: ListedSchedule,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    batch: int = 1,
    around: tuple[int, int] = (0, 0),
    kind: str = "normal",
) -> None:
    """A sample of queries, and all around the ends of the parts, against the oracle; equal bits every time."""
    q, k, v = inputs(schedule, dtype, head_dim, batch, sum(around), kind)
    tokens, (start, after), lengths = q.shape[2], around, None
    if after:
        lengths = tokens - (torch.arange(batch, dtype=torch.int32, device="cuda") * 37 + 5) % (after + 1)
    more = {"video_start": start, "lengths": lengths}
    out, lse = planned_attention(q, k, v, schedule, backend="triton", return_lse=True, **more)
    for _ in range(3):
        assert torch.equal(planned_attention(q, k, v, schedule, backend="triton", **more), out)
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:200]
    ends = torch.tensor([end + at for end in (0, start, tokens - after, tokens) for at in range(-40, 40)])
    queries = torch.cat([drawn, ends[(ends >= 0) & (ends < tokens)]]).unique()
    at = queries.cuda()
    check_against_oracle(out[:, :, at], q, k, v, schedule, lse=lse[:, :, at], queries=queries, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind(kind: str) -> None:
    check(made(), kind=kind)


@pytest.mark.parametrize(
    ("head_dim", "block_k", "dtype"),
    [(64, 64, torch.float16), (64, 128, torch.bfloat16), (128, 64, torch.bfloat16), (128, 256, torch.float16)],
)
def test_anchors_and_text(head_dim: int, block_k: int, dtype: torch.dtype) -> None:
    check(made(block_k=block_k, anchored_heads=[0, 1, 2], anchors=("random", "frames")), dtype, head_dim, 2, (77, 130))


def test_wan_480p() -> None:
    check(made(WAN_480P, density=0.2, anchored_heads=[1]), kind="means")
    check(made(WAN_480P, density=0.5), kind="drifting")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_without_waiting_and_in_a_graph() -> None:
    schedule = made(anchored_heads=[1])
    q, k, v = inputs(schedule, others=107)
    more = {"video_start": 7, "lengths": torch.tensor([q.shape[2] - 50], dtype=torch.int32, device="cuda")}
    expected = attend(q, k, v, schedule, "triton", **more)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, schedule, "triton", **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [attend(q, k, v, schedule, "triton", **more) for _ in range(2)]
    for _ in range(3):
        for out in outs:
            out.zero_()
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)
