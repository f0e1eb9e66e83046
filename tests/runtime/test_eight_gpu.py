"""Heads of 8 bits on an sm90: the hopper backend against the oracle."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from support import adverse
from support.budget import check_against_oracle
from support.schedules import random_schedule

from calibatt.plans import BF16, INT8, INT8_FP8, Blocks, TokenGrid
from calibatt.runtime.backends import hopper
from calibatt.runtime.ops import attend, planned_attention
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule

pytestmark = pytest.mark.gpu

SMALL = TokenGrid(frames=5, height=12, width=26)
WAN_480P = TokenGrid(frames=21, height=30, width=52)
EIGHT = pytest.mark.parametrize("precision", [INT8, INT8_FP8], ids=["int8", "int8_fp8"])
MIXED = (INT8_FP8, BF16, INT8, INT8_FP8)
KINDS = adverse.KINDS[:-1]
inputs = partial(adverse.inputs, rising=(1.0, 0.02))
"""The kernel takes lists from their end."""


def made(
    precisions: tuple[int, ...], grid: TokenGrid = SMALL, block_k: int = 128, density: float = 0.4, **options: object
) -> AttentionSchedule:
    """Listed heads, the third one dense; with anchors the first and the last but one."""
    core = random_schedule(
        np.random.default_rng(0), grid, Blocks(128, block_k), len(precisions), density, dense_heads=[2],
        precisions=precisions, **options,
    )  # fmt: skip
    core.check()
    return ListedSchedule(core)


def check(
    schedule: AttentionSchedule,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    batch: int = 1,
    around: tuple[int, int] = (0, 0),
    padded: bool = False,
    kind: str = "normal",
    samples: int = 300,
) -> None:
    """A sample of queries, and all around the ends of the parts, against the oracle; equal bits every time."""
    q, k, v = inputs(schedule, dtype, head_dim, batch, sum(around), kind)
    tokens, (start, after), lengths = q.shape[2], around, None
    if padded:
        lengths = tokens - (torch.arange(batch, dtype=torch.int32, device="cuda") * 37 + 5) % (after + 1)
    more = {"video_start": start, "lengths": lengths}
    out, lse = planned_attention(q, k, v, schedule, backend="hopper", return_lse=True, **more)
    for _ in range(3):
        assert torch.equal(planned_attention(q, k, v, schedule, backend="hopper", **more), out)
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:samples]
    ends = torch.tensor([end + at for end in (0, start, tokens - after, tokens) for at in range(-70, 70)])
    queries = torch.cat([drawn, ends[(ends >= 0) & (ends < tokens)]]).unique()
    at = queries.cuda()
    check_against_oracle(out[:, :, at], q, k, v, schedule, lse=lse[:, :, at], queries=queries, **more)
    for head in range(schedule.heads):
        source = start + torch.from_numpy(schedule.core.token_source(head)).cuda()
        assert torch.equal(out[:, head, start : tokens - after], out[:, head, source])
        assert torch.equal(lse[:, head, start : tokens - after], lse[:, head, source])


@EIGHT
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_kind(kind: str, precision: int) -> None:
    check(made((precision,) * 3, TokenGrid(9, 15, 31)), kind=kind)


@EIGHT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_variants_with_anchors_and_text(head_dim: int, block_k: int, dtype: torch.dtype, precision: int) -> None:
    options = {"anchored_heads": [0, 2], "anchors": ("random", "frames")}
    check(made((precision,) * 4, block_k=block_k, **options), dtype, head_dim, 2, (77, 130), True)
    check(made((precision,) * 4, block_k=block_k, **options), dtype, head_dim)


@pytest.mark.parametrize("around", [(0, 0), (0, 1), (1, 0), (64, 64), (127, 129), (128, 128), (257, 300)], ids=str)
def test_mixed_heads_among_others(around: tuple[int, int]) -> None:
    schedule = made(MIXED, TokenGrid(3, 7, 26), anchored_heads=[1, 3])
    check(schedule, batch=3, around=around)
    check(schedule, batch=3, around=around, padded=True, kind="means")


@EIGHT
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 257])
def test_tails(tokens: int, precision: int) -> None:
    check(made((precision,) * 3, TokenGrid(1, 1, tokens), density=0.5))


@EIGHT
def test_wan_480p(precision: int) -> None:
    check(made((precision,) * 4, WAN_480P, density=0.2, anchored_heads=[1]), kind="means")


@EIGHT
def test_many_products_with_values_far_from_their_mean(precision: int) -> None:
    """Rows that keep one half of the keys, whose values lie to one side: an accumulator of 13 bits would drift."""
    schedule = made((precision,) * 3, WAN_480P, density=0.5)
    q, k, v = inputs(schedule)
    block = torch.arange(WAN_480P.tokens, device="cuda") // 128 % 2
    v += (2 - 4 * block)[:, None].to(v.dtype)
    out = planned_attention(q, k, v, schedule, backend="hopper")
    queries = torch.arange(0, WAN_480P.tokens, 331)
    check_against_oracle(out[:, :, queries.cuda()], q, k, v, schedule, queries=queries)


@EIGHT
def test_empty_lists_are_zeros(precision: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan has any; kernels must not hang or invent."""
    schedule = made((precision,) * 3)
    bound = schedule.bind("cuda")
    tiles = bound.derived(hopper.prepare).tiles
    tiles[::3, 2] = tiles[::3, 1]
    emptied = tiles[::3, 0]
    q, k, v = inputs(schedule)
    out, lse = attend(q, k, v, schedule, "hopper", return_lse=True)
    assert out.isfinite().all()
    for place in emptied.tolist():
        head, rows = place >> 16, slice((place & 0xFFFF) * 128, (place & 0xFFFF) * 128 + 128)
        assert not out[0, head, rows].any()
        assert (lse[0, head, rows] == -torch.inf).all()


def test_equal_bits_every_time_whatever_else_runs() -> None:
    schedule = made((INT8_FP8, INT8, INT8_FP8, BF16), TokenGrid(9, 30, 52), anchored_heads=[3])
    q, k, v = inputs(schedule)
    expected = planned_attention(q, k, v, schedule, backend="hopper")
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(300):
        differ |= (attend(q, k, v, schedule, "hopper") != expected).any()
    assert not differ


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_without_waiting_and_in_a_graph() -> None:
    schedule = made(MIXED, anchored_heads=[3])
    q, k, v = inputs(schedule, others=107)
    lengths = torch.tensor([q.shape[2] - 50], dtype=torch.int32, device="cuda")
    more = {"video_start": 7, "lengths": lengths}
    expected = attend(q, k, v, schedule, "hopper", **more)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, schedule, "hopper", **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [attend(q, k, v, schedule, "hopper", **more) for _ in range(2)]
    for _ in range(3):
        for out in outs:
            out.zero_()
        graph.replay()
        assert all(torch.equal(out, expected) for out in outs)


@EIGHT
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_not_finite_is_never_rounded_away(which: str, precision: int) -> None:
    schedule = made((precision,) * 3)
    q, k, v = inputs(schedule)
    broken = {"q": q, "k": k, "v": v}
    broken[which][0, 0, 300, 3] = torch.nan
    out = planned_attention(q, k, v, schedule, backend="hopper")
    kept = schedule.dense(0)[1][:, 300 // 128].cuda()
    wrong = {"q": torch.arange(len(kept), device="cuda") == 300, "k": torch.ones_like(kept), "v": kept}[which]
    assert not out[0, 0, wrong].isfinite().all(-1).any()
    assert out[0, 1:].isfinite().all()
