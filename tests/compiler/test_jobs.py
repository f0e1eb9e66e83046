"""The same bytes with any number of processes, nothing left after a kill, one clear message for a broken store."""

from __future__ import annotations

import inspect
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import kills, stats
from support.jobs import die

from calibatt.compiler.cli import command
from calibatt.compiler.errors import CompileError
from calibatt.compiler.pipeline import processes
from calibatt.compiler.stats import StoreWriter

ROOT = Path(__file__).parent.parent.parent
PASSES = "select{target-density=0.6},anchors,select{target-density=0.6},merge-heads,schedule,lower"
PAPER = "vote,repeat{max-difference=1},merge-heads,schedule,lower"


@pytest.fixture(scope="module", params=[PASSES, PAPER])
def passes(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    of = stats.manifest(thresholds=(0.8, 0.9))
    return stats.write_store(tmp_path_factory.mktemp("stats") / "store", of, closed=True)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_processes_change_nothing(store: Path, passes: str, tmp_path: Path) -> None:
    for jobs in (1, 2):
        found = invoke(store, "-o", tmp_path / f"{jobs}.plan", "--passes", passes, "--jobs", jobs)
        assert found.exit_code == 0, found.output
    assert (tmp_path / "1.plan").read_bytes() == (tmp_path / "2.plan").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.plan", "2.plan"]


KILLED = """
import os, signal, sys
from calibatt.compiler import cli, pipeline
left = [int(sys.argv.pop(1))]
done = pipeline._work
def work(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return done(*arguments)
pipeline._work = work
cli.main()
"""


def test_what_a_killed_job_left_goes_with_the_next_one(store: Path, tmp_path: Path) -> None:
    arguments = [str(store), "-o", str(tmp_path / "p.plan"), "--passes", PASSES]
    killed = subprocess.run([sys.executable, "-c", KILLED, "6", *arguments], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".p.plan.*.work")
    assert len(list(left.glob("*.unit"))) == 4
    assert left.stat().st_mode & 0o777 == 0o700
    (tmp_path / ".p.plan.mine.work").mkdir()
    (tmp_path / ".q.plan.abcdefgh.work").mkdir()
    assert invoke(*arguments).exit_code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".p.plan.lock"} == {"p.plan", ".p.plan.mine.work", ".q.plan.abcdefgh.work"}


def test_a_process_that_is_killed_is_told() -> None:
    with processes(2) as over, pytest.raises(CompileError, match="all 2 processes must go on to the end, got one that"):
        list(over(die, [None] * 4))


def test_a_process_that_is_killed_before_all_work_is_given_out_is_told() -> None:
    """And one that starts meanwhile ends, for which the pool would wait for ever."""
    late = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))

    def arguments() -> Iterator[None]:
        yield None
        late.start()
        while pool._broken is False:  # the one that dies of it takes the pool with it
            time.sleep(0.01)
        yield None

    with processes(2) as over:
        pool = inspect.getclosurevars(over).nonlocals["pool"]
        with pytest.raises(CompileError, match="all 2 processes must go on to the end, got one that was killed"):
            list(over(die, arguments()))
    late.join(60)
    assert late.exitcode == -signal.SIGKILL


def test_processes_end_with_the_job_that_is_killed(store: Path, tmp_path: Path) -> None:
    """They would wait for its next word for ever, and keep their memory."""
    assert kills.kill_compilation(store, tmp_path / "p.plan", random.Random(0), jobs=2, all_of_it=True, within=0.0)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def corrupt_unit(store: Path) -> None:
    """In the last section, which only reading all of it finds."""
    flip(store / "units" / "t001_l001.unit")


def corrupt_sampling(store: Path) -> None:
    flip(store / "samplings" / "s1.sampling")


def missing_unit(store: Path) -> None:
    (store / "units" / "t001_l001.unit").unlink()


def descending_thresholds(store: Path) -> None:
    value = json.loads((store / "manifest.json").read_text())
    value["thresholds"] = value["thresholds"][::-1]
    (store / "manifest.json").write_text(json.dumps(value))


def no_samplings(store: Path) -> None:
    for path in (store / "samplings").iterdir():
        path.unlink()


BROKEN = {
    corrupt_unit: "t001_l001.unit: section '",
    corrupt_sampling: "s1.sampling: section 'window_effect'",
    missing_unit: "units must have 4 units, got none named t001_l001.unit",
    descending_thresholds: "thresholds must be ascending floats in (0, 1], got (0.9, 0.8)",
    no_samplings: "must have a finished sampling, got none",
}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("spoil", BROKEN)
def test_a_broken_store_is_one_line_and_leaves_nothing(store: Path, tmp_path: Path, spoil: object, jobs: int) -> None:
    if jobs == 2 and spoil is not corrupt_unit:
        pytest.skip("found before any process is started")
    broken = shutil.copytree(store, tmp_path / "store")
    assert callable(spoil)
    spoil(broken)
    found = invoke(broken, "-o", tmp_path / "p.plan", "--passes", PASSES, "--jobs", jobs)
    assert found.exit_code == 2
    assert BROKEN[spoil] in found.stderr
    assert found.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


def test_stores_of_other_blocks_are_not_mixed(store: Path, tmp_path: Path) -> None:
    other = stats.manifest(blocks=type(stats.manifest().blocks)(32, 32))
    with StoreWriter.open(tmp_path / "other", other):
        pass
    found = invoke(store, tmp_path / "other", "-o", tmp_path / "p.plan")
    assert found.exit_code == 2
    assert "must have one manifest, got: blocks.block_k: 16, 32; blocks.block_q: 16, 32" in found.stderr
    assert found.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("option", "value", "best"), [("--target-density", "0.01", "density 0."), ("--target-db", "900", None)]
)
def test_an_impossible_target_names_the_best(
    store: Path, tmp_path: Path, option: str, value: str, best: str | None
) -> None:
    """Dense attention changes nothing: any number of dB is reached."""
    found = invoke(store, "-o", tmp_path / "p.plan", option, value)
    assert found.exit_code == (2 if best else 0), found.output
    if best:
        assert f"leave room for the least that the menu can keep, {best}" in found.stderr
        assert list(tmp_path.iterdir()) == []
