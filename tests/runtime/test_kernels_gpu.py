"""The triton backend on a GPU: real sizes and dtypes, addresses beyond 2^31, no waiting for the device.

The rest of the triton tests (test_backends.py) run on the GPU as well where there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.budget import check_against_oracle
from support.schedules import random_schedule

from calibatt.plans import Blocks, TokenGrid
from calibatt.runtime.ops import attend, choose_backend, planned_attention
from calibatt.runtime.schedule import LayerSchedule

pytestmark = pytest.mark.gpu

WAN_480P = TokenGrid(frames=21, height=30, width=52)
WAN_720P = TokenGrid(frames=21, height=45, width=80)
SAMPLED_QUERIES = 300


def made(grid: TokenGrid, blocks: Blocks, density: float = 0.2) -> LayerSchedule:
    """Four heads: listed, anchored, dense, anchored and dense."""
    rng = np.random.default_rng(0)
    core = random_schedule(rng, grid, blocks, 4, density, dense_heads=[2, 3], anchored_heads=[1, 3])
    core.check()
    return LayerSchedule(core)


def inputs(schedule: LayerSchedule, dtype: torch.dtype, head_dim: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    """q, k and v, ``(batch, H, N, head_dim)`` as a model makes them: channels of all heads of a token side by side."""
    torch.manual_seed(0)
    shape = (batch, schedule.grid.tokens, schedule.heads, head_dim)
    return tuple(torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))


def check(schedule: LayerSchedule, dtype: torch.dtype, head_dim: int, batch: int = 1, backend: str = "triton") -> None:
    """A sample of queries against the oracle; copies of anchor rows bit by bit."""
    q, k, v = inputs(schedule, dtype, head_dim, batch)
    out, lse = planned_attention(q, k, v, schedule, backend=backend, return_lse=True)
    tokens = schedule.grid.tokens
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:SAMPLED_QUERIES]
    queries = torch.cat([drawn, torch.tensor([0, tokens - 1])])
    at = queries.cuda()
    check_against_oracle(out[:, :, at], q, k, v, schedule, lse=lse[:, :, at], queries=queries)
    for head in range(schedule.heads):
        source = torch.from_numpy(schedule.core.token_source(head)).cuda()
        assert torch.equal(out[:, head], out[:, head, source])
        assert torch.equal(lse[:, head], lse[:, head, source])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [WAN_480P, WAN_720P], ids=["480p", "720p"])
def test_wan(grid: TokenGrid, dtype: torch.dtype) -> None:
    check(made(grid, Blocks(128, 128)), dtype, head_dim=128)


@pytest.mark.parametrize("blocks", [Blocks(64, 64), Blocks(128, 64), Blocks(256, 256), Blocks(16, 32)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_and_head_sizes_with_text(blocks: Blocks, head_dim: int) -> None:
    grid = TokenGrid(frames=5, height=12, width=26, text_before=77, text_after=130)
    check(made(grid, blocks), torch.bfloat16, head_dim, batch=2)


@pytest.mark.parametrize("head_dim", [16, 32, 256])
def test_other_head_sizes(head_dim: int) -> None:
    check(made(TokenGrid(frames=3, height=7, width=26), Blocks(128, 128)), torch.float16, head_dim)


def test_torch_backend() -> None:
    check(made(WAN_480P, Blocks(128, 128)), torch.bfloat16, head_dim=128, backend="torch")


def test_auto_is_triton() -> None:
    assert choose_backend(made(WAN_480P, Blocks(128, 128)), "cuda", torch.bfloat16, 128) == "triton"


def test_tensors_beyond_two_to_the_31_elements() -> None:
    """The last of six batches, in which element 2^31 lies, is what the same batch is alone."""
    core = random_schedule(np.random.default_rng(0), WAN_720P, Blocks(128, 128), 40, 0.01, anchored_heads=[39])
    schedule = LayerSchedule(core)
    x = inputs(schedule, torch.bfloat16, 128, batch=6)[0]
    assert x.numel() > 2**31
    out = planned_attention(x, x, x, schedule, backend="triton")[5:]
    alone = x[5:].clone()
    assert torch.equal(out, planned_attention(alone, alone, alone, schedule, backend="triton"))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_bound_schedule_runs_without_waiting_and_in_a_graph() -> None:
    schedule = made(WAN_480P, Blocks(128, 128))
    q, k, v = inputs(schedule, torch.bfloat16, 128)
    expected = attend(q, k, v, schedule, "triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, schedule, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, schedule, "triton")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
