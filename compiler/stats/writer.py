"""Writing a store: append-only, one sampling after the other, resumable after any crash.

A sampling is added to every unit, which knows what it holds and is replaced by one rename; the sampling's own file,
written last, makes it count. Whatever has its final name is whole.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from calibatt.compiler.stats.errors import ManifestMismatch, MissingUnits, SampleExists, StoreBusy, UnitError
from calibatt.compiler.stats.files import (
    PROGRESS,
    SAMPLINGS,
    SUFFIX,
    check_name,
    entries,
    finished,
    places,
    read_manifest,
    sweep,
    unit_name,
    unit_path,
    write_whole,
)
from calibatt.compiler.stats.manifest import Manifest
from calibatt.compiler.stats.sampling import SamplingTables, write_sampling
from calibatt.compiler.stats.unit import Unit, combined, read_samplings, read_unit, reclosed, write_unit
from calibatt.plans.files import MANIFEST, UNITS, sync_folder


class StoreWriter:
    """Writes a store; a context manager. One process uses `StoreWriter.open`, others of the same job `join`."""

    def __init__(self, path: Path, manifest: Manifest, lock: int) -> None:
        """Use `StoreWriter.open`."""
        self.path = path
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], manifest: Manifest) -> StoreWriter:
        """Starts a store, or continues one of the same manifest; half-written files of a killed writer are removed.

        Args:
            path: The folder; created with its parents.
            manifest: What the store holds.

        Raises:
            StoreBusy: Another writer has it open.
            ManifestMismatch: It is of another manifest; every difference is listed.
            ManifestError: The folder holds something else, or a broken manifest.
            OSError: It cannot be written.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if entries(folder):  # before anything is written into it
            _check_same(folder, manifest, "continued")
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusy(f"{folder} must have one writer, got another that has it open") from None
            if entries(folder):
                _check_same(folder, manifest, "continued")
            else:
                write_whole(folder / MANIFEST, manifest.to_json())
            for part in (UNITS, SAMPLINGS, PROGRESS):
                (folder / part).mkdir(exist_ok=True)
                sweep(folder / part)
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, manifest, lock)

    @classmethod
    def join(cls, path: str | os.PathLike[str], manifest: Manifest) -> StoreWriter:
        """Writes beside another process of the same job, which has the store open and keeps it open meanwhile.

        The processes agree among themselves who adds which samplings.

        Raises:
            StoreBusy: No process has it open.
            ManifestMismatch: It is of another manifest; every difference is listed.
            ManifestError: It has no manifest, or a broken one.
            OSError: It cannot be read.
        """
        folder = Path(path)
        _check_same(folder, manifest, "joined")
        with suppress(FileNotFoundError):
            lock = os.open(folder / ".lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return cls(folder, manifest, lock)
            os.close(lock)
        raise StoreBusy(f"{folder} must be open in another process of this job, got nobody")

    def close(self) -> None:
        """Closes the store for this writer; samplings in progress stay unfinished."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def done(self) -> tuple[str, ...]:
        """Names of the finished samplings, ascending."""
        return tuple(finished(self.path))

    def unit_samplings(self, time_index: int, layer: int) -> tuple[str, ...]:
        """Names of the samplings that a unit holds, in order of arrival; none where there is no unit yet.

        Raises:
            UnitError: No such time or layer, or a damaged file.
        """
        path = self._unit_path(time_index, layer)
        return read_samplings(path, self.manifest, (time_index, layer)) if path.exists() else ()

    def read_unit(self, time_index: int, layer: int) -> Unit | None:
        """A unit as it is now; None where there is none yet.

        Raises:
            UnitError: No such time or layer, or a damaged file.
        """
        path = self._unit_path(time_index, layer)
        return read_unit(path, self.manifest, (time_index, layer)) if path.exists() else None

    def add(self, time_index: int, layer: int, measured: Unit) -> None:
        """Adds what one sampling measured (`Unit.of`) to a unit; does nothing if the unit holds the sampling already.

        The file is read, changed and replaced by one rename, alone among the processes of the job.

        Raises:
            SampleError: The name breaks its rule.
            UnitError: No such time or layer, arrays that contradict the manifest, or a damaged file.
            StoreBusy: This writer is closed.
            OSError: It cannot be written.
        """
        self._check_open()
        check_name(name := measured.samplings[0])
        path = self._unit_path(time_index, layer)
        try:
            measured.check(self.manifest)
        except UnitError as error:
            raise UnitError(f"{path}: {error}") from None
        with self._alone(path):
            before = self.read_unit(time_index, layer)
            if before is not None and name in before.samplings:
                return
            unit = measured if before is None else combined([before, measured])
            self._write(path, unit, (time_index, layer))

    def finish(self, name: str, tables: SamplingTables, meta: Mapping[str, Any]) -> Path:
        """Makes a sampling count, once every unit holds it.

        Args:
            name: Name of the sampling.
            tables: The tables of its own file.
            meta: Facts of it (prompt, seed, steps, branches, vectors, seconds and so on): plain values.

        Raises:
            SampleExists: It is finished already.
            MissingUnits: Units do not hold it; names them.
            SampleError: The name, the tables or `meta` break a rule.
            StoreBusy: This writer is closed.
            OSError: It cannot be written.
        """
        self._check_open()
        if check_name(name) in self.done():
            raise SampleExists(f"sampling {name!r} must be finished once, got it again in {self.path}")
        missing = [place for place in places(self.manifest) if name not in self.unit_samplings(*place)]
        if missing:
            listed = ", ".join(unit_name(*place) for place in missing[:8])
            raise MissingUnits(f"sampling {name!r} must be in every unit, got {len(missing)} without it: {listed}")
        path = self.path / SAMPLINGS / (name + SUFFIX)
        write_sampling(path, name, tables, self.manifest, meta)
        sync_folder(path.parent)
        return path

    def close_units(self, on_unit: Callable[[], object] = lambda: None) -> int:
        """Rewrites open units with a byte a block instead of two; adding to one opens it again.

        Args:
            on_unit: Called after each unit, whether it was open or not.

        Returns:
            How many were open.
        """
        self._check_open()
        count = 0
        for place in places(self.manifest):
            path = self._unit_path(*place)
            with self._alone(path):
                unit = self.read_unit(*place)
                if unit is not None and not unit.closed:
                    self._write(path, reclosed(unit), place)
                    count += 1
            on_unit()
        return count

    def progress_folder(self, name: str) -> Path:
        """The folder of a sampling in progress, created if it is missing, for the caller's own files.

        Raises:
            SampleError: The name breaks its rule.
            StoreBusy: This writer is closed.
        """
        self._check_open()
        path = self.path / PROGRESS / check_name(name)
        path.mkdir(exist_ok=True)
        return path

    def drop_progress(self, name: str) -> None:
        """Removes that folder if there is one; after a kill it is whole or gone.

        Raises:
            SampleError: The name breaks its rule.
            StoreBusy: This writer is closed.
        """
        self._check_open()
        path = self.path / PROGRESS / check_name(name)
        if path.exists():
            hidden = path.with_name(f".{name}.{secrets.token_hex(8)}.tmp")
            path.rename(hidden)
            shutil.rmtree(hidden)

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Locks a unit against the other processes of the job, by a hidden file beside it."""
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, path: Path, unit: Unit, place: tuple[int, int]) -> None:
        write_unit(path, unit, self.manifest, place)
        sync_folder(path.parent)

    def _unit_path(self, time_index: int, layer: int) -> Path:
        return unit_path(self.path, self.manifest, time_index, layer)

    def _check_open(self) -> None:
        if self._lock < 0:
            raise StoreBusy(f"{self.path} must be open for writing, got a closed writer")


def _check_same(folder: Path, manifest: Manifest, what: str) -> None:
    if different := read_manifest(folder).differences(manifest):
        listed = "; ".join(different)
        raise ManifestMismatch(f"{folder} must be {what} with its own manifest, got (its, new): {listed}")
