"""Small whole plans for tests."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from calibatt.plans import (
    BF16,
    DENSE,
    FRAMES,
    INT8,
    INT8_FP8,
    NO_ANCHORS,
    ROWS,
    Blocks,
    LayerSchedule,
    ModelSignature,
    PlanFile,
    Segment,
    StoredLayers,
    TokenGrid,
)
from calibatt.plans.encoding import encode
from calibatt.plans.masks import natural_order
from support.schedules import ANCHORS, random_schedule

GRID = TokenGrid(frames=2, height=3, width=13)
BLOCKS = Blocks(16, 16)


def tiny_schedule(variant: int, frames: bool = False) -> LayerSchedule:
    """Four heads over 5 key blocks: listed, dense, sharing the first one's lists, anchored; the same on any machine.

    With `frames`, the third head computes the second frame only, which stands for both, and two heads are of 8 bits.
    """
    lists = [1 << tile | 1 << (2 * tile + variant) % 5 for tile in (0, 1, 2, 3, 4, 1, 2, 3, 4)]
    return LayerSchedule(
        grid=GRID,
        blocks=BLOCKS,
        list_bits=np.array(lists, np.uint8)[:, None],
        head_list=np.array([0, DENSE, 0, 5], dtype=np.int32),
        head_anchor=np.array([NO_ANCHORS, NO_ANCHORS, 1 if frames else NO_ANCHORS, 0], dtype=np.int32),
        anchor_ptr=np.array([0, 4, 5][: 3 if frames else 2], dtype=np.int32),
        anchor_axis=np.array([ROWS, FRAMES][: 2 if frames else 1], dtype=np.int32),
        group_start=np.array([0, 2, 3, 4, 0][: 5 if frames else 4], dtype=np.int32),
        group_anchor=np.array([1, 2, 3, 4 + variant % 2, 1][: 5 if frames else 4], dtype=np.int32),
        tile_order=np.roll(np.arange(5 + 5 + (3 if frames else 5) + 4, dtype=np.int32), variant),
        head_precision=np.array([INT8, BF16, INT8_FP8, BF16] if frames else [BF16] * 4, np.uint8),
    )


def tiny_plan(**changes: Any) -> PlanFile:
    """Two segments and two layers of `tiny_schedule`, every header value set.

    `changes` replace fields; with another signature or other segments nothing is predicted unless they say so.
    """
    values: dict[str, Any] = {
        "signature": ModelSignature("TinyTransformer", layers=2, heads=4, head_dim=8, weights_digest="00ff"),
        "grid": GRID,
        "blocks": BLOCKS,
        "segments": (Segment(0.0, 0.375, 0.25), Segment(0.375, 1.0, 0.75)),
        "schedules": [[tiny_schedule(2 * segment + layer) for layer in (0, 1)] for segment in (1, 2)],
        "passes": "vote{agreement=0.5},select{max-error=0.02},lower",
        "scheduler_hint": {"class": "UniPCMultistepScheduler", "flow_shift": 5.0},
        "provenance": {"samples": 3, "prompts_digest": "abcd", "versions": {"calibatt": "0.1.0"}},
        "predicted": {
            "device": "a test",
            "planned_ms": [[0.5, 0.625], [0.75, 0.875]],
            "dense_ms": [[1.0, 1.0], [1.0, 1.0]],
        },
        "license": "CC0-1.0",
        "notes": "Lists out of thin air: no model will like it.",
    }
    if {"signature", "segments"} & set(changes):  # of other shapes
        del values["predicted"]
    values |= changes
    if not isinstance(values["schedules"], StoredLayers):
        values["schedules"] = StoredLayers.of(values["schedules"])
    return PlanFile(**values)


def frames_plan() -> PlanFile:
    """`tiny_plan` with anchor frames in its second segment."""
    first, _ = tiny_plan().schedules
    return tiny_plan(schedules=[first, [tiny_schedule(4 + layer, frames=True) for layer in (0, 1)]])


def random_plan(seed: int) -> PlanFile:
    """A small plan of any kind: grid, blocks, segments and their bases, layers, heads and lists are drawn."""
    rng = np.random.default_rng(seed)
    grid = TokenGrid(*(int(rng.integers(1, most)) for most in (4, 6, 20)))
    blocks = Blocks(*(int(rng.choice([16, 16, 32, 64])) for _ in range(2)))
    count, layers, heads = int(rng.choice([1, 1, 1, 2, 2, 3, 6])), int(rng.integers(1, 4)), int(rng.integers(1, 5))
    edges = [0.0, *np.sort(rng.random(count - 1)).tolist(), 1.0]
    segments = tuple(Segment(start, stop, (start + stop) / 2) for start, stop in pairwise(edges))
    bases: list[int] = []
    for segment in range(count):  # each of the one before it, of the first of all, or of itself
        bases.append(int(rng.choice([max(segment - 1, 0), 0, segment])))
    drawn = [[_random_layer(rng, grid, blocks, heads) for _ in range(layers)] for _ in range(count)]
    encoded = [
        [encode(layer, None if base == at else drawn[base][index]) for index, layer in enumerate(drawn[at])]
        for at, base in enumerate(bases)
    ]
    return PlanFile(
        signature=ModelSignature("Any", layers, heads, 8),
        grid=grid,
        blocks=blocks,
        segments=segments,
        schedules=StoredLayers("", grid, blocks, heads, bases, encoded),
        predicted={
            "planned_ms": rng.random((count, layers)).tolist(),
            "head_price": rng.random((count, layers, heads)).tolist(),
            "latent_db": {"mean": -1.5, "standard_error": 1, "samplings": 3},
        }
        if seed % 2
        else {},
    )


def _random_layer(rng: np.random.Generator, grid: TokenGrid, blocks: Blocks, heads: int) -> LayerSchedule:
    def some() -> list[int]:
        return np.flatnonzero(rng.random(heads) < 0.3).tolist()

    found = random_schedule(
        rng, grid, blocks, heads, float(rng.choice([0, 0.3, 1])), dense_heads=some(), shared_heads=some(),
        anchored_heads=some(), anchors=ANCHORS, patterns=[None, 1][int(rng.integers(2))],
        precisions=rng.choice([BF16, BF16, INT8, INT8_FP8], heads).tolist(),
    )  # fmt: skip
    return found if rng.random() < 0.5 else replace(found, tile_order=natural_order(found))
