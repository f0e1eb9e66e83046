"""The processes of one calibration, as torchrun starts them: who samples what, and how they wait for each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a rank waits for another one. A rank that fails ends the wait of all at once."""


class RankLostError(RuntimeError):
    """Another rank has failed."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job; a context manager, inside which they can communicate.

    Args:
        rank: Its number.
        count: How many there are; one that torchrun did not start is alone.
        local_rank: Its number on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Ranks:
        """This process as torchrun's environment variables describe it."""
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        return cls(*(int(os.environ[name]) for name in names)) if set(names) <= set(os.environ) else cls()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if self.count > 1:
            self._together(dist.init_process_group, "gloo", timeout=PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def own_device(self, device: str) -> str:
        """The device as given; ``cuda`` is from now on this rank's own GPU.

        Raises:
            ValueError: The machine has fewer GPUs than ranks.
        """
        if device == "cuda" and self.count > 1:
            if self.local_rank >= (gpus := torch.cuda.device_count()):
                raise ValueError(
                    f"--nproc-per-node must be at most the {gpus} GPUs of a machine, got a rank {self.local_rank} there"
                )
            torch.cuda.set_device(self.local_rank)
        return device

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks do together: every `count`-th."""
        return list(items[self.rank :: self.count])

    def wait(self) -> None:
        """Returns when all ranks have called it.

        Raises:
            RankLostError: A rank never will.
        """
        if self.count > 1:
            self._together(dist.barrier)

    def from_first(self, value: T) -> T:
        """The value of rank 0, whatever the others pass.

        Raises:
            RankLostError: A rank has failed.
        """
        box = [value]
        if self.count > 1:
            self._together(dist.broadcast_object_list, box)
        return box[0]

    def total(self, number: int) -> int:
        """The sum of the numbers of all ranks.

        Raises:
            RankLostError: A rank has failed.
        """
        box = torch.tensor(number)
        if self.count > 1:
            self._together(dist.all_reduce, box)
        return int(box)

    def _together(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except RuntimeError as error:
            raise RankLostError(f"all {self.count} ranks must go on to the end, got one that failed") from error
