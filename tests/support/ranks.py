"""Several processes at once, which form a process group: of a function, or of a command by torchrun."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = timedelta(seconds=60)
"""How long a rank waits for another one before it fails."""


def run_ranks(function: Callable[..., None], ranks: int, folder: Path, *arguments: Any, backend: str = "gloo") -> None:
    """Calls ``function(*arguments)`` in each rank.

    Where one fails the others are ended, and its traceback is in the error.

    Args:
        function: Of a module, for others to find it there; the process group is there already.
        ranks: How many.
        folder: Where the ranks find each other.
        arguments: What to call it with.
        backend: ``gloo`` on the CPU; with ``nccl`` each rank makes its tensors on a GPU of its own.
    """
    # A server that has imported all may have begun to use a GPU, which none of its processes could then.
    method = "spawn" if backend == "nccl" else "forkserver"
    _start(partial(_in_group, backend), ranks, folder, function, arguments, method=method)


def run_commands(function: Callable[..., None], ranks: int, folder: Path, *arguments: Any) -> None:
    """`run_ranks` of a function that makes its process group itself, as under torchrun."""
    _start(_as_command, ranks, folder, function, arguments)


def _start(wrapper: Callable[..., None], ranks: int, folder: Path, *arguments: Any, method: str = "forkserver") -> None:
    # The server imports once what every process needs.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "diffusers.models.transformers"])
    meeting = folder / "meeting"
    torch.multiprocessing.start_processes(wrapper, (ranks, meeting, *arguments), ranks, start_method=method)


def _in_group(
    backend: str, rank: int, ranks: int, meeting: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # diffusers calls what torch will replace
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
    else:
        torch.accelerator.device_count = lambda: 1  # what diffusers divides by, even on a CPU
    store = dist.FileStore(str(meeting), ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()


def _as_command(
    rank: int, ranks: int, meeting: Path, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    # A file instead of the port of torchrun.
    store = dist.FileStore(str(meeting), ranks)
    dist.init_process_group = partial(dist.init_process_group, store=store, rank=rank, world_size=ranks)
    function(*arguments)


class Torchrun:
    """A command in several processes, started; a context manager, which ends them all.

    Args:
        ranks: How many.
        arguments: What ``python`` would get.
    """

    def __init__(self, ranks: int, *arguments: Any) -> None:
        tests = str(Path(__file__).parents[1])
        paths = [tests, *filter(None, [os.environ.get("PYTHONPATH")])]
        # Standalone: the ranks meet at a port that is free.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            + [str(argument) for argument in arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str, str]:
        """Exit code, what was written to stdout, and to stderr."""
        out, err = self._process.communicate(timeout=TIMEOUT.total_seconds())
        return self._process.returncode, out, err

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)  # torchrun ends its processes
            self._process.wait(30)
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()
