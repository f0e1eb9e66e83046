"""Reading statistics: one or several stores of one manifest, one unit in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import (
    DuplicateSample,
    ManifestMismatch,
    MissingUnits,
    NoSamples,
    ProbeError,
    RefinementError,
    SampleError,
    StoreError,
    UnitError,
)
from calibatt.compiler.stats.files import (
    LADDERS,
    MANIFEST,
    PARTIAL,
    PROBES,
    REFINED,
    REFINEMENT,
    SAMPLE,
    SAMPLES,
    check_name,
    entries,
    read_manifest,
    unit_name,
    unit_names,
)
from calibatt.compiler.stats.manifest import Manifest
from calibatt.compiler.stats.probes import ErrorWeights, Probe, TimeWeightInfo, error_weights, layer_factor, time_weight
from calibatt.compiler.stats.refinement import (
    Ladders,
    check_complete,
    file_name,
    prove_errors,
    read_errors,
    read_ladders,
)
from calibatt.compiler.stats.unit import UnitStatistics, read_unit


class Store:
    """Complete samples of one manifest; use `Store.open`."""

    def __init__(
        self,
        manifest: Manifest,
        folders: dict[str, Path],
        meta: dict[str, dict[str, Any]],
        probes: tuple[Probe, ...],
        interrupted: tuple[Path, ...],
        ladders: Ladders | None = None,
        refined: dict[str, Path] | None = None,
    ) -> None:
        """Use `Store.open`."""
        self.manifest = manifest
        self.ladders = ladders
        """What was measured in a refinement; None where there is none."""
        self.refined = refined or {}
        """Files with the errors of the ladders, by sample."""
        self.meta = meta
        """What was said of each sample when it was finished."""
        self.probes = probes
        self.interrupted = interrupted
        """Folders of samples that an interruption left; they are not among `samples`."""
        self._folders = folders

    @classmethod
    def open(cls, paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Store:
        """Opens one store or several.

        Every sample's file list is proved here, every unit when it is read.

        Args:
            paths: Folders written by `StoreWriter`, or to which such samples were copied.

        Raises:
            ManifestError: A folder has no manifest or a broken one.
            ManifestMismatch: The manifests differ; every difference is listed.
            DuplicateSample: Two folders hold one sample, or one probe.
            MissingUnits: A sample lacks files; names them.
            SampleError: A `sample.json` or a name breaks its rule.
            ProbeError: A probe breaks its rule.
            RefinementError: What a refinement is of cannot be read.
            StoreError: A folder holds what no store does.
            NoSamples: There is no complete sample.
        """
        folders = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
        if not folders:
            raise NoSamples("statistics must come from at least one folder, got none")
        manifest = read_manifest(folders[0])
        samples: dict[str, Path] = {}
        meta: dict[str, dict[str, Any]] = {}
        interrupted: list[Path] = []
        probes: dict[str, tuple[Path, Probe]] = {}
        for folder in folders:
            _check_same(folders[0], manifest, folder)
            _check_entries(folder)
            for path in entries(folder / SAMPLES):
                if path.name.endswith(PARTIAL):
                    interrupted.append(path)
                    continue
                if path.name in samples:
                    raise DuplicateSample(
                        f"sample {path.name!r} must be in one store, got {samples[path.name]} and {path}"
                    )
                samples[path.name] = path
                meta[path.name] = _check_sample(path, manifest)
            for path in entries(folder / PROBES):
                if path.name in probes:
                    raise DuplicateSample(
                        f"probe {path.name!r} must be in one store, got {probes[path.name][0]} and {path}"
                    )
                probes[path.name] = (path, _read_probe(path, manifest))
        if not samples:
            hint = f"; interrupted: {', '.join(map(str, interrupted))}" if interrupted else ""
            raise NoSamples(f"{', '.join(map(str, folders))} must have a complete sample, got none{hint}")
        for path, probe in probes.values():
            if probe.sample not in samples:
                raise ProbeError(f"{path}: a probe must be of a complete sample, got {probe.sample!r}")
        ordered = dict(sorted(samples.items()))
        known = tuple(probe for _, (_, probe) in sorted(probes.items()))
        return cls(manifest, ordered, meta, known, tuple(interrupted), *_refinement(folders, manifest))

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of all complete samples, ascending."""
        return tuple(self._folders)

    def unit(self, sample: str, time_index: int, layer: int, planes: bool = True) -> UnitStatistics:
        """One unit, proved whole, or all of it but the planes; its arrays are read-only views of the mapped file.

        Raises:
            UnitError: There is no such sample, time or layer, or the file breaks a rule.
            OSError: The file cannot be read.
        """
        if sample not in self._folders:
            raise UnitError(f"sample must be one of {', '.join(self.samples)}, got {sample!r}")
        for what, value, count in (
            ("time_index", time_index, len(self.manifest.times)),
            ("layer", layer, self.manifest.model.layers),
        ):
            if not 0 <= value < count:
                raise UnitError(f"{what} must be from 0 to {count - 1}, got {value}")
        place = {"sample": sample, "time_index": time_index, "layer": layer}
        return read_unit(self._folders[sample] / unit_name(time_index, layer), self.manifest, place, planes)

    def expect(self, samples: Sequence[str], time_index: int, layer: int, planes: bool = True) -> None:
        """Has the system read units ahead, while the caller does something else; promises nothing."""
        if not hasattr(os, "posix_fadvise"):
            return
        manifest = self.manifest
        blocks = manifest.model.heads * manifest.q_blocks * manifest.k_blocks
        before_planes = (
            blocks * (manifest.has_block_error + manifest.has_mass) + _SMALL_BYTES
        )  # in order of their names
        for sample in samples:
            try:
                file = os.open(self._folders[sample] / unit_name(time_index, layer), os.O_RDONLY)
            except OSError:
                continue  # `unit` says so
            try:
                os.posix_fadvise(file, 0, 0 if planes else before_planes, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)

    def time_weight(self) -> tuple[npt.NDArray[np.float64], TimeWeightInfo]:
        """Squared error of the final latent per unit of attention error at each time, and where it comes from.

        Returns:
            float64 (times,): the mean of each time's probes, log-linear between probed times, held beyond them; 1
            everywhere if never probed, and ``info.probes`` is 0.
        """
        return time_weight(self.manifest.times, self.probes)

    def layer_factor(self) -> npt.NDArray[np.float64]:
        """How the time weight spreads over the layers, float64 (times, layers); 1 everywhere if never probed."""
        return layer_factor(self.manifest.times, self.manifest.model.layers, self.probes)

    def error_weights(self) -> ErrorWeights:
        """What an error costs at each time, layer and head, by the finest of what was probed."""
        model = self.manifest.model
        return error_weights(self.manifest.times, model.layers, model.heads, self.probes)

    def check_refinement(self) -> tuple[str, ...]:
        """Proves that there is a finished refinement of just these samples, and reads all of its errors once.

        Returns:
            The digests of its files.

        Raises:
            RefinementError: There is none, one of other samples, one that was not finished, or a file is damaged.
            OSError: A file cannot be read.
        """
        if self.ladders is None:
            raise RefinementError("the store must be refined (calibatt-calibrate --refine), got no refinement")
        folder = next(iter(self.refined.values())).parent if self.refined else Path(REFINEMENT)
        check_complete(folder, self.ladders, self.samples, tuple(self.refined))
        return tuple(prove_errors(self.refined[name], name, self.ladders, self.manifest) for name in self.samples)

    def refined_error(self, time_index: int, layer: int) -> npt.NDArray[np.float64]:
        """Means over the samples of the errors of a unit's ladders and windows, float64 ``(C, H)``.

        Raises:
            RefinementError: A file is damaged, or there is no refinement.
            OSError: A file cannot be read.
        """
        if self.ladders is None:
            raise RefinementError("the store must be refined (calibatt-calibrate --refine), got no refinement")
        files = tuple((name, self.refined[name], self.refined[name].stat().st_mtime_ns) for name in self.samples)
        found: npt.NDArray[np.float64] = _mean_errors(files, time_index, self.ladders, self.manifest)[layer]
        return found

    @property
    def size_bytes(self) -> int:
        """Bytes of all complete samples."""
        return sum(path.stat().st_size for folder in self._folders.values() for path in folder.iterdir())


_SMALL_BYTES = 1 << 16
"""What else lies before a unit's planes, about."""


@lru_cache(maxsize=1)
def _mean_errors(
    files: tuple[tuple[str, Path, int], ...], time_index: int, ladders: Ladders, manifest: Manifest
) -> npt.NDArray[np.float64]:
    """Means over the samples of the errors of all layers at one time, float64 ``(L, C, H)``; read only.

    Layers of one time are asked for one after the other, and a file is read for all of them at once. `files` are names
    of samples, paths, and when they were last changed.
    """
    total = np.zeros((manifest.model.layers, ladders.errors(manifest), manifest.model.heads))
    for name, path, _ in files:
        total += read_errors(path, name, time_index, ladders, manifest)
    total /= len(files)
    total.flags.writeable = False
    return total


def _check_same(first: Path, manifest: Manifest, folder: Path) -> None:
    if different := manifest.differences(read_manifest(folder)):
        listed = "; ".join(different)
        raise ManifestMismatch(f"{first} and {folder} must have one manifest, got: {listed}")


def _check_entries(folder: Path) -> None:
    for path in entries(folder):
        if path.name not in (MANIFEST, SAMPLES, PROBES, REFINEMENT):
            known = f"{MANIFEST}, {SAMPLES}, {PROBES} and {REFINEMENT}"
            raise StoreError(f"{folder} must hold only {known}, got {path.name!r}")


def _refinement(folders: Sequence[Path], manifest: Manifest) -> tuple[Ladders | None, dict[str, Path]]:
    """Ladders and files of the errors of all folders; whether they are whole and right is proved when they are used.

    Refinements of several stores are each of their own samples, and so of use to no job of all: the first one says so.
    """
    ladders: Ladders | None = None
    refined: dict[str, Path] = {}
    for folder in folders:
        found = read_ladders(folder / REFINEMENT, manifest)
        if found is None or ladders not in (None, found):
            continue
        ladders = found
        for path in entries(folder / REFINEMENT):
            if path.name != LADDERS and path.suffix != REFINED:
                raise RefinementError(f"{folder / REFINEMENT} must hold only {LADDERS} and errors, got {path.name!r}")
        names = [path.stem for path in entries(folder / REFINEMENT) if path.suffix == REFINED]
        refined |= {name: folder / REFINEMENT / file_name(name) for name in names}
    return ladders, refined


def _check_sample(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Proves a sample's `sample.json` and the names in its folder; returns what was said of it."""
    check_name(path.name)
    if not path.is_dir():
        raise SampleError(f"{path} must be a folder, got a file")
    found = {each.name for each in entries(path)}
    # First, whether the manifest is the one it was recorded with: a damaged one could ask for any number of files.
    meta = _read_meta(path, manifest) if SAMPLE in found else {}
    expected = [*unit_names(manifest), SAMPLE]
    if missing := [name for name in expected if name not in found]:
        raise MissingUnits(f"{path} must have {len(expected)} files, got none named {', '.join(missing)}")
    if unknown := sorted(found - set(expected)):
        raise SampleError(f"{path} must hold only its units and {SAMPLE}, got {', '.join(unknown)}")
    return meta


def _read_meta(path: Path, manifest: Manifest) -> dict[str, Any]:
    try:
        value = json.loads((path / SAMPLE).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"{path / SAMPLE} must be JSON, got {error}") from None
    if not isinstance(value, dict) or set(value) != {"name", "manifest", "meta"} or not isinstance(value["meta"], dict):
        raise SampleError(f"{path / SAMPLE} must have the fields name, manifest and meta, got {value!r}")
    for name, want in (("name", path.name), ("manifest", manifest.digest)):
        if value[name] != want:
            raise SampleError(f"{path / SAMPLE}: {name} must be {want!r}, got {value[name]!r}")
    return dict(value["meta"])


def _read_probe(path: Path, manifest: Manifest) -> Probe:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ProbeError(f"{path}: a probe must be UTF-8, got {error}") from None
    probe = Probe.from_json(text, str(path))
    if path.name != probe.file_name:
        raise ProbeError(f"{path}: the file must be named {probe.file_name!r}, got {path.name!r}")
    if probe.time_index >= len(manifest.times):
        raise ProbeError(f"{path}: time_index must be below {len(manifest.times)}, got {probe.time_index}")
    try:
        probe.check_shape(manifest.model.layers, manifest.model.heads)
    except ProbeError as error:
        raise ProbeError(f"{path}: {error}") from None
    return probe
