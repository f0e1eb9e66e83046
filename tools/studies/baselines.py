"""What else could choose the blocks: patterns of geometry, and rules that look at the input. Written from the
published descriptions; all are *scores*, of which a mask keeps the highest, so that any density can be had.

A score is float32 ``(..., Q, K)``: higher is kept longer. Geometry gives ranks with a fraction that differs from row to
row, so that a share d of all blocks is kept by keeping, in every row, d of them to within one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibatt.plans import Blocks, TokenGrid

GOLDEN = 0.6180339887
CUBE = 4
"""Side of the cubes of `cube_order`, in tokens."""


def coordinates(grid: TokenGrid) -> Tensor:
    """int64 ``(N, 3)``: frame, row and column of every video token."""
    axes = [torch.arange(size) for size in (grid.frames, grid.height, grid.width)]
    return torch.cartesian_prod(*axes).view(-1, 3)


def cube_order(grid: TokenGrid) -> Tensor:
    """int64 ``(N,)``: tokens cube by cube, `CUBE` on a side, as Sliding Tile Attention orders them.

    Raises:
        ValueError: A side of the grid is no multiple of `CUBE`.
    """
    sides = (grid.frames, grid.height, grid.width)
    if any(side % CUBE for side in sides):
        raise ValueError(f"cubes must fill the grid: its sides must be multiples of {CUBE}, got {sides}")
    split = [part for side in sides for part in (side // CUBE, CUBE)]
    return torch.arange(grid.tokens).view(split).permute(0, 2, 4, 1, 3, 5).reshape(-1)


def _frames(df: Tensor, dr: Tensor, dc: Tensor, grid: TokenGrid, first: Tensor) -> Tensor:
    """Whole frames, the nearest first; within a frame the nearest rows."""
    return df + dr / (2 * grid.height)


def _rows(df: Tensor, dr: Tensor, dc: Tensor, grid: TokenGrid, first: Tensor) -> Tensor:
    """The same rows in all frames, the nearest first."""
    return dr + df / (2 * grid.frames)


def _box(df: Tensor, dr: Tensor, dc: Tensor, grid: TokenGrid, first: Tensor) -> Tensor:
    """3D windows with the proportions of the grid."""
    sides = torch.stack([df / grid.frames, dr / grid.height, dc / grid.width])
    return sides.amax(0) + 0.01 * sides.sum(0)


def _cubes(df: Tensor, dr: Tensor, dc: Tensor, grid: TokenGrid, first: Tensor) -> Tensor:
    """3D windows as long in time as in space, in tokens."""
    sides = torch.stack([df, dr, dc])
    return sides.amax(0) + 0.01 * sides.sum(0)


def _radial(df: Tensor, dr: Tensor, dc: Tensor, grid: TokenGrid, first: Tensor) -> Tensor:
    """A spatial window that halves with every doubling of the distance in time; the first frame comes right after the
    block's own surroundings.

    Li et al., *Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation* (2025).
    """
    octave = torch.floor(torch.log2(df.clamp(min=1)))
    needed = (dr + dc / grid.width + 1) * 2**octave + 0.01 * df
    return torch.where(first, needed.clamp(max=1.5), needed)


def _spatial(df: Tensor, dr: Tensor, dc: Tensor, grid: TokenGrid, first: Tensor) -> Tensor:
    """SVG's spatial heads: the own frame, the first one, near ones. Xi et al., *Sparse VideoGen* (2025)."""
    return torch.where(first & (df > 0), torch.full_like(df, 0.9), _frames(df, dr, dc, grid, first))


def _temporal(df: Tensor, dr: Tensor, dc: Tensor, grid: TokenGrid, first: Tensor) -> Tensor:
    """SVG's temporal heads: the same place in all frames. Xi et al., *Sparse VideoGen* (2025)."""
    return _rows(df, dr, dc, grid, first)


PATTERNS = {
    "frames": _frames,
    "rows": _rows,
    "box": _box,
    "cubes": _cubes,
    "radial": _radial,
    "spatial": _spatial,
    "temporal": _temporal,
}


def pattern(
    kind: str, grid: TokenGrid, blocks: Blocks, order: Tensor | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """A pattern's score ``(Q, K)``: blocks by the distance of their nearest tokens.

    Args:
        kind: One of `PATTERNS`.
        grid: The token sequence.
        blocks: Block sizes.
        order: int64 ``(N,)``; which token stands at each place of the sequence; raster order if absent.
        device: Where it is computed.
    """
    at = coordinates(grid)
    at = (at if order is None else at[order.cpu()]).to(device)
    pad = -len(at) % blocks.block_k
    keys = torch.cat([at, at[-1:].expand(pad, 3)])
    rows = []
    for queries in at.split(blocks.block_q):
        df, dr, dc = (queries[:, None] - keys).abs().float().unbind(-1)
        far = PATTERNS[kind](df, dr, dc, grid, (keys[:, 0] == 0).expand_as(df))
        rows.append(far.view(len(queries), -1, blocks.block_k).amin((0, 2)))
    return ranked(-torch.stack(rows))


def random_score(shape: tuple[int, ...], seed: int) -> Tensor:
    """A score without any knowledge ``(..., Q, K)``."""
    return ranked(torch.rand(shape, generator=torch.Generator().manual_seed(seed)))


def ranked(score: Tensor) -> Tensor:
    """Minus the rank of each block in its row, of equals the lower block first, plus a fraction of the row's own."""
    ranks = score.argsort(dim=-1, descending=True, stable=True).argsort(-1).float()
    fraction = (torch.arange(score.shape[-2], device=score.device) * GOLDEN) % 1
    return -(ranks + fraction[:, None])


def mass_before(mass: Tensor) -> Tensor:
    """Top-p as a score: minus the mass of all blocks of the row that hold more, ``(..., Q, K)``; a block is in the
    smallest set that holds p of the mass iff this is above -p."""
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    return torch.empty_like(mass).scatter_(-1, index, -(ordered.cumsum(-1) - ordered))


def skip_softmax_score(q: Tensor, k: Tensor, blocks: Blocks) -> Tensor:
    """Skip-softmax as a score ``(B, H, Q, K)``: a tile is skipped if, in all its rows, its largest score stays so far
    below the running maximum that exp of the difference is under a threshold; the score is the largest difference.

    NVIDIA Model-Optimizer's calibrated skip-softmax, after Yuan et al., *BLASST: Dynamic BLocked Attention Sparsity via
    Softmax Thresholding* (2025). All scores are computed: only the softmax and the product with the values are saved,
    so its executed density overstates what it saves.
    """
    found = []
    tokens = q.shape[2]
    pad = -tokens % blocks.block_k
    for queries, keys in zip(q, k, strict=True):
        scores = queries @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = torch.nn.functional.pad(scores, (0, pad), value=-torch.inf)
        largest = scores.unflatten(-1, (-1, blocks.block_k)).amax(-1).float()
        below = largest - largest.cummax(-1).values
        below = torch.nn.functional.pad(below, (0, 0, 0, -tokens % blocks.block_q), value=-torch.inf)
        found.append(below.unflatten(1, (-1, blocks.block_q)).amax(2))
    return torch.stack(found)
