"""The passes by name; a pass is imported when it is asked for.

A pass is a frozen dataclass whose fields are its options. It changes units and does nothing else: verifying, timing,
printing and accounting are the pipeline's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from calibatt.compiler.errors import PassError
from calibatt.compiler.ir import Job, UnitIR

Findings = dict[str, float]
"""What a pass counted in one unit; the pipeline adds them up."""


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler.

    Most passes see one unit at a time. One with `decides` looks at every unit first (`survey`), then once at all that
    was found (`decide`), and then changes every unit by what was decided.
    """

    name: ClassVar[str]
    """In pass strings; kebab-case."""
    decides: ClassVar[bool] = False

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        """Refuses what cannot work, before any unit is read.

        Args:
            job: Nothing has been decided yet.
            before: The passes that will have been run.

        Raises:
            PassError: An option that the statistics rule out, or a place among the passes.
        """
        return None

    def refuse_after(self, before: Sequence[Pass], *names: str) -> None:
        """Raises a `PassError` in one form if one of some passes, this one perhaps, will have been run."""
        for each in before:
            self.require(each.name not in names, self.name, f"come before {each.name}", "it after")

    def survey(self, job: Job, unit: UnitIR) -> Any:
        """What `decide` needs to know of a unit: small, and able to travel between processes.

        Raises:
            PassError: The unit lacks what the pass requires.
        """
        return None

    def decide(self, job: Job, surveys: Sequence[Any]) -> Sequence[Any]:
        """What is to be done with each unit; may set what the job knows.

        Args:
            job: May be changed.
            surveys: One a unit, all layers of a time after the other.

        Raises:
            PassError: It cannot be done.
        """
        return [None] * len(surveys)

    @abstractmethod
    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        """Changes a unit; the job is read only.

        Args:
            job: Read only.
            unit: To be changed.
            decision: Of `decide`.

        Raises:
            PassError: The unit lacks what the pass requires.
        """

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        """What the report says of the pass, from the sum of what `change` found."""
        return dict(total)

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
    "select": _load("select", "Select"),
    "anchors": _load("anchors", "Anchors"),
    "repeat": _load("repeat", "Repeat"),
    "merge-heads": _load("merge_heads", "MergeHeads"),
    "schedule": _load("schedule", "Schedule"),
    "lower": _load("lower", "Lower"),
}
"""Every pass there is, in the order in which they are usually run."""
