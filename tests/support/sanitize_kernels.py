"""Every CUDA kernel once, at the smallest sizes that reach all its code; for a tool that watches memory:

    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/support/sanitize_kernels.py
    compute-sanitizer --tool racecheck ...       (see race_control.py for why that proves nothing)

Some cases have more tiles than the device has processors, so that a CTA takes several, and steps enough to fill all
queues and to wrap them. Results are compared with the oracle, so that it also shows what a tool disturbs. Then come the
plans of `support.guards`, every extreme of the format, between regions that nobody may read or write; with ``--guards``
they alone, which needs no tool.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from calibatt.plans import BF16, INT8, INT8_FP8, PRECISIONS, Blocks, TokenGrid
from calibatt.runtime.backends import hopper as hopper_backend
from calibatt.runtime.ops import planned_attention
from calibatt.runtime.schedule import ListedSchedule
from support.budget import check_against_oracle
from support.guards import adversarial, run_guarded
from support.schedules import random_schedule

CASES: dict[str, list[tuple[Any, ...]]] = {
    "hopper": [(128, 128, torch.bfloat16, True), (64, 64, torch.float16, True), (128, 128, torch.bfloat16, False)],
    "hopper eight": [
        (128, 128, torch.bfloat16, True, (INT8_FP8, INT8, INT8_FP8)),
        (64, 64, torch.float16, True, (INT8, BF16, INT8_FP8)),
    ],
    "triton": [(128, 128, torch.bfloat16, True), (64, 64, torch.float16, False)],
}
"""Head size, block_k, dtype, whether some heads have anchors; precisions of heads where not all have 16 bits."""
FEW_PROCESSORS = 3
"""That the hopper kernel is told of: a few CTAs then take all tiles."""


def run_case(
    backend: str, head_dim: int, block_k: int, dtype: torch.dtype, anchored: bool, precisions: Sequence[int] = ()
) -> None:
    """Twice, so that the second launch is one of `runtime.launch.Launches`; once with scores that overshoot."""
    grid = TokenGrid(2, 9, 26)
    core = random_schedule(
        np.random.default_rng(0), grid, Blocks(128, block_k), 3, 0.7, dense_heads=[2],
        anchored_heads=[1, 2] if anchored else [], anchors=("random", "frames"), precisions=precisions,
    )  # fmt: skip
    core.check()
    schedule = ListedSchedule(core)
    torch.manual_seed(0)
    shape, lengths = (2, 7 + grid.tokens + 33, 3, head_dim), torch.tensor([500, 508], dtype=torch.int32, device="cuda")
    more = {"video_start": 7, "lengths": lengths}
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    for factor in (1, 1, 40):
        out, lse = planned_attention(q * factor, k, v, schedule, backend=backend, return_lse=True, **more)
        check_against_oracle(out, q * factor, k, v, schedule, lse=lse, **more)


if __name__ == "__main__":
    hopper_backend.processors = lambda device: FEW_PROCESSORS
    for name in [name for name in sys.argv[1:] if name in CASES] or CASES:
        backend, _, eight = name.partition(" ")
        for case in CASES[name] if "--guards" not in sys.argv else []:
            run_case(backend, *case)
            print(name, *case, "as the oracle", flush=True)
        for what, (core, before, after) in adversarial(128).items():
            if eight:
                core = replace(core, head_precision=((np.arange(core.heads) + 1) % len(PRECISIONS)).astype(np.uint8))
            run_guarded(core, before, after, backend, "cuda", torch.bfloat16, 128)
            print(name, what, "untouched", flush=True)
