"""What can be wrong with a statistics store; every message names the file or field, the rule and the value found."""

from __future__ import annotations


class StoreError(ValueError):
    """Base of all errors of `calibatt.compiler.stats`."""


class ManifestError(StoreError):
    """A manifest breaks a rule or cannot be read."""


class ManifestMismatch(StoreError):
    """Two manifests that must be one differ; the message lists every difference."""


class UnitError(StoreError):
    """The arrays of one unit contradict the manifest, each other or their place."""


class SampleExists(StoreError):
    """A complete sample of this name is there already."""


class DuplicateSample(StoreError):
    """Two stores hold a sample of one name, or a probe of one sample and time."""


class MissingUnits(StoreError):
    """A sample lacks units or its `sample.json`; the message names them."""


class SampleError(StoreError):
    """A sample's name, `sample.json` or directory breaks a rule."""


class ProbeError(StoreError):
    """A probe of the time weight breaks a rule."""


class RefinementError(StoreError):
    """A refinement is damaged, unfinished, or of other samples or ladders than those asked for."""


class NoSamples(StoreError):
    """A store has no complete sample."""


class StoreBusy(StoreError):
    """Another writer has the store open."""
