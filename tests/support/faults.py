"""Full disks, folders that cannot be written, and two at once; `support.kills` runs them and adds kills."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from calibatt.compiler.stats import Store, StoreBusy, StoreWriter
from calibatt.plans import PlanFile
from support import stats

TESTS = Path(__file__).parents[1]
WRITTEN = 6
"""Samplings that a writer adds."""
WAIT_SECONDS = 600
"""Until whoever is left has to have ended."""


def add_samplings(path: Path) -> None:
    with StoreWriter.open(path, stats.manifest()) as writer:
        for index in range(WRITTEN):
            writer.progress_folder(f"s{index}")
            if f"s{index}" not in writer.done():
                stats.add_sampling(writer, f"s{index}")
            writer.drop_progress(f"s{index}")


def compilation(store: Path, plan: Path, *more: str, jobs: int = 4) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "calibatt.compiler.cli", str(store), "-o", str(plan), "--jobs", str(jobs), *more]
    paths = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def done(job: subprocess.Popen[str]) -> int:
    """The exit code."""
    job.communicate(timeout=WAIT_SECONDS)
    return job.returncode


def one_line(job: subprocess.Popen[str], told: str | None = None) -> None:
    """Exit code 2, and one line that names the command."""
    told = job.communicate(timeout=WAIT_SECONDS)[1] if told is None else told
    assert job.returncode == 2, (job.returncode, told)
    assert told.startswith("calibatt-compile: "), told
    assert told.count("\n") == 1, told


class Mounted:
    """A small file system in memory; needs root on Linux."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __enter__(self) -> Mounted:
        self.path.mkdir(exist_ok=True)
        self._mount(0, f"size={self.size}")
        return self

    def _mount(self, flags: int, options: str) -> None:
        if self._libc.mount(b"tmpfs", bytes(self.path), b"tmpfs", flags, options.encode()):
            raise PermissionError(ctypes.get_errno(), f"cannot mount {self.path}")

    def only_read(self) -> None:
        self._mount(32 | 1, "")  # remount, read only

    def __exit__(self, *_: object) -> None:
        self._libc.umount2(bytes(self.path), 2)


def _names(path: Path, error: OSError) -> None:
    assert str(path) in str(error), error


def disk(folder: Path, sizes: int) -> dict[str, int]:
    """The compiler and a store's writer on full disks of many sizes: each fails in one line, or is done."""
    store = stats.write_store(folder / "store", stats.manifest(), closed=True)
    ends = {"disk": 0, "done": 0}
    for pages in np.unique(np.geomspace(1, 60, sizes).astype(int)):
        with Mounted(folder / "small", int(pages) * 4096) as small:
            job = compilation(store, small.path / "p.plan", jobs=1)
            told = job.communicate(timeout=WAIT_SECONDS)[1]
            if job.returncode == 0:
                PlanFile.read(small.path / "p.plan").prove()
                ends["done"] += 1
            else:
                one_line(job, told)
                ends["disk"] += 1
            assert not [path for path in small.path.iterdir() if path.suffix == ".plan"] or job.returncode == 0
        with Mounted(folder / "small", int(pages) * 8192) as small:
            try:
                add_samplings(small.path / "s")
                ends["done"] += 1
            except OSError as error:
                _names(small.path, error)
                ends["disk"] += 1
                if any((small.path / "s").glob("samplings/*.sampling")):
                    Store.open(small.path / "s")
    return ends


def refused(folder: Path) -> dict[str, int]:
    """Nothing is written where nothing can be: one line each, at once."""
    store = stats.write_store(folder / "store", stats.manifest(), closed=True)
    with Mounted(folder / "fixed", 1 << 20) as fixed:
        (fixed.path / "old").mkdir()
        fixed.only_read()
        one_line(compilation(store, fixed.path / "p.plan", jobs=1))
        one_line(compilation(store, fixed.path / "old" / "p.plan", "--force", jobs=1))
        try:
            StoreWriter.open(fixed.path / "s", stats.manifest())
        except OSError as error:
            _names(fixed.path, error)
        else:
            raise AssertionError("a store was opened where nothing can be written")
    return {"refused": 3}


def pairs(folder: Path, count: int) -> dict[str, int]:
    """Two at once: of two compilations one writes the plan, of two writers of a store one is refused."""
    store = stats.write_store(folder / "store", stats.manifest(), closed=True)
    for number in range(count):
        two = [compilation(store, folder / f"{number}.plan", jobs=1) for _ in range(2)]
        codes = sorted(map(done, two))
        assert codes == [0, 2], codes
        PlanFile.read(folder / f"{number}.plan").prove()
    with StoreWriter.open(folder / "s", stats.manifest()):
        for _ in range(count):
            try:
                StoreWriter.open(folder / "s", stats.manifest())
            except StoreBusy:
                continue
            raise AssertionError("two writers of one store")
    return {"pairs": 2 * count}
