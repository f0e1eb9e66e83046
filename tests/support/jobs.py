"""Jobs for tests: statistics in memory that pass for a store, and stores on disk of the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from calibatt.compiler.bits import count
from calibatt.compiler.cost import Device
from calibatt.compiler.gather import StatisticsSource
from calibatt.compiler.ir import Groups, Job, UnitIR, packed_bits
from calibatt.compiler.language import parse_passes
from calibatt.compiler.menu import Menu
from calibatt.compiler.pipeline import Account, in_turn, run
from calibatt.compiler.shelf import MemoryShelf
from calibatt.compiler.stats import Ladders, Manifest, Probe, Store, StoreWriter, UnitStatistics
from calibatt.compiler.stats.probes import ErrorWeights, TimeWeightInfo
from calibatt.plans import TokenGrid
from support import stats

DEVICE = Device("test", "made up", tflops=1.0, tile_us=0.0, store_us=0.0)


class MemoryStore:
    """What `gather` asks of a store, from `units[sample, time_index, layer]`."""

    def __init__(self, of: Manifest, units: dict[tuple[str, int, int], UnitStatistics], weights: Any = None) -> None:
        self.manifest = of
        self.units = units
        self.samples = tuple(sorted({sample for sample, _, _ in units}))
        self.weights = weights

    def unit(self, sample: str, time_index: int, layer: int, planes: bool = True) -> UnitStatistics:
        return self.units[sample, time_index, layer]

    def expect(self, samples: Any, time_index: int, layer: int, planes: bool = True) -> None:
        assert set(samples) <= set(self.samples)
        assert (samples[0], time_index, layer) in self.units

    ladders = None

    def error_weights(self) -> ErrorWeights:
        shape = len(self.manifest.times), self.manifest.model.layers
        time = np.ones(shape[0]) if self.weights is None else np.asarray(self.weights, float)
        info = TimeWeightInfo(0 if self.weights is None else shape[0], (), (), 0.0)
        return ErrorWeights(time, time[:, None] * np.ones(shape), None, info.probes > 0, str(info))


def memory_store(of: Manifest, samples: int = 3, seed: int = 0, weights: Any = None) -> MemoryStore:
    units = {}
    for sample in range(samples):
        for time_index in range(len(of.times)):
            for layer in range(of.model.layers):
                unit_seed = ((seed * 64 + sample) * 64 + time_index) * 64 + layer
                units[f"s{sample}", time_index, layer] = stats.unit(of, unit_seed)
    return MemoryStore(of, units, weights)


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


def compile_store(store: MemoryStore, passes: str) -> tuple[Compiled, list[Account]]:
    """The job of a store after some passes."""
    source, shelf = StatisticsSource(store), MemoryShelf()
    found = source.make_job(DEVICE)
    accounts = run(source, found, parse_passes(passes), shelf, in_turn).accounts
    found.__class__ = Compiled
    found.all = [shelf.units[index] for index in range(found.units)]
    return found, accounts


def compiled(passes: str, of: Manifest | None = None, **options: Any) -> tuple[Compiled, list[Account]]:
    """The job of random statistics after some passes."""
    return compile_store(memory_store(of or stats.manifest(), **options), passes)


def write_store(path: Path, of: Manifest, samples: int = 3, seed: int = 0, probed: bool = False) -> Path:
    """The store of `memory_store` on disk."""
    memory = memory_store(of, samples, seed)
    with StoreWriter.open(path, of) as writer:
        for name in memory.samples:
            sample = writer.begin(name)
            for (owner, time_index, layer), unit in memory.units.items():
                if owner == name:
                    sample.write(time_index, layer, unit)
            sample.finish({"prompt": f"prompt of {name}", "seed": 1})
        for time_index in range(len(of.times)) if probed else ():
            final = 0.5 ** (len(of.times) - time_index)
            writer.write_probe(Probe(memory.samples[0], time_index, final / 0.25, 0.25, final, 1.0))
    return path


SHARES = (0.1, 0.25, 0.5, 0.8)


def errors_of(store: Store, ladders: Ladders, seed: int) -> np.ndarray:
    """Random errors of every level and window of a sample, smaller the more is kept."""
    of, rng = store.manifest, np.random.default_rng(seed)
    shape = (len(of.times), of.model.layers, len(ladders.kinds), len(ladders.shares), of.model.heads)
    rungs = np.sort(rng.random(shape, np.float32), 3)[:, :, :, ::-1]
    windows = rng.random((*shape[:2], len(of.windows), of.model.heads), np.float32)
    return np.concatenate([rungs.reshape(*shape[:2], -1, shape[4]), windows], 2)


def refine_store(path: Path, kinds: tuple[str, ...] = ("row", "votes"), count: int | None = None) -> Store:
    """Random errors for the first samples of a store on disk, all if absent."""
    store = Store.open(path)
    ladders = Ladders(store.samples, kinds, SHARES)
    with StoreWriter.open(path, store.manifest) as writer:
        done = writer.refine(ladders)
        for seed, name in enumerate(store.samples[:count]):
            if name not in done:
                writer.write_errors(name, errors_of(store, ladders, seed), ladders, seconds=1.0)
    return Store.open(path)


def random_anchors(rng: np.random.Generator, axis: int, grid: TokenGrid) -> Groups:
    """Groups of any lengths with any anchors."""
    members = Groups(axis, (), ()).members(grid)
    starts = [0, *(np.flatnonzero(rng.random(members - 1) < 0.5) + 1).tolist()]
    anchors = rng.integers(starts, [*starts[1:], members])
    return Groups(axis, tuple(starts), tuple(anchors.tolist()))


def check_packed_blocks(menu: Menu, unit: UnitIR, head: int, groups: Groups) -> None:
    """`Menu.packed_blocks` against every mask, made and packed."""
    masks = [menu.mask(unit, head, column)[1] for column in range(len(menu.estimated))]
    expected = [int(count(packed_bits(bits, unit.grid, unit.blocks, groups), (0, 1))) for bits in masks]
    assert menu.packed_blocks(unit, head, groups).tolist() == expected
