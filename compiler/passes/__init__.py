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

UnitAt = Callable[[int], UnitIR]
Findings = dict[str, float]
"""What a pass counted in one unit; the pipeline adds them up."""


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler.

    Most passes see one unit at a time. One with `decides` looks at every unit first (`survey`), then once at all that
    was found (`decide`), and then changes every unit by what was decided. One with `by_layer` looks at all times of one
    layer instead (`decide_layer`), and may look at them again while it changes one. The units outside of its range of
    times a pass neither sees nor changes.

    Args:
        from_time: Least denoising time of the units it is for; every one if absent.
        to_time: Greatest.
    """

    name: ClassVar[str]
    """In pass strings; kebab-case."""
    decides: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    votes: ClassVar[bool] = False
    """The counts of the paper's own method must be read for it."""
    from_time: float | None = None
    to_time: float | None = None

    @property
    def codes(self) -> bool:
        """The blocks' errors must be kept for it."""
        return False

    def covers(self, time: float) -> bool:
        """Whether the pass is for units of this denoising time."""
        return (self.from_time is None or self.from_time <= time) and (self.to_time is None or time <= self.to_time)

    def survey(self, job: Job, unit: UnitIR) -> Any:
        """What `decide` needs to know of a unit: small, and able to travel between processes.

        Raises:
            PassError: The unit lacks what the pass requires.
        """
        return None

    def decide(self, job: Job, units: Sequence[int], surveys: Sequence[Any]) -> Sequence[Any]:
        """What is to be done with each unit it is for; may set what the job knows.

        Args:
            job: May be changed.
            units: Numbers of the units.
            surveys: One a unit.

        Raises:
            PassError: It cannot be done.
        """
        return [None] * len(surveys)

    def decide_layer(self, job: Job, layer: int, unit_at: UnitAt) -> Sequence[Any]:
        """What is to be done with each time of a layer.

        Args:
            job: Read only.
            layer: Which.
            unit_at: The layer's unit at a time index, as the passes before left it; read only.
        """
        raise NotImplementedError

    @abstractmethod
    def change(self, job: Job, unit: UnitIR, decision: Any) -> Findings:
        """Changes a unit; the job is read only.

        Args:
            job: Read only.
            unit: To be changed.
            decision: Of `decide`; of a pass with `by_layer` a pair of that of `decide_layer` and its `unit_at`.

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
    "uniform": _load("uniform", "Uniform"),
    "protect": _load("protect", "Protect"),
    "select": _load("select", "Select"),
    "anchors": _load("anchors", "Anchors"),
    "repeat": _load("repeat", "Repeat"),
    "fill-gaps": _load("fill_gaps", "FillGaps"),
    "merge-times": _load("merge_times", "MergeTimes"),
    "merge-heads": _load("merge_heads", "MergeHeads"),
    "schedule": _load("schedule", "Schedule"),
    "lower": _load("lower", "Lower"),
}
"""Every pass there is, in the order in which they are usually run."""
