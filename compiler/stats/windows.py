"""Windows: masks of blocks that are near in space and time, whatever the content."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import ManifestError
from calibatt.plans.schema import Blocks, TokenGrid

RADII = {"frames": 1, "rows": 1, "box": 3}
"""Kinds of windows and how many radii each has."""
_PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Window:
    """Token pairs that are at most the radii apart.

    Args:
        kind: ``frames``: at most ``radii[0]`` frames apart, anywhere in the frame. ``rows``: at most ``radii[0]``
            spatial rows apart, in any frame and column. ``box``: at most ``(frames, rows, columns)`` apart.
        radii: Non-negative integers, one for ``frames`` and ``rows``, three for ``box``.

    Raises:
        ManifestError: There is no such kind, or the radii do not fit it.
    """

    kind: str
    radii: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in RADII:
            raise ManifestError(f"window.kind must be one of {', '.join(RADII)}, got {self.kind!r}")
        right = isinstance(self.radii, tuple) and len(self.radii) == RADII[self.kind]
        if not right or not all(type(radius) is int and radius >= 0 for radius in self.radii):
            rule = f"{RADII[self.kind]} non-negative integers for {self.kind!r}"
            raise ManifestError(f"window.radii must be {rule}, got {self.radii!r}")

    def __str__(self) -> str:
        return f"{self.kind}({','.join(map(str, self.radii))})"

    def reach(self, grid: TokenGrid) -> tuple[int, int, int]:
        """Radii in frames, rows and columns, cut to the grid."""
        frames, rows, columns = {
            "frames": (*self.radii, grid.height, grid.width),
            "rows": (grid.frames, *self.radii, grid.width),
            "box": self.radii,
        }[self.kind]
        return min(frames, grid.frames - 1), min(rows, grid.height - 1), min(columns, grid.width - 1)


def window_keep(window: Window, grid: TokenGrid, blocks: Blocks) -> npt.NDArray[np.bool_]:
    """The blocks that a window keeps: those in which any token pair is within the radii.

    Returns:
        bool (Q, K), a new array.
    """
    keep: npt.NDArray[np.bool_] = _window_keep(window, grid, blocks).copy()
    return keep


@lru_cache(maxsize=64)
def _window_keep(window: Window, grid: TokenGrid, blocks: Blocks) -> npt.NDArray[np.bool_]:
    q_blocks, k_blocks = blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens)
    frames, rows, columns = window.reach(grid)
    block, row, left, right = _row_parts(grid, blocks.block_q)
    frame, height = np.divmod(np.arange(grid.rows), grid.height)
    # Every part reaches a run of key blocks in every row that is near: +1 where a run starts, -1 after it stops.
    edges = np.zeros(q_blocks * (k_blocks + 1), np.int64)
    at_once = max(1, _PAIRS_AT_ONCE // grid.rows)
    for start in range(0, len(block), at_once):
        some = slice(start, start + at_once)
        near = np.abs(frame[row[some], None] - frame) <= frames
        near &= np.abs(height[row[some], None] - height) <= rows
        part, other = np.nonzero(near)
        first_token = other * grid.width
        low = (first_token + np.maximum(left[some][part] - columns, 0)) // blocks.block_k
        high = (first_token + np.minimum(right[some][part] + columns, grid.width - 1)) // blocks.block_k
        line = block[some][part] * (k_blocks + 1)
        edges += np.bincount(line + low, minlength=edges.size)
        edges -= np.bincount(line + high + 1, minlength=edges.size)
    keep: npt.NDArray[np.bool_] = edges.reshape(q_blocks, -1).cumsum(1)[:, :-1] > 0
    return keep


def default_windows(grid: TokenGrid) -> tuple[Window, ...]:
    """The windows that are measured by default: a few of each kind, none that keeps everything."""
    frames, height, width = grid.frames, grid.height, grid.width
    menu = [Window("frames", (radius,)) for radius in (0, 1, frames // 8, frames // 4)]
    menu += [Window("rows", (height // part,)) for part in (16, 8, 4)]
    menu += [Window("box", (frames // t, height // s, width // s)) for t, s in ((8, 8), (4, 8), (2, 8), (8, 4), (4, 4))]
    widest = (frames - 1, height - 1, width - 1)
    distinct = {window.reach(grid): window for window in reversed(menu) if window.reach(grid) != widest}
    return tuple(reversed(distinct.values()))


def _row_parts(grid: TokenGrid, size: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Blocks cut at row ends: block, row, first and last column of every part, each int64 (parts,)."""
    token = np.arange(grid.tokens)
    block, row, column = token // size, token // grid.width, token % grid.width
    starts = np.flatnonzero((column == 0) | (np.diff(block, prepend=-1) > 0))
    stops = np.append(starts[1:], grid.tokens) - 1
    return block[starts], row[starts], column[starts], column[stops]
