"""Raw statistics of attention: what a store holds, and the one way to write and read it."""

from calibatt.compiler.stats.codes import (
    code_values,
    dequantise,
    fast_codes,
    quantise,
)
from calibatt.compiler.stats.errors import (
    DuplicateSample,
    ManifestError,
    ManifestMismatch,
    MissingUnits,
    NoSamples,
    SampleError,
    SampleExists,
    StoreBusy,
    StoreError,
    UnitError,
)
from calibatt.compiler.stats.manifest import Manifest
from calibatt.compiler.stats.sampling import SamplingTables
from calibatt.compiler.stats.store import Store, Table
from calibatt.compiler.stats.unit import Unit, combined, neighbours, unit_shapes
from calibatt.compiler.stats.windows import Window, default_windows, window_keep
from calibatt.compiler.stats.writer import StoreWriter

__all__ = [
    "DuplicateSample",
    "Manifest",
    "ManifestError",
    "ManifestMismatch",
    "MissingUnits",
    "NoSamples",
    "SampleError",
    "SampleExists",
    "SamplingTables",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreWriter",
    "Table",
    "Unit",
    "UnitError",
    "Window",
    "code_values",
    "combined",
    "default_windows",
    "dequantise",
    "fast_codes",
    "neighbours",
    "quantise",
    "unit_shapes",
    "window_keep",
]
