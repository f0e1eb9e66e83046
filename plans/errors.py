"""What can be wrong with a plan file: one exception per broken promise, all below `PlanError`."""

from __future__ import annotations


class PlanError(Exception):
    """A plan, or a file in the plan container, breaks a promise of FORMAT.md."""


class SchemaError(PlanError):
    """A value of the header is missing, of the wrong kind or out of its range."""


class ScheduleError(PlanError):
    """The arrays of a schedule contradict each other: lists, columns, anchors, heads or tile order."""
