"""Requirements that a plan must meet, and the verdict that is stamped into it."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibatt.plans import PlanFile, write_plan
from calibatt.tools.evaluate.evaluation import Candidate
from calibatt.tools.evaluate.metrics import Metric
from calibatt.tools.inspect_plan.summary import EVALUATION

_REQUIREMENT = re.compile(r"\s*([a-z]+)(?:\.([a-z]+))?\s*(>=|<=)\s*([-+0-9.eE]+)\s*")
_HOLDS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le}
STATISTICS = ("mean", "worst")
OF_HEADS = ("broken", "ratio")
"""Requirements that are one number of all heads and prompts."""


class RequirementError(ValueError):
    """A requirement cannot be read, or asks for what was not measured."""


@dataclass(frozen=True)
class Requirement:
    """``psnr>=30`` (a mean), ``psnr.worst>=24``, ``broken<=0``."""

    name: str
    statistic: str
    relation: str
    limit: float

    def __str__(self) -> str:
        statistic = "" if self.statistic == STATISTICS[0] else f".{self.statistic}"
        return f"{self.name}{statistic}{self.relation}{self.limit:g}"

    def value(self, metrics: Mapping[str, Any], heads: Mapping[str, Any]) -> float:
        """The number that the requirement is about; `check_names` has proved that there is one."""
        if self.name in OF_HEADS:
            return float(len(heads["broken"]) if self.name == "broken" else heads["ratio"])
        return float(metrics[self.name][self.statistic])

    def holds(self, value: float) -> bool:
        return _HOLDS[self.relation](value, self.limit)


def parse_requirements(text: str) -> tuple[Requirement, ...]:
    """Reads ``psnr>=30,flicker<=0.01``.

    Raises:
        RequirementError: A part is not ``name>=number`` or ``name.statistic<=number``.
    """
    requirements = []
    for part in text.split(","):
        match = _REQUIREMENT.fullmatch(part)
        rule = f"read name>=number or name.{'|'.join(STATISTICS)}<=number"
        if not match or (match[2] or STATISTICS[0]) not in STATISTICS:
            raise RequirementError(f"--require must {rule}, got {part.strip()!r}")
        try:
            limit = float(match[4])
        except ValueError:
            raise RequirementError(f"--require must {rule}, got {part.strip()!r}") from None
        if match[1] in OF_HEADS and match[2]:
            raise RequirementError(f"--require must {rule}; {match[1]} has no .{match[2]}, got {part.strip()!r}")
        requirements.append(Requirement(match[1], match[2] or STATISTICS[0], match[3], limit))
    return tuple(requirements)


def check_names(
    requirements: Sequence[Requirement], metrics: Sequence[Metric], candidates: Sequence[Candidate], heads: bool
) -> None:
    """Refuses requirements of numbers that will not be measured, before any work.

    Args:
        requirements: What must hold.
        metrics: The metrics that are measured.
        candidates: The plans.
        heads: Whether heads are measured.

    Raises:
        RequirementError: One is of something else; the message names what is measured.
    """
    known = [metric.name for metric in metrics]
    if heads and all("head_price" in each.plan.file.predicted for each in candidates):  # what heads are held against
        known += OF_HEADS
    for each in requirements:
        if each.name not in known:
            raise RequirementError(f"--require must name what is measured ({', '.join(known)}), got {each.name!r}")


def verdict(
    requirements: Sequence[Requirement], metrics: Mapping[str, Any], heads: Mapping[str, Any]
) -> dict[str, Any]:
    """Whether each requirement holds: plain values; ``passed`` is True where nothing is required."""
    checks = []
    for each in requirements:
        value = each.value(metrics, heads)
        checks.append({"requirement": str(each), "value": value, "holds": each.holds(value)})
    return {"passed": all(check["holds"] for check in checks), "checks": checks}


def stamp(path: Path, plan: PlanFile, evaluation: Mapping[str, Any]) -> None:
    """Writes a verdict into a plan's header, in place of an older one; what the plan executes stays as it is.

    Raises:
        OSError: The file cannot be written.
    """
    write_plan(path, replace(plan, provenance={**plan.provenance, EVALUATION: dict(evaluation)}))
