"""The passes by name; a pass is imported when it is first used.

A pass is a frozen dataclass whose fields are its options. It changes units and does nothing else: the pipeline
verifies, times, prints and accounts.
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
"""Numbers that a pass counted in one unit; the pipeline adds them up."""


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler.

    Most passes see one unit at a time. One with `decides` first surveys every unit (`survey`), then decides once from
    all surveys (`decide`), and then changes every unit by that decision.
    """

    name: ClassVar[str]
    """Its name in pass strings, in kebab-case."""
    decides: ClassVar[bool] = False

    def check(self, job: Job, before: Sequence[Pass]) -> None:
        """Refuses options and orders of passes that cannot work, before any unit is read.

        Args:
            job: The job, in which nothing has been decided yet.
            before: The passes that are run before this one.

        Raises:
            PassError: The statistics lack what an option needs, or another pass must come before or after.
        """
        return None

    def refuse_after(self, before: Sequence[Pass], *names: str) -> None:
        """Raises a `PassError` if one of these passes is run before this one."""
        for each in before:
            self.require(each.name not in names, self.name, f"come before {each.name}", "it after")

    def survey(self, job: Job, unit: UnitIR) -> Any:
        """What `decide` needs to know of a unit: small, and picklable.

        Raises:
            PassError: The unit lacks what the pass requires.
        """
        return None

    def decide(self, job: Job, surveys: Sequence[Any]) -> Sequence[Any]:
        """Decides what is done with each unit; may set values of the job.

        Args:
            job: The job; it may be changed.
            surveys: The survey of each unit, layer by layer, time by time.

        Raises:
            PassError: It cannot be done.
        """
        return [None] * len(surveys)

    @abstractmethod
    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        """Changes a unit; the job is read only.

        Args:
            job: The job, which is not changed.
            unit: The unit to change.
            decision: What `decide` returned for the unit.

        Raises:
            PassError: The unit lacks what the pass requires.
        """

    def report(self, job: Job, total: Findings) -> dict[str, Any]:
        """The findings in the report, from the sums of what `change` returned."""
        return dict(total)

    def require(self, ok: bool, what: str, rule: str, value: object) -> None:
        """Raises a `PassError` in one form for all passes unless `ok`."""
        if not ok:
            raise PassError(f"{self.name}: {what} must {rule}, got {value}")


def _load(module: str, kind: str) -> Callable[[], type[Pass]]:
    def load() -> type[Pass]:
        loaded: type[Pass] = getattr(import_module(f"calibatt.compiler.passes.{module}"), kind)
        return loaded

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
"""All passes, in the order in which they are usually run."""
