"""Lists that are on a device as bits until a layer runs: what is unpacked, when, and how much memory it all takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from support import compile_kernel
from support.budget import check_against_oracle
from support.schedules import layer_schedules, random_schedule

from calibatt.plans import Blocks, ModelSignature, PackedLayer, PlanFile, Segment, StoredLayers, TokenGrid, encode
from calibatt.plans import LayerSchedule as CoreSchedule
from calibatt.runtime import Plan, planned_attention, resident
from calibatt.runtime.backends import hopper
from calibatt.runtime.padding import ShorterPlans
from calibatt.runtime.parallel import Share, Ulysses
from calibatt.runtime.resident import ResidentSchedules
from calibatt.runtime.schedule import LayerSchedule
from calibatt.runtime.workspace import PackedLists, Room, Workspace, unpack_by_kernel, unpack_by_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = TokenGrid(frames=2, height=3, width=26, text_before=4, text_after=35)
BLOCKS = Blocks(16, 32)
WAN_720P = TokenGrid(frames=21, height=45, width=80)


def drawn(seed: int, grid: TokenGrid = GRID, density: float = 0.4) -> CoreSchedule:
    rng = np.random.default_rng(seed)
    return random_schedule(rng, grid, BLOCKS, 4, density, dense_heads=[1], shared_heads=[2], anchored_heads=[3])


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plan is small."""
    monkeypatch.setattr(resident, "RESIDENT_BYTES", 0)


def check_lists(schedule: LayerSchedule, core: CoreSchedule) -> None:
    """The columns of every tile are those that the schedule says, and a 0 follows the last list."""
    assert schedule.workspace is not None
    with schedule.bind(DEVICE).lowered() as bound:
        columns = bound.columns.cpu()
        assert bound.lists is not None
        assert columns[: core.k_blocks].tolist() == list(range(core.k_blocks))
        assert columns[int(bound.lists.starts[-1])] == 0
        assert len(bound.tiles) == core.head_tile_ptr[-1]
        for head, tile, start, stop in bound.tiles.tolist():
            assert columns[start:stop].tolist() == core.columns(head, tile).tolist()


@given(layer_schedules())
def test_unpacked_lists_are_the_schedules(core: CoreSchedule) -> None:
    schedule = LayerSchedule(core)
    schedule.workspace = Workspace((schedule.most_lists + 1) * core.k_blocks + 1)
    check_lists(schedule, core)


@pytest.mark.parametrize("k_blocks", [1, 2, 7, 8, 9, 511, 512, 513, 591, 1030])
@pytest.mark.parametrize("unpack", [unpack_by_kernel, unpack_by_torch])
def test_kernel_and_torch_unpack_any_number_of_key_blocks(k_blocks: int, unpack: object) -> None:
    keep = np.random.default_rng(k_blocks).random((6, k_blocks)) < 0.3
    keep[0], keep[1], keep[2] = True, False, False
    keep[1:, 0] |= ~keep[1:].any(1)
    keep[2], keep[2, -1] = False, True
    starts = k_blocks + np.cumsum([0, *keep.sum(1)])
    columns = torch.full((int(starts[-1]) + 3,), 7, dtype=torch.int16, device=DEVICE).view(torch.uint16)
    bits = torch.from_numpy(np.packbits(keep, axis=1, bitorder="little")).to(DEVICE)
    lists = PackedLists(bits, torch.from_numpy(starts.astype(np.int32)).to(DEVICE), k_blocks, Room(columns))
    unpack(lists, columns)
    assert columns.tolist() == [*range(k_blocks), *np.nonzero(keep)[1], 0, 7, 7]


def test_the_kernel_compiles_and_spills_nothing() -> None:
    cases = [{"sm": sm, "k_blocks": 591} for sm in (80, 90)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, compile_kernel.__file__, json.dumps(cases)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [usage["stack_bytes"] for usage in json.loads(result.stdout)] == [0, 0]


@pytest.mark.usefixtures("packed")
def test_layers_of_a_plan_take_turns_in_one_room() -> None:
    """The triton backend reads columns; every layer finds its own, in any order, from either segment."""
    plan = ResidentSchedules([[LayerSchedule(drawn(2 * at + layer)) for layer in range(2)] for at in range(2)])
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, GRID.tokens, 16, dtype=torch.float16, device=DEVICE)
    for segment, layer in ((0, 0), (0, 1), (0, 0), (1, 1), (1, 1), (0, 0)):
        schedule = plan.layers(segment)[layer]
        check_against_oracle(planned_attention(q, k, v, schedule, backend="triton"), q, k, v, schedule)
    rooms = {schedule.bind(DEVICE).columns.data_ptr() for at in range(2) for schedule in plan.layers(at)}
    assert len(rooms) == 1
    lists = sum(schedule.bound_bytes for at in range(2) for schedule in plan.layers(at))
    assert plan.bound_bytes == lists + plan.layers(0)[0].bind(DEVICE).columns.nbytes


@pytest.mark.usefixtures("packed")
def test_shares_and_shorter_text_are_packed_too() -> None:
    whole = ResidentSchedules([[LayerSchedule(drawn(seed, density=0.9)) for seed in range(2)]])
    for text in (35, 20, 0):
        for schedule in ShorterPlans(whole, 1, GRID.text_after)[text].layers(0):
            check_lists(schedule, schedule.core)
    ranks = Ulysses(None, 1, 2, False)
    for schedule in ResidentSchedules([[Share(schedule, ranks) for schedule in whole.layers(0)]]).layers(0):
        check_lists(schedule, schedule.core)


def test_small_plans_stay_lists() -> None:
    plan = ResidentSchedules([[LayerSchedule(drawn(0))]])
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
    room = Room(SimpleNamespace(device=torch.device("cuda:0"), record_stream=recorded.append))
    for _ in range(3):
        with room.entered():
            pass
    assert (first.waited, second.waited, recorded) == ([second], [first], [second, first])
    capturing[0] = True
    with room.entered():  # streams are joined by whoever captures
        pass


def test_a_plan_in_720p_takes_less_than_300_mb() -> None:
    """Wan 2.1 14B, every head with lists of its own: bytes do not depend on how much they hold."""
    layers, segments, heads = 40, 3, 40
    blocks = Blocks(128, 128)
    rows = heads * blocks.q_blocks(WAN_720P.tokens)
    keep = np.random.default_rng(0).random((rows, blocks.k_blocks(WAN_720P.tokens))) < 0.3
    keep[:, 0] = True
    nothing = np.zeros(0, np.int32)
    layer = PackedLayer(
        WAN_720P,
        blocks,
        np.packbits(keep, axis=1, bitorder="little"),
        head_list=np.arange(0, rows, rows // heads, dtype=np.int32),
        head_anchor=np.full(heads, -1, np.int32),
        anchor_ptr=np.zeros(1, np.int32),
        group_start=nothing,
        anchor_row=nothing,
        tile_order=np.arange(rows, dtype=np.int32),
    )
    stored = encode(layer, None)
    plan = Plan(
        PlanFile(
            signature=ModelSignature("WanTransformer3DModel", layers, heads, 128),
            grid=WAN_720P,
            blocks=blocks,
            segments=(Segment(0.0, 0.3, 0.1), Segment(0.3, 0.6, 0.5), Segment(0.6, 1.0, 0.8)),
            schedules=StoredLayers("", WAN_720P, blocks, heads, range(segments), [[stored] * layers] * segments),
        )
    )
    for segment in (2, 1):  # the one at work and the next, of each a layer: all are alike
        bound = plan.layers(segment)[0].bind("cpu")
        bound.derived(hopper.prepare)
    a_layer = plan.layers(2)[0].bound_bytes
    room = bound.columns.nbytes
    assert plan.bound_bytes == 2 * a_layer + room
    total = 2 * layers * a_layer + room
    assert 230e6 < total < 260e6
    assert (2 * layers + 1) * layer.schedule().col_idx.nbytes > 670e6, "as lists"
