"""Small manifests, and random statistics that keep every rule: in memory, or as a store on disk.

of = manifest()                                     # thresholds=(0.8, 0.9) for votes
measured(of, seed), unit(of, "s0", seed)            # what one sampling measures at one place: arrays, and as a unit
tables(of, seed)                                    # what is kept of a sampling alone
write_store(path, of, names=("s0", "s1"))           # a store with finished samplings; equal seeds, equal numbers
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from calibatt.compiler.stats import Manifest, SamplingTables, StoreWriter, Unit, Window, neighbours
from calibatt.plans import EIGHT_BITS, Blocks, ModelSignature, TokenGrid

VECTORS = 2


def manifest(**changes: Any) -> Manifest:
    """Two layers, three heads, 2 x 5 x 7 video tokens, two times."""
    values: dict[str, Any] = {
        "model": ModelSignature("TinyModel", layers=2, heads=3, head_dim=8),
        "grid": TokenGrid(2, 5, 7),
        "blocks": Blocks(16, 16),
        "times": (0.25, 0.75),
        "windows": (Window("frames", (0,)), Window("box", (1, 1, 1))),
        "shares": (0.25, 0.5, 0.75),
        "row_radius": 2,
        "frame_radius": 1,
        "versions": {"calibatt": "0"},
    }
    return Manifest(**{**values, **changes})


def measured(of: Manifest, seed: int = 0, copies: float = 1.0) -> dict[str, Any]:
    """Random arrays of one sampling and (time, layer); `copies` is a factor on what copies of rows and frames cost."""
    rng = np.random.default_rng(seed)
    shape = (of.model.heads, of.q_blocks, of.k_blocks)

    def near(count: int, radius: int) -> np.ndarray:
        inside = neighbours(count, radius)
        values = rng.random((of.model.heads, *inside.shape)) ** 3 / (count * of.model.layers * of.model.heads)
        return np.where(inside, values, np.nan).astype(np.float32)

    blocks = of.model.layers * np.prod(shape)
    effect, error = ((rng.random(shape) ** 4 * 5 / blocks).astype(np.float32) for _ in range(2))
    effect[..., -1] *= 4  # what matters to many queries
    found = {"effect": effect, "error": error, "row_effect": near(of.grid.height, of.row_radius) * np.float32(copies)}
    if of.frame_radius:
        found["frame_effect"] = near(of.grid.frames, of.frame_radius) * np.float32(copies)
    if of.thresholds:
        votes = np.sort(rng.integers(0, 3, (len(of.thresholds), *shape)), 0).astype(np.uint16)
        found |= {"votes": votes, "vote_samples": 2, "row_difference": near(of.grid.height, of.row_radius)}
    return found


def unit(of: Manifest, name: str, seed: int = 0, copies: float = 1.0) -> Unit:
    """`measured` as the unit of one sampling."""
    return Unit.of(name, **measured(of, seed, copies))


def tables(of: Manifest, seed: int = 0, ladder: bool = True, vectors: int = VECTORS) -> SamplingTables:
    """Random tables of one sampling; `ladder` False: not measured, as in a store's first sampling."""
    rng = np.random.default_rng(seed)
    times, layers, heads = len(of.times), of.model.layers, of.model.heads

    def effects(masks: int) -> np.ndarray:
        return rng.normal(0, 0.01, (vectors, times, layers, masks, heads)).astype(np.float32)

    level = rng.random((times, layers, heads)).sum((1, 2)) * 1e-3
    ladder_effect = effects(len(of.shares)) * (1 if ladder else np.float32(np.nan))
    return SamplingTables(level, effects(len(of.windows)), ladder_effect, effects(len(EIGHT_BITS)) / np.float32(4))


def seed_of(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def add_sampling(writer: StoreWriter, name: str, seed: int = 0, ladder: bool = True, **meta: Any) -> None:
    """Adds a random sampling, the same for the same name and seed, and finishes it."""
    of = writer.manifest
    for time in range(len(of.times)):
        for layer in range(of.model.layers):
            writer.add(time, layer, unit(of, name, seed_of(seed, name, time, layer)))
    meta = {"prompt": f"prompt of {name}", "seed": 1, "vectors": VECTORS, **meta}
    if "steps" not in meta:  # which is what earlier versions stored
        meta.setdefault("times", sorted({1.0, *of.times}, reverse=True))
    writer.finish(name, tables(of, seed_of(seed, name), ladder), meta)


def write_store(
    path: Path, of: Manifest, names: Iterable[str] = ("s0", "s1", "s2"), seed: int = 0, closed: bool = False
) -> Path:
    """A store of finished random samplings; the first one's ladder was not measured."""
    with StoreWriter.open(path, of) as writer:
        for index, name in enumerate(names):
            add_sampling(writer, name, seed, ladder=index > 0)
        if closed:
            writer.close_units()
    return path
