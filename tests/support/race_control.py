"""Does compute-sanitizer's racecheck understand mbarriers between the warps of a warp-specialised kernel? It does not.

    compute-sanitizer --tool racecheck --kernel-regex kns=race_control python tests/support/race_control.py ordered

ordered    a producer warp stores an integer a round to one of two slots and arrives on `full`; four consumer warps
           wait, read it and arrive on `free`, for which the producer waits: correct by construction, yet reported.
unordered  the same without waits: a real race, which is reported too.
flat       one partition, where Gluon puts barriers between store and load.

So what racecheck says of `hopper_forward`, which exchanges the facts of a tile in this way, means nothing.
(compute-sanitizer of CUDA 13.0, triton 3.6.0, one H200, 2026-11-26.)
"""

from __future__ import annotations

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

MODES = ("ordered", "unordered", "flat")
ROUNDS = 16


@gluon.jit
def _producer(slots, full, free, ROUNDS: gl.constexpr, ORDERED: gl.constexpr):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for i in range(ROUNDS):
        if ORDERED:
            mbarrier.wait(free.index(i % 2), (i // 2 + 1) % 2)
        slots.index(i % 2).store(gl.full([1], 7 * i + 1, gl.int32, ONE))
        if ORDERED:
            mbarrier.arrive(full.index(i % 2), count=1)


@gluon.jit
def _consumer(out, slots, full, free, ROUNDS: gl.constexpr, ORDERED: gl.constexpr):
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for i in range(ROUNDS):
        if ORDERED:
            mbarrier.wait(full.index(i % 2), i // 2 % 2)
        gl.store(out + i, gl.max(slots.index(i % 2).load(ONE), axis=0))
        if ORDERED:
            mbarrier.arrive(free.index(i % 2), count=1)


@gluon.jit
def race_control(out, ROUNDS: gl.constexpr, ORDERED: gl.constexpr, FLAT: gl.constexpr, num_warps: gl.constexpr):
    """Grid: one. out: int32 ``(ROUNDS,)``."""
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slots = gl.allocate_shared_memory(gl.int32, [2, 1], SHARED)
    if FLAT:
        for i in range(ROUNDS):
            slots.index(i % 2).store(gl.full([1], 7 * i + 1, gl.int32, ONE))
            gl.store(out + i, gl.max(slots.index(i % 2).load(ONE), axis=0))
    else:
        full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for slot in gl.static_range(2):
            mbarrier.init(full.index(slot), count=1)
            mbarrier.init(free.index(slot), count=1)
            slots.index(slot).store(gl.full([1], 0, gl.int32, ONE))
        gl.warp_specialize([
            (_consumer, (out, slots, full, free, ROUNDS, ORDERED)),
            (_producer, (slots, full, free, ROUNDS, ORDERED)),
        ], [1], [24])  # fmt: skip


if __name__ == "__main__":
    for mode in sys.argv[1:] or MODES:
        out = torch.full((ROUNDS,), -1, dtype=torch.int32, device="cuda")
        race_control[(1,)](out, ROUNDS=ROUNDS, ORDERED=mode == "ordered", FLAT=mode == "flat", num_warps=4)
        right = out.tolist() == [7 * i + 1 for i in range(ROUNDS)]
        print(mode, "right" if right else out.tolist())
        if not right and mode != "unordered":
            raise SystemExit(1)
