"""Errors of a statistics store; every message names the file or field, the rule and the value."""

from __future__ import annotations

from calibatt.plans.errors import legible


class StoreError(ValueError):
    """Base of all errors of `calibatt.compiler.stats`. Messages are `legible`."""

    def __init__(self, message: str = "") -> None:
        super().__init__(legible(message))


class ManifestError(StoreError):
    """A manifest breaks a rule or cannot be read."""


class ManifestMismatch(StoreError):
    """Two manifests that must be equal differ; the message lists every difference."""


class UnitError(StoreError):
    """The arrays of one unit contradict the manifest, each other, or the unit's time and layer."""


class SampleExists(StoreError):
    """A sampling of this name is finished already."""


class DuplicateSample(StoreError):
    """Two stores hold a sampling of one name."""


class MissingUnits(StoreError):
    """There is no unit for some times and layers, or it does not hold a sampling; the message names them."""


class SampleError(StoreError):
    """A sampling's name, tables or file break a rule."""


class NoSamples(StoreError):
    """A store has no finished sampling."""


class StoreBusy(StoreError):
    """Another writer has the store open."""
