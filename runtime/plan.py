"""Loads plans, one or a set, and attaches them to models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from calibatt.plans import ModelSignature, PlanFile, TokenGrid, write_plan
from calibatt.runtime.adapters import PlanMismatchError
from calibatt.runtime.attachment import Attachable
from calibatt.runtime.resident import LoadedPlan
from calibatt.runtime.session import check_signature


class Plan(Attachable, LoadedPlan):
    """A plan that is ready to run; immutable.

    Args:
        file: The plan's contents.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (self.file,)  # without its arrays on devices

    def fitting(self, signature: ModelSignature) -> Sequence[Plan]:
        """This plan, if it is for the model.

        Raises:
            PlanMismatchError: It is for another model; lists all differences.
        """
        check_signature(self.signature, signature)
        return [self]

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the plan to a file that `load_plan` reads: whole or not at all, the same plan as the same bytes.

        Raises:
            OSError: The file cannot be written.
        """
        write_plan(path, self.file)


class PlanSet(Attachable):
    """Plans of several models and resolutions, of which every forward gets its own.

    Args:
        plans: By name, such as the names of their files.
    """

    def __init__(self, plans: Mapping[str, Plan]) -> None:
        self.plans = dict(plans)

    def fitting(self, signature: ModelSignature) -> Sequence[Plan]:
        """The plans that are for a model, each at a resolution of its own.

        Raises:
            PlanMismatchError: None is, says what differs from each; or several are, at one resolution.
        """
        names: dict[TokenGrid, str] = {}
        refused = []
        for name, plan in self.plans.items():
            try:
                check_signature(plan.signature, signature)
            except PlanMismatchError as error:
                refused.append(f"{name}: {error}")
                continue
            if plan.grid in names:
                raise PlanMismatchError(
                    f"one plan at most must be for {signature.architecture} at {plan.grid}, got {names[plan.grid]} and "
                    f"{name}; load the one that is meant with load_plan"
                )
            names[plan.grid] = name
        if not names:
            raise PlanMismatchError(f"a plan must be for this model, got none: {' | '.join(refused)}")
        return [self.plans[name] for name in names.values()]


def load_plan(path: str | PathLike[str], *, prove: bool = True) -> Plan:
    """Maps a plan file and proves all of it; masks stay in the file until they are needed.

        >>> plan = load_plan("plans/demo.plan")
        >>> plan.signature.architecture, plan.grid.tokens, len(plan.segments)
        ('WanTransformer3DModel', 4608, 8)
        >>> 0 < plan.schedule(time=0.9, layer=0).density < 1  # share of the blocks of dense attention
        True

    Args:
        path: The file.
        prove: Prove every layer now, on all cores. Else only header and checksums are proved now and a layer when it
            is first used, so that a wrongly written plan may fail in the middle of a video.

    Raises:
        PlanError: The first broken promise of FORMAT.md; the message names file, rule and value.
        OSError: The file cannot be read.
    """
    file = PlanFile.read(path)
    if prove:
        file.prove()
    return Plan(file)


def load_plans(folder: str | PathLike[str], *, prove: bool = True) -> PlanSet:
    """Loads every ``.plan`` file of a folder, not of the folders in it.

        >>> plans = load_plans("plans/")
        >>> {name: plan.grid.tokens for name, plan in plans.plans.items()}
        {'demo.plan': 4608}

    Args:
        folder: Where the files are.
        prove: As of `load_plan`.

    Raises:
        FileNotFoundError: The folder has none, or is none.
        PlanError: As of `load_plan`, of the first file that breaks a promise.
    """
    paths = sorted(Path(folder).glob("*.plan"))
    if not paths:
        raise FileNotFoundError(f"{folder} must be a folder with .plan files, got none")
    return PlanSet({path.name: load_plan(path, prove=prove) for path in paths})
