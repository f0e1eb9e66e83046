"""A function in several processes at once, which form a process group on the CPU."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = timedelta(seconds=60)
"""How long a rank waits for another one before it fails."""


def run_ranks(function: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> None:
    """Calls ``function(*arguments)`` in each rank.

    Where one fails the others are ended, and its traceback is in the error.

    Args:
        function: Of a module, for others to find it there.
        ranks: How many.
        folder: Where the ranks find each other.
        arguments: What to call it with.
    """
    # The server imports once what every process needs.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "diffusers.models.transformers"])
    torch.multiprocessing.start_processes(
        _rank, (ranks, folder / "ranks", function, arguments), ranks, start_method="forkserver"
    )


def _rank(rank: int, ranks: int, meeting: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # diffusers calls what torch will replace
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # what diffusers divides by, even on a CPU
    store = dist.FileStore(str(meeting), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
