"""Where units are kept between stages: in a list, or in a folder from which an interrupted job can go on."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from calibatt.compiler.errors import CompileError
from calibatt.compiler.ir import UnitIR

KEY = "key"


class Shelf(Protocol):
    """Keeps, for each stage, a unit and what its stage found."""

    def found(self, stage: int, index: int) -> Any | None:
        """What `put` was given, or None if this unit has not come that far."""

    def unit(self, stage: int, index: int) -> UnitIR:
        """A unit as that stage left it."""

    def put(self, stage: int, index: int, unit: UnitIR, found: Any) -> None:
        """Keeps a unit and what was found; who reads finds all of it or nothing."""

    def forget(self, stage: int) -> None:
        """Lets go of the units of a stage that no one will ask for again; what was found stays."""


class MemoryShelf:
    """For one process and small jobs."""

    def __init__(self) -> None:
        self.units: dict[int, UnitIR] = {}
        """As the last stage left them."""
        self._units: dict[tuple[int, int], UnitIR] = {}
        self._found: dict[tuple[int, int], Any] = {}

    def found(self, stage: int, index: int) -> Any | None:
        return self._found.get((stage, index))

    def unit(self, stage: int, index: int) -> UnitIR:
        unit = copy.copy(self._units[stage, index])
        unit.anchors, unit.packed, unit.choice = list(unit.anchors), dict(unit.packed), list(unit.choice)
        unit.packed_menu = dict(unit.packed_menu)
        return unit

    def put(self, stage: int, index: int, unit: UnitIR, found: Any) -> None:
        self._units[stage, index] = self.units[index] = unit
        self._found[stage, index] = found

    def forget(self, stage: int) -> None:
        pass


class DiskShelf:
    """For many processes and jobs of any size. Use `DiskShelf.open`.

    A file of a unit appears under its name whole or not at all, what was found last: if it is there, the unit is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path, key: str, resume: bool) -> DiskShelf:
        """Starts a shelf, or goes on with one.

        Args:
            folder: Where; created.
            key: Stands for everything that decides what the units become.
            resume: Go on with what is there, instead of discarding it.

        Raises:
            CompileError: The folder is of another job, or of none of ours.
        """
        if folder.exists():
            if not (folder / KEY).is_file():
                raise CompileError(f"{folder} must be a folder of an interrupted job, got something else")
            if resume and (folder / KEY).read_text() != key:
                raise CompileError(f"{folder} must be of this very job to be resumed, got other statistics or options")
            if not resume:
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KEY).write_text(key)
        return cls(folder)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def found(self, stage: int, index: int) -> Any | None:
        path = self._path(stage, index, "found")
        if not path.exists():
            return None
        with open(path, "rb") as file:
            return pickle.load(file)

    def unit(self, stage: int, index: int) -> UnitIR:
        with open(self._path(stage, index, "unit"), "rb") as file:
            unit: UnitIR = pickle.load(file)
        unit.means = replace(unit.means, error_code=np.load(self._codes(index), mmap_mode="r"))
        return unit

    def put(self, stage: int, index: int, unit: UnitIR, found: Any) -> None:
        codes, light = self._codes(index), copy.copy(unit)
        if not codes.exists():
            temporary = codes.with_suffix(".tmp.npy")
            np.save(temporary, unit.means.error_code)
            os.replace(temporary, codes)
        light.means = replace(unit.means, error_code=np.zeros(0, np.uint8))
        self._dump(self._path(stage, index, "unit"), light)
        self._dump(self._path(stage, index, "found"), found)

    def forget(self, stage: int) -> None:
        for path in self.folder.glob(f"*.{stage}.unit"):
            path.unlink()

    def _path(self, stage: int, index: int, kind: str) -> Path:
        return self.folder / f"{index:05d}.{stage}.{kind}"

    def _codes(self, index: int) -> Path:
        """Large, and changed by no pass: stored once, mapped afterwards."""
        return self.folder / f"{index:05d}.npy"

    @staticmethod
    def _dump(path: Path, value: object) -> None:
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            pickle.dump(value, file, protocol=5)
        os.replace(temporary, path)
