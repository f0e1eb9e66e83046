"""Names inside a store, and small files that appear whole or not at all."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from calibatt.compiler.stats.errors import ManifestError, SampleError, StoreError, UnitError
from calibatt.compiler.stats.manifest import Manifest
from calibatt.plans.files import MANIFEST, UNITS, store_around, sync_folder, write_text

SAMPLINGS, PROGRESS = "samplings", "progress"
SUFFIX = ".sampling"
MAX_MANIFEST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(name: str) -> str:
    """Checks and returns the name of a sampling.

    Raises:
        SampleError: It cannot be the name of a file on every system.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith("."):
        rule = "1 to 100 letters, digits, '.', '_' or '-', begin with a letter or digit and not end in '.'"
        raise SampleError(f"a sampling's name must have {rule}, got {name!r}")
    return name


def unit_name(time_index: int, layer: int) -> str:
    return f"t{time_index:03d}_l{layer:03d}.unit"


def unit_path(folder: Path, manifest: Manifest, time_index: int, layer: int) -> Path:
    """The file of a unit in the folder of a store.

    Raises:
        UnitError: There is no such time or layer.
    """
    for what, value, count in (
        ("time_index", time_index, len(manifest.times)),
        ("layer", layer, manifest.model.layers),
    ):
        if type(value) is not int or not 0 <= value < count:
            raise UnitError(f"{what} of a unit must be an integer from 0 to {count - 1}, got {value!r}")
    return folder / UNITS / unit_name(time_index, layer)


def places(manifest: Manifest) -> list[tuple[int, int]]:
    """Time index and layer of every unit."""
    return [(time, layer) for time in range(len(manifest.times)) for layer in range(manifest.model.layers)]


def require_outside(path: Path) -> None:
    """Refuses an output inside a store, which could make it unreadable or destroy it.

    Raises:
        StoreError: `path` is in a store.
    """
    if (folder := store_around(path)) is not None:
        raise StoreError(f"{path} must not be in a store of statistics, got {folder}")


def entries(folder: Path) -> list[Path]:
    """The files and folders in a folder, by name, without hidden ones; none if there is no folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def finished(folder: Path) -> dict[str, Path]:
    """Files of the finished samplings of a store by name, ascending."""
    return {path.name[: -len(SUFFIX)]: path for path in entries(folder / SAMPLINGS) if path.name.endswith(SUFFIX)}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a store.

    Raises:
        ManifestError: There is none, or it breaks a rule; the message names the file.
    """
    path = folder / MANIFEST
    try:
        with open(path, "rb") as file:
            encoded = file.read(MAX_MANIFEST_BYTES + 1)
        if len(encoded) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: the manifest must have at most {MAX_MANIFEST_BYTES} bytes, got more")
        text = encoded.decode()
    except (FileNotFoundError, NotADirectoryError):
        raise ManifestError(f"{folder} must be a store of statistics, got no {MANIFEST} in it") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: the manifest must be UTF-8, got {error}") from None
    try:
        return Manifest.from_json(text)
    except ManifestError as error:
        raise ManifestError(f"{path}: {error}") from None


def write_whole(path: Path, text: str) -> None:
    """Writes a small file: flushed beside its place, then renamed, so that it appears whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    write_text(path, text)
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Removes half-written files of a killed writer: hidden files whose names end in ``.tmp``."""
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
