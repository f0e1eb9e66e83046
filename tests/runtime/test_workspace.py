"""Lists that are on a device as bits until a layer runs: what is unpacked, when, and how much memory it all takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from support import compile_kernel
from support.budget import check_against_oracle
from support.schedules import layer_schedules, random_schedule

from calibatt.plans import (
    Blocks,
    LayerSchedule,
    ModelSignature,
    PlanFile,
    Segment,
    StoredLayers,
    TokenGrid,
    encode,
)
from calibatt.runtime import Plan, planned_attention, resident
from calibatt.runtime.backends import hopper
from calibatt.runtime.parallel import Share, Ulysses
from calibatt.runtime.resident import ResidentSchedules
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule
from calibatt.runtime.workspace import PackedLists, Room, Workspace, unpack_by_kernel, unpack_by_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = TokenGrid(frames=2, height=3, width=26)
BLOCKS = Blocks(16, 32)
WAN_720P = TokenGrid(frames=21, height=45, width=80)


def drawn(seed: int, grid: TokenGrid = GRID, density: float = 0.4) -> LayerSchedule:
    rng = np.random.default_rng(seed)
    return random_schedule(
        rng, grid, BLOCKS, 4, density, dense_heads=[1], shared_heads=[2], anchored_heads=[3], anchors="mixed"
    )


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is small."""
    monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)


def check_lists(schedule: AttentionSchedule, core: LayerSchedule) -> None:
    """The columns of every tile are those that the schedule says, a 0 follows the last list; queries are as if written
    out.
    """
    plain = ListedSchedule(core).bind(DEVICE)
    assert schedule.workspace is not None
    with schedule.bind(DEVICE).lowered() as bound:
        columns = bound.columns.cpu()
        assert bound.lists is not None
        assert columns[: core.k_blocks].tolist() == list(range(core.k_blocks))
        assert columns[int(bound.lists.starts[-1])] == 0
        assert len(bound.tiles) == core.head_tile_ptr[-1]
        for head, tile, start, stop in bound.tiles.tolist():
            assert columns[start:stop].tolist() == core.columns(head, tile).tolist()
        assert bound.anchored == plain.anchored
        for name in ("tiles", "heads", "query_token", "query_first", "query_copies"):
            assert torch.equal(getattr(bound, name), getattr(plain, name)), name
            assert getattr(bound, name).dtype == torch.int32


@given(layer_schedules())
def test_unpacked_lists_are_the_schedules(core: LayerSchedule) -> None:
    schedule = ListedSchedule(core)
    schedule.workspace = Workspace((schedule.most_lists + 1) * core.k_blocks + 1, schedule.most_queries)
    check_lists(schedule, core)


@pytest.mark.parametrize("k_blocks", [1, 2, 7, 8, 9, 511, 512, 513, 591, 1030])
@pytest.mark.parametrize("unpack", [unpack_by_kernel, unpack_by_torch])
def test_kernel_and_torch_unpack_any_number_of_key_blocks(k_blocks: int, unpack: Callable[[PackedLists], None]) -> None:
    keep = np.random.default_rng(k_blocks).random((6, k_blocks)) < 0.3
    keep[0], keep[1], keep[2] = True, False, False
    keep[1:, 0] |= ~keep[1:].any(1)
    keep[2], keep[2, -1] = False, True
    starts = k_blocks + np.cumsum([0, *keep.sum(1)])
    columns = torch.full((int(starts[-1]) + 3,), 7, dtype=torch.int16, device=DEVICE).view(torch.uint16)
    bits = torch.from_numpy(np.packbits(keep, axis=1, bitorder="little")).to(DEVICE)
    runs = np.array([[0, 3, 50, 10, 2], [3, 300, 7, 7, 1], [303, 1, 400, 0, 9]], dtype=np.int32)
    room = Room(columns, torch.zeros(3, 320, dtype=torch.int32, device=DEVICE))
    starts_there, runs_there = (torch.from_numpy(array.astype(np.int32)).to(DEVICE) for array in (starts, runs))
    lists = PackedLists(bits, starts_there, k_blocks, runs_there, 304, room)
    unpack(lists)
    token, first, copies = (array.tolist() for array in room.queries(304))
    assert token == [50, 51, 52, *range(7, 307), 400]
    assert first == [10, 11, 12, *range(7, 307), 0]
    assert copies == [2] * 3 + [1] * 300 + [9]
    assert columns.tolist() == [*range(k_blocks), *np.nonzero(keep)[1], 0, 7, 7]


@pytest.mark.slow
def test_the_kernel_compiles_and_spills_nothing() -> None:
    cases = [{"sm": sm, "k_blocks": 591} for sm in (80, 90)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, compile_kernel.__file__, json.dumps(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [usage["stack_bytes"] for usage in json.loads(result.stdout)] == [0, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("packed")
def test_layers_of_a_plan_take_turns_in_one_room() -> None:
    """The triton backend reads columns; every layer finds its own, in any order, from either segment."""
    plan = ResidentSchedules([[ListedSchedule(drawn(2 * at + layer)) for layer in range(2)] for at in range(2)])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, GRID.tokens, 16, dtype=torch.float16, device=DEVICE)
    for segment, layer in ((0, 0), (0, 1), (0, 0), (1, 1), (1, 1), (0, 0)):
        schedule = plan.layers(segment)[layer]
        check_against_oracle(planned_attention(q, k, v, schedule, backend="triton"), q, k, v, schedule)
    rooms = {schedule.bind(DEVICE).columns.data_ptr() for at in range(2) for schedule in plan.layers(at)}
    assert len(rooms) == 1
    lists = sum(schedule.bound_bytes for at in range(2) for schedule in plan.layers(at))
    bound = plan.layers(0)[0].bind(DEVICE)
    assert bound.lists is not None
    assert plan.bound_bytes == lists + bound.lists.room.nbytes


@pytest.mark.usefixtures("packed")
def test_shares_are_packed_too() -> None:
    whole = ResidentSchedules([[ListedSchedule(drawn(seed, density=0.9)) for seed in range(2)]])
    ranks = Ulysses(None, 1, 2, False)
    for schedule in ResidentSchedules([[Share(schedule, ranks) for schedule in whole.layers(0)]]).layers(0):
        check_lists(schedule, schedule.core)


def test_small_plans_stay_lists() -> None:
    plan = ResidentSchedules([[ListedSchedule(drawn(0))]])
    with plan.layers(0)[0].bind(DEVICE).lowered() as bound:
        assert bound.lists is None
    assert plan.bound_bytes == plan.layers(0)[0].bound_bytes


class FakeStream:
    """A CUDA stream that takes notes of what it waits for."""

    def __init__(self) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


def test_a_room_is_for_one_stream_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, capturing = FakeStream(), FakeStream(), [False]
    streams, recorded = [first, second, second, first], []  # the first one's memory it is
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams.pop(0))
    memory = SimpleNamespace(device=torch.device("cuda:0"), record_stream=recorded.append)
    room = Room(memory, SimpleNamespace(record_stream=lambda stream: None))
    for _ in range(3):
        with room.entered():
            pass
    assert (first.waited, second.waited, recorded) == ([second], [first], [second, first])
    capturing[0] = True
    with room.entered():  # streams are joined by whoever captures
        pass


@pytest.mark.parametrize("anchored", [0, 4, 8])
def test_a_plan_in_720p_takes_less_than_300_mb(anchored: int) -> None:
    """Wan 2.1 14B, every head with lists of its own: bytes do not depend on how much they hold. Some heads compute
    anchor rows, a pattern each; what the hopper backend derives is counted for the segment at work.
    """
    layers, segments, heads = 40, 3, 40
    blocks = Blocks(128, 128)
    rng = np.random.default_rng(0)
    core = random_schedule(rng, WAN_720P, blocks, heads, 0.3, anchored_heads=range(anchored))
    assert len(core.list_bits) == core.head_tile_ptr[-1]
    stored = encode(core, None)
    plan = Plan(
        PlanFile(
            signature=ModelSignature("WanTransformer3DModel", layers, heads, 128),
            grid=WAN_720P,
            blocks=blocks,
            segments=(Segment(0.0, 0.3, 0.1), Segment(0.3, 0.6, 0.5), Segment(0.6, 1.0, 0.8)),
            schedules=StoredLayers("", WAN_720P, blocks, heads, range(segments), [[stored] * layers] * segments),
        )
    )
    now, following = (plan.layers(segment)[0] for segment in (2, 1))  # of each a layer: all are alike
    for schedule in (now, following):
        schedule.bind("cpu")
    with now.bind("cpu").lowered() as bound:
        bound.derived(hopper.prepare)
        assert bound.lists is not None
        room = bound.lists.room.nbytes
    assert plan.bound_bytes == now.bound_bytes + following.bound_bytes + room
    total = layers * (now.bound_bytes + following.bound_bytes) + room
    assert 200e6 < total < 300e6, total
    assert 2 * layers * core.col_idx.nbytes > 500e6, "as lists"
