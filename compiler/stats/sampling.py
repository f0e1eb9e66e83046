"""The file of one sampling: its level, and signed effects of whole masks and precisions, which predictions add up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.codes import MOST, Float
from calibatt.compiler.stats.errors import SampleError
from calibatt.compiler.stats.manifest import Manifest
from calibatt.plans.container import Container, write_container
from calibatt.plans.errors import PlanError
from calibatt.plans.precision import EIGHT_BITS

MAGIC = b"CALIBSMP"
VERSION = (2, 0)
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SamplingTables:
    """The tables of one sampling; V random vectors, T times, L layers, H heads, W windows, C shares of the ladder.

    Args:
        level: float64 (T,), positive: sum over layers, heads and blocks of the squared effects of single blocks, mean
            over the vectors.
        window_effect: float32 (V, T, L, W, H): signed effect of each window.
        ladder_effect: float32 (V, T, L, C, H): signed effect of each mask of the ladder; NaN in all of a (time, layer)
            that had no earlier sampling.
        precision_effect: float32 (V, T, L, 2, H): signed effect of each of `plans.EIGHT_BITS`, of the dense head.
    """

    level: Float64
    window_effect: Float
    ladder_effect: Float
    precision_effect: Float

    @property
    def vectors(self) -> int:
        return len(self.window_effect)

    @property
    def has_ladder(self) -> bool:
        """Whether the ladder was measured at every time and layer."""
        return self.ladder_effect.size > 0 and bool(np.isfinite(self.ladder_effect).all())

    def check(self, manifest: Manifest) -> None:
        """Proves the arrays against the manifest.

        Raises:
            SampleError: An array is of another shape or dtype, or breaks its rule.
        """
        times, layers, heads = len(manifest.times), manifest.model.layers, manifest.model.heads
        vectors = self.window_effect.shape[0] if self.window_effect.ndim else 0
        if vectors < 1:
            raise SampleError("window_effect must be of at least one vector, got none")
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "level": ("float64", (times,)),
            "window_effect": ("float32", (vectors, times, layers, len(manifest.windows), heads)),
            "ladder_effect": ("float32", (vectors, times, layers, len(manifest.shares), heads)),
            "precision_effect": ("float32", (vectors, times, layers, len(EIGHT_BITS), heads)),
        }
        for name, (dtype, shape) in shapes.items():
            array = getattr(self, name)
            if (array.dtype.name, array.shape) != (dtype, shape):
                raise SampleError(f"{name} must be {dtype} {shape}, got {array.dtype.name} {array.shape}")
        missing = np.isnan(self.ladder_effect)
        absent = missing.all((0, 3, 4), keepdims=True)
        if (missing != absent).any():
            raise SampleError("ladder_effect must be numbers, or NaN in all of a (time, layer), got others")
        signed = math.sqrt(MOST)
        for name, array, least, most in (
            ("level", self.level, 1 / MOST, MOST),
            ("window_effect", self.window_effect, -signed, signed),
            ("ladder_effect", self.ladder_effect[~missing], -signed, signed),
            ("precision_effect", self.precision_effect, -signed, signed),
        ):
            if not (right := (array >= least) & (array <= most)).all():
                raise SampleError(f"{name} must be from {least:g} to {most:g}, got {array[~right][0]}")


def write_sampling(
    path: str | PathLike[str], name: str, tables: SamplingTables, manifest: Manifest, meta: Mapping[str, Any]
) -> int:
    """Writes a sampling's file, whole or not at all; returns its bytes.

    Raises:
        SampleError: The arrays contradict the manifest, or `meta` holds no plain values.
        OSError: It cannot be written.
    """
    header = {"name": name, "manifest": manifest.digest, "meta": dict(meta)}
    sections = {each.name: getattr(tables, each.name) for each in fields(tables)}
    try:
        tables.check(manifest)
        return write_container(path, magic=MAGIC, version=VERSION, header=header, sections=sections, crc=True)
    except (PlanError, SampleError) as error:
        raise SampleError(f"{path}: {error}") from None


def read_header(path: str | PathLike[str], name: str, manifest: Manifest) -> tuple[dict[str, Any], str]:
    """The meta data of a finished sampling and the digest of its file; only the header is read.

    Raises:
        SampleError: The file is damaged, or of another name or manifest.
        OSError: It cannot be read.
    """
    file = _open(path, name, manifest)
    return dict(file.header["meta"]), file.digest


def read_sampling(path: str | PathLike[str], name: str, manifest: Manifest) -> SamplingTables:
    """A sampling's tables, proved; the arrays are read-only views of the mapped file.

    Raises:
        SampleError: The file is damaged, of another name or manifest, or its arrays break a rule.
        OSError: It cannot be read.
    """
    file = _open(path, name, manifest)
    try:
        file.verify(quick=True)  # also sections that a later version added
        tables = SamplingTables(*(file.section(each.name) for each in fields(SamplingTables)))
        tables.check(manifest)
    except (PlanError, SampleError) as error:
        raise SampleError(f"{path}: {error}") from None
    return tables


def _open(path: str | PathLike[str], name: str, manifest: Manifest) -> Container:
    try:
        file = Container.open(path, magic=MAGIC, version=VERSION, crc=True)
    except PlanError as error:
        raise SampleError(str(error)) from None
    if set(file.header) != {"name", "manifest", "meta"} or not isinstance(file.header["meta"], dict):
        raise SampleError(f"{path}: the header must have name, manifest and meta, got {file.header}")
    for field, want in (("name", name), ("manifest", manifest.digest)):
        if file.header[field] != want:
            raise SampleError(f"{path}: {field} must be {want!r}, got {file.header[field]!r}")
    return file
