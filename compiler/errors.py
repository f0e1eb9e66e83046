"""Errors of the compiler; every message names the thing, the rule and the value."""

from __future__ import annotations


class CompileError(ValueError):
    """Base of all errors of the compiler."""


class PassSyntaxError(CompileError):
    """A pass string cannot be read, or names a pass or an option that there is not."""


class PassError(CompileError):
    """A pass cannot do its work: an option out of range, or something it requires is missing."""


class VerifyError(CompileError):
    """A pass left the job in a state that breaks a rule; always a bug of that pass."""
