"""Passes on masks drawn as text, before and after: what a golden file of a pass holds.

    One line that says what the case is about.
    passes: merge-heads{max-growth=0.5}

    before
    time 0.25
      #.#...  ###...
      .#.#..  .#.#..
      ...
    after
    time 0.25
      ###...  ###...
      ...
    lists 0 0
    found {'blocks_added': 1, 'pairs': 1}

Query blocks go down, key blocks right, heads side by side. Instead of ``after`` and what follows, a case that must be
refused has a line ``refused`` with the error. ``lists`` is there if the passes end with lower: each head's first list.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibatt.compiler.bits import pack, unpack
from calibatt.compiler.cost import Device
from calibatt.compiler.errors import CompileError
from calibatt.compiler.ir import Job, UnitIR, UnitMeans
from calibatt.compiler.language import parse_passes
from calibatt.compiler.pipeline import in_turn, run
from calibatt.compiler.stats import Manifest, Table
from calibatt.compiler.steps import steps_of
from calibatt.plans import PRECISIONS, Blocks, ModelSignature, TokenGrid
from calibatt.tools.studies.in_memory import MemoryShelf
from support.jobs import DEVICE

GOLDENS = Path(__file__).parent.parent / "compiler" / "golden"
BLOCK = 16


@dataclass(frozen=True)
class DrawnSource:
    """One layer whose masks are bool ``keep[time][head]``, ``(Q, Q)``."""

    times: tuple[float, ...]
    keep: np.ndarray

    def make_job(self, device: Device) -> Job:
        times, heads, q_blocks, _ = self.keep.shape
        signature, grid = ModelSignature("Drawn", 1, heads, BLOCK), TokenGrid(1, 1, BLOCK * q_blocks)
        manifest = Manifest(signature, grid, Blocks(BLOCK, BLOCK), self.times)
        return Job(manifest, device, steps_of(self.times, ()), np.ones(times), Table(()))

    def unit(self, job: Job, time_index: int, layer: int) -> UnitIR:
        keep = pack(self.keep[time_index])
        heads = len(keep)
        first = self.keep[time_index].argmax(-1)[..., None] == np.arange(self.keep.shape[-1])
        means = UnitMeans(
            np.zeros(first.shape, np.uint8),
            np.zeros(heads, np.float32),
            np.zeros((0, heads)),
            np.zeros((0, 0)),
            np.zeros((len(PRECISIONS), heads)),
        )
        unit = UnitIR(
            time_index, layer, job.manifest.grid, job.manifest.blocks, means, pack(first), np.zeros((0, heads))
        )
        unit.keep, unit.choice = keep, ["drawn"] * heads
        return unit


def draw(times: tuple[float, ...], keep: np.ndarray) -> str:
    """The text of masks bool ``(times, H, Q, K)``."""
    lines = []
    for time, heads in zip(times, keep, strict=True):
        lines.append(f"time {time:g}")
        for row in heads.transpose(1, 0, 2):
            lines.append("  " + "  ".join("".join(".#"[int(kept)] for kept in head) for head in row))
    return "\n".join(lines)


def read(text: str) -> DrawnSource:
    """The masks of a text."""
    times: list[float] = []
    rows: list[list[list[list[bool]]]] = []
    for line in text.splitlines():
        if line.startswith("time "):
            times.append(float(line.removeprefix("time ")))
            rows.append([])
        else:
            rows[-1].append([[mark == "#" for mark in head] for head in line.split()])
    return DrawnSource(tuple(times), np.array(rows, bool).transpose(0, 2, 1, 3))


def renewed(text: str) -> str:
    """A golden file as it should be, from its first part: what it is about, passes and masks before."""
    head, _, rest = text.partition("\nbefore\n")
    drawing = rest.split("\nafter\n")[0].split("\nrefused ")[0].rstrip("\n")
    about, passes = head.strip().split("\npasses: ")
    source = read(drawing)
    start = f"{about}\npasses: {passes}\n\nbefore\n{draw(source.times, source.keep)}\n"
    shelf = MemoryShelf()
    try:
        parsed = parse_passes(passes)
        job = source.make_job(DEVICE)
        run(source, job, parsed, shelf, in_turn)
    except CompileError as error:
        return f"{start}refused {error}\n"
    units = [shelf.units[index] for index in range(job.units)]
    after = np.stack([unpack(unit.keep, unit.k_blocks) for unit in units])
    lists = "".join(
        f"lists {' '.join(str(first) for first in unit.lowered.head_list)}\n"
        for unit in units
        if unit.lowered is not None
    )
    findings = {name: value for name, value in sorted(job.findings[parsed[0].name].items())}
    return f"{start}after\n{draw(source.times, after)}\n{lists}found {findings}\n"
