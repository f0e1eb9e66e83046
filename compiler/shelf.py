"""Stores units between stages, in a folder that many processes share."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from calibatt.compiler.ir import UnitIR
from calibatt.plans.files import whole_file


class Shelf(Protocol):
    """Stores each unit as the last stage left it."""

    def unit(self, index: int) -> UnitIR:
        """A copy of a unit, which the caller may change."""

    def put(self, index: int, unit: UnitIR) -> None:
        """Stores a unit, in place of an older one."""


class DiskShelf:
    """For many processes and jobs of any size.

    Args:
        folder: A folder of this job that only this user can write: its files are unpickled.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unit(self, index: int) -> UnitIR:
        unit: UnitIR = pickle.loads((self.folder / f"{index}.unit").read_bytes())
        unit.means = replace(unit.means, error_code=np.load(self._codes(index), mmap_mode="r"))
        return unit

    def put(self, index: int, unit: UnitIR) -> None:
        light = copy.copy(unit)
        if not self._codes(index).exists():
            with whole_file(self._codes(index), sync=False) as file:
                np.save(file, unit.means.error_code)
        light.means = replace(unit.means, error_code=np.zeros(0, np.uint8))
        with whole_file(self.folder / f"{index}.unit", sync=False) as file:
            pickle.dump(light, file)

    def _codes(self, index: int) -> Path:
        """Fields that are large and that no pass changes: they are stored once, and mapped afterwards."""
        return self.folder / f"{index}.npy"
