"""Blocks that no mask may drop, and heads that stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import Bool, pack
from calibatt.compiler.ir import Job, UnitIR
from calibatt.compiler.passes import Findings, Pass
from calibatt.plans import Blocks, TokenGrid


@dataclass(frozen=True)
class Protect(Pass):
    """Adds to the blocks that every mask keeps, and marks times and layers that stay dense.

    It comes before `select`, so that what it protects is paid for within the budget. Text columns and rows are
    always protected; one block a row is required from the start.

    Requires: no masks chosen yet.
    Ensures: the required blocks only grow.

    Args:
        sinks: Protect the columns of the first frame.
        diagonal: Protect the blocks that hold a query's own key.
        first_times: Recorded times of most noise that stay dense.
        last_times: Recorded times of least noise that stay dense.
        first_layers: First layers that stay dense.
        last_layers: Last layers that stay dense.

    Raises:
        PassError: A count is negative, or masks are chosen already.
    """

    name: ClassVar[str] = "protect"
    sinks: bool = False
    diagonal: bool = False
    first_times: int = 0
    last_times: int = 0
    first_layers: int = 0
    last_layers: int = 0

    def __post_init__(self) -> None:
        for option in ("first_times", "last_times", "first_layers", "last_layers"):
            value = getattr(self, option)
            self.require(value >= 0, option.replace("_", "-"), "not be negative", value)

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        manifest = job.manifest
        self.require(unit.keep is None, "masks", "be chosen later (protect comes before select)", unit.name)
        unit.required = unit.required | pack(protected(manifest.grid, manifest.blocks, self.sinks, self.diagonal))
        times, layers = len(manifest.times), manifest.model.layers
        noisiest = times - 1 - unit.time_index
        dense = noisiest < self.first_times or unit.time_index < self.last_times
        dense |= unit.layer < self.first_layers or layers - 1 - unit.layer < self.last_layers
        unit.force_dense |= dense
        return {"dense_units": int(unit.force_dense)}

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        required = protected(job.manifest.grid, job.manifest.blocks, self.sinks, self.diagonal)
        return {"protected_density": float(required.mean()), **total}


@lru_cache(maxsize=4)
def protected(grid: TokenGrid, blocks: Blocks, sinks: bool, diagonal: bool) -> Bool:
    """bool ``(Q, K)``: blocks with a text query or key, and those that the options name; read only."""
    tokens = np.arange(grid.tokens)
    text = (tokens < grid.text_before) | (tokens >= grid.text_before + grid.video_tokens)
    columns = text.copy()
    if sinks:
        columns |= tokens < grid.text_before + grid.height * grid.width
    rows = _any(text, blocks.block_q)
    keep: Bool = rows[:, None] | _any(columns, blocks.block_k)[None, :]
    if diagonal:
        keep[tokens // blocks.block_q, tokens // blocks.block_k] = True
    keep.flags.writeable = False
    return keep


def _any(tokens: Bool, size: int) -> Bool:
    """Whether any token of each block is set."""
    found: Bool = np.logical_or.reduceat(tokens, np.arange(0, len(tokens), size))
    return found
