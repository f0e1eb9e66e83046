"""The same bytes with any number of processes, after a kill, and one clear message for every broken store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support import stats
from support.jobs import refine_store, write_store

from calibatt.compiler.cli import command
from calibatt.compiler.stats import Store, StoreWriter

ROOT = Path(__file__).parent.parent.parent
PASSES = (
    "vote,protect,select{target-density=0.6},anchors{safety=0.1},select{target-density=0.6},merge-times,schedule,lower"
)


@pytest.fixture(scope="module", params=["plain", "refined"])
def store(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = write_store(tmp_path_factory.mktemp("stats") / "store", stats.manifest(), probed=True)
    if request.param == "refined":
        refine_store(path)
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_processes_change_nothing(store: Path, tmp_path: Path) -> None:
    for jobs in (1, 2):
        found = invoke(store, "-o", tmp_path / f"{jobs}.plan", "--passes", PASSES, "--jobs", jobs)
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


@pytest.mark.parametrize("units", [3, 6, 9])
def test_a_killed_job_goes_on(store: Path, tmp_path: Path, units: int) -> None:
    whole, plan = tmp_path / "whole.plan", tmp_path / "p.plan"
    assert invoke(store, "-o", whole, "--passes", PASSES).exit_code == 0
    arguments = [str(store), "-o", str(plan), "--passes", PASSES]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(units), *arguments], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not plan.exists()
    work = tmp_path / "p.plan.work"
    stages = sorted(path.name for path in work.glob("*.0.found"))
    assert len(stages) == min(units, 4)
    other = invoke(store, "-o", plan, "--resume", "--target-density", 0.4)
    assert other.exit_code == 2
    assert "must be of this very job to be resumed, got other statistics or options" in other.stderr
    times = {path: os.stat(path).st_mtime_ns for path in work.glob("*.npy")}
    assert times
    resumed = invoke(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert plan.read_bytes() == whole.read_bytes()
    assert not work.exists()


def test_a_folder_of_something_else_is_left_alone(store: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    found = invoke(store, "-o", tmp_path / "p.plan", "--work", tmp_path / "mine")
    assert found.exit_code == 2
    assert "mine must be a folder of an interrupted job, got something else" in found.stderr
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


def corrupt_shard(store: Path) -> None:
    path = store / "samples" / "s1" / "t001_l001.unit"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def missing_unit(store: Path) -> None:
    (store / "samples" / "s1" / "t001_l001.unit").unlink()


def descending_thresholds(store: Path) -> None:
    value = json.loads((store / "manifest.json").read_text())
    value["thresholds"] = value["thresholds"][::-1]
    (store / "manifest.json").write_text(json.dumps(value))


def stale_refinement(store: Path) -> None:
    shutil.rmtree(store / "refinement", ignore_errors=True)
    refine_store(store)
    shutil.rmtree(store / "samples" / "s1")


def corrupt_refinement(store: Path) -> None:
    path = refine_store(store).refined["s1"]
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def no_samples(store: Path) -> None:
    for path in (store / "samples").iterdir():
        shutil.rmtree(path)
    for path in (store / "probes").iterdir():
        path.unlink()


BROKEN = {
    stale_refinement: "must be of the samples that are compiled, got a refinement of s1",
    corrupt_refinement: "s1.refined: section 't001'",
    corrupt_shard: "t001_l001.unit: section '",
    missing_unit: "s1 must have 5 files, got none named t001_l001.unit",
    descending_thresholds: "thresholds must be ascending floats in (0, 1], got (0.98, 0.95, 0.9, 0.8)",
    no_samples: "must have a complete sample, got none",
}


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("spoil", BROKEN)
def test_a_broken_store_is_one_line_and_leaves_nothing(store: Path, tmp_path: Path, spoil: object, jobs: int) -> None:
    if jobs == 2 and spoil not in (corrupt_shard, corrupt_refinement):
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


def test_a_refinement_is_proved_before_any_unit_is_read(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = shutil.copytree(store, tmp_path / "store")
    corrupt_refinement(broken)
    monkeypatch.setattr(Store, "unit", lambda *_: pytest.fail("a unit was read"))
    found = invoke(broken, "-o", tmp_path / "p.plan")
    assert found.exit_code == 2
    assert BROKEN[corrupt_refinement] in found.stderr


@pytest.mark.parametrize(
    ("option", "value", "best"),
    [("--target-density", "0.01", "density 0."), ("--target-speedup", "50", "a speed-up of ")],
)
def test_an_impossible_target_names_the_best(store: Path, tmp_path: Path, option: str, value: str, best: str) -> None:
    found = invoke(store, "-o", tmp_path / "p.plan", option, value)
    assert found.exit_code == 2
    assert f"leave room for the least that the menu can keep, {best}" in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_samples_in_any_order(store: Path, tmp_path: Path) -> None:
    """Folders of samples and refinement are made and listed in another order, the plan is the same."""
    other = shutil.copytree(store, tmp_path / "other", ignore=shutil.ignore_patterns("samples", "refinement"))
    for part in ("samples", "refinement"):
        for path in sorted((store / part).glob("*"), reverse=True):
            copy = shutil.copytree if path.is_dir() else shutil.copy
            (other / part).mkdir(exist_ok=True)
            copy(path, other / part / path.name)
    for name, stats_dir in (("a", store), ("b", other)):
        assert invoke(stats_dir, "-o", tmp_path / f"{name}.plan", "--target-density", 0.6).exit_code == 0
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()
