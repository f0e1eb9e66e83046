"""Jobs for tests: statistics in memory that pass for a store; on disk they are `stats.write_store`'s."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np

from calibatt.compiler.bits import count, unpack
from calibatt.compiler.cost import Device, Speed
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.ir import Groups, Job, UnitIR, packed_bits
from calibatt.compiler.language import parse_passes
from calibatt.compiler.menu import Menu
from calibatt.compiler.pipeline import Account, in_turn, run
from calibatt.compiler.stats import Manifest, SamplingTables, Table, Unit, combined
from calibatt.plans import INT8, INT8_FP8, TokenGrid
from calibatt.tools.studies.in_memory import MemoryShelf
from support import stats

DEVICE = Device("test", "made up", tflops=1.0)
EIGHT = replace(DEVICE, eight_bit={INT8: Speed({1: 0.875}), INT8_FP8: Speed({1: 0.75}, prepass_ns=0.01)})
"""A device with 8 bits; the pre-pass of a head of `stats.manifest` takes as long as 0.7 of its blocks."""


class MemoryStore:
    """What `gather` asks of a store.

    Args:
        of: The manifest.
        parts: Units of one sampling each, by sampling, time and layer.
        tables: Of each sampling, by name.
    """

    def __init__(
        self, of: Manifest, parts: dict[tuple[str, int, int], Unit], tables: dict[str, SamplingTables]
    ) -> None:
        self.manifest, self.parts, self.tables = of, parts, tables
        self.samplings = tuple(sorted(tables))
        self.meta: dict[str, dict[str, Any]] = {name: {"prompt": name} for name in self.samplings}

    def unit(self, time_index: int, layer: int) -> Unit:
        return combined([self.parts[name, time_index, layer] for name in self.samplings])

    def table(self) -> Table:
        return Table(tuple(self.tables[name] for name in self.samplings))


def memory_store(of: Manifest, samples: int = 3, seed: int = 0, copies: float = 1.0) -> MemoryStore:
    """Random samplings s0, s1, ...: what `stats.write_store` writes, but for the first one's ladder.

    Args:
        of: The manifest.
        samples: How many.
        seed: Of all numbers.
        copies: Factor on what copies of rows and frames cost.
    """
    names = [f"s{sample}" for sample in range(samples)]
    places = [(time, layer) for time in range(len(of.times)) for layer in range(of.model.layers)]
    parts = {
        (name, *at): stats.unit(of, name, stats.seed_of(seed, name, *at), copies) for name in names for at in places
    }
    return MemoryStore(of, parts, {name: stats.tables(of, stats.seed_of(seed, name)) for name in names})


def die(index: int, argument: Any) -> None:
    """What the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def gathered(of: Manifest | None = None, **options: Any) -> tuple[Job, list[UnitIR]]:
    """A job of random statistics and its units, no pass run yet."""
    source = StatisticsSource(memory_store(of or stats.manifest(), **options))
    found = source.make_job(DEVICE)
    return found, [source.unit(found, *found.place(index)) for index in range(found.units)]


class Compiled(Job):
    """A job after some passes, with its units in memory."""

    all: list[UnitIR]
    accounts: list[Account]

    def at_time(self, time_index: int) -> list[UnitIR]:
        layers = self.manifest.model.layers
        return self.all[time_index * layers : (time_index + 1) * layers]


def compile_store(store: Any, passes: str, device: Device = DEVICE) -> tuple[Compiled, list[Account]]:
    """The job of a store after some passes."""
    source, shelf = StatisticsSource(store), MemoryShelf()
    found = source.make_job(device)
    accounts = run(source, found, parse_passes(passes), shelf, in_turn).accounts
    found.__class__ = Compiled
    found.all = [shelf.units[index] for index in range(found.units)]
    return found, accounts


def compiled(
    passes: str, of: Manifest | None = None, device: Device = DEVICE, **options: Any
) -> tuple[Compiled, list[Account]]:
    """The job of random statistics after some passes."""
    return compile_store(memory_store(of or stats.manifest(), **options), passes, device)


def mask(unit: UnitIR, head: int) -> np.ndarray:
    """bool ``(Q, K)``, the head's mask over the original query blocks."""
    return unpack(unit.keep[head], unit.k_blocks)


def tiles(unit: UnitIR, head: int) -> np.ndarray:
    """bool ``(tiles, K)``, the head's mask over its packed tiles (those of its anchors, where it has any)."""
    return unpack(unit.tile_bits(head), unit.k_blocks)


def random_anchors(rng: np.random.Generator, axis: int, grid: TokenGrid) -> Groups:
    """Groups of any lengths with any anchors."""
    members = Groups(axis, (), ()).members(grid)
    starts = [0, *(np.flatnonzero(rng.random(members - 1) < 0.5) + 1).tolist()]
    anchors = rng.integers(starts, [*starts[1:], members])
    return Groups(axis, tuple(starts), tuple(anchors.tolist()))


def check_packed_blocks(menu: Menu, unit: UnitIR, head: int, groups: Groups) -> None:
    """`Menu.packed_blocks` against every mask, made and packed."""
    masks = [menu.bits(mask, unit, head) for mask in menu.masks]
    expected = [int(count(packed_bits(bits, unit.grid, unit.blocks, groups), (0, 1))) for bits in masks]
    assert menu.packed_blocks(unit, head, groups).tolist() == expected
