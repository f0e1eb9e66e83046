"""The kernels on a GPU: real sizes and dtypes, addresses beyond 2^31, no waiting for the device.

The hopper tests need an sm90. The rest of the triton tests (test_backends.py) run on the GPU too where there is one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.budget import check_against_oracle
from support.schedules import random_schedule

from calibatt.plans import Blocks, TokenGrid
from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.kernels.hopper import hopper_forward
from calibatt.runtime.ops import attend, choose_backend, planned_attention
from calibatt.runtime.resident import ResidentSchedules
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule
from calibatt.runtime.workspace import PackedLists, Room, unpack_by_torch

pytestmark = pytest.mark.gpu

WAN_480P = TokenGrid(frames=21, height=30, width=52)
WAN_720P = TokenGrid(frames=21, height=45, width=80)
SAMPLED_QUERIES = 300
KERNELS = ["triton", "hopper"]
KINDS = ("random", "frames")
"""Of anchors: rows, then frames."""


def made(grid: TokenGrid, blocks: Blocks, density: float = 0.2) -> AttentionSchedule:
    """Four heads: listed, anchored by rows, dense, anchored by frames and dense."""
    rng = np.random.default_rng(0)
    core = random_schedule(rng, grid, blocks, 4, density, dense_heads=[2, 3], anchored_heads=[1, 3], anchors=KINDS)
    core.check()
    return ListedSchedule(core)


def inputs(
    schedule: AttentionSchedule, dtype: torch.dtype, head_dim: int, batch: int = 1, others: int = 0
) -> tuple[torch.Tensor, ...]:
    """q, k and v, ``(batch, H, N, head_dim)`` as a model makes them: channels of all heads of a token side by side."""
    torch.manual_seed(0)
    shape = (batch, schedule.grid.tokens + others, schedule.heads, head_dim)
    return tuple(torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))


def check(
    schedule: AttentionSchedule,
    dtype: torch.dtype,
    head_dim: int,
    batch: int = 1,
    backend: str = "triton",
    around: tuple[int, int] = (0, 0),
    padded: bool = False,
) -> None:
    """A sample of queries, and all around the ends of the parts, against the oracle; copies of anchors bit by bit.

    Args:
        around: Tokens before the video, and after it.
        padded: Some of those after it are padding, in every sample so many others.
    """
    q, k, v = inputs(schedule, dtype, head_dim, batch, sum(around))
    tokens, (start, after) = q.shape[2], around
    stop, lengths = tokens - after, None
    if padded:
        lengths = tokens - (torch.arange(batch, dtype=torch.int32, device="cuda") * 37 + 5) % (after + 1)
    more = {"video_start": start, "lengths": lengths}
    out, lse = planned_attention(q, k, v, schedule, backend=backend, return_lse=True, **more)
    assert torch.equal(planned_attention(q, k, v, schedule, backend=backend, **more), out)
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[:SAMPLED_QUERIES]
    ends = torch.tensor([end + at for end in (0, start, stop, tokens) for at in range(-130, 130)])
    queries = torch.cat([drawn, ends[(ends >= 0) & (ends < tokens)]]).unique()
    at = queries.cuda()
    check_against_oracle(out[:, :, at], q, k, v, schedule, lse=lse[:, :, at], queries=queries, **more)
    for head in range(schedule.heads):
        source = start + torch.from_numpy(schedule.core.token_source(head)).cuda()
        assert torch.equal(out[:, head, start:stop], out[:, head, source])
        assert torch.equal(lse[:, head, start:stop], lse[:, head, source])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [WAN_480P, WAN_720P], ids=["480p", "720p"])
def test_wan(grid: TokenGrid, dtype: torch.dtype, backend: str) -> None:
    check(made(grid, Blocks(128, 128)), dtype, head_dim=128, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_variants_with_text(head_dim: int, block_k: int, dtype: torch.dtype) -> None:
    grid = TokenGrid(frames=5, height=12, width=26)
    check(made(grid, Blocks(128, block_k)), dtype, head_dim, batch=2, backend="hopper", around=(77, 130), padded=True)


AROUND = [
    (0, 1),
    (1, 0),
    (1, 1),
    (63, 65),
    (64, 64),
    (127, 129),
    (128, 128),
    (129, 127),
    (0, 300),
    (257, 0),
    (512, 1001),
]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("around", AROUND, ids=str)
def test_prefix_and_suffix_of_any_length(around: tuple[int, int], padded: bool, backend: str) -> None:
    """Ends in the midst of blocks, before and after a video that ends in the midst of one, or does not."""
    for grid in (TokenGrid(frames=3, height=7, width=26), TokenGrid(frames=2, height=4, width=32)):
        check(made(grid, Blocks(128, 128)), torch.bfloat16, 128, 3, backend, around, padded)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("around", [(1, 1), (70, 0), (0, 200)], ids=str)
def test_hopper_short_videos_among_others(around: tuple[int, int], tokens: int) -> None:
    core = random_schedule(np.random.default_rng(tokens), TokenGrid(1, 1, tokens), Blocks(128, 64), 3, 0.5)
    check(ListedSchedule(core), torch.bfloat16, 128, 2, "hopper", around, padded=True)


@pytest.mark.parametrize("size", [6, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hopper_scores_that_overshoot_the_maximum_of_the_text(size: int, dtype: torch.dtype) -> None:
    """The first blocks are partial ones of text, whose keys are small here."""
    schedule = made(TokenGrid(frames=3, height=7, width=26), Blocks(128, 128), density=0.5)
    q, k, v = inputs(schedule, dtype, 128, others=150)
    q = q * size
    k[:, :, :70] *= 0.01
    k[:, :, -80:] *= 0.02
    more = {"video_start": 70}
    out, lse = planned_attention(q, k, v, schedule, backend="hopper", return_lse=True, **more)
    check_against_oracle(out, q, k, v, schedule, lse=lse, **more)


@pytest.mark.parametrize("backend", KERNELS)
def test_wan_720p_with_text_and_conditions(backend: str) -> None:
    check(made(WAN_720P, Blocks(128, 128)), torch.bfloat16, 128, backend=backend, around=(3600, 300), padded=True)


@pytest.mark.parametrize("backend", KERNELS)
def test_text_of_another_length_compiles_nothing(backend: str) -> None:
    schedule = made(TokenGrid(frames=3, height=7, width=26), Blocks(128, 128))
    kernel = hopper_forward if backend == "hopper" else block_sparse_forward
    counts = []
    for around in ((37, 1), (0, 300), (1001, 0), (16, 128)):
        check(schedule, torch.bfloat16, 128, backend=backend, around=around, padded=True)
        counts.append(sum(len(cache[0]) for cache in kernel.device_caches.values()))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("block_k", [64, 128])
def test_hopper_tails(tokens: int, block_k: int) -> None:
    core = random_schedule(np.random.default_rng(tokens), TokenGrid(1, 1, tokens), Blocks(128, block_k), 3, 0.5)
    check(ListedSchedule(core), torch.bfloat16, 128, backend="hopper")


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("layout", ["side by side", "one tensor", "one head", "not aligned"])
def test_kernels_take_any_strides(layout: str, backend: str) -> None:
    heads = 1 if layout == "one head" else 4
    grid = TokenGrid(frames=3, height=7, width=26)
    schedule = ListedSchedule(random_schedule(np.random.default_rng(0), grid, Blocks(128, 128), heads))
    torch.manual_seed(0)
    size = {"side by side": 128, "one tensor": 128, "one head": 128, "not aligned": 132}[layout]
    shape = (2, heads, grid.tokens, size) if layout == "not aligned" else (2, grid.tokens, 3, heads, size)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    if layout == "not aligned":
        q = k = v = x[..., :128]
    else:
        q, k, v = (x[:, :, part].transpose(1, 2) for part in range(3))
        if layout == "side by side":
            q, k, v = (part.contiguous() for part in (q, k, v))
    out = planned_attention(q, k, v, schedule, backend=backend)
    check_against_oracle(out, q, k, v, schedule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rising", [False, True], ids=["level", "rising"])
@pytest.mark.parametrize("size", [6, 40])
def test_hopper_scores_that_overshoot_the_first_blocks_maximum(size: int, rising: bool, dtype: torch.dtype) -> None:
    """Lists are taken from their end: keys that grow towards the first one overshoot in every block."""
    schedule = made(TokenGrid(frames=5, height=12, width=26), Blocks(128, 128), density=0.5)
    q, k, v = inputs(schedule, dtype, 128)
    q = q * size
    if rising:
        k = k * torch.linspace(1, 0.02, schedule.grid.tokens, device="cuda", dtype=dtype)[:, None]
    out, lse = planned_attention(q, k, v, schedule, backend="hopper", return_lse=True)
    check_against_oracle(out, q, k, v, schedule, lse=lse)


def test_hopper_confines_what_is_not_finite_to_its_rows() -> None:
    core = random_schedule(np.random.default_rng(0), TokenGrid(3, 12, 26), Blocks(128, 128), 3, 0.5, dense_heads=[2])
    schedule = ListedSchedule(core)
    q, k, v = inputs(schedule, torch.bfloat16, 128)
    expected = planned_attention(q, k, v, schedule, backend="hopper")
    broken = q.clone()
    rows = [(0, 0, 300), (0, 1, 301), (0, 2, 63)]
    for row, value in zip(rows, (torch.nan, torch.inf, -torch.inf), strict=True):
        broken[row] = value
    found = planned_attention(broken, k, v, schedule, backend="hopper")
    assert [tuple(row) for row in (found != expected).any(-1).nonzero().tolist()] == rows


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_what_is_not_finite_stays_with_those_who_keep_it(backend: str, which: str, value: float) -> None:
    schedule = made(TokenGrid(3, 12, 26), Blocks(128, 128), 0.4)
    q, k, v = inputs(schedule, torch.bfloat16, 128, batch=2)
    clean = planned_attention(q, k, v, schedule, backend=backend)
    kept = torch.stack([schedule.dense(head)[1] for head in range(schedule.heads)]).cuda()
    for block in range(schedule.k_blocks):
        broken = {"k": k.clone(), "v": v.clone()}
        broken[which][0, :, block * 128 + 3] = value
        found = planned_attention(q, broken["k"], broken["v"], schedule, backend=backend)
        assert torch.equal(found[1], clean[1])
        assert torch.equal(found[0][~kept[:, :, block]], clean[0][~kept[:, :, block]])
        if which == "v" or value != value:
            assert not found[0][kept[:, :, block]].isfinite().any()


@pytest.mark.parametrize("backend", ["torch", *KERNELS])
def test_an_empty_batch_is_an_empty_result(backend: str) -> None:
    schedule = made(TokenGrid(3, 12, 26), Blocks(128, 128))
    nothing = inputs(schedule, torch.bfloat16, 128, batch=0)
    assert planned_attention(*nothing, schedule, backend=backend).shape == nothing[0].shape


@pytest.mark.parametrize("anchored", [[], [1, 3]], ids=["plain", "anchored"])
def test_hopper_gives_equal_bits_every_time(anchored: list[int]) -> None:
    core = random_schedule(
        np.random.default_rng(0), TokenGrid(9, 30, 52), Blocks(128, 128), 8, 0.3, anchored_heads=anchored, anchors=KINDS
    )
    schedule = ListedSchedule(core)
    q, k, v = inputs(schedule, torch.bfloat16, 128)
    expected = planned_attention(q, k, v, schedule, backend="hopper")
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        differ |= (attend(q, k, v, schedule, "hopper") != expected).any()
    assert not differ


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_follow_tensors_that_change(backend: str) -> None:
    """Addresses, strides, batch, dtype, scale: in turns, so that what was kept of a call meets other tensors."""
    schedule = made(TokenGrid(frames=5, height=12, width=26), Blocks(128, 128))
    layouts = []
    for dtype, batch in ((torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float16, 1)):
        q, k, v = inputs(schedule, dtype, 128, batch)
        fused = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
        layouts += [(q, k, v), (q.contiguous(), k, v.contiguous()), tuple(fused)]
    expected: dict[int, torch.Tensor] = {}
    for turn in range(3):
        for at, (q, k, v) in enumerate(layouts):
            q = q.clone() if turn else q
            out = planned_attention(q, k, v, schedule, backend=backend, scale=0.1 if at % 2 else None)
            if turn == 0:
                check_against_oracle(out, q, k, v, schedule, scale=0.1 if at % 2 else None)
            assert torch.equal(out, expected.setdefault(at, out))


@pytest.mark.parametrize("anchored", [[], [1, 3]], ids=["plain", "anchored"])
def test_hopper_on_streams_at_once(anchored: list[int]) -> None:
    core = random_schedule(
        np.random.default_rng(0), TokenGrid(3, 30, 52), Blocks(128, 128), 4, 0.3, anchored_heads=anchored, anchors=KINDS
    )
    schedule = ListedSchedule(core)
    q, k, v = inputs(schedule, torch.bfloat16, 128)
    expected = attend(q, k, v, schedule, "hopper")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    outs = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(attend(q, k, v, schedule, "hopper"))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("anchored", [[], [1, 3]], ids=["plain", "anchored"])
def test_hopper_graphs_replayed_at_once(anchored: list[int]) -> None:
    """Two graphs of two launches each, captured on one stream and replayed on two."""
    core = random_schedule(
        np.random.default_rng(0), TokenGrid(3, 30, 52), Blocks(128, 128), 4, 0.3, anchored_heads=anchored, anchors=KINDS
    )
    schedule = ListedSchedule(core)
    q, k, v = inputs(schedule, torch.bfloat16, 128)
    expected = attend(q, k, v, schedule, "hopper")
    graphs, outs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs += [attend(q, k, v, schedule, "hopper") for _ in range(2)]
        graphs.append(graph)
    for out in outs:
        out.zero_()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in outs)
    assert torch.equal(attend(q, k, v, schedule, "hopper"), expected)


@pytest.mark.parametrize("blocks", [Blocks(64, 64), Blocks(128, 64), Blocks(256, 256), Blocks(16, 32)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_and_head_sizes_with_text(blocks: Blocks, head_dim: int) -> None:
    grid = TokenGrid(frames=5, height=12, width=26)
    check(made(grid, blocks), torch.bfloat16, head_dim, batch=2, around=(77, 130), padded=True)


@pytest.mark.parametrize("head_dim", [16, 32, 256])
def test_other_head_sizes(head_dim: int) -> None:
    check(made(TokenGrid(frames=3, height=7, width=26), Blocks(128, 128)), torch.float16, head_dim)


def test_torch_backend() -> None:
    check(made(WAN_480P, Blocks(128, 128)), torch.bfloat16, head_dim=128, backend="torch")


def test_auto_takes_the_fastest_that_can() -> None:
    best = "hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    assert choose_backend(made(WAN_480P, Blocks(128, 128)), "cuda", torch.bfloat16, 128) == best
    assert choose_backend(made(WAN_480P, Blocks(64, 64)), "cuda", torch.bfloat16, 128) == "triton"


@pytest.mark.parametrize("backend", KERNELS)
def test_tensors_beyond_two_to_the_31_elements(backend: str) -> None:
    """The last of six batches, in which element 2^31 lies, is what the same batch is alone."""
    core = random_schedule(np.random.default_rng(0), WAN_720P, Blocks(128, 128), 40, 0.01, anchored_heads=[39])
    schedule = ListedSchedule(core)
    x = inputs(schedule, torch.bfloat16, 128, batch=6)[0]
    assert x.numel() > 2**31
    out = planned_attention(x, x, x, schedule, backend=backend)[5:]
    alone = x[5:].clone()
    assert torch.equal(out, planned_attention(alone, alone, alone, schedule, backend=backend))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("others", [0, 207])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_bound_schedule_runs_without_waiting_and_in_a_graph(others: int, backend: str) -> None:
    schedule = made(WAN_480P, Blocks(128, 128))
    q, k, v = inputs(schedule, torch.bfloat16, 128, others=others)
    lengths = torch.tensor([q.shape[2] - 50], dtype=torch.int32, device="cuda") if others else None
    more = {"video_start": others // 3, "lengths": lengths}
    expected = attend(q, k, v, schedule, backend, **more)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, schedule, backend, **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(q, k, v, schedule, backend, **more)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_lists_unpacked_when_they_are_used(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share a room: equal bits to layers whose lists wait, without waiting, in a graph, on two streams."""
    layers = [made(WAN_480P, Blocks(128, 128), density) for density in (0.2, 0.5, 0.1)]
    q, k, v = inputs(layers[0], torch.bfloat16, 128)
    expected = [attend(q, k, v, layer, backend) for layer in layers]
    monkeypatch.setattr("calibatt.runtime.resident.RESIDENT_BYTES", 0)
    plan = ResidentSchedules([[ListedSchedule(layer.core) for layer in layers]])

    def run() -> list[torch.Tensor]:
        return [attend(q, k, v, layer, backend) for layer in plan.layers(0)]

    def check(found: list[torch.Tensor]) -> None:
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    check(run())
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(again)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for out in captured:
            out.zero_()
        run()
        graph.replay()
        check(captured)
    torch.cuda.synchronize()
    other, found = torch.cuda.Stream(), []
    for _ in range(3):
        found.append(run())
        with torch.cuda.stream(other):
            found.append(run())
    torch.cuda.synchronize()
    for each in found:
        check(each)


@pytest.mark.parametrize("k_blocks", [255, 591, 931])
def test_unpacking_takes_little_time(k_blocks: int) -> None:
    """Of 24,000 lists; a layer's attention takes 9 ms in 480p and 49 ms in 720p."""
    bits = torch.randint(0, 256, (24_000, -(-k_blocks // 8)), dtype=torch.uint8, device="cuda")
    bits[:, -1] &= 0xFF >> -k_blocks % 8
    bits[:, 0] |= 1
    counts = (bits[:, :, None] >> torch.arange(8, dtype=torch.uint8, device="cuda") & 1).sum((1, 2))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int() + k_blocks
    columns = torch.zeros(24_001 * k_blocks + 1, dtype=torch.int16, device="cuda").view(torch.uint16)
    nothing = torch.zeros(0, 5, dtype=torch.int32, device="cuda")
    lists = PackedLists(bits, starts, k_blocks, nothing, 0, Room(columns, nothing.new_zeros(3, 0)))
    unpack_by_torch(lists)
    by_torch = columns.clone()
    columns.view(torch.int16).zero_()
    lists.unpack()
    assert torch.equal(columns.view(torch.int16), by_torch.view(torch.int16))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        lists.unpack()
    end.record()
    end.synchronize()
    print(f"{k_blocks} key blocks: {begin.elapsed_time(end) / 20:.4f} ms")
    assert begin.elapsed_time(end) / 20 < 0.3
