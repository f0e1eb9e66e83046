"""A refined store: the errors of ladders of masks, measured while its samples were sampled once more.

What a mask is follows from the statistics (`calibatt.compiler.ladders`), so that only errors are kept, in a folder of
the store: ``ladders.json`` says which ladders of which samples they are, and one container file a sample holds them,
written whole or not at all. Errors of other ladders, or of ladders of other samples, are never read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from calibatt.compiler.stats.errors import RefinementError
from calibatt.compiler.stats.files import LADDERS, REFINED, entries
from calibatt.compiler.stats.manifest import Manifest
from calibatt.plans.container import Container, write_container
from calibatt.plans.errors import PlanError

Float = npt.NDArray[np.float32]

MAGIC = b"CALIBREF"
VERSION = (1, 0)
RULE = 1
"""Of how levels follow from statistics: a change there makes what was measured before another ladder's."""
KINDS = ("row", "own", "votes", "mass")
"""What comes first: what adds most to its row's error, errors drawn to those of blocks at the same distance; the same
of errors as they are; what has most votes of the keep planes; most mean mass."""
DEFAULT_KINDS = ("row",)
DEFAULT_SHARES = (
    *(0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
    *(0.6, 0.7, 0.8, 0.9),
)
MOST_SHARES = 254


@dataclass(frozen=True)
class Ladders:
    """Families of masks for every head, time and layer.

    Args:
        samples: Names of the samples that they are derived from, ascending: all of a store.
        kinds: What orders the blocks, of `KINDS`.
        shares: Most blocks of each level, as a share of all, in (0, 1), ascending.

    Raises:
        RefinementError: A value breaks its rule.
    """

    samples: tuple[str, ...]
    kinds: tuple[str, ...] = DEFAULT_KINDS
    shares: tuple[float, ...] = DEFAULT_SHARES

    def __post_init__(self) -> None:
        known = isinstance(self.kinds, tuple) and set(self.kinds) <= set(KINDS)
        if not known or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise RefinementError(f"ladders.kinds must be some of {', '.join(KINDS)}, got {self.kinds!r}")
        shares = self.shares
        numbers = isinstance(shares, tuple) and all(type(share) is float for share in shares)
        ascending = numbers and all(a < b for a, b in itertools.pairwise((0.0, *shares, 1.0)))
        if not ascending or not 0 < len(shares) <= MOST_SHARES:
            raise RefinementError(
                f"ladders.shares must be 1 to {MOST_SHARES} ascending floats in (0, 1), got {shares!r}"
            )
        names = isinstance(self.samples, tuple) and all(isinstance(name, str) for name in self.samples)
        if not names or not self.samples or list(self.samples) != sorted(set(self.samples)):
            raise RefinementError(f"ladders.samples must be ascending names, got {self.samples!r}")

    def check(self, manifest: Manifest) -> None:
        """Proves that a store of this manifest has what the ladders are derived from.

        Raises:
            RefinementError: Block error or mass was not recorded.
        """
        for kinds, has, how in (
            ({"row", "own"}, manifest.has_block_error, "block error"),
            ({"mass"}, manifest.has_mass, "block mass (calibatt-calibrate --mass)"),
        ):
            if (wanting := kinds & set(self.kinds)) and not has:
                raise RefinementError(f"ladders.kinds must do without {min(wanting)!r} in a store without {how}")

    def errors(self, manifest: Manifest) -> int:
        """Errors of a head at one time: every level of every kind, then the manifest's windows."""
        return len(self.kinds) * len(self.shares) + len(manifest.windows)

    def digest(self, manifest: Manifest) -> str:
        """Stands for all that decides the masks, 32 hexadecimal digits."""
        return blake2b((manifest.digest + self.to_json()).encode(), digest_size=16).hexdigest()

    def told(self, manifest: Manifest) -> str:
        """The same in words, for people."""
        shares = ", ".join(f"{share:g}" for share in self.shares)
        of = f"{len(self.samples)} samples, digest {self.digest(manifest)}"
        return f"measured: ladders {'+'.join(self.kinds)} at {shares} and {len(manifest.windows)} windows, {of}"

    def to_json(self) -> str:
        """The canonical text of ``ladders.json``."""
        value = {"rule": RULE, "samples": self.samples, "kinds": self.kinds, "shares": self.shares}
        return json.dumps(value, sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, what: str) -> Ladders:
        """Reads ``ladders.json``; `what` names it in errors.

        Raises:
            RefinementError: It is no JSON map of just the fields, of another rule, or a value breaks its own.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RefinementError(f"{what}: ladders must be JSON, got {error}") from None
        names = {"rule", "samples", "kinds", "shares"}
        if not isinstance(value, dict) or set(value) != names:
            raise RefinementError(f"{what}: ladders must have the fields {sorted(names)}, got {value!r}")
        if value.pop("rule") != RULE:
            raise RefinementError(f"{what}: ladders must be of rule {RULE}; delete the folder and refine again")
        try:
            return cls(**{name: tuple(part) if isinstance(part, list) else part for name, part in value.items()})
        except RefinementError as error:
            raise RefinementError(f"{what}: {error}") from None


def file_name(sample: str) -> str:
    return f"{sample}{REFINED}"


def time_name(time_index: int) -> str:
    return f"t{time_index:03d}"


def write_errors(folder: Path, sample: str, errors: Float, ladders: Ladders, manifest: Manifest, **told: Any) -> Path:
    """Writes what was measured of one sample, whole or not at all.

    Args:
        folder: Of the refinement.
        sample: Its name.
        errors: float32 ``(T, L, C, H)``: mean ||(O' - O) W_h||^2 / mean ||x||^2 of every level and window; see
            `Ladders.errors`.
        ladders: What was measured.
        manifest: Of the store.
        told: More for the header; plain values.

    Raises:
        RefinementError: Another shape or dtype, or a value that is no error.
        OSError: It cannot be written.
    """
    _check_errors(errors, (len(manifest.times), *_unit_shape(ladders, manifest)), sample)
    path = folder / file_name(sample)
    header = {"sample": sample, "ladders": ladders.digest(manifest), "told": told}
    sections = {time_name(index): part for index, part in enumerate(errors)}
    write_container(path, magic=MAGIC, version=VERSION, header=header, sections=sections, crc=True)
    return path


def open_errors(path: Path, sample: str, ladders: Ladders, manifest: Manifest) -> Container:
    """The file of one sample, its structure proved; sections are when they are read.

    Raises:
        RefinementError: It is damaged, or of another sample or other ladders.
        OSError: It cannot be read.
    """
    try:
        file = Container.open(path, magic=MAGIC, version=VERSION, crc=True)
    except PlanError as error:
        raise RefinementError(str(error)) from None
    wanted = {"sample": sample, "ladders": ladders.digest(manifest)}
    found = {name: file.header.get(name) for name in wanted}
    if found != wanted:
        hint = "delete the folder and refine again (calibatt-calibrate --refine)"
        raise RefinementError(f"{path}: the header must say {wanted}, got {found}; {hint}")
    times = {time_name(index) for index in range(len(manifest.times))}
    if set(file.names) != times:
        raise RefinementError(f"{path}: the sections must be {sorted(times)}, got {sorted(file.names)}")
    return file


def read_errors(path: Path, sample: str, time_index: int, ladders: Ladders, manifest: Manifest) -> Float:
    """Errors float32 ``(L, C, H)`` of one sample at one time.

    Raises:
        RefinementError: The file is damaged, or of another sample or other ladders.
        OSError: It cannot be read.
    """
    return _section(open_errors(path, sample, ladders, manifest), path, time_index, ladders, manifest)


def prove_errors(path: Path, sample: str, ladders: Ladders, manifest: Manifest) -> str:
    """Reads all errors of one sample; returns the file's digest.

    Raises:
        RefinementError: The file is damaged, or of another sample or other ladders.
        OSError: It cannot be read.
    """
    file = open_errors(path, sample, ladders, manifest)
    for time_index in range(len(manifest.times)):
        _section(file, path, time_index, ladders, manifest)
    return str(file.digest)


def _section(file: Container, path: Path, time_index: int, ladders: Ladders, manifest: Manifest) -> Float:
    try:
        errors: Float = file.section(time_name(time_index))
    except PlanError as error:
        raise RefinementError(str(error)) from None
    _check_errors(errors, _unit_shape(ladders, manifest), str(path))
    return errors


def read_ladders(folder: Path, manifest: Manifest) -> Ladders | None:
    """What the errors in a refinement's folder are of; None where there is none.

    Raises:
        RefinementError: ``ladders.json`` is broken, or the store lacks what its ladders are derived from.
        OSError: It cannot be read.
    """
    path = folder / LADDERS
    if not path.exists():
        if found := entries(folder):
            raise RefinementError(f"{folder} must have {LADDERS}, got only {', '.join(each.name for each in found)}")
        return None
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RefinementError(f"{path}: ladders must be UTF-8, got {error}") from None
    ladders = Ladders.from_json(text, str(path))
    ladders.check(manifest)
    return ladders


def check_complete(folder: Path, ladders: Ladders, samples: Sequence[str], refined: Sequence[str]) -> None:
    """Refuses a refinement of other samples than a store's, or one that is not finished.

    Raises:
        RefinementError: Names the samples, and what can be done.
    """
    others = "or compile without it (select{menu=windows+cuts})"
    if ladders.samples != tuple(samples):
        added = sorted(set(samples) - set(ladders.samples))
        gone = sorted(set(ladders.samples) - set(samples))
        told = "; ".join(f"{what} {', '.join(names)}" for what, names in (("not of", added), ("of", gone)) if names)
        raise RefinementError(
            f"{folder} must be of the samples that are compiled, got a refinement {told}; "
            f"delete it and refine again (calibatt-calibrate --refine), {others}"
        )
    if missing := sorted(set(samples) - set(refined)):
        raise RefinementError(
            f"{folder} must hold the errors of {len(samples)} samples, got none of {', '.join(missing)}; "
            f"go on (calibatt-calibrate --refine), {others}"
        )


def _unit_shape(ladders: Ladders, manifest: Manifest) -> tuple[int, int, int]:
    return manifest.model.layers, ladders.errors(manifest), manifest.model.heads


def _check_errors(errors: Any, shape: tuple[int, ...], what: str) -> None:
    if not isinstance(errors, np.ndarray) or errors.dtype != np.float32 or errors.shape != shape:
        found = f"{getattr(errors, 'dtype', type(errors).__name__)} {getattr(errors, 'shape', '')}"
        raise RefinementError(f"{what}: errors must be float32 {shape}, got {found}")
    if not (np.isfinite(errors) & (errors >= 0)).all():
        raise RefinementError(f"{what}: errors must be finite and not negative, got {float(errors.min()):g}")
