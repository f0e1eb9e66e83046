"""The passes by name; a pass is imported when it is asked for.

A pass is a frozen dataclass whose fields are its options. It changes the job and does nothing else: verifying, timing,
printing and accounting are the pipeline's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

from calibatt.compiler.errors import PassError
from calibatt.compiler.ir import Job


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler."""

    name: ClassVar[str]
    """In pass strings; kebab-case."""

    @abstractmethod
    def apply(self, job: Job) -> None:
        """Changes the job.

        Raises:
            PassError: The job lacks what the pass requires.
        """

    def require(self, ok: bool, what: str, rule: str, value: object) -> None:
        """Raises a `PassError` in one form for all passes unless `ok`."""
        if not ok:
            raise PassError(f"{self.name}: {what} must {rule}, got {value}")


def _load(module: str, kind: str) -> Callable[[], type[Pass]]:
    def load() -> type[Pass]:
        found: type[Pass] = getattr(import_module(f"calibatt.compiler.passes.{module}"), kind)
        return found

    return load


PASSES: dict[str, Callable[[], type[Pass]]] = {
    "vote": _load("vote", "Vote"),
    "uniform": _load("uniform", "Uniform"),
    "protect": _load("protect", "Protect"),
    "select": _load("select", "Select"),
    "anchors": _load("anchors", "Anchors"),
    "schedule": _load("schedule", "Schedule"),
    "lower": _load("lower", "Lower"),
}
"""Every pass there is, in the order in which they are usually run."""
