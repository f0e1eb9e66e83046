"""The statistics of one time and layer, means over samplings: arrays, their rules, and the file that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.codes import MOST, Codes, Float, dequantise, quantise
from calibatt.compiler.stats.errors import DuplicateSample, SampleError, UnitError
from calibatt.compiler.stats.files import check_name
from calibatt.compiler.stats.manifest import Manifest
from calibatt.plans.container import Container, write_container
from calibatt.plans.errors import PlanError

MAGIC = b"CALIBSTA"
VERSION = (2, 0)
Place = tuple[int, int]
"""Time index and layer of a unit."""
CODED = ("effect", "error")
"""Arrays stored as codes, with a peak for each head."""
SMALL = ("row_effect", "frame_effect", "row_difference")
"""Arrays stored as they are; NaN where there is no such row or frame."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Means over samplings of what was measured at one (time, layer), each first divided by its sampling's level.

    H heads, Q and K query and key blocks, Y rows of a frame, R row radius, F frames, S frame radius, T thresholds.

    Args:
        samplings: Names of the samplings it holds, in order of arrival.
        effect: Codes (H, Q, K) of squared effects, uint16 while samplings are being added, uint8 once closed; see
            `stats.codes`.
        effect_peak: float32 (H,): the value of code 0.
        error: Codes of the errors of blocks, likewise.
        error_peak: float32 (H,).
        row_effect: float32 (H, Y, 2 R), offsets -R..-1, 1..R, NaN just where there is no such row: squared effect of
            replacing a row by that neighbour.
        frame_effect: float32 (H, F, 2 S), of frames, likewise; None where S is 0.
        votes: uint16 (T, H, Q, K), a sum: in how many samples (branches count singly) the block is in the smallest set
            that holds the mass; None without thresholds.
        vote_samples: How many samples voted; 0 without thresholds.
        row_difference: float32 (H, Y, 2 R): mean ||O[r] - O[r + d]||^2 / ||O[r]||^2; None without thresholds.
    """

    samplings: tuple[str, ...]
    effect: Codes
    effect_peak: Float
    error: Codes
    error_peak: Float
    row_effect: Float
    frame_effect: Float | None = None
    votes: npt.NDArray[np.uint16] | None = None
    vote_samples: int = 0
    row_difference: Float | None = None

    @classmethod
    def of(cls, sampling: str, effect: Float, error: Float, row_effect: Float, **more: Any) -> Unit:
        """The unit of one sampling; effects and errors are float32 ``(H, Q, K)``, means over vectors / level.

        Raises:
            UnitError: An effect or error is negative or not finite.
        """
        arrays: dict[str, Any] = {}
        for name, value in (("effect", effect), ("error", error)):
            peak = value.max((1, 2))
            try:
                arrays |= {name: quantise(value, peak[:, None, None], fine=True), f"{name}_peak": peak}
            except UnitError as wrong:
                raise UnitError(f"{name}: {wrong}") from None
        return cls((sampling,), **arrays, row_effect=row_effect, **more)

    @property
    def n(self) -> int:
        """How many samplings it holds."""
        return len(self.samplings)

    @property
    def closed(self) -> bool:
        return self.effect.dtype == np.uint8

    def effect_values(self) -> Float:
        """Mean squared effect of each block / level, float32 (H, Q, K)."""
        return dequantise(self.effect, self.effect_peak[:, None, None])

    def error_values(self) -> Float:
        """Mean error of each block / level, float32 (H, Q, K)."""
        return dequantise(self.error, self.error_peak[:, None, None])

    def check(self, manifest: Manifest) -> None:
        """Proves the arrays against the manifest.

        Raises:
            UnitError: An array is missing, not announced, of another shape or dtype, or breaks its rule.
        """
        if not self.samplings or len(set(self.samplings)) != self.n:
            raise UnitError(f"samplings must be at least one, all different, got {self.samplings}")
        shapes = unit_shapes(manifest)
        axes = {
            "row": neighbours(manifest.grid.height, manifest.row_radius),
            "frame": neighbours(manifest.grid.frames, manifest.frame_radius),
        }
        for name in (*CODED, *(f"{name}_peak" for name in CODED), "votes", *SMALL):
            array = getattr(self, name)
            if (array is None) != (name not in shapes):
                rule = "be there" if array is None else "be absent"
                raise UnitError(f"{name} must {rule} as the manifest says, got {_kind(array)}")
            if array is None:
                continue
            allowed = ("uint8", "uint16") if name in CODED else ("uint16",) if name == "votes" else ("float32",)
            if _kind(array) not in [f"{dtype} {shapes[name]}" for dtype in allowed]:
                raise UnitError(f"{name} must be {' or '.join(allowed)} {shapes[name]}, got {_kind(array)}")
            if array.dtype.kind == "u":
                continue
            if (axis := name.split("_")[0]) in axes:
                inside = axes[axis]
                if not np.isnan(array[:, ~inside]).all():
                    value = array[:, ~inside][~np.isnan(array[:, ~inside])][0]
                    raise UnitError(f"{name} must be NaN where there is no such {axis}, got {value}")
                array = array[:, inside]
            if array.size and not (array.min() >= 0 and array.max() <= MOST):  # NaN fails the first
                wrong = ~((array >= 0) & (array <= MOST))
                raise UnitError(f"{name} must be from 0 to {MOST:g}, got {array[wrong][0]}")
        if self.effect.dtype != self.error.dtype:
            raise UnitError(f"error must be of effect's dtype {self.effect.dtype}, got {self.error.dtype}")
        count = self.vote_samples
        if type(count) is not int or (count > 0) != bool(manifest.thresholds) or count < 0:
            rule = "be a positive integer" if manifest.thresholds else "be 0 without thresholds"
            raise UnitError(f"vote_samples must {rule}, got {count}")
        if self.votes is not None and self.votes.max() > count:
            raise UnitError(f"votes must be at most vote_samples {count}, got {self.votes.max()}")


def combined(parts: Sequence[Unit], closed: bool = False) -> Unit:
    """The mean of several units, each weighted by the samplings it holds; votes are added.

    Args:
        parts: The units, in the order in which their samplings are listed.
        closed: Whether codes are uint8 instead of uint16.

    Raises:
        DuplicateSample: Two hold one sampling.
    """
    samplings = tuple(name for part in parts for name in part.samplings)
    if len(set(samplings)) != len(samplings):
        twice = sorted({name for name in samplings if samplings.count(name) > 1})
        raise DuplicateSample(f"a sampling must be in one store, got {', '.join(map(repr, twice))} in several")
    weights = [np.float32(part.n / len(samplings)) for part in parts]
    arrays: dict[str, Any] = {}
    first = parts[0]
    for name in CODED:
        codes = np.empty(getattr(first, name).shape, np.uint8 if closed else np.uint16)
        peaks = np.zeros(len(codes), np.float32)
        for head in range(len(codes)):
            total: Any = None
            for part, weight in zip(parts, weights, strict=True):
                value = dequantise(getattr(part, name)[head], weight * getattr(part, f"{name}_peak")[head])
                total = value if total is None else np.add(total, value, out=total)
            peaks[head] = total.max()
            codes[head] = quantise(total, peaks[head], fine=not closed)
        arrays |= {name: codes, f"{name}_peak": peaks}
    for name in SMALL:
        if getattr(first, name) is not None:
            pairs = zip(parts, weights, strict=True)
            arrays[name] = sum((getattr(part, name) * np.float64(weight) for part, weight in pairs), np.float64(0))
            arrays[name] = arrays[name].astype(np.float32)
    if first.votes is not None:
        votes = sum((part.votes.astype(np.uint32) for part in parts if part.votes is not None), np.uint32(0))
        arrays["votes"] = np.minimum(votes, np.iinfo(np.uint16).max).astype(np.uint16)
    return Unit(samplings, **arrays, vote_samples=sum(part.vote_samples for part in parts))


def reclosed(unit: Unit) -> Unit:
    """The same unit with uint8 codes."""
    return combined([unit], closed=True)


def neighbours(count: int, radius: int) -> npt.NDArray[np.bool_]:
    """bool ``(count, 2 radius)``: whether there is a row, or frame, at each offset -radius..-1, 1..radius of each."""
    place = np.arange(count)[:, None] + np.array([*range(-radius, 0), *range(1, radius + 1)], np.int64)
    return (place >= 0) & (place < count)


def unit_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a unit of this manifest."""
    heads, thresholds = manifest.model.heads, len(manifest.thresholds)
    blocks = (heads, manifest.q_blocks, manifest.k_blocks)
    rows = (heads, manifest.grid.height, 2 * manifest.row_radius)
    frames = (heads, manifest.grid.frames, 2 * manifest.frame_radius)
    shapes: dict[str, tuple[int, ...]] = {name: blocks for name in CODED} | {f"{name}_peak": (heads,) for name in CODED}
    shapes["row_effect"] = rows
    if manifest.frame_radius:
        shapes["frame_effect"] = frames
    if thresholds:
        shapes |= {"votes": (thresholds, *blocks), "row_difference": rows}
    return shapes


def write_unit(path: str | PathLike[str], unit: Unit, manifest: Manifest, place: Place) -> int:
    """Writes one unit file, whole or not at all.

    Args:
        path: The file.
        unit: The arrays; checked against the manifest.
        manifest: The store's manifest.
        place: Its time index and layer; a reader proves that it found the file where it belongs.

    Returns:
        Bytes written.

    Raises:
        UnitError: The arrays contradict the manifest.
        OSError: The file cannot be written.
    """
    try:
        unit.check(manifest)
    except UnitError as error:
        raise UnitError(f"{path}: {error}") from None
    sections = {name: getattr(unit, name) for name in unit_shapes(manifest)}
    header = _identity(manifest, place) | {"samplings": list(unit.samplings), "vote_samples": unit.vote_samples}
    return write_container(path, magic=MAGIC, version=VERSION, header=header, sections=sections, crc=True)


def read_samplings(path: str | PathLike[str], manifest: Manifest, place: Place) -> tuple[str, ...]:
    """Names of the samplings that a unit file holds; only the header is read.

    Raises:
        UnitError: The file is damaged, or belongs to another manifest or place.
        OSError: The file cannot be read.
    """
    return _open(path, manifest, place)[1]


def read_unit(path: str | PathLike[str], manifest: Manifest, place: Place) -> Unit:
    """Reads and proves one unit file; the arrays are read-only views of the mapped file.

    Raises:
        UnitError: The file is damaged, belongs to another manifest or place, or its arrays break a rule.
        OSError: The file cannot be read.
    """
    file, samplings = _open(path, manifest, place)
    try:
        arrays = {name: file.section(name) for name in file.names}
    except PlanError as error:
        raise UnitError(str(error)) from None
    if set(file.names) != set(unit_shapes(manifest)):
        raise UnitError(f"{path}: the sections must be {sorted(unit_shapes(manifest))}, got {sorted(file.names)}")
    unit = Unit(samplings, **arrays, vote_samples=file.header["vote_samples"])
    try:
        unit.check(manifest)
    except UnitError as error:
        raise UnitError(f"{path}: {error}") from None
    return unit


def _identity(manifest: Manifest, place: Place) -> dict[str, Any]:
    """What the header of a unit says whatever was measured."""
    return {"time_index": place[0], "layer": place[1], "manifest": manifest.digest}


def _open(path: str | PathLike[str], manifest: Manifest, place: Place) -> tuple[Container, tuple[str, ...]]:
    try:
        file = Container.open(path, magic=MAGIC, version=VERSION, crc=True)
    except PlanError as error:
        raise UnitError(str(error)) from None
    expected = _identity(manifest, place)
    given = {key: value for key, value in file.header.items() if key not in ("samplings", "vote_samples")}
    if given != expected or len(file.header) != len(expected) + 2:
        rule = f"be {expected} with samplings and vote_samples"
        raise UnitError(f"{path}: the header must {rule}, got {file.header}")
    names, count = file.header["samplings"], file.header["vote_samples"]
    try:
        if not isinstance(names, list) or type(count) is not int:
            raise SampleError("of other types")
        return file, tuple(check_name(name) for name in names)
    except SampleError as error:
        raise UnitError(f"{path}: samplings must be names, and vote_samples an integer, got {error}") from None


def _kind(array: object) -> str:
    if not isinstance(array, np.ndarray):
        return "none" if array is None else type(array).__name__
    return f"{array.dtype.name} {array.shape}"
