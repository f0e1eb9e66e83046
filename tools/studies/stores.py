"""Stores of statistics for studies: grown sampling by sampling, and seen at some of their times."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calibatt.compiler.gather import Samplings
from calibatt.compiler.stats import Manifest, SamplingTables, Store, StoreWriter, Table, Unit
from calibatt.tools.calibrate.calibration import Calibrator, sampling_name
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.work import Work, make_manifest


def sampling_counts(store: Samplings) -> dict[str, Any]:
    """What statistics were made of: ``prompts``, ``samplings`` (a prompt and a seed each), and ``vectors``, the numbers
    of random vectors that their samplings have, each number once."""
    meta = store.meta.values()
    return {
        "prompts": len({each["prompt"] for each in meta}),
        "samplings": len(store.samplings),
        "vectors": sorted({int(each["vectors"]) for each in meta}),
    }


def grown(
    folder: Path, sampler: Sampler, work: Work, counts: Sequence[int], *, vectors: int = 1, **options: Any
) -> dict[int, Store]:
    """Stores of the first samplings of some work, each as `calibatt-calibrate` makes it of these alone.

    Args:
        folder: Of all these stores; what is there is not measured again.
        sampler: What to run.
        work: Prompts and seeds.
        counts: Ascending.
        vectors: Random vectors of each.
        options: Of `make_manifest`.

    Returns:
        The stores by their number of samplings.
    """
    found, growing = {}, folder / "growing"
    for count in counts:
        kept, copy = folder / f"{count}x{vectors}", folder / "copy"
        if not kept.exists():
            with StoreWriter.open(growing, make_manifest(sampler, **options)) as writer:
                calibrator = Calibrator(sampler, writer, vectors=vectors)
                for prompt, seed in work[:count]:
                    if sampling_name(prompt, seed) not in writer.done():
                        calibrator.calibrate(prompt, seed)
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(growing, copy)
            with StoreWriter.open(copy, make_manifest(sampler, **options)) as writer:
                writer.close_units()
            copy.rename(kept)
        found[count] = Store.open(kept)
    return found


@dataclass(frozen=True, eq=False)
class AtTimes:
    """A store as if only some of its times had been recorded; a `gather.Samplings`.

    Args:
        store: The store.
        indices: Of its times, ascending.
    """

    store: Store
    indices: tuple[int, ...]

    @cached_property
    def manifest(self) -> Manifest:
        return replace(self.store.manifest, times=tuple(self.store.manifest.times[index] for index in self.indices))

    @property
    def samplings(self) -> tuple[str, ...]:
        return self.store.samplings

    @property
    def meta(self) -> dict[str, dict[str, Any]]:
        return self.store.meta

    def unit(self, time_index: int, layer: int) -> Unit:
        return self.store.unit(self.indices[time_index], layer)

    def table(self) -> Table:
        def some(tables: SamplingTables) -> SamplingTables:
            arrays = {each.name: getattr(tables, each.name) for each in fields(tables)}
            at = list(self.indices)
            return SamplingTables(**{n: x[at] if n == "level" else np.asarray(x[:, at]) for n, x in arrays.items()})

        return Table(tuple(map(some, self.store.table().samplings)))
