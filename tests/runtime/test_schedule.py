"""The index arrays on a device say what the schedule says."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from support.schedules import layer_schedules, random_schedule

from calibatt.plans import Blocks, LayerSchedule, TokenGrid
from calibatt.runtime.schedule import ListedSchedule, bound_to


@pytest.fixture
def core() -> LayerSchedule:
    grid = TokenGrid(frames=2, height=3, width=13)
    return random_schedule(np.random.default_rng(1), grid, Blocks(16, 32), 3, dense_heads=[1], anchored_heads=[2])


@given(layer_schedules())
def test_executing_the_arrays_is_executing_the_schedule(core: LayerSchedule) -> None:
    """Every token is written once, for the source and the key blocks that `dense` says, in the order of the tiles."""
    bound = ListedSchedule(core).bind("cpu")
    tokens, block_q = core.grid.tokens, core.blocks.block_q
    columns = bound.columns.numpy()
    source = np.full((core.heads, tokens), -1)
    keep = np.zeros((core.heads, tokens, core.k_blocks), dtype=np.bool_)
    order = []
    for head, tile, start, stop in bound.tiles.tolist():
        order.append(core.head_tile_ptr[head] + tile)
        packed_tokens, packed_start, step = bound.heads[head].tolist()
        for query in range(tile * block_q, min((tile + 1) * block_q, packed_tokens)):
            token, first, copies = query, query, 1
            if bound.anchored:
                arrays = bound.query_token, bound.query_first, bound.query_copies
                token, first, copies = (int(array[packed_start + query]) for array in arrays)
            for target in first + step * np.arange(copies):
                assert source[head, target] == -1
                source[head, target] = token
                keep[head, target, columns[start:stop]] = True
    assert order == core.tile_order.tolist()
    for head in range(core.heads):
        expected_source, expected_keep = core.dense(head)
        assert np.array_equal(source[head], expected_source)
        assert np.array_equal(keep[head], expected_keep)


def test_properties_and_dense_are_those_of_the_core(core: LayerSchedule) -> None:
    schedule = ListedSchedule(core)
    assert (schedule.grid, schedule.blocks, schedule.heads) == (core.grid, core.blocks, core.heads)
    assert schedule.density == core.density
    source, keep = schedule.dense(2)
    assert source.dtype == torch.int64
    assert keep.dtype == torch.bool
    assert np.array_equal(source.numpy(), core.dense(2)[0])
    assert np.array_equal(keep.numpy(), core.dense(2)[1])


def test_bind_is_kept_until_unbind(core: LayerSchedule) -> None:
    schedule = ListedSchedule(core)
    bound = schedule.bind("cpu")
    assert schedule.bind(torch.device("cpu")) is bound
    schedule.unbind()
    assert schedule.bind("cpu") is not bound


def test_derived_is_made_once(core: LayerSchedule) -> None:
    bound = ListedSchedule(core).bind("cpu")
    calls = []
    for _ in range(2):
        bound.derived(calls.append)
    assert calls == [bound]


class FakeStream:
    """A CUDA stream that takes notes of what it waits for."""

    def __init__(self) -> None:
        self.waited: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        self.waited.append(other)


class FakeCuda:
    """Which stream is current, and whether it captures a graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream = FakeStream()
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: id(self.stream), raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr("calibatt.runtime.schedule.bound_to", lambda core, *_: bound_to(core, torch.device("cpu")))


def test_streams_wait_for_the_copies_and_memory_for_the_streams(
    core: LayerSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, schedule = FakeCuda(monkeypatch), ListedSchedule(core)
    first, second = cuda.stream, FakeStream()
    bound = schedule.bind("cuda:0")
    cuda.stream = second
    assert schedule.bind("cuda:0") is bound
    assert schedule.bind("cuda:0") is bound
    assert (first.waited, second.waited) == ([], [first])
    schedule.unbind()
    assert (first.waited, second.waited) == ([second], [first, first])
    assert schedule.bind("cuda:0") is not bound


def test_streams_wait_for_what_was_derived(core: LayerSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, schedule = FakeCuda(monkeypatch), ListedSchedule(core)
    first, second, third = cuda.stream, FakeStream(), FakeStream()
    bound = schedule.bind("cuda:0")
    object.__setattr__(bound, "device", torch.device("cuda:0"))
    cuda.stream = second
    schedule.bind("cuda:0").derived(repr)
    assert (first.waited, second.waited) == ([], [first])
    for cuda.stream in (third, first, second, third):
        schedule.bind("cuda:0").derived(repr)
    assert (first.waited, second.waited, third.waited) == ([second], [first], [first, second])
    cuda.stream = third
    bound.derived(str)
    cuda.stream = first  # bound before it was derived, as where threads run at once
    bound.derived(str)
    assert first.waited == [second, third]
    schedule.unbind()
    assert third.waited[2:] == [first, second]  # memory is freed after all of them


def test_nothing_is_derived_while_a_graph_is_captured(core: LayerSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, schedule = FakeCuda(monkeypatch), ListedSchedule(core)
    bound = schedule.bind("cuda:0")
    object.__setattr__(bound, "device", torch.device("cuda:0"))
    cuda.capturing = True
    with pytest.raises(RuntimeError, match="must be run once on cuda:0 before a CUDA graph is captured"):
        bound.derived(repr)
    cuda.capturing = False
    made = bound.derived(repr)
    cuda.capturing, cuda.stream = True, FakeStream()
    assert bound.derived(repr) is made
    assert cuda.stream.waited == []


def test_what_a_graph_captured_stays(core: LayerSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, schedule = FakeCuda(monkeypatch), ListedSchedule(core)
    cuda.capturing = True
    schedule.prefetch(torch.device("cuda:0"), nullcontext())
    assert schedule.bound_bytes == 0
    with pytest.raises(RuntimeError, match="must be on cuda:0 before a CUDA graph is captured"):
        schedule.bind("cuda:0")
    cuda.capturing = False
    bound = schedule.bind("cuda:0")
    cuda.capturing = True
    assert schedule.bind("cuda:0") is bound
    cuda.capturing = False
    schedule.unbind()
    assert schedule.bind("cuda:0") is bound
