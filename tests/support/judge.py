"""Both readers of a plan file, asked the same: what `calibatt.plans` says is what FORMAT.md says, or both refuse it."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from calibatt.plans import DENSE, NO_ANCHORS, LayerSchedule, PlanFile
from calibatt.plans.errors import PlanError
from support import second_reader

KNOWN = ("passes", "scheduler_hint", "provenance", "predicted", "license", "notes")


class Disagreement(Exception):
    """A file that the two readers do not take for the same."""


def first(path: Path, threads: bool = True) -> PlanFile | PlanError:
    """What `calibatt.plans` says of a file: a plan with every layer proved, on all cores or on one, or why not."""
    try:
        plan = PlanFile.read(path)
        plan.prove() if threads else deque(plan.walk(), maxlen=0)
        return plan
    except PlanError as error:
        return error


def judge(path: Path, found: PlanFile | PlanError) -> None:
    """Asks the second reader about a file, too.

    Raises:
        Disagreement: It refuses what was accepted, accepts what was refused, or takes something to mean another thing.
    """
    try:
        expected: second_reader.Plan | second_reader.Refused = second_reader.read(path.read_bytes())
    except second_reader.Refused as error:
        expected = error
    if isinstance(found, PlanError) or isinstance(expected, second_reader.Refused):
        if isinstance(found, PlanError) != isinstance(expected, second_reader.Refused):
            says = f"{type(found).__name__}: {found}" if isinstance(found, PlanError) else "accepted"
            raise Disagreement(
                f"{says}; the second reader: {expected if isinstance(expected, Exception) else 'accepted'}"
            )
        return
    for what, ours, theirs in zip(("header", "layer"), _parts(found), _expected(expected), strict=True):
        if repr(ours) != repr(theirs):
            raise Disagreement(f"{what}: {ours!r:.400} for {theirs!r:.400}")
    for segment, layer, packed in found.walk():
        theirs_layer = expected.segments[segment][layer]
        if broken := _difference(packed, theirs_layer):
            raise Disagreement(f"segment {segment}, layer {layer}: {broken}")


def _parts(plan: PlanFile) -> tuple[Any, Any]:
    header = {name: getattr(plan, name) for name in KNOWN}
    header |= {"model": asdict(plan.signature), "grid": asdict(plan.grid), "blocks": asdict(plan.blocks)}
    header["segments"] = [asdict(segment) for segment in plan.segments]
    return header, [len(layers) for layers in plan.schedules.layers]


def _expected(plan: second_reader.Plan) -> tuple[Any, Any]:
    """The same of the second reader, what a later version added left out."""
    header = {name: plan.header[name] for name in KNOWN}
    for name, keys in (
        ("model", ("architecture", "layers", "heads", "head_dim", "weights_digest")),
        ("grid", ("frames", "height", "width")),
        ("blocks", ("block_q", "block_k")),
    ):
        header[name] = {key: plan.header[name][key] for key in keys}
    header["segments"] = [{key: each[key] for key in ("start", "stop", "time")} for each in plan.header["segments"]]
    return header, [len(layers) for layers in plan.segments]


def _difference(schedule: LayerSchedule, expected: second_reader.Layer) -> str:
    """In what a layer differs, with everything that kernels index by looked at as they see it; empty: in nothing."""
    row_ptr, col_idx = schedule.row_ptr, schedule.col_idx
    arrays = (row_ptr, schedule.head_list, schedule.head_anchor, schedule.tile_order)
    if any(array.dtype != np.int32 for array in arrays) or col_idx.dtype != np.uint16:
        return "dtypes"
    if not np.array_equal(schedule.tile_order, expected.order):
        return "tile order"
    if schedule.head_precision.tolist() != expected.precision:
        return "precision of heads"
    if row_ptr[-1] != len(col_idx) or schedule.heads != len(expected.heads):
        return "ends"
    for head, (mask, anchors) in enumerate(zip(expected.heads, expected.anchors, strict=True)):
        start = int(schedule.head_list[head])
        if mask is None:
            if start != DENSE:
                return f"head {head} is dense"
        else:
            ptr = row_ptr[start : start + len(mask) + 1].astype(np.int64)
            tile, column = np.nonzero(mask)
            if start < 0 or not np.array_equal(ptr, ptr[0] + np.append(0, np.cumsum(mask.sum(1)))):
                return f"lengths of head {head}"
            if not np.array_equal(col_idx[ptr[0] : ptr[-1]], column) or ptr[-1] - ptr[0] != len(tile):
                return f"lists of head {head}"
        pattern = int(schedule.head_anchor[head])
        if (pattern == NO_ANCHORS) != (anchors is None):
            return f"anchors of head {head}"
        if anchors is not None:
            groups = [each.tolist() for each in schedule.groups(pattern)]
            if (int(schedule.anchor_axis[pattern]), *groups) != anchors:
                return f"groups of head {head}"
    return ""
