"""Files that appear under their names whole or not at all, and locks between processes."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

FilePath = str | os.PathLike[str]
MANIFEST, UNITS = "manifest.json", "units"
"""The file and the folder by which a store of statistics is recognised."""


def store_around(path: Path) -> Path | None:
    """The store of statistics that contains a path, or None; only the store's own code may write there."""
    for folder in path.resolve().parents:
        if (folder / MANIFEST).is_file() and (folder / UNITS).is_dir():
            return folder
    return None


@contextmanager
def whole_file(path: FilePath, mode: str = "wb", sync: bool = True) -> Iterator[IO[Any]]:
    """A new file beside `path`, flushed and renamed to it at the end; nothing is left of it after an error.

    Args:
        path: Where to; an existing file is replaced.
        mode: ``wb``, or ``w`` for UTF-8.
        sync: Whether it must be whole even after a power cut.

    Raises:
        OSError: It cannot be written; names `path` whatever failed.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise type(error)(error.errno, error.strerror, str(target)) from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: FilePath, text: str) -> None:
    """Writes a file of UTF-8 as `whole_file` does.

    Raises:
        OSError: As `whole_file`.
    """
    with whole_file(path, "w") as file:
        file.write(text)


def sync_folder(folder: FilePath) -> None:
    """Makes renames inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def alone(path: FilePath, busy: Exception) -> Iterator[None]:
    """Keeps other processes out of the same context; the lock is a hidden file beside `path`, gone afterwards.

    Args:
        path: What is worked on; need not exist.
        busy: Raised if another process is in the context.

    Raises:
        OSError: The lock cannot be made.
    """
    target = Path(path)
    lock = target.with_name(f".{target.name}.lock")
    handle = _locked(lock, busy)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _locked(lock: Path, busy: Exception) -> int:
    """A handle of the lock file, locked. If the last holder has just removed that file, a new one is made."""
    import fcntl  # some systems on which plans are only read do not have it

    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(handle), os.stat(lock)):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise busy from None
        except FileNotFoundError:
            pass
        os.close(handle)
