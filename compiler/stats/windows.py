"""Parametric masks: blocks that are near in space and time, whatever the content."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import ManifestError
from calibatt.plans.schema import Blocks, TokenGrid

RADII = {"frames": 1, "rows": 1, "box": 3}
"""Kinds of windows and how many radii each has."""
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Window:
    """Token pairs that are at most the radii apart.

    Args:
        kind: ``frames``: at most ``radii[0]`` frames apart, anywhere in the frame. ``rows``: at most ``radii[0]``
            spatial rows apart, in any frame and column. ``box``: at most ``(frames, rows, columns)`` apart.
        radii: Non-negative integers, one for ``frames`` and ``rows``, three for ``box``.

    Raises:
        ManifestError: No such kind, or radii that do not fit it.
    """

    kind: str
    radii: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in RADII:
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


@lru_cache(maxsize=64)
def window_keep(window: Window, grid: TokenGrid, blocks: Blocks) -> npt.NDArray[np.bool_]:
    """The blocks that a window keeps: those in which any token pair is within the radii.

    A pair with a text token is always within: a query or key block that holds one is kept whole.

    Returns:
        bool (Q, K), read only (it is cached).
    """
    q_blocks, k_blocks = blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens)
    first, last = grid.text_before, grid.text_before + grid.video_tokens
    keep = np.zeros((q_blocks, k_blocks), np.bool_)
    k_starts = np.arange(0, grid.tokens, blocks.block_k)
    at_once = max(1, _CHUNK // grid.tokens)
    for start in range(0, q_blocks, at_once):
        stop = min(start + at_once, q_blocks)
        near = np.zeros((stop - start, grid.tokens), np.bool_)
        for row, block in enumerate(range(start, stop)):
            near[row, block * blocks.block_q : (block + 1) * blocks.block_q] = True
        video = near[:, first:last].reshape(-1, grid.frames, grid.height, grid.width)
        for axis, radius in enumerate(window.reach(grid), 1):
            video = _dilate(video, axis, radius)
        near[:, first:last] = video.reshape(stop - start, -1)
        keep[start:stop] = np.logical_or.reduceat(near, k_starts, axis=1)
    keep |= _has_text(grid, blocks.block_q)[:, None] | _has_text(grid, blocks.block_k)[None, :]
    keep.setflags(write=False)
    return keep


def default_windows(grid: TokenGrid) -> tuple[Window, ...]:
    """A small menu for a grid: a few of each kind, none that keeps everything."""
    frames, height, width = grid.frames, grid.height, grid.width
    menu = [Window("frames", (radius,)) for radius in (0, 1, frames // 8, frames // 4)]
    menu += [Window("rows", (height // part,)) for part in (16, 8, 4)]
    menu += [Window("box", (frames // t, height // s, width // s)) for t, s in ((8, 8), (4, 8), (2, 8), (8, 4), (4, 4))]
    whole = (frames - 1, height - 1, width - 1)
    distinct = {window.reach(grid): window for window in reversed(menu) if window.reach(grid) != whole}
    return tuple(reversed(distinct.values()))


def _dilate(near: npt.NDArray[np.bool_], axis: int, radius: int) -> npt.NDArray[np.bool_]:
    """Every place within `radius` of a true one along an axis."""
    size = near.shape[axis]
    if radius == 0:
        return near
    pad = [(0, 0)] * near.ndim
    pad[axis] = (1, 0)
    count = np.pad(np.cumsum(near, axis=axis, dtype=np.int32), pad)
    places = np.arange(size)
    above = np.take(count, np.minimum(places + radius + 1, size), axis=axis)
    found: npt.NDArray[np.bool_] = above > np.take(count, np.maximum(places - radius, 0), axis=axis)
    return found


def _has_text(grid: TokenGrid, block: int) -> npt.NDArray[np.bool_]:
    starts = np.arange(0, grid.tokens, block)
    stops = np.minimum(starts + block, grid.tokens)
    found: npt.NDArray[np.bool_] = (starts < grid.text_before) | (stops > grid.text_before + grid.video_tokens)
    return found
