"""Writing a store: append-only, resumable after any crash, one complete sample at a time.

A sample is written under ``samples/<name>.partial`` and renamed to ``samples/<name>`` when it is complete, so whatever
has its final name is whole. What an interruption leaves is found by its name, discarded and recorded again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import (
    DuplicateSample,
    ManifestMismatch,
    MissingUnits,
    ProbeError,
    RefinementError,
    SampleError,
    SampleExists,
    StoreBusy,
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
    sync_folder,
    unit_name,
    unit_names,
    write_whole,
)
from calibatt.compiler.stats.manifest import Manifest
from calibatt.compiler.stats.probes import Probe
from calibatt.compiler.stats.refinement import Ladders, file_name, open_errors, read_ladders, write_errors
from calibatt.compiler.stats.unit import UnitStatistics, write_unit


class StoreWriter:
    """One process's hold on one store; a context manager. Use `StoreWriter.open`, and `join` in its helpers."""

    def __init__(self, path: Path, manifest: Manifest, lock: int) -> None:
        """Use `StoreWriter.open`."""
        self.path = path
        self.manifest = manifest
        self._lock = lock
        self._current: dict[str, SampleWriter] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], manifest: Manifest) -> StoreWriter:
        """Creates a store, or continues one of the same manifest.

        Raises:
            StoreBusy: Another writer has it open.
            ManifestMismatch: It was written with another manifest; every difference is listed.
            ManifestError: It has a broken manifest, or the folder holds something else.
            OSError: It cannot be written.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusy(f"{folder} must have one writer, got another that has it open") from None
            if (folder / MANIFEST).exists() or entries(folder):
                found = read_manifest(folder)
                if different := found.differences(manifest):
                    listed = "; ".join(different)
                    raise ManifestMismatch(
                        f"{folder} must be continued with its own manifest, got (its, new): {listed}"
                    )
            else:
                write_whole(folder / MANIFEST, manifest.to_json())
            for part in (SAMPLES, PROBES):
                (folder / part).mkdir(exist_ok=True)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, manifest, lock)

    @classmethod
    def join(cls, path: str | os.PathLike[str], manifest: Manifest) -> StoreWriter:
        """Helps another process of the same job, which has the store open and keeps it open for as long.

        The processes agree among themselves who writes which samples and probes: nobody checks.

        Raises:
            StoreBusy: Nobody has it open.
            ManifestMismatch: It is of another manifest; every difference is listed.
            ManifestError: It has no manifest, or a broken one.
            OSError: It cannot be read.
        """
        folder = Path(path)
        found = read_manifest(folder)
        if different := found.differences(manifest):
            raise ManifestMismatch(
                f"{folder} must be joined with its own manifest, got (its, new): {'; '.join(different)}"
            )
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return cls(folder, manifest, lock)
        os.close(lock)
        raise StoreBusy(f"{folder} must be open in another process of this job, got nobody")

    def close(self) -> None:
        """Lets another writer in; what was not finished stays interrupted."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def done(self) -> tuple[str, ...]:
        """Names of the complete samples, ascending."""
        return tuple(path.name for path in entries(self.path / SAMPLES) if not path.name.endswith(PARTIAL))

    def interrupted(self) -> tuple[str, ...]:
        """Names of samples begun and not finished, ascending; `begin` discards what is there and starts again."""
        found = [path.name for path in entries(self.path / SAMPLES) if path.name.endswith(PARTIAL)]
        return tuple(name[: -len(PARTIAL)] for name in found)

    def begin(self, name: str) -> SampleWriter:
        """Starts a sample; what an interruption left of it is discarded, and an earlier writer of it refuses to go on.

        Raises:
            SampleError: The name breaks its rule.
            SampleExists: It is complete already.
            StoreBusy: This writer is closed.
        """
        self._check_open()
        if check_name(name) in self.done():
            raise SampleExists(f"{self.path / SAMPLES / name} must be recorded once, got a complete sample")
        partial = self.path / SAMPLES / (name + PARTIAL)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        self._current[name] = SampleWriter(self, name, partial)
        return self._current[name]

    def write_probe(self, probe: Probe) -> Path:
        """Adds one probe of the time weight.

        Raises:
            ProbeError: It is of no complete sample or recorded time.
            DuplicateSample: This sample and time are probed already.
            StoreBusy: This writer is closed.
        """
        self._check_open()
        if probe.sample not in self.done():
            raise ProbeError(f"a probe must be of a complete sample, got {probe.sample!r}")
        if probe.time_index >= len(self.manifest.times):
            raise ProbeError(f"probe.time_index must be below {len(self.manifest.times)}, got {probe.time_index}")
        probe.check_shape(self.manifest.model.layers, self.manifest.model.heads)
        path = self.path / PROBES / probe.file_name
        try:
            write_whole(path, probe.to_json())
        except FileExistsError:
            raise DuplicateSample(f"{path} must be written once, got a probe there already") from None
        return path

    def probed(self) -> frozenset[tuple[str, int]]:
        """Samples and time indices probed already.

        Raises:
            ProbeError: A file among the probes is none.
        """
        found = [Probe.from_json(path.read_text("utf-8"), str(path)) for path in entries(self.path / PROBES)]
        return frozenset((probe.sample, probe.time_index) for probe in found)

    def refine(self, ladders: Ladders) -> tuple[str, ...]:
        """Begins a refinement, or goes on with one.

        Args:
            ladders: Of the complete samples.

        Returns:
            Names of the samples whose errors are there already, ascending; what an interruption left is proved whole.

        Raises:
            RefinementError: The store has a refinement of other ladders, or samples, or a damaged file of one.
            StoreBusy: This writer is closed.
            OSError: It cannot be written.
        """
        self._check_open()
        folder = self.path / REFINEMENT
        ladders.check(self.manifest)
        if ladders.samples != self.done():
            raise RefinementError(f"a refinement must be of all {len(self.done())} samples, got {ladders.samples}")
        found = read_ladders(folder, self.manifest)
        if found is None:
            folder.mkdir(exist_ok=True)
            write_whole(folder / LADDERS, ladders.to_json())
        elif found != ladders:
            what = "samples" if found.samples != ladders.samples else "kinds or shares"
            rule = f"be deleted before other {what} are refined"
            raise RefinementError(f"{folder} must {rule}, got {_told(found)}, asked for {_told(ladders)}")
        done = [path.name[: -len(REFINED)] for path in entries(folder) if path.name.endswith(REFINED)]
        for name in done:
            open_errors(folder / file_name(name), name, ladders, self.manifest)
        return tuple(done)

    def write_errors(self, sample: str, errors: npt.NDArray[np.float32], ladders: Ladders, **told: Any) -> Path:
        """Adds what was measured of one sample to the refinement; see `refinement.write_errors`.

        Raises:
            RefinementError: No sample of the ladders, or errors that are none.
            DuplicateSample: It is there already.
            StoreBusy: This writer is closed.
            OSError: It cannot be written.
        """
        self._check_open()
        if sample not in ladders.samples:
            raise RefinementError(f"errors must be of a sample of the ladders, got {sample!r}")
        path = self.path / REFINEMENT / file_name(sample)
        if path.exists():
            raise DuplicateSample(f"{path} must be written once, got errors there already")
        return write_errors(path.parent, sample, errors, ladders, self.manifest, **told)

    def _check_open(self) -> None:
        if self._lock < 0:
            raise StoreBusy(f"{self.path} must be open for writing, got a closed writer")


def _told(ladders: Ladders) -> str:
    shares = ",".join(f"{share:g}" for share in ladders.shares)
    return f"{len(ladders.samples)} samples, {'+'.join(ladders.kinds)} at {shares}"


class SampleWriter:
    """A sample in progress; use `StoreWriter.begin`."""

    def __init__(self, store: StoreWriter, name: str, partial: Path) -> None:
        """Use `StoreWriter.begin`."""
        self.name = name
        self._store = store
        self._partial = partial
        self._written: set[str] = set()

    def write(self, time_index: int, layer: int, unit: UnitStatistics) -> int:
        """Writes one unit and returns its bytes; nothing of it is kept in memory.

        Raises:
            StoreBusy: The store's writer is closed.
            SampleError: The sample was begun again since.
            UnitError: No such time or layer, written before, or arrays that contradict the manifest.
            OSError: It cannot be written.
        """
        self._check_current()
        manifest = self._store.manifest
        for what, value, count in (
            ("time_index", time_index, len(manifest.times)),
            ("layer", layer, manifest.model.layers),
        ):
            if type(value) is not int or not 0 <= value < count:
                raise UnitError(
                    f"{what} of a unit of {self.name!r} must be an integer from 0 to {count - 1}, got {value!r}"
                )
        file = unit_name(time_index, layer)
        if file in self._written:
            raise UnitError(f"{self._partial / file} must be written once, got it again")
        place = {"sample": self.name, "time_index": time_index, "layer": layer}
        size = write_unit(self._partial / file, unit, manifest, place)
        self._written.add(file)
        return size

    def finish(self, meta: Mapping[str, Any]) -> Path:
        """Completes the sample: `sample.json`, then the rename that makes it count.

        Args:
            meta: What the sample is (prompt, seed, seconds and so on): JSON values.

        Raises:
            MissingUnits: Units were not written; names them.
            SampleError: `meta` is no JSON map, or the sample was begun again since.
            StoreBusy: The store's writer is closed.
            OSError: It cannot be written.
        """
        self._check_current()
        if missing := [name for name in unit_names(self._store.manifest) if name not in self._written]:
            raise MissingUnits(
                f"{self._partial} must have a unit for every time and layer, got none for {', '.join(missing)}"
            )
        value = {"name": self.name, "manifest": self._store.manifest.digest, "meta": meta}
        try:
            text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise SampleError(f"{self._partial}: meta must be JSON values, got {error}") from None
        write_whole(self._partial / SAMPLE, text)
        final = self._store.path / SAMPLES / self.name
        os.rename(self._partial, final)
        sync_folder(final.parent)
        return final

    def _check_current(self) -> None:
        self._store._check_open()
        if self._store._current.get(self.name) is not self:
            raise SampleError(f"{self._partial} must be written by who began it last, got an earlier writer")
