"""The torch backend: gathers what each tile keeps and hands it to scaled_dot_product_attention. Any device, any dtype.

Tiles whose lists have the same number of keys form a batch, whatever their head. Keys and values lie side by side in one
buffer, so that one copy gathers both; outputs are written in the order of the batches, and one last gather puts them where
they belong and copies anchor rows to their groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from calibatt.plans.schedule import DENSE
from calibatt.plans.schedule import LayerSchedule as CoreSchedule
from calibatt.runtime.schedule import DeviceSchedule

CHUNK_BYTES = 1 << 22
"""Keys and values gathered at a time for each thread: what its cache holds, and enough work for each parallel region."""


@dataclass(frozen=True, eq=False)
class _Batch:
    """Tiles of `block_q` packed queries that keep the same number of keys.

    `blocks` int64 (tiles, kept): rows of the table of key blocks of all heads. `keys`: how many of the gathered keys exist.
    """

    tiles: int
    blocks: torch.Tensor
    keys: int


@dataclass(frozen=True, eq=False)
class _Work:
    """A schedule as batches; "row" is a query of a head: ``head * N + token``.

    `query_rows` int64 (packed rows,): first the tiles of the batches, each padded to `block_q` by repeating its last
    query, then the queries of the dense heads. `dense`: head and number of queries. `source` int64 (H * N,): the packed row
    that each output row takes.
    """

    query_rows: torch.Tensor
    batches: list[_Batch]
    dense: list[tuple[int, int]]
    source: torch.Tensor


def supports(core: CoreSchedule, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """This backend executes every schedule on every device that torch knows."""
    return []
