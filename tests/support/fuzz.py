"""A structure-aware fuzzer of plan files and statistics stores:

    cd tests && python -m support.fuzz --seconds 600 --seed 1 --out fuzz.json plans stores
Valid files are drawn, changed by `support.mutations` with their digests made right again, and read
(`support.fuzz_guided` chooses the changes by the code that they reach). Of every execution:

- it ends in what the file says or in `PlanError` (`StoreError` of a store), and in nothing else;
- it takes at most a second, and the memory that FORMAT.md states: the process has a limit;
- a plan means the same to the second reader (`support.judge`), written from FORMAT.md alone: accepted by both, with
  lists, anchors and order looked at as kernels index them, or refused by both;
- a store that is accepted holds arrays of the shapes of its manifest, of finite numbers.

The first finding of each kind is kept as a file beside ``--out``.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from calibatt.compiler.stats import Store, StoreError
from calibatt.compiler.stats.sampling import MAGIC as SAMPLING
from calibatt.compiler.stats.unit import MAGIC as UNIT
from calibatt.compiler.stats.unit import VERSION as STATS_VERSION
from calibatt.plans import Container, write_plan
from calibatt.plans.encoding import LAYER_BYTES
from support import hostile, judge, mutations, second_container, stats
from support.plans import frames_plan, random_plan, tiny_plan

Case = Callable[[random.Random], bytes | None]
MOST_SECONDS, LONG_SECONDS = 1.0, 0.1
"""What is long is timed again, in seconds of the processor, all threads: the machine may be busy."""
SLACK_BYTES = 64 << 20
"""Beside what layers take: the header, which is bounded by its 4 MiB and 524,288 values, and the second reader."""


class Finding(Exception):
    """What must not be."""


class Plans:
    """Executions over plan files, in one folder of a file system in memory."""

    files = 40
    most_bytes = 8 * LAYER_BYTES

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / "any.plan"
        plans = [tiny_plan(), frames_plan(), *(random_plan(seed * 1000 + each) for each in range(self.files))]
        self.parts = [self._parts(plan) for plan in plans]
        self.parts += [hostile.dense_parts(), hostile.changed(heads=3, layers=2)]
        self.done = 0

    def _parts(self, plan: Any) -> tuple[hostile.Header, hostile.Sections]:
        write_plan(self.path, plan)
        judge.judge(self.path, judge.first(self.path))
        file = Container.open(self.path, magic=hostile.MAGIC, version=hostile.VERSION)
        return file.header, {name: file.section(name).copy() for name in file.names}

    def change(self, rng: random.Random) -> None:
        """Writes the next file.

        Raises:
            OverflowError: No file can say so.
        """
        self.path.write_bytes(mutations.file(rng, *rng.choice(self.parts)))
        self.done += 1

    def read(self) -> Any:
        return judge.first(self.path, threads=self.done % 16 == 0)

    def judge(self, found: Any) -> str:
        """Raises:
        Disagreement: The second reader does.
        """
        judge.judge(self.path, found)
        return type(found).__name__


class Stores:
    """Executions over stores: one file of a store changed, removed or renamed, and everything read."""

    most_bytes = 0

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / "store"
        self.of = stats.manifest(thresholds=(0.8,), times=(0.5,))
        self.whole = stats.write_store(folder / "whole", self.of, ("s0", "s1"), seed)
        self.names = [str(path.relative_to(self.whole)) for path in sorted(self.whole.rglob("*")) if path.is_file()]
        self.names = [name for name in self.names if not Path(name).name.startswith(".")]
        shutil.copytree(self.whole, self.path)
        self.parts = {name: self._parts(name) for name in self.names if name != "manifest.json"}
        self.touched: set[Path] = set()

    def magic(self, name: str) -> bytes:
        return UNIT if name.endswith(".unit") else SAMPLING

    def _parts(self, name: str) -> tuple[Any, Any, bytes]:
        magic = self.magic(name)
        file = Container.open(self.whole / name, magic=magic, version=STATS_VERSION, crc=True)
        return file.header, {each: file.section(each).copy() for each in file.names}, magic

    def change(self, rng: random.Random) -> None:
        for path in self.touched:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if (whole := self.whole / path.relative_to(self.path)).exists():
                shutil.copyfile(whole, path)
        name = rng.choice(self.names)
        path = self.path / name
        self.touched = {path}
        act = rng.randrange(20)
        if act == 0:
            path.unlink()
        elif act == 1:
            path.rename(
                other := path.with_name(rng.choice(("x", "~.sampling", "a b.unit", "\x1b[2J.sampling", "s9.sampling")))
            )
            self.touched.add(other)
        elif act == 2:
            (other := path.with_name("x.sampling")).mkdir()
            self.touched.add(other)
        elif name != "manifest.json":
            header, sections, magic = self.parts[name]
            path.write_bytes(mutations.file(rng, header, sections, magic, STATS_VERSION, crc=True))
        elif act < 6:
            path.write_bytes(mutations.raw(rng, (self.whole / name).read_bytes()))
        else:
            path.write_text(json.dumps(mutations.document(rng, json.loads((self.whole / name).read_text()))))

    def read(self) -> Any:
        try:
            store = Store.open(self.path)
            places = [
                (time, layer)
                for time in range(len(store.manifest.times))
                for layer in range(store.manifest.model.layers)
            ]
            return store, [store.unit(*place) for place in places], store.table()
        except (StoreError, IsADirectoryError, FileNotFoundError) as error:  # a folder in the place of a file, say
            return error

    def judge(self, found: Any) -> str:
        if isinstance(found, Exception):
            return type(found).__name__
        store, units, table = found
        of = store.manifest
        for unit in units:
            shape = (of.model.heads, of.q_blocks, of.k_blocks)
            if unit.effect.shape != shape or unit.error.shape != shape or unit.row_effect.shape[0] != shape[0]:
                raise Finding("shapes of a unit")
            if not (np.isfinite(unit.effect_peak).all() and np.isfinite(unit.error_peak).all()):
                raise Finding("peaks of a unit")
        for path in self.touched:
            if path.is_file() and path.suffix in (".unit", ".sampling"):  # who refuses the container refuses the file
                second_container.container(path.read_bytes(), self.magic(path.name), STATS_VERSION[0], crc=True)
        if not (np.isfinite(table.window_error).all() and np.isfinite(table.time_level).all()):
            raise Finding("numbers of a table")
        return type(store).__name__


KINDS: dict[str, Any] = {"plans": Plans, "stores": Stores}


class Run:
    """Executions of one kind, and what was seen.

    Args:
        kind: One of `KINDS`.
        folder: For files, better in memory.
        seed: Of the valid files, and of what is done to them.
        keep: Where findings go; None: nowhere.
    """

    def __init__(self, kind: str, folder: Path, seed: int, keep: Path | None = None) -> None:
        self.kind, self.seed, self.keep = kind, seed, keep
        self.rng = random.Random(seed)
        self.subject = KINDS[kind](folder, seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, str] = {}
        self.executions, self.worst_seconds = 0, 0.0
        self._peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def limit_memory(self) -> None:
        """From now on more memory than is stated is a `MemoryError`; Linux."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        most = int(status["VmData"].split()[0]) * 1024 + self.subject.most_bytes + SLACK_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))

    def once(self, rng: random.Random) -> None:
        """One execution; what must not be is counted, the first of its kind kept."""
        try:
            self.subject.change(rng)
        except OverflowError:
            return
        self.executions += 1
        try:
            start = time.perf_counter()
            found = self.subject.read()
            if (took := time.perf_counter() - start) > self.worst_seconds:
                self._time(took)
            if isinstance(found, Exception) and "must fit in memory" in str(found):
                raise Finding("more memory than is stated")
            self.counts[self.subject.judge(found)] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._found(f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}", str(error))

    def _time(self, took: float) -> None:
        """A longest one: what others did to the machine meanwhile does not count, so it is read again."""
        if took > LONG_SECONDS:
            start = time.process_time()
            self.subject.read()
            took = min(took, time.process_time() - start)
        self.worst_seconds = max(self.worst_seconds, took)
        if took > MOST_SECONDS:
            self._found("seconds", f"{took:.2f} s of processor time")

    def _found(self, kind: str, text: str) -> None:
        self.findings[kind] += 1
        if kind not in self.examples and self.keep is not None:
            name = f"{self.kind}-{self.seed}-{len(self.examples)}"
            source = self.subject.path
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, self.keep / name)
            text = f"{name}: {text}"
        self.examples.setdefault(kind, text[:600])

    def summary(self, seconds: float) -> dict[str, Any]:
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "kind": self.kind,
            "seed": self.seed,
            "executions": self.executions,
            "seconds": round(seconds, 1),
            "worst_seconds": round(self.worst_seconds, 4),
            "peak_growth_mb": round((peak_kib - self._peak_kib) * 1024 / 1e6, 1),
            "outcomes": dict(self.counts.most_common()),
            "findings": {kind: [count, self.examples[kind]] for kind, count in self.findings.most_common()},
        }


def versions() -> dict[str, str]:
    found = {name: metadata.version(name) for name in ("numpy", "msgpack", "zstandard")}
    return {"python": platform.python_version(), **found}


def save(run: Run, out: Path, seconds: float, **facts: Any) -> None:
    """Adds a run to the JSON file, and prints it."""
    known = json.loads(out.read_text()) if out.exists() else {"runs": []}
    known["runs"].append(run.summary(seconds) | {"date": str(date.today()), "versions": versions()} | facts)
    out.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(known["runs"][-1], indent=1), flush=True)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Reads changed plans and stores; fails where something must not be.")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz.json"), help="JSON; runs are added to those in it")
    return parser


def memory_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def main() -> None:
    parser = options()
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    chosen = parser.parse_args()
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    findings = 0
    for kind in chosen.kinds:
        with memory_folder() as folder:
            run = Run(kind, Path(folder), chosen.seed, chosen.out.parent)
            run.limit_memory()
            start = time.monotonic()
            while time.monotonic() - start < chosen.seconds:
                run.once(run.rng)
            save(run, chosen.out, time.monotonic() - start)
        findings += run.findings.total()
    sys.exit(findings > 0)


if __name__ == "__main__":
    main()
