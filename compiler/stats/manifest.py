"""What a store of statistics was measured on and how: one frozen value, one canonical `manifest.json`."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from hashlib import blake2b
from typing import Any

from calibatt.compiler.stats.errors import ManifestError
from calibatt.compiler.stats.windows import Window
from calibatt.plans.errors import ScheduleError, SchemaError
from calibatt.plans.schedule import check_size
from calibatt.plans.schema import Blocks, ModelSignature, TokenGrid

SCHEMA_VERSION = 4
MAX_UNITS, MAX_TIMES = 1 << 16, 1000
"""So many files in a folder; three digits of a name."""
DEFAULT_SHARES = (0.1, 0.2, 0.35, 0.5, 0.7)


def _require(ok: bool, what: str, rule: str, value: object) -> None:
    if not ok:
        raise ManifestError(f"{what} must be {rule}, got {value!r}")


def _ascending(values: object, low: float, high: float) -> bool:
    if not isinstance(values, tuple) or not values:
        return False
    if not all(type(value) is float and math.isfinite(value) and low <= value <= high for value in values):
        return False
    return all(a < b for a, b in itertools.pairwise(values))


@dataclass(frozen=True)
class Manifest:
    """Everything that all units of a store share.

    Args:
        model: The model that was measured.
        grid: Its video tokens; blocks begin with the first one.
        blocks: Tokens per query and key block.
        times: Recorded denoising times, floats in [0, 1], ascending; a unit's `time_index` counts in them.
        windows: The parametric masks whose effects are measured.
        shares: Densities of the ladder's masks, floats below 1, ascending, none for no ladder.
        row_radius: Row offsets -radius..-1, 1..radius are measured; 0 for none.
        frame_radius: Frame offsets, likewise.
        thresholds: Masses whose votes are counted for the paper's own method, floats in (0, 1], ascending; mostly none.
        versions: Versions of the tools and libraries that wrote it, by name.
        schema_version: Version of the store's format.

    Raises:
        ManifestError: A value breaks its rule.
    """

    model: ModelSignature
    grid: TokenGrid
    blocks: Blocks
    times: tuple[float, ...]
    windows: tuple[Window, ...] = ()
    shares: tuple[float, ...] = DEFAULT_SHARES
    row_radius: int = 0
    frame_radius: int = 0
    thresholds: tuple[float, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _require(type(self.schema_version) is int, "schema_version", "an integer", self.schema_version)
        _require(self.schema_version == SCHEMA_VERSION, "schema_version", str(SCHEMA_VERSION), self.schema_version)
        for name, kind in (("model", ModelSignature), ("grid", TokenGrid), ("blocks", Blocks)):
            _require(isinstance(getattr(self, name), kind), name, f"a {kind.__name__}", getattr(self, name))
        try:
            check_size(self.grid, self.blocks, self.model.heads)
        except ScheduleError as error:  # no plan can be that large
            raise ManifestError(str(error)) from None
        _require(_ascending(self.times, 0.0, 1.0), "times", "ascending floats in [0, 1]", self.times)
        units = len(self.times) * self.model.layers
        _require(len(self.times) <= MAX_TIMES, "times", f"at most {MAX_TIMES}", len(self.times))
        _require(units <= MAX_UNITS, "model.layers", f"at most {MAX_UNITS} in all times together", units)
        levels = self.thresholds == () or _ascending(self.thresholds, math.ulp(0.0), 1.0)
        _require(levels, "thresholds", "ascending floats in (0, 1]", self.thresholds)
        shares = self.shares == () or _ascending(self.shares, math.ulp(0.0), 1.0 - math.ulp(0.5))
        _require(shares, "shares", "ascending floats in (0, 1)", self.shares)
        windows = isinstance(self.windows, tuple) and all(isinstance(window, Window) for window in self.windows)
        _require(windows and len(set(self.windows)) == len(self.windows), "windows", "distinct Windows", self.windows)
        for name, count in (("row_radius", self.grid.height), ("frame_radius", self.grid.frames)):
            radius = getattr(self, name)
            _require(type(radius) is int and 0 <= radius < count, name, f"an integer from 0 to {count - 1}", radius)
        versions = isinstance(self.versions, Mapping) and all(
            isinstance(part, str) for pair in self.versions.items() for part in pair
        )
        _require(versions, "versions", "a map of strings", self.versions)
        object.__setattr__(self, "versions", dict(sorted(self.versions.items())))

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def q_blocks(self) -> int:
        return self.blocks.q_blocks(self.grid.tokens)

    @property
    def k_blocks(self) -> int:
        return self.blocks.k_blocks(self.grid.tokens)

    @cached_property
    def digest(self) -> str:
        """Digest of the whole manifest, 32 hexadecimal digits; every unit carries it."""
        return blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """The canonical text of `manifest.json`: equal manifests give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Reads `manifest.json`.

        Raises:
            ManifestError: It is no JSON, lacks or has unknown fields, or a value breaks its rule.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"the manifest must be JSON, got {error}") from None
        if isinstance(value, dict) and (older := value.get("schema_version")) in range(1, SCHEMA_VERSION):
            rule = f"{SCHEMA_VERSION} (calibrate again: an earlier version measured something else)"
            _require(False, "schema_version", rule, older)
        known = _fields_of(cls, "the manifest", value)
        version = known["schema_version"]
        _require(version == SCHEMA_VERSION, "schema_version", str(SCHEMA_VERSION), version)
        try:
            for name, kind in (("model", ModelSignature), ("grid", TokenGrid), ("blocks", Blocks)):
                known[name] = kind(**_fields_of(kind, name, known[name]))
            for name in ("times", "thresholds", "shares", "windows"):
                _require(isinstance(known[name], list), name, "a list", known[name])
                known[name] = tuple(known[name])
            known["windows"] = tuple(_window(window) for window in known["windows"])
            return cls(**known)
        except SchemaError as error:
            raise ManifestError(str(error)) from None

    def differences(self, other: Manifest) -> list[str]:
        """One line ``field: ours, theirs`` for every field that differs; empty for equal manifests."""
        ours, theirs = (_flat("", asdict(each)) for each in (self, other))
        names = sorted({*ours, *theirs})
        pairs = [(name, ours.get(name, "absent"), theirs.get(name, "absent")) for name in names]
        return [f"{name}: {mine!r}, {their!r}" for name, mine, their in pairs if mine != their]


def _window(value: object) -> Window:
    known = _fields_of(Window, "windows", value)
    _require(isinstance(known["radii"], list), "window.radii", "a list", known["radii"])
    return Window(known["kind"], tuple(known["radii"]))


def _fields_of(kind: type[Any], what: str, value: object) -> dict[str, Any]:
    """The values of a map whose keys must be exactly the fields of a dataclass."""
    names = {each.name for each in fields(kind)}
    if not isinstance(value, dict):
        raise ManifestError(f"{what} must be a map, got {value!r}")
    for rule, wrong in (("have the field", names - set(value)), ("not have the field", set(value) - names)):
        if wrong:
            raise ManifestError(f"{what} must {rule} {min(wrong)!r}, got {sorted(value)}")
    return dict(value)


def _flat(prefix: str, value: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat.update(_flat(f"{prefix}{name}.", part) if isinstance(part, Mapping) else {prefix + name: part})
    return flat
