"""The statistics of one sample, time and layer: arrays, their rules, and the file that holds them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import UnitError
from calibatt.compiler.stats.manifest import Manifest
from calibatt.plans.container import Container, write_container
from calibatt.plans.errors import PlanError

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]
Code = npt.NDArray[np.uint8]

MAGIC = b"CALIBSTA"
VERSION = (1, 1)
"""Minor 1: sections have a CRC-32, which is what a compiler has time for; units of minor 0 are still read."""
STEPS_PER_OCTAVE = 8
ZERO_CODE = 255
ROUNDING = 1e-3


def quantise(values: npt.ArrayLike, peak: npt.ArrayLike) -> Code:
    """Non-negative values as uint8 codes: value = peak * 2 ** (-code / 8), code 255 = 0.

    Codes 0 to 254 span 31.75 octaves; within them the relative error is at most 2 ** (1 / 16) - 1 = 4.4 %. What is
    below half a step under the last code becomes 0.

    Args:
        values: Any shape, finite, 0 <= values <= peak; what rounding put above the peak, by up to 0.1 %, is the peak.
        peak: Broadcasts against `values`; finite, non-negative.

    Raises:
        UnitError: A value or peak out of range.
    """
    value, top = np.broadcast_arrays(np.asarray(values, np.float64), np.asarray(peak, np.float64))
    if value.size and not (np.isfinite(top).all() and top.min() >= 0):
        raise UnitError(f"peak must be finite and not negative, got {top.min()} to {top.max()}")
    wrong = ~((value >= 0) & (value <= top * (1 + ROUNDING)))
    if wrong.any():
        raise UnitError(f"values must be in [0, peak], got {value[wrong][0]} under peak {top[wrong][0]}")
    code = np.full(value.shape, float(ZERO_CODE))
    some = value > 0
    code[some] = np.rint(STEPS_PER_OCTAVE * (np.log2(top[some]) - np.log2(value[some])))
    stored: Code = np.clip(code, 0, ZERO_CODE).astype(np.uint8)
    return stored


def dequantise(codes: Code, peak: npt.ArrayLike) -> Float:
    """The values of `quantise`'s codes, float32 of the codes' shape; `peak` broadcasts."""
    if codes.dtype != np.uint8:
        raise UnitError(f"codes must be uint8, got {codes.dtype}")
    return (_FRACTIONS[codes] * np.asarray(peak, np.float64)).astype(np.float32)


def code_values(peak: float) -> Float:
    """What every code stands for under a peak, float32 (256,): a table for what must be fast."""
    return (_FRACTIONS * peak).astype(np.float32)


_FRACTIONS = np.append(np.exp2(-np.arange(ZERO_CODE) / STEPS_PER_OCTAVE), 0.0)


_TOP_BITS = 15


def fast_codes(values: Float, peak: np.float32) -> Code:
    """`quantise` by table: a value's code by its exponent and 8 bits of its mantissa, at most 0.2 % from exact.

    Args:
        values: float32, any shape, 0 <= values <= peak.
        peak: What code 0 stands for.
    """
    if peak <= 0:
        return quantise(np.zeros(values.shape), 0.0)
    bits = (values * np.float32(1 / peak)).view(np.uint32)
    bits >>= _TOP_BITS
    found: Code = _table().take(bits, mode="clip")
    return found


@lru_cache(maxsize=1)
def _table() -> Code:
    top = int(np.float32(1).view(np.uint32)) >> _TOP_BITS
    middles = ((np.arange(top + 1, dtype=np.uint32) << _TOP_BITS) + (1 << (_TOP_BITS - 1))).view(np.float32)
    codes = quantise(np.minimum(middles, 1), 1.0)
    codes[0] = 255  # an exact zero
    return codes


@dataclass(frozen=True)
class UnitStatistics:
    """One (sample, time, layer); H heads, Q and K blocks, T thresholds, M = T + windows, Y rows a frame, R row radius;
    F frames, S frame radius.

    Args:
        planes: uint8 (T, H, Q, ceil(K / 8)), bits little-endian: the blocks that reach each threshold's mass. Nested;
            no query block is empty; bits from K on are 0. None only where a reader did not ask for them.
        menu_error: float32 (M, H): relative squared output error of each candidate mask.
        menu_residual_error: float32 (M, H): the same after the output projection and gate, relative to the residual.
        output_size: float32 (H,): mean ||O_h W_h||^2 / mean ||x||^2.
        row_error: float32 (H, Y, 2 R): error of row r + d standing for row r; NaN just where r + d leaves the frame.
        row_residual_error: float32 (H, Y, 2 R): the same relative to the residual.
        frame_error: float32 (H, F, 2 S), of frames what `row_error` is of rows, or None.
        frame_residual_error: float32 (H, F, 2 S), or None.
        block_mass: uint8 (H, Q, K) codes of peak 1, or None.
        block_error: uint8 (H, Q, K) codes of `block_error_peak`, or None.
        block_error_peak: float32 (H,), or None.
    """

    planes: Code | None
    menu_error: Float
    menu_residual_error: Float
    output_size: Float
    row_error: Float
    row_residual_error: Float
    frame_error: Float | None = None
    frame_residual_error: Float | None = None
    block_mass: Code | None = None
    block_error: Code | None = None
    block_error_peak: Float | None = None

    def keep(self, plane: int, manifest: Manifest) -> npt.NDArray[np.bool_]:
        """One keep plane, bool (H, Q, K)."""
        if self.planes is None:
            raise UnitError("planes must have been read, got none")
        bits = np.unpackbits(self.planes[plane], axis=-1, count=manifest.k_blocks, bitorder="little")
        return bits.astype(np.bool_)

    def mass(self) -> Float:
        """Block mass, float32 (H, Q, K).

        Raises:
            UnitError: It was not recorded.
        """
        if self.block_mass is None:
            raise UnitError("block_mass must have been recorded (calibatt-calibrate --mass), got none")
        return dequantise(self.block_mass, 1.0)

    def error(self) -> Float:
        """Block error, float32 (H, Q, K).

        Raises:
            UnitError: It was not recorded.
        """
        if self.block_error is None or self.block_error_peak is None:
            raise UnitError("block_error must have been recorded, got none")
        return dequantise(self.block_error, self.block_error_peak[:, None, None])

    def check(self, manifest: Manifest, planes: bool = True) -> None:
        """Proves the arrays against the manifest and each other; without planes, all but them.

        Raises:
            UnitError: An array is missing, not announced, of another shape or dtype, or breaks its rule.
        """
        shapes = unit_shapes(manifest)
        if not planes:
            del shapes["planes"]
        for each in fields(self):
            array = getattr(self, each.name)
            if (array is None) != (each.name not in shapes):
                rule = "be there" if array is None else "be absent"
                raise UnitError(f"{each.name} must {rule} as the manifest says, got {_kind(array)}")
            if array is not None and (_kind(array) != (want := "{} {}".format(*shapes[each.name]))):
                raise UnitError(f"{each.name} must be {want}, got {_kind(array)}")
        if self.planes is not None:
            self._check_planes(manifest, self.planes)
        axes = {
            "row": neighbours(manifest.grid.height, manifest.row_radius),
            "frame": neighbours(manifest.grid.frames, manifest.frame_radius),
        }
        for each in fields(self):
            array = getattr(self, each.name)
            if array is None or array.dtype == np.uint8:
                continue
            axis = each.name.split("_")[0]
            if axis in axes:
                inside = axes[axis]
                if not np.isnan(array[:, ~inside]).all():
                    value = array[:, ~inside][~np.isnan(array[:, ~inside])][0]
                    raise UnitError(f"{each.name} must be NaN where there is no such {axis}, got {value}")
                array = array[:, inside]
            wrong = ~(np.isfinite(array) & (array >= 0))
            if wrong.any():
                raise UnitError(f"{each.name} must be finite and not negative, got {array[wrong][0]}")

    def _check_planes(self, manifest: Manifest, all_planes: Code) -> None:
        spare = -manifest.k_blocks % 8
        if spare and (all_planes[..., -1] >> (8 - spare)).any():
            raise UnitError(f"planes must have zero bits from key block {manifest.k_blocks} on, got ones")
        for head in range(all_planes.shape[1]):  # one head at a time fits into the cache
            planes = all_planes[:, head]
            kept = planes[0].max(-1)
            if not kept.all():
                block = int(kept.argmin())
                raise UnitError(
                    f"planes must keep a block for every query block, got none for head {head}, block {block}"
                )
            for plane, (inner, outer) in enumerate(itertools.pairwise(planes)):
                if (inner & ~outer).any():
                    raise UnitError(f"planes must be nested, got bits of plane {plane} that plane {plane + 1} lacks")


def neighbours(count: int, radius: int) -> npt.NDArray[np.bool_]:
    """bool ``(count, 2 radius)``: whether there is a row, or frame, at each offset -radius..-1, 1..radius of each."""
    place = np.arange(count)[:, None] + np.array([*range(-radius, 0), *range(1, radius + 1)], np.int64)
    return (place >= 0) & (place < count)


def unit_shapes(manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every array that a unit of this manifest has."""
    heads, thresholds = manifest.model.heads, len(manifest.thresholds)
    blocks = (heads, manifest.q_blocks, manifest.k_blocks)
    rows = (heads, manifest.grid.height, 2 * manifest.row_radius)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "planes": ("uint8", (thresholds, heads, manifest.q_blocks, -(-manifest.k_blocks // 8))),
        "menu_error": ("float32", (len(manifest.menu), heads)),
        "menu_residual_error": ("float32", (len(manifest.menu), heads)),
        "output_size": ("float32", (heads,)),
        "row_error": ("float32", rows),
        "row_residual_error": ("float32", rows),
    }
    if manifest.frame_radius:
        frames = (heads, manifest.grid.frames, 2 * manifest.frame_radius)
        shapes |= {"frame_error": ("float32", frames), "frame_residual_error": ("float32", frames)}
    if manifest.has_mass:
        shapes["block_mass"] = ("uint8", blocks)
    if manifest.has_block_error:
        shapes["block_error"] = ("uint8", blocks)
        shapes["block_error_peak"] = ("float32", (heads,))
    return shapes


def write_unit(path: str | PathLike[str], unit: UnitStatistics, manifest: Manifest, place: Mapping[str, object]) -> int:
    """Writes one unit file, whole or not at all.

    Args:
        path: The file.
        unit: The arrays; checked against the manifest.
        manifest: Of the store.
        place: ``sample``, ``time_index`` and ``layer``; a reader proves that it found the file where it belongs.

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
    header = {**place, "manifest": manifest.digest}
    return write_container(path, magic=MAGIC, version=VERSION, header=header, sections=sections, crc=True)


def read_unit(
    path: str | PathLike[str], manifest: Manifest, place: Mapping[str, object], planes: bool = True
) -> UnitStatistics:
    """Reads and proves one unit file, or all of it but the planes; the arrays are views of the mapped file.

    Raises:
        UnitError: The file is damaged, belongs to another manifest or place, or its arrays break a rule.
        OSError: The file cannot be read.
    """
    try:
        file = Container.open(path, magic=MAGIC, version=VERSION, crc=True)
        arrays = {name: file.section(name) for name in file.names if planes or name != "planes"}
    except PlanError as error:
        raise UnitError(str(error)) from None
    expected = {**place, "manifest": manifest.digest}
    if file.header != expected:
        raise UnitError(f"{path}: the header must be {expected}, got {file.header}")
    if set(file.names) != set(unit_shapes(manifest)):
        raise UnitError(f"{path}: the sections must be {sorted(unit_shapes(manifest))}, got {sorted(file.names)}")
    unit = UnitStatistics(planes=arrays.pop("planes", None), **arrays)
    try:
        unit.check(manifest, planes)
    except UnitError as error:
        raise UnitError(f"{path}: {error}") from None
    return unit


def _kind(array: Array | None) -> str:
    if not isinstance(array, np.ndarray):
        return "none" if array is None else type(array).__name__
    return f"{array.dtype.name} {array.shape}"
