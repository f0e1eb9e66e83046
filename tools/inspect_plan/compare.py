"""Two plans side by side: what their headers say, and how much their masks have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from calibatt.plans import NO_ANCHORS, PackedLayer, PlanFile
from calibatt.plans.errors import legible

HEADER = ("signature", "grid", "blocks", "passes", "scheduler_hint", "provenance", "license", "notes")


def compare(one: PlanFile, other: PlanFile) -> dict[str, Any]:
    """What differs, as values that JSON can hold.

    For every segment of the first plan and the second's at its time: both densities; blocks that both compute / that
    either does; heads that compute other rows or frames (other anchors), whose blocks are not compared.
    """
    header = {
        name: [str(getattr(one, name)), str(getattr(other, name))]
        for name in HEADER
        if getattr(one, name) != getattr(other, name)
    }
    header |= {} if one.segments == other.segments else {"segments": [str(len(one.segments)), str(len(other.segments))]}
    found: dict[str, Any] = {"same": one.digest == other.digest, "header": header}
    if (one.signature.layers, one.signature.heads, one.grid, one.blocks) != (
        *(other.signature.layers, other.signature.heads),
        *(other.grid, other.blocks),
    ):
        return found | {"segments": None}
    return found | {"segments": _segments(one, other)}


def _segments(one: PlanFile, other: PlanFile) -> list[dict[str, Any]]:
    times = [segment.time for segment in one.segments]
    densities, common, either = np.zeros((len(times), 2)), np.zeros(len(times), int), np.zeros(len(times), int)
    apart = np.zeros(len(times), int)
    for layer in range(one.signature.layers):  # neighbouring segments of a layer are decoded together
        for index, time in enumerate(times):
            first, last = one.packed(index, layer), other.packed(other.segment_index(time), layer)
            densities[index] += first.density, last.density
            found = [_head(first, last, head) for head in range(first.heads)]
            apart[index] += found.count(None)
            for pair in found:
                if pair is not None:
                    common[index] += pair[0]
                    either[index] += pair[1]
    return [
        {
            "time": time,
            "densities": (densities[index] / one.signature.layers).tolist(),
            "in_common": float(common[index] / either[index]) if either[index] else 1.0,
            "heads_of_other_rows": int(apart[index]),
        }
        for index, time in enumerate(times)
    ]


def _head(one: PackedLayer, other: PackedLayer, head: int) -> tuple[int, int] | None:
    """Blocks that both compute, and that either does; None where they compute other rows or frames."""
    if _anchors(one, head) != _anchors(other, head):
        return None
    masks = [one.head_bits(head), other.head_bits(head)]
    counts = [one.computed_blocks(head), other.computed_blocks(head)]
    if masks[0] is None or masks[1] is None:
        common = min(counts)
    else:
        common = int(np.bitwise_count(masks[0] & masks[1]).sum())
    return common, sum(counts) - common


def _anchors(layer: PackedLayer, head: int) -> tuple[int, list[int]] | None:
    """What the head computes rows or frames of, and which; None: all."""
    pattern = int(layer.head_anchor[head])
    if pattern == NO_ANCHORS:
        return None
    part = slice(int(layer.anchor_ptr[pattern]), int(layer.anchor_ptr[pattern + 1]))
    return int(layer.anchor_axis[pattern]), layer.group_anchor[part].tolist()


def show(value: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `compare` found."""
    console = console or Console()
    if value["same"]:
        console.print("the plans are the same, byte for byte")
        return
    for name, texts in value["header"].items():
        for sign, text in zip("-+", texts, strict=True):
            console.print(f"{sign} {name}: {legible(text)}", markup=False, highlight=False, soft_wrap=True)
    if value["segments"] is None:
        console.print("their masks cannot be compared: other layers, heads, tokens or blocks")
        return
    table = Table(title="masks", title_justify="left")
    for name in ("time", "density, first", "second", "blocks in common", "heads of other rows"):
        table.add_column(name, justify="right")
    for part in value["segments"]:
        first, second = (f"{density:.4f}" for density in part["densities"])
        table.add_row(
            f"{part['time']:.3f}", first, second, f"{part['in_common']:.1%}", str(part["heads_of_other_rows"])
        )
    console.print(table)
