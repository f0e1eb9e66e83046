"""Stores on disk what has been done of a sampling: outputs and gradients of forwards, tables of times."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from calibatt.plans.files import whole_file
from calibatt.tools.calibrate.chain import Cotangents

SAME = 2e-5
"""Relative difference of sizes up to which arguments of a forward count as the same."""
SAME_OUTPUT = 0.02
"""Relative difference up to which outputs of a forward count as the same: other kernels round otherwise."""


class JournalError(ValueError):
    """A sampling is continued with other facts, arguments or weights than it was begun with."""


class Journal:
    """A folder with a file for each output, gradient and table; a file that is there is whole.

    Args:
        folder: An existing folder; None: nothing is stored.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._begun = time.perf_counter()
        clock = None if folder is None else folder / "seconds.json"
        self.seconds: float = json.loads(clock.read_text("utf-8")) if clock is not None and clock.exists() else 0.0
        """Seconds that earlier runs of this sampling took."""

    def begin(self, facts: Mapping[str, int]) -> None:
        """Proves that a sampling is continued as it was begun.

        Raises:
            JournalError: It was begun with other facts.
        """
        path = None if self.folder is None else self.folder / "begun.json"
        if path is not None and path.exists() and (known := json.loads(path.read_text("utf-8"))) != dict(facts):
            raise JournalError(
                f"{self.folder} must be continued with {known}, got {dict(facts)}; remove it to begin anew"
            )
        self._write("begun.json", json.dumps(dict(facts)).encode())

    def output(self, number: int, marks: Sequence[float]) -> tuple[Tensor, ...] | None:
        """The tensors that a forward returned, or None if they are not stored.

        Args:
            number: Number of the forward.
            marks: Time and sizes of its arguments.

        Raises:
            JournalError: It had other arguments.
        """
        stored = self._load(f"forward{number:04d}.out")
        if stored is None:
            return None
        known = stored.pop("marks").tolist()
        if len(known) != len(marks) or not np.allclose(known, marks, rtol=SAME, atol=0):
            raise JournalError(
                f"forward {number} must be given what it was when {self.folder} was begun (prompts, guidance, "
                "scheduler), got arguments of another size or time; remove the folder to begin anew"
            )
        return tuple(stored[str(index)] for index in range(len(stored)))

    def compare(self, kept: Sequence[Tensor], again: Sequence[Tensor]) -> None:
        """Proves that a sampling goes on with the model that it was begun with, by what a forward returns.

        Raises:
            JournalError: It returns something else.
        """
        for before, now in zip(kept, again, strict=True):
            apart = float((before.to(now) - now).float().norm() / now.float().norm())
            if not apart <= SAME_OUTPUT:
                raise JournalError(
                    f"a model must be the one that {self.folder} was begun with (weights, LoRA, precision), got outputs"
                    f" {apart:.2g} of their size away; remove the folder to begin anew"
                )

    def keep_output(self, number: int, marks: Sequence[float], outputs: Sequence[Tensor]) -> None:
        """Stores the tensors that a forward returned."""
        tensors = {str(index): x for index, x in enumerate(outputs)}
        self._save(f"forward{number:04d}.out", {**tensors, "marks": torch.tensor(marks, dtype=torch.float64)})

    def has_gradients(self, number: int) -> bool:
        return self.folder is not None and (self.folder / f"forward{number:04d}.grad").exists()

    def gradients(self, number: int) -> Cotangents:
        """The stored gradients of a forward's inputs."""
        stored = self._load(f"forward{number:04d}.grad")
        assert stored is not None
        vectors = int(stored.pop("vectors"))
        inputs = len(stored) // vectors
        return [[stored[f"{vector}.{index}"] for index in range(inputs)] for vector in range(vectors)]

    def keep_gradients(self, pulled: Mapping[int, Cotangents]) -> None:
        """Stores gradients of the inputs of forwards."""
        for number, gradients in pulled.items():
            tensors = {f"{vector}.{index}": x for vector, some in enumerate(gradients) for index, x in enumerate(some)}
            self._save(f"forward{number:04d}.grad", {**tensors, "vectors": torch.tensor(len(gradients))})
        self._write("seconds.json", json.dumps(self.seconds + time.perf_counter() - self._begun).encode())

    def tables(self) -> dict[int, dict[str, np.ndarray]]:
        """The stored tables, by index of the time."""
        tables = {}
        for path in () if self.folder is None else sorted(self.folder.glob("time*.table")):
            tables[int(path.stem[4:])] = {name: x.numpy() for name, x in (self._load(path.name) or {}).items()}
        return tables

    def keep_table(self, index: int, table: Mapping[str, np.ndarray]) -> None:
        """Stores the table of one time."""
        self._save(f"time{index:04d}.table", {name: torch.from_numpy(np.asarray(x)) for name, x in table.items()})

    def _load(self, name: str) -> dict[str, Tensor] | None:
        path = None if self.folder is None else self.folder / name
        try:
            return load_file(path) if path is not None and path.exists() else None
        except SafetensorError as error:
            raise JournalError(f"{path} must be whole, got {error}; remove {self.folder} to begin anew") from None

    def _save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if self.folder is not None:
            self._write(name, save({key: x.detach().cpu().contiguous() for key, x in tensors.items()}))

    def _write(self, name: str, data: bytes) -> None:
        if self.folder is not None:
            with whole_file(self.folder / name, sync=False) as file:
                file.write(data)
