"""Random valid schedules, as a plain function of a generator and as a hypothesis strategy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from calibatt.plans import BF16, DENSE, FRAMES, NO_ANCHORS, ROWS, Blocks, LayerSchedule, TokenGrid

ANCHORS = ("random", "every", "frame", "frames", "video", "mixed")
"""Groups of rows: of random length, every row an anchor, one anchor a frame. Of frames: random, one for all. Any."""
OTHERS = (0, 0, 1, 7, 16, 33)
"""Tokens before the video, or after it."""


def random_groups(
    rng: np.random.Generator, grid: TokenGrid, anchors: str = "random"
) -> tuple[int, np.ndarray, np.ndarray]:
    """Axis of one pattern, first members and anchors of its groups, both int32 ``(groups,)``."""
    if anchors == "mixed":
        anchors = ANCHORS[rng.integers(len(ANCHORS) - 1)]
    axis = FRAMES if anchors in ("frames", "video") else ROWS
    members = np.arange(grid.frames if axis == FRAMES else grid.rows)
    must_start = members % (grid.frames if axis == FRAMES else grid.height) == 0
    chosen = anchors == "every" or (rng.random(len(members)) < 0.4) & (anchors in ("random", "frames"))
    start = members[must_start | chosen]
    stop = np.append(start[1:], len(members))
    return axis, start.astype(np.int32), rng.integers(start, stop).astype(np.int32)


def random_schedule(
    rng: np.random.Generator,
    grid: TokenGrid,
    blocks: Blocks,
    heads: int,
    density: float = 0.3,
    *,
    dense_heads: Sequence[int] = (),
    shared_heads: Sequence[int] = (),
    anchored_heads: Sequence[int] = (),
    anchors: str | Sequence[str] = "random",
    patterns: int | None = None,
    precisions: Sequence[int] = (),
) -> LayerSchedule:
    """A valid schedule: every tile of a listed head keeps each key block with probability `density`, and at least one.

    Args:
        rng: Source of everything random.
        grid: The token sequence.
        blocks: Block sizes.
        heads: Number of heads.
        density: 0 leaves one block a tile, 1 leaves all of them (listed, unlike a dense head).
        dense_heads: Heads that list nothing and keep every key block.
        shared_heads: Heads that take the lists of an earlier head that has at least as many tiles, if there is one.
        anchored_heads: Heads that compute anchor rows, or frames, only. May overlap with the two above.
        anchors: One of `ANCHORS`, or some, which patterns are of in turn.
        patterns: Anchor patterns that the anchored heads share in turn; by default each has its own.
        precisions: Of the heads; all `BF16` if empty.
    """
    tokens, block_q = grid.tokens, blocks.block_q
    k_blocks = blocks.k_blocks(tokens)
    patterns = len(anchored_heads) if patterns is None else min(patterns, len(anchored_heads))
    kinds = [anchors] if isinstance(anchors, str) else anchors
    groups = [random_groups(rng, grid, kinds[index % len(kinds)]) for index in range(patterns)]
    head_anchor = np.full(heads, NO_ANCHORS, dtype=np.int32)
    for index, head in enumerate(anchored_heads):
        head_anchor[head] = index % patterns
    head_list = np.full(heads, DENSE, dtype=np.int32)
    tiles = []
    lists: list[np.ndarray] = []
    owners: list[int] = []
    for head, pattern in enumerate(head_anchor):
        axis, start, _ = (ROWS, range(grid.rows), None) if pattern == NO_ANCHORS else groups[pattern]
        rows = len(start) * (grid.height if axis == FRAMES else 1)
        tiles.append(-(-(rows * grid.width) // block_q))
        if head in dense_heads:
            continue
        shared = [owner for owner in owners if tiles[owner] >= tiles[head]] if head in shared_heads else []
        if shared:
            head_list[head] = head_list[shared[0]]
            continue
        owners.append(head)
        head_list[head] = len(lists)
        keep = rng.random((tiles[head], k_blocks)) < density
        keep[np.arange(tiles[head]), rng.integers(k_blocks, size=tiles[head])] = True
        lists += [*np.packbits(keep, axis=1, bitorder="little")]
    return LayerSchedule(
        grid=grid,
        blocks=blocks,
        list_bits=np.array(lists, np.uint8).reshape(-1, -(-k_blocks // 8)),
        head_list=head_list,
        head_anchor=head_anchor,
        anchor_ptr=np.cumsum([0, *(len(start) for _, start, _ in groups)]).astype(np.int32),
        anchor_axis=np.array([axis for axis, _, _ in groups], dtype=np.int32),
        group_start=np.concatenate([*(start for _, start, _ in groups), []]).astype(np.int32),
        group_anchor=np.concatenate([*(anchor for _, _, anchor in groups), []]).astype(np.int32),
        tile_order=rng.permutation(sum(tiles)).astype(np.int32),
        head_precision=np.array(precisions, np.uint8) if precisions else np.zeros(heads, np.uint8),
    )


@st.composite
def grids(draw: st.DrawFn, max_frames: int = 3, max_height: int = 5, max_width: int = 40) -> TokenGrid:
    """Small grids; rows seldom divide blocks, and the whole may be shorter than a block."""
    sizes = (max_frames, max_height, max_width)
    return TokenGrid(*(draw(st.integers(1, most)) for most in sizes))


def all_blocks(sizes: Sequence[int] = (16, 32, 64, 128)) -> st.SearchStrategy[Blocks]:
    """Every pair of the given block sizes."""
    return st.builds(Blocks, st.sampled_from(sizes), st.sampled_from(sizes))


@st.composite
def layer_schedules(
    draw: st.DrawFn,
    grid: st.SearchStrategy[TokenGrid] | None = None,
    blocks: st.SearchStrategy[Blocks] | None = None,
    heads: st.SearchStrategy[int] | None = None,
    precisions: Sequence[int] = (BF16,),
) -> LayerSchedule:
    """Valid schedules of any kind: dense, listed, shared and anchored heads, in every mixture.

    Args:
        grid: Strategy of the grid; `grids()` by default.
        blocks: Strategy of the block sizes; `all_blocks()` by default.
        heads: Strategy of the number of heads; 1 to 4 by default.
        precisions: What heads may multiply in.
    """
    count = draw(heads if heads is not None else st.integers(1, 4))
    some_heads = st.sets(st.integers(0, count - 1)).map(sorted)
    return random_schedule(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        draw(grid if grid is not None else grids()),
        draw(blocks if blocks is not None else all_blocks()),
        count,
        draw(st.sampled_from((0.0, 0.1, 0.3, 0.7, 1.0))),
        dense_heads=draw(some_heads),
        shared_heads=draw(some_heads),
        anchored_heads=draw(some_heads),
        anchors=draw(st.sampled_from(ANCHORS)),
        patterns=draw(st.sampled_from((None, 1))),
        precisions=draw(st.lists(st.sampled_from(precisions), min_size=count, max_size=count)),
    )
