"""Small manifests and random units that keep every rule."""

from __future__ import annotations

from typing import Any

import numpy as np

from calibatt.compiler.stats import Manifest, UnitStatistics, Window, neighbours, quantise
from calibatt.plans import Blocks, ModelSignature, TokenGrid


def manifest(**changes: Any) -> Manifest:
    """Two layers, three heads, 2 x 5 x 7 video tokens and three text tokens, two times."""
    values: dict[str, Any] = {
        "model": ModelSignature("TinyModel", layers=2, heads=3, head_dim=8),
        "grid": TokenGrid(2, 5, 7, text_after=3),
        "blocks": Blocks(16, 16),
        "times": (0.25, 0.75),
        "windows": (Window("frames", (0,)), Window("box", (1, 1, 1))),
        "row_radius": 2,
        "frame_radius": 1,
        "has_mass": True,
        "versions": {"calibatt": "0"},
    }
    return Manifest(**{**values, **changes})


def unit(of: Manifest, seed: int = 0) -> UnitStatistics:
    """Random arrays."""
    rng = np.random.default_rng(seed)
    heads, q, k, menu = of.model.heads, of.q_blocks, of.k_blocks, len(of.menu)
    mass = rng.dirichlet(np.ones(k), (heads, q))
    order = np.argsort(-mass, -1)
    before = np.cumsum(np.take_along_axis(mass, order, -1), -1) - np.take_along_axis(mass, order, -1)
    planes = np.zeros((len(of.thresholds), heads, q, k), bool)
    for plane, threshold in zip(planes, of.thresholds, strict=True):
        np.put_along_axis(plane, order, before < threshold, -1)

    def copies(inside: np.ndarray) -> np.ndarray:
        return np.where(inside, rng.random((heads, *inside.shape)), np.nan).astype(np.float32)

    rows = [copies(neighbours(of.grid.height, of.row_radius)) for _ in range(2)]
    error = rng.random((heads, q, k))
    peak = error.max((1, 2)).astype(np.float32) * np.float32(1.001)
    menus = [rng.random((menu, heads), np.float32) for _ in range(2)]
    size = rng.random(heads, np.float32)
    frames = [copies(neighbours(of.grid.frames, of.frame_radius)) if of.frame_radius else None for _ in range(2)]
    return UnitStatistics(
        planes=np.packbits(planes, -1, bitorder="little"),
        menu_error=menus[0],
        menu_residual_error=menus[1],
        output_size=size,
        row_error=rows[0],
        row_residual_error=rows[1],
        frame_error=frames[0],
        frame_residual_error=frames[1],
        block_mass=quantise(mass, 1.0) if of.has_mass else None,
        block_error=quantise(error, peak[:, None, None]) if of.has_block_error else None,
        block_error_peak=peak if of.has_block_error else None,
    )
