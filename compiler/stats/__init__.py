"""Raw statistics of attention: what a store holds, and the one way to write and read it."""

from calibatt.compiler.stats.errors import (
    DuplicateSample,
    ManifestError,
    ManifestMismatch,
    MissingUnits,
    NoSamples,
    ProbeError,
    RefinementError,
    SampleError,
    SampleExists,
    StoreBusy,
    StoreError,
    UnitError,
)
from calibatt.compiler.stats.manifest import DEFAULT_THRESHOLDS, Manifest
from calibatt.compiler.stats.probes import ErrorWeights, Probe, TimeWeightInfo, error_weights
from calibatt.compiler.stats.refinement import Ladders
from calibatt.compiler.stats.store import Store
from calibatt.compiler.stats.unit import (
    STEPS_PER_OCTAVE,
    ZERO_CODE,
    UnitStatistics,
    code_values,
    dequantise,
    fast_codes,
    neighbours,
    quantise,
    unit_shapes,
)
from calibatt.compiler.stats.windows import Window, default_windows, window_keep
from calibatt.compiler.stats.writer import SampleWriter, StoreWriter

__all__ = [
    "DEFAULT_THRESHOLDS",
    "STEPS_PER_OCTAVE",
    "ZERO_CODE",
    "DuplicateSample",
    "ErrorWeights",
    "Ladders",
    "Manifest",
    "ManifestError",
    "ManifestMismatch",
    "MissingUnits",
    "NoSamples",
    "Probe",
    "ProbeError",
    "RefinementError",
    "SampleError",
    "SampleExists",
    "SampleWriter",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreWriter",
    "TimeWeightInfo",
    "UnitError",
    "UnitStatistics",
    "Window",
    "code_values",
    "default_windows",
    "dequantise",
    "error_weights",
    "fast_codes",
    "neighbours",
    "quantise",
    "unit_shapes",
    "window_keep",
]
