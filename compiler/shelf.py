"""Where units are kept between stages: in a list, or in a folder from which an interrupted job can go on."""

from __future__ import annotations

import copy
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from calibatt.compiler.errors import CompileError
from calibatt.compiler.ir import UnitIR
from calibatt.compiler.stored import load, save
from calibatt.plans.files import whole_file, write_text

KEY = "calibatt-compile.key"
MARK = "work folder of calibatt-compile"
"""The first line of the key: a folder without it is nobody's of ours."""
_NAMES = rf"{re.escape(KEY)}|\d{{5}}\.npy|\d{{5}}\.\d+\.(unit|found)"
OURS = re.compile(rf"{_NAMES}|\.({_NAMES})\.[0-9a-f]{{16}}\.tmp")
"""Names of the files that a shelf makes."""


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
        """Starts a shelf, or goes on with one. Only files that a shelf has made are ever removed.

        Args:
            folder: Where; created.
            key: Stands for everything that decides what the units become.
            resume: Go on with what is there, instead of discarding it.

        Raises:
            CompileError: The folder is of another job, or of none of ours.
        """
        shelf, mark = cls(folder), f"{MARK}\n{key}\n"
        if folder.exists():
            found = shelf._mark()
            if not found.startswith(f"{MARK}\n"):
                raise CompileError(f"{folder} must be a folder of an interrupted job, got something else")
            if strange := [path.name for path in folder.iterdir() if not OURS.fullmatch(path.name)]:
                raise CompileError(f"{folder} must hold only what calibatt-compile left, got {strange[0]!r}")
            if resume and found != mark:
                raise CompileError(f"{folder} must be of this very job to be resumed, got other statistics or options")
            if not resume:
                shelf.remove()
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / KEY, mark)
        return shelf

    def _mark(self) -> str:
        """How the folder's key begins; nothing where there is none."""
        with suppress(OSError, UnicodeDecodeError), open(self.folder / KEY, encoding="utf-8") as file:
            return file.read(100)
        return ""

    def remove(self) -> None:
        """Removes what a shelf has made; the mark last, so that an interrupted removal can be seen for what it is."""
        ours = [path for path in self.folder.iterdir() if OURS.fullmatch(path.name)]
        for path in sorted(ours, key=lambda path: path.name == KEY):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's file is in it
            self.folder.rmdir()

    def found(self, stage: int, index: int) -> Any | None:
        path = self._path(stage, index, "found")
        return load(path, "Found") if path.exists() else None

    def unit(self, stage: int, index: int) -> UnitIR:
        unit: UnitIR = load(self._path(stage, index, "unit"), "UnitIR")
        unit.means = replace(unit.means, error_code=np.load(self._codes(index), mmap_mode="r", allow_pickle=False))
        return unit

    def put(self, stage: int, index: int, unit: UnitIR, found: Any) -> None:
        codes, light = self._codes(index), copy.copy(unit)
        if not codes.exists():
            with whole_file(codes, sync=False) as file:
                np.save(file, unit.means.error_code)
        light.means = replace(unit.means, error_code=np.zeros(0, np.uint8))
        save(self._path(stage, index, "unit"), light)
        save(self._path(stage, index, "found"), found)

    def forget(self, stage: int) -> None:
        for path in self.folder.glob(f"*.{stage}.unit"):
            path.unlink()

    def _path(self, stage: int, index: int, kind: str) -> Path:
        return self.folder / f"{index:05d}.{stage}.{kind}"

    def _codes(self, index: int) -> Path:
        """Large, and changed by no pass: stored once, mapped afterwards."""
        return self.folder / f"{index:05d}.npy"
