"""Windows against the definition, token pair by token pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibatt.compiler.stats import ManifestError, Window, default_windows, window_keep
from calibatt.plans import Blocks, TokenGrid

GRIDS = st.builds(TokenGrid, st.integers(1, 4), st.integers(1, 5), st.integers(1, 20))
RADIUS = st.integers(0, 4)
WINDOWS = st.one_of(
    st.builds(Window, st.sampled_from(["frames", "rows"]), st.tuples(RADIUS)),
    st.builds(Window, st.just("box"), st.tuples(RADIUS, RADIUS, RADIUS)),
)


def brute(window: Window, grid: TokenGrid, blocks: Blocks) -> np.ndarray:
    place = [(*divmod(index // grid.width, grid.height), index % grid.width) for index in range(grid.tokens)]
    used = {"frames": (0,), "rows": (1,), "box": (0, 1, 2)}[window.kind]
    keep = np.zeros((blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens)), bool)
    for i, one in enumerate(place):
        for j, two in enumerate(place):
            near = all(abs(one[axis] - two[axis]) <= radius for axis, radius in zip(used, window.radii, strict=True))
            keep[i // blocks.block_q, j // blocks.block_k] |= near
    return keep


@settings(max_examples=40, deadline=None, derandomize=True)
@given(WINDOWS, GRIDS, st.sampled_from([16, 32]), st.sampled_from([16, 64]))
def test_window_keeps_what_the_definition_says(window, grid, block_q, block_k):
    blocks = Blocks(block_q, block_k)
    np.testing.assert_array_equal(window_keep(window, grid, blocks), brute(window, grid, blocks))


def test_the_result_is_the_callers_own():
    grid, blocks, window = TokenGrid(4, 4, 16), Blocks(16, 16), Window("frames", (0,))
    window_keep(window, grid, blocks)[:] = True
    assert not window_keep(window, grid, blocks).all()


@pytest.mark.parametrize("grid", [TokenGrid(21, 45, 80), TokenGrid(8, 24, 24), TokenGrid(1, 1, 1), TokenGrid(2, 3, 4)])
def test_default_windows_are_distinct_and_none_keeps_everything(grid):
    menu = default_windows(grid)
    assert len({window.reach(grid) for window in menu}) == len(menu)
    assert all(window.reach(grid) != (grid.frames - 1, grid.height - 1, grid.width - 1) for window in menu)
    assert len(menu) > 5 or grid.tokens < 100


@pytest.mark.parametrize(
    ("kind", "radii", "message"),
    [
        ("ball", (1,), r"window.kind must be one of frames, rows, box, got 'ball'"),
        ("frames", (1, 2), r"window.radii must be 1 non-negative integers for 'frames', got \(1, 2\)"),
        ("box", (1, 2, -1), r"window.radii must be 3 non-negative"),
        ("rows", [1], r"window.radii must be 1 non-negative"),
        ("rows", (1.0,), r"window.radii must be 1 non-negative"),
    ],
)
def test_wrong_windows(kind, radii, message):
    with pytest.raises(ManifestError, match=message):
        Window(kind, radii)
