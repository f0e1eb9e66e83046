"""Reading statistics: one or several stores of one manifest, one unit in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calibatt.compiler.stats.errors import (
    DuplicateSample,
    ManifestMismatch,
    MissingUnits,
    NoSamples,
    SampleError,
    StoreError,
    UnitError,
)
from calibatt.compiler.stats.files import (
    PROGRESS,
    SAMPLINGS,
    SUFFIX,
    check_name,
    entries,
    finished,
    places,
    read_manifest,
    unit_name,
    unit_path,
)
from calibatt.compiler.stats.manifest import Manifest
from calibatt.compiler.stats.sampling import Float64, SamplingTables, read_header, read_sampling
from calibatt.compiler.stats.unit import Unit, combined, read_unit
from calibatt.plans.files import MANIFEST, UNITS


@dataclass(frozen=True, eq=False)
class Table:
    """The tables of all samplings.

    Args:
        samplings: Their tables, in the order of their names.
    """

    samplings: tuple[SamplingTables, ...]

    @cached_property
    def time_level(self) -> Float64:
        """float64 (T,): the geometric mean over the samplings."""
        levels: Float64 = np.exp(np.mean([np.log(each.level) for each in self.samplings], 0))
        return levels

    @cached_property
    def window_error(self) -> Float64:
        """Mean over samplings and vectors of each window's squared effect / level, float64 (T, L, W, H)."""
        return self._squared("window_effect")

    @cached_property
    def precision_error(self) -> Float64:
        """The same for each of `plans.EIGHT_BITS`, float64 (T, L, 2, H)."""
        return self._squared("precision_effect")

    def _squared(self, name: str) -> Float64:
        total = np.zeros(getattr(self.samplings[0], name).shape[1:])
        for each in self.samplings:
            squared = sum(vector.astype(np.float64) ** 2 for vector in getattr(each, name))
            total += squared / each.vectors / each.level[:, None, None, None]
        mean: Float64 = total / len(self.samplings)
        return mean


@dataclass(frozen=True, eq=False)
class Store:
    """Finished samplings of one manifest; use `Store.open`.

    Args:
        manifest: What the store holds.
        folders: The folders with finished samplings, and the names of these.
        meta: Meta data of each finished sampling, by name.
        unfinished: Names of samplings in progress; units may hold them already, in part.
        digests: Of the samplings' files.
    """

    manifest: Manifest
    folders: dict[Path, tuple[str, ...]]
    meta: dict[str, dict[str, Any]]
    unfinished: tuple[str, ...]
    digests: tuple[str, ...]

    @classmethod
    def open(cls, paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Store:
        """Opens one store or several.

        Names and headers of samplings are proved here, tables and units when they are read.

        Args:
            paths: Folders written by `StoreWriter`.

        Raises:
            ManifestError: A folder has no manifest, a broken one, or one of an earlier version.
            ManifestMismatch: The manifests differ; every difference is listed.
            DuplicateSample: Two folders hold one sampling.
            MissingUnits: A folder with a finished sampling lacks units; names them.
            SampleError: A sampling's file or name breaks its rule.
            StoreError: A folder holds files that do not belong into a store.
            NoSamples: There is no finished sampling.
        """
        folders = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
        if not folders:
            raise NoSamples("statistics must come from at least one folder, got none")
        manifest = read_manifest(folders[0])
        owner: dict[str, Path] = {}
        meta: dict[str, dict[str, Any]] = {}
        names: dict[Path, tuple[str, ...]] = {}
        unfinished: set[str] = set()
        digests: list[str] = []
        for folder in folders:
            if different := manifest.differences(read_manifest(folder)):
                listed = "; ".join(different)
                raise ManifestMismatch(f"{folders[0]} and {folder} must have one manifest, got: {listed}")
            _check_entries(folder)
            samplings = finished(folder)
            for name, path in samplings.items():
                if name in owner:
                    raise DuplicateSample(f"sampling {name!r} must be in one store, got {owner[name]} and {folder}")
                owner[name] = folder
                meta[name], digest = read_header(path, check_name(name), manifest)
                digests.append(digest)
            if samplings:  # a header that fits proves the manifest; a damaged one could ask for any number of units
                names[folder] = tuple(samplings)
                _check_units(folder, manifest)
            unfinished |= {path.name for path in entries(folder / PROGRESS)} - set(samplings)
        waiting = tuple(sorted(unfinished))
        if not names:
            hint = f"; unfinished: {', '.join(waiting)}" if waiting else ""
            raise NoSamples(f"{', '.join(map(str, folders))} must have a finished sampling, got none{hint}")
        ordered = dict(sorted(names.items(), key=lambda pair: pair[1]))
        return cls(manifest, ordered, dict(sorted(meta.items())), waiting, tuple(sorted(digests)))

    @property
    def samplings(self) -> tuple[str, ...]:
        """Names of all finished samplings, ascending."""
        return tuple(self.meta)

    def unit(self, time_index: int, layer: int) -> Unit:
        """One unit, proved whole; of several stores the mean, weighted by the samplings that each holds.

        The arrays of one store's unit are read-only views of the mapped file.

        Raises:
            UnitError: There is no such time or layer, a file breaks a rule, or lacks a finished sampling.
            DuplicateSample: Two stores hold one sampling.
            OSError: A file cannot be read.
        """
        units = []
        for folder, names in self.folders.items():
            path = unit_path(folder, self.manifest, time_index, layer)
            units.append(read_unit(path, self.manifest, (time_index, layer)))
            if missing := [name for name in names if name not in units[-1].samplings]:
                raise UnitError(f"{path}: the unit must hold every finished sampling, got none of {', '.join(missing)}")
        if len(units) == 1:
            return units[0]
        try:
            return combined(units)
        except DuplicateSample as error:
            raise DuplicateSample(f"{unit_name(time_index, layer)}: {error}") from None

    def table(self) -> Table:
        """The tables of all samplings; the large arrays are views of mapped files.

        Raises:
            SampleError: A file is damaged, or its arrays break a rule.
            OSError: A file cannot be read.
        """
        owner = {name: folder for folder, names in self.folders.items() for name in names}
        paths = [owner[name] / SAMPLINGS / (name + SUFFIX) for name in self.samplings]
        pairs = zip(paths, self.samplings, strict=True)
        return Table(tuple(read_sampling(path, name, self.manifest) for path, name in pairs))

    def __eq__(self, other: object) -> bool:
        """Whether both stores read the same files."""
        return isinstance(other, Store) and (self.folders, self.digests) == (other.folders, other.digests)

    def __hash__(self) -> int:
        return hash((tuple(self.folders), self.digests))

    @property
    def size_bytes(self) -> int:
        """Bytes of all units and samplings."""
        parts = [folder / part for folder in self.folders for part in (UNITS, SAMPLINGS)]
        return sum(path.stat().st_size for part in parts for path in entries(part))


def _check_entries(folder: Path) -> None:
    known = (MANIFEST, UNITS, SAMPLINGS, PROGRESS)
    for path in entries(folder):
        if path.name not in known:
            raise StoreError(f"{folder} must hold only {', '.join(known)}, got {path.name!r}")
    for path in entries(folder / SAMPLINGS):
        if path.suffix != SUFFIX:
            raise SampleError(f"{folder / SAMPLINGS} must hold only files *{SUFFIX}, got {path.name!r}")


def _check_units(folder: Path, manifest: Manifest) -> None:
    present = {path.name for path in entries(folder / UNITS)}
    expected = [unit_name(*place) for place in places(manifest)]
    if missing := [name for name in expected if name not in present]:
        listed = ", ".join(missing[:8])
        raise MissingUnits(f"{folder / UNITS} must have {len(expected)} units, got none named {listed}")
    if unknown := sorted(present - set(expected)):
        raise StoreError(f"{folder / UNITS} must hold only units, got {', '.join(unknown[:8])}")
