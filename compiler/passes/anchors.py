"""Rows, or whole frames, that are computed once and copied to their neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from calibatt.compiler.bits import Bits, count
from calibatt.compiler.ir import Float64, Groups, Int64, Job, UnitIR, packed_bits
from calibatt.compiler.menu import Menu
from calibatt.compiler.passes import Findings, Pass
from calibatt.plans import FRAMES, ROWS


@dataclass(frozen=True)
class Anchors(Pass):
    """Gives heads whose output repeats anchors (rows or frames), where that is cheaper than computing every token.

    For each head, dynamic programming partitions a frame's rows into groups with an anchor each, so that the error of
    copies plus the price of the computed rows is least (a row has its share of the head's predicted milliseconds).
    Every frame has the same groups. The video's frames are partitioned likewise. The head adopts the better of the two
    partitions, with the best mask of the last `select`'s menu, if both together are still cheaper when lowered: a
    packed tile keeps every block that one of its queries keeps, so packing distant rows can cost more than it saves.

    Another `select` after it spends what was saved. Milliseconds are then worth less, and heads whose anchors are no
    longer worth their error lose them again.

    Heads stay in the precision that `select` gave them.

    Requires: `select`, whose multiplier prices a millisecond.
    Ensures: no head computes more blocks than before.

    Args:
        max_group_rows: Most rows of a group, its anchor included; 1: no anchor rows.
        max_group_frames: Most frames of a group; 1: no anchor frames.

    Raises:
        PassError: An option is out of range, or `select` has not been run.
    """

    name: ClassVar[str] = "anchors"
    max_group_rows: int = 4
    max_group_frames: int = 8

    def __post_init__(self) -> None:
        self.require(self.max_group_rows >= 1, "max-group-rows", "be at least 1", self.max_group_rows)
        self.require(self.max_group_frames >= 1, "max-group-frames", "be at least 1", self.max_group_frames)

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        self.require(any(each.name == "select" for each in before), "select", "come before", "none")
        self.refuse_after(before, "anchors", "repeat", "schedule")

    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        multiplier = job.multiplier
        assert multiplier is not None
        keep, unit.error, unit.copy_error = unit.keep.copy(), unit.error.copy(), np.zeros(unit.heads)
        counts: Findings = {"heads": unit.heads, "of_frames": 0.0, "computed": 0.0}
        best: dict[int, Offer] = {}
        market = Market(job, unit, multiplier * int(job.steps.counts[unit.time_index]))
        offered = set()
        for axis, errors, most in (
            (ROWS, unit.means.row_error, self.max_group_rows),
            (FRAMES, unit.means.frame_error, self.max_group_frames),
        ):
            if errors is None or errors.shape[2] == 0 or most == 1:
                continue
            for head, groups in market.groups(axis, errors, most):
                offered.add(head)
                offer = market.offer(head, groups, copied(errors[head], groups))
                if offer.gain > 0 and (head not in best or offer.gain > best[head].gain):
                    best[head] = offer
        for head, offer in best.items():
            unit.anchors[head], unit.packed[head], market.table.packed[head] = offer.groups, offer.packed, offer.blocks
            unit.copy_error[head], unit.error[head] = offer.copied, offer.error
            keep[head], unit.choice[head] = offer.keep, offer.choice
            counts["of_frames"] += offer.groups.axis == FRAMES
            counts["computed"] += len(offer.groups.anchors) / offer.groups.members(unit.grid)
        unit.keep = keep
        counts["heads_with_anchors"] = len(best)
        counts["dearer_when_lowered"] = len(offered) - len(best)
        return counts

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        adopted, computed = total["heads_with_anchors"], total.pop("computed")
        findings: dict[str, Any] = {name: int(value) for name, value in total.items()}
        return {**findings, "computed_in_them": computed / adopted if adopted else 1.0}


@dataclass(frozen=True, eq=False)
class Offer:
    """Anchors for a head, and the mask that goes with them.

    Args:
        gain: Milliseconds saved x their price - error added.
        groups: The anchors.
        copied: Error of the copies.
        error: Error of copies and mask together.
        choice: Name of the mask.
        keep: The mask over the original query blocks, packed.
        packed: The mask over the tiles of the anchors, packed.
        blocks: int64 ``(masks,)``, blocks of each mask of the menu with these anchors.
    """

    gain: float
    groups: Groups
    copied: float
    error: float
    choice: str
    keep: Bits
    packed: Bits
    blocks: Int64


class Market:
    """Prices masks and anchors of a unit's heads together.

    A head with anchors pays less for a block, and so is better off with more of them: its mask is chosen anew from the
    menu of the last `select`, and its groups for that mask.

    Args:
        job: The job of the unit.
        unit: A unit whose masks are chosen, without anchors.
        multiplier: The price of a millisecond of this unit.
    """

    def __init__(self, job: Job, unit: UnitIR, multiplier: float) -> None:
        self.unit = unit
        self.block_price = multiplier * job.block_ms * job.block_costs(unit.precision)
        _, self.blocks = unit.computed()
        assert unit.menu is not None
        self.table, self.menu = unit.menu, Menu(job, unit.menu.parts)

    def groups(self, axis: int, errors: Float64, most: int) -> Iterator[tuple[int, Groups]]:
        """Heads for which anchors on this axis seem cheaper than computing every token, each with its best groups.

        Args:
            axis: `ROWS` or `FRAMES`.
            errors: float64 ``(H, members, 2 R)``, what a member adds to the head's error if it is a copy.
            most: Most members of a group.
        """
        members = errors.shape[1]
        added = group_errors(errors, most)
        partitions = best_groups(added, self.blocks * self.block_price / members)
        share = np.array([len(starts) / members for starts, _ in partitions])
        cost = (share * self.block_price)[:, None] * self.table.blocks + self.table.error
        chosen = np.take_along_axis(self.table.blocks, cost.argmin(1)[:, None], 1)[:, 0]
        blocks = np.where(share < 1, chosen, self.blocks)
        partitions = best_groups(added, blocks * self.block_price / members)
        for head, (starts, anchors) in enumerate(partitions):
            if len(starts) < members:
                yield head, Groups(axis, starts, anchors)

    def offer(self, head: int, groups: Groups, copied: float) -> Offer:
        """The best mask with these anchors, as lowered; its gain is 0 if it computes more than the head does now."""
        unit = self.unit
        price = self.block_price[head]
        before = self.blocks[head] * price + float(unit.error[head])
        packed_blocks = self.menu.packed_blocks(unit, head, groups)
        cost = packed_blocks * price + self.table.error[head]
        at = int(np.where(packed_blocks <= self.blocks[head], cost, np.inf).argmin())
        mask = self.menu.masks[at]
        keep = self.menu.bits(mask, unit, head)
        packed = packed_bits(keep, unit.grid, unit.blocks, groups)
        computed = int(count(packed, (0, 1)))
        error = float(self.table.error[head, at]) + copied + float(unit.precision_error[head])
        after = computed * price + error
        gain = float(before - after) if computed <= self.blocks[head] else -1.0
        return Offer(gain, groups, copied, error, mask.name, keep, packed, packed_blocks)


def group_errors(member_error: Float64, most_members: int) -> Float64:
    """Error of every short group of members (rows of a frame, or frames), with each of them as its anchor.

    Args:
        member_error: float64 ``(H, Y, 2 R)``: error of member r + d standing for member r; offsets -R..-1, 1..R.
        most_members: Longest group.

    Returns:
        float64 ``(H, Y, G, G)``: of the group of ``g + 1`` members from y with its anchor at ``y + a``, the sum of
        its members' errors; infinite where one of them does not exist or is beyond the radius.
    """
    heads, members, offsets = member_error.shape
    radius = offsets // 2
    most = min(most_members, 2 * radius + 1, members)
    stands = np.full((heads, members, members), np.inf)  # [member, anchor]
    stands[:, np.arange(members), np.arange(members)] = 0.0
    for index, offset in enumerate((*range(-radius, 0), *range(1, radius + 1))):
        those = np.arange(max(0, -offset), min(members, members - offset))
        stands[:, those, those + offset] = member_error[:, those, index]
    errors = np.full((heads, members, most, most), np.inf)
    for first in range(members):
        for size in range(1, min(most, members - first) + 1):
            group = slice(first, first + size)
            errors[:, first, size - 1, :size] = stands[:, group, group].sum(1)
    return errors


def best_groups(errors: Float64, price: Float64) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The cheapest partition of the members for each head: exact, by dynamic programming.

    Args:
        errors: float64 ``(H, Y, G, G)`` of `group_errors`.
        price: float64 ``(H,)``, the price of an anchor.

    Returns:
        For each head the starts and anchors of its groups. Of equal partitions the one with the shortest last group and
        the first anchor.
    """
    heads, members, most, _ = errors.shape
    anchor = errors.argmin(3)
    group = errors.min(3)
    best = np.zeros((heads, members + 1))
    size_at = np.zeros((heads, members + 1), dtype=np.int64)
    for stop in range(1, members + 1):
        sizes = np.arange(1, min(most, stop) + 1)
        cost = best[:, stop - sizes] + group[:, stop - sizes, sizes - 1] + price[:, None]
        at = cost.argmin(1)
        best[:, stop], size_at[:, stop] = cost[np.arange(heads), at], sizes[at]
    return [_trace(size_at[head], anchor[head]) for head in range(heads)]


def _trace(size_at: Int64, anchor: Int64) -> tuple[tuple[int, ...], tuple[int, ...]]:
    starts, anchors, stop = [], [], len(size_at) - 1
    while stop:
        size = int(size_at[stop])
        stop -= size
        starts.append(stop)
        anchors.append(stop + int(anchor[stop, size - 1]))
    return tuple(reversed(starts)), tuple(reversed(anchors))


def copied(errors: Float64, groups: Groups) -> float:
    """Error of all copies, from the errors ``(members, 2 R)`` of each member."""
    members, radius = len(errors), errors.shape[1] // 2
    offset = np.repeat(groups.anchors, np.diff([*groups.starts, members])) - np.arange(members)
    copies = np.flatnonzero(offset)
    return float(errors[copies, offset[copies] + radius - (offset[copies] > 0)].sum())
