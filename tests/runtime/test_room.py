"""One piece of memory for all that the launches of a call hand on, and counters that calls share."""

from __future__ import annotations

import gc
import math
from weakref import WeakSet

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibatt.runtime import launch
from calibatt.runtime.launch import ARRIVALS, ROOM_ALIGNED_BYTES, make_room

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32])


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=6))
def test_arrays_of_a_room_are_aligned_and_apart(arrays: list[tuple[list[int], torch.dtype]]) -> None:
    room = make_room(torch.empty(1), {str(at): each for at, each in enumerate(arrays)})
    end = 0
    for (shape, dtype), each in zip(arrays, room.values(), strict=True):
        assert (list(each.value.shape), each.value.dtype, each.base) == (shape, dtype, "room")
        assert each.value.is_contiguous()
        assert each.offset % ROOM_ALIGNED_BYTES == 0
        assert each.offset == each.value.data_ptr() - room["0"].value.data_ptr()
        assert end <= each.offset < end + ROOM_ALIGNED_BYTES
        end = each.offset + math.prod(shape) * dtype.itemsize


def test_counters_are_of_a_stream_and_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_counters_of", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    few, many = torch.empty(1, 2, 5, 8), torch.empty(3, 4, 5, 8)
    first = launch._counters(few, 7)
    assert launch._counters(few, 7) is first
    assert launch._counters(few, 8) is not first
    grown = launch._counters(many, 7)
    assert grown.shape == (ARRIVALS + 2 * 3 * 4,)
    assert not grown.any()
    assert launch._counters(few, 7) is grown
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert launch._counters(few, 7) is not grown  # a graph has its own


def test_launches_keep_the_kernels_that_they_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9 unloads a kernel that is freed, as its cache does where two threads compile one at once."""

    class Compiled:
        metadata = None

    class Kernel:
        arg_names = ()

        def __getitem__(self, grid: tuple[int, int, int]) -> type[Compiled]:
            return Compiled

    alive = WeakSet()

    def raw_launch(compiled: Compiled, grid: tuple[int, int, int]) -> None:
        alive.add(compiled)

    monkeypatch.setattr(launch, "_raw_launch", raw_launch)
    launches = launch.Launches([launch.Call(Kernel(), (1, 1, 1), {})])
    gc.collect()
    assert len(alive) == 1
    del launches


def test_a_cache_that_threads_overfilled_is_emptied() -> None:
    made = {key: key for key in range(5)}
    launch.keep(made, "new", 0, 4)
    assert made == {"new": 0}
