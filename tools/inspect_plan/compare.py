"""Two plans side by side: what their headers say, and how much their masks have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from calibatt.plans import PlanFile
from calibatt.tools.inspect_plan.summary import printable

HEADER = ("signature", "grid", "blocks", "passes", "scheduler_hint", "provenance", "license", "notes")


def compare(one: PlanFile, other: PlanFile) -> dict[str, Any]:
    """What differs, as values that JSON can hold.

    For every segment of the first plan and the second's at its time: both densities; blocks that both compute / that
    either does; heads that compute other rows (another anchor pattern), whose blocks are not compared.
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
    return found | {"segments": [_segment(one, other, index) for index in range(len(one.segments))]}


def _segment(one: PlanFile, other: PlanFile, index: int) -> dict[str, Any]:
    time = one.segments[index].time
    second = other.segment_index(time)
    both = either = apart = 0
    densities = np.zeros(2)
    for layer in range(one.signature.layers):
        first, last = one.packed(index, layer), other.packed(second, layer)
        densities += first.density, last.density
        for head in range(first.heads):
            if first.tiles(head) != last.tiles(head):
                apart += 1
                continue
            masks = [first.head_bits(head), last.head_bits(head)]
            counts = [first.computed_blocks(head), last.computed_blocks(head)]
            if masks[0] is None or masks[1] is None:
                common = min(counts)
            else:
                common = int(np.bitwise_count(masks[0] & masks[1]).sum())
            both, either = both + common, either + sum(counts) - common
    densities /= one.signature.layers
    return {
        "time": time,
        "densities": densities.tolist(),
        "in_common": both / either if either else 1.0,
        "heads_of_other_rows": apart,
    }


def show(value: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `compare` found."""
    console = console or Console()
    if value["same"]:
        console.print("the plans are the same, byte for byte")
        return
    for name, texts in value["header"].items():
        for sign, text in zip("-+", texts, strict=True):
            console.print(f"{sign} {name}: {printable(text)}", markup=False, highlight=False, soft_wrap=True)
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
