"""Units from a plan that was compiled before: its masks and anchors, without the statistics behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from calibatt.compiler.bits import Bits, pack, unpack
from calibatt.compiler.cost import Device
from calibatt.compiler.errors import CompileError
from calibatt.compiler.ir import Groups, Job, UnitIR, UnitMeans, full_bits
from calibatt.compiler.passes import Pass
from calibatt.compiler.stats import Manifest
from calibatt.plans import FRAMES, NO_ANCHORS, ROWS, Blocks, PackedLayer, PlanFile

PASSES = ("fill-gaps", "merge-times", "merge-heads", "schedule", "lower")
"""What can be done to masks alone."""
DEFAULT_PASSES = "schedule,lower"


def check_passes(passes: Sequence[Pass]) -> None:
    """Refuses passes that need statistics.

    Raises:
        CompileError: Names the first.
    """
    for each in passes:
        if each.name not in PASSES:
            why = "the rest needs statistics, and a plan has none"
            raise CompileError(f"passes of --from-plan must be {', '.join(PASSES)} ({why}), got {each.name!r}")


class PlanSource:
    """A plan as what `run` starts from.

    Args:
        path: Of the plan.
        block_sizes: Of the new plan: multiples of the old ones; the old ones if absent.

    Raises:
        PlanError: The plan cannot be read.
        CompileError: Blocks that are no multiples: what a smaller one would keep was never recorded.
    """

    def __init__(self, path: Path, block_sizes: Blocks | None = None) -> None:
        self.path = path
        self.plan = PlanFile.read(path)
        self.blocks = block_sizes or self.plan.blocks
        old, new = self.plan.blocks, self.blocks
        self._times = (new.block_q // old.block_q, new.block_k // old.block_k)
        if (old.block_q * self._times[0], old.block_k * self._times[1]) != (new.block_q, new.block_k):
            why = "what a smaller block would keep was never recorded"
            rule = f"be multiples of the plan's {old.block_q} and {old.block_k} ({why})"
            raise CompileError(f"blocks of --from-plan must {rule}, got {new.block_q} and {new.block_k}")

    def __reduce__(self) -> tuple[type[PlanSource], tuple[Path, Blocks]]:
        return PlanSource, (self.path, self.blocks)

    def make_job(self, device: Device) -> Job:
        """What is known before any unit is made; the manifest says what the plan says."""
        plan = self.plan
        times = tuple(segment.time for segment in plan.segments)
        if sorted(set(times)) != list(times):
            raise CompileError(f"{self.path}: segments must stand for ascending times, got {times}")
        manifest = Manifest(plan.signature, plan.grid, self.blocks, times)
        return Job(manifest, (), device, np.ones(len(times)), votes=False)

    def unit(self, job: Job, time_index: int, layer: int) -> UnitIR:
        """One layer of one segment, its masks decided; errors are not known and 0.

        Raises:
            PlanError: The layer is damaged.
            CompileError: It has anchors that differ from frame to frame.
        """
        packed, manifest = self.plan.packed(time_index, layer), job.manifest
        heads, k_blocks = manifest.model.heads, manifest.k_blocks
        keep = np.repeat(full_bits(manifest.q_blocks, k_blocks)[None], heads, 0)
        required = np.zeros_like(keep)
        unit = UnitIR(time_index, layer, manifest.grid, self.blocks, UnitMeans(), required)
        unit.anchors = [self._groups(packed, head) for head in range(heads)]
        if not any(unit.anchors):
            unit.anchors = []
        for head in range(heads):
            bits = packed.head_bits(head)
            if bits is None:
                bits = full_bits(packed.tiles(head), packed.k_blocks)
            bits = coarser(bits, packed.k_blocks, *self._times)
            if unit.anchors and unit.anchors[head] is not None:
                unit.packed[head] = bits
            else:
                keep[head] = bits
        required[...] = _first_blocks(keep)
        unit.keep, unit.choice, unit.error = keep, ["of the plan"] * heads, np.zeros(heads)
        return unit

    def _groups(self, layer: PackedLayer, head: int) -> Groups | None:
        pattern = int(layer.head_anchor[head])
        if pattern == NO_ANCHORS:
            return None
        part = slice(int(layer.anchor_ptr[pattern]), int(layer.anchor_ptr[pattern + 1]))
        starts, rows = layer.group_start[part], layer.group_anchor[part]
        if layer.anchor_axis[pattern] == FRAMES:
            return Groups(FRAMES, tuple(starts.tolist()), tuple(rows.tolist()))
        grid = layer.grid
        by_frame = [np.flatnonzero(starts // grid.height == frame) for frame in range(grid.frames)]
        found = {
            (tuple((starts[at] % grid.height).tolist()), tuple((rows[at] % grid.height).tolist())) for at in by_frame
        }
        if len(found) > 1:
            raise CompileError(f"{self.path}: anchors must be the same in every frame, got {len(found)} kinds")
        return Groups(ROWS, *found.pop())


def coarser(bits: Bits, k_blocks: int, times_q: int, times_k: int) -> Bits:
    """A packed mask over blocks that are some times larger: they keep what any of their parts keeps."""
    if (times_q, times_k) == (1, 1):
        return bits
    keep = unpack(bits, k_blocks)
    keep = np.logical_or.reduceat(keep, np.arange(0, len(keep), times_q), axis=0)
    return pack(np.logical_or.reduceat(keep, np.arange(0, k_blocks, times_k), axis=1))


def _first_blocks(keep: Bits) -> Bits:
    """The first block that each row of packed masks keeps, alone."""
    byte = (keep != 0).argmax(-1)[..., None]
    first = np.take_along_axis(keep, byte, -1)
    found = np.zeros_like(keep)
    np.put_along_axis(found, byte, first & (~first + np.uint8(1)), -1)
    return found
