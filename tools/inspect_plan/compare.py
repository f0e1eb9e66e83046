"""Two plans side by side: what their headers say, and how much their masks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from calibatt.plans import NO_ANCHORS, LayerSchedule, PlanFile
from calibatt.plans.errors import legible
from calibatt.plans.readable import words

HEADER = ("signature", "grid", "blocks", "passes", "scheduler_hint", "provenance", "license", "notes")


def compare(one: PlanFile, other: PlanFile) -> dict[str, Any]:
    """What differs, as values that JSON can hold.

    For every segment of the first plan and the second's at its time: both densities; blocks that both compute / that
    either does; heads that compute other rows or frames (other anchors), whose blocks are not compared.
    """
    header = {
        name: pair for name in HEADER if (pair := [_plain(getattr(each, name)) for each in (one, other)])[0] != pair[1]
    }
    header |= {} if one.segments == other.segments else {"segments": [len(one.segments), len(other.segments)]}
    differences: dict[str, Any] = {"same": one.digest == other.digest, "header": header}
    if (one.signature.layers, one.signature.heads, one.grid, one.blocks) != (
        *(other.signature.layers, other.signature.heads),
        *(other.grid, other.blocks),
    ):
        return differences | {"segments": None}
    return differences | {"segments": _segments(one, other)}


def _plain(value: Any) -> Any:
    """A value of a header; a dataclass as a mapping of its fields."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _segments(one: PlanFile, other: PlanFile) -> list[dict[str, Any]]:
    times = [segment.time for segment in one.segments]
    densities, common, either = np.zeros((len(times), 2)), np.zeros(len(times), int), np.zeros(len(times), int)
    apart = np.zeros(len(times), int)
    for layer in range(one.signature.layers):  # neighbouring segments of a layer are decoded together
        for index, time in enumerate(times):
            first, last = one.schedules.schedule(index, layer), other.schedule(time, layer)
            densities[index] += first.density, last.density
            pairs = [_head(first, last, head) for head in range(first.heads)]
            apart[index] += pairs.count(None)
            for pair in pairs:
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


def _head(one: LayerSchedule, other: LayerSchedule, head: int) -> tuple[int, int] | None:
    """How many blocks both compute, and how many at least one does; None if their anchors differ."""
    if _anchors(one, head) != _anchors(other, head):
        return None
    masks = [one.head_bits(head), other.head_bits(head)]
    counts = [one.computed_blocks(head), other.computed_blocks(head)]
    if masks[0] is None or masks[1] is None:
        common = min(counts)
    else:
        common = int(np.bitwise_count(masks[0] & masks[1]).sum())
    return common, sum(counts) - common


def _anchors(layer: LayerSchedule, head: int) -> tuple[int, list[int]] | None:
    """Axis and anchors of a head; None if it computes every query."""
    pattern = int(layer.head_anchor[head])
    if pattern == NO_ANCHORS:
        return None
    return int(layer.anchor_axis[pattern]), layer.groups(pattern)[1].tolist()


def _told_apart(one: Any, other: Any) -> list[str]:
    """Two unequal values in words; of mappings only the entries that differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
        one, other = ({key: each[key] for key in keys if key in each} for each in (one, other))
    texts = [words(each) or "none" for each in (one, other)]
    return texts if texts[0] != texts[1] else [texts[0], f"{texts[1]}, but not the same"]


def show(value: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `compare` found."""
    console = console or Console()
    if value["same"]:
        console.print("the plans are the same, byte for byte")
        return
    for name, pair in value["header"].items():
        for sign, text in zip("-+", _told_apart(*pair), strict=True):
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
