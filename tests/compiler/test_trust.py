"""`calibatt-compile` loses nothing, lets nothing in, and says truthfully what is written."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support import stats

from calibatt.compiler import cli, gather, pipeline
from calibatt.compiler.cli import command
from calibatt.compiler.stats import Store
from calibatt.plans import PlanFile, files

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "calibatt.compiler.cli"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stats.write_store(tmp_path_factory.mktemp("stats") / "store", stats.manifest())


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def refused(result: Result, words: str, code: int = 2) -> None:
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("calibatt-compile: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_compilation_says_so(store: Path, tmp_path: Path) -> None:
    with files.alone(tmp_path / "p.plan", AssertionError()):
        before = content(tmp_path)
        result = invoke(store, "-o", tmp_path / "p.plan")
        refused(result, "p.plan must be made by one process at a time, got another that is at it")
        assert content(tmp_path) == before
    assert invoke(store, "-o", tmp_path / "p.plan").exit_code == 0
    assert sorted(content(tmp_path)) == ["p.plan"]


def test_a_plan_that_was_made_meanwhile_stays(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_store(paths: Any) -> Store:
        (tmp_path / "p.plan").write_text("precious")
        return Store.open(paths)

    monkeypatch.setattr(cli, "Store", SimpleNamespace(open=open_store))
    refused(invoke(store, "-o", tmp_path / "p.plan"), "p.plan must not exist (--force replaces it)")
    assert (tmp_path / "p.plan").read_text() == "precious"


def test_of_two_compilations_one_writes_the_plan(store: Path, tmp_path: Path) -> None:
    line = [*COMMAND, str(store), "-o", str(tmp_path / "p.plan")]
    pair = [subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [each.communicate()[1] for each in pair]
    codes = sorted(each.returncode for each in pair)
    assert codes == [0, 2], told
    assert sum("at a time" in each or "must not exist" in each for each in told) == 1
    PlanFile.read(tmp_path / "p.plan").prove()
    assert sorted(content(tmp_path)) == ["p.plan"]


INTO = ["manifest.json", "units/t000_l000.unit", "samplings/s0.sampling", "new.plan", "units/new.plan"]


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("place", INTO)
def test_no_output_is_in_a_store(store: Path, tmp_path: Path, place: str, other: bool) -> None:
    """Not in the one that is read, and not in any other."""
    mine = shutil.copytree(store, tmp_path / "mine")
    read, into = (mine if each else store for each in (not other, True))
    before = content(mine)
    for option in ("-o", "--report"):
        arguments = [option, into / place] if option == "-o" else ["-o", tmp_path / "p.plan", option, into / place]
        refused(invoke(read, *arguments, "--force"), f"must not be in a store of statistics, got {into.resolve()}")
    (tmp_path / "link").symlink_to(into)
    refused(invoke(read, "-o", tmp_path / "link" / place, "--force"), "must not be in a store of statistics")
    assert content(mine) == before
    Store.open(mine)


def test_outputs_do_not_replace_each_other(store: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for other in (tmp_path / "p.plan", tmp_path / "sub" / ".." / "p.plan"):
        refused(invoke(store, "-o", tmp_path / "p.plan", "--report", other), "--report must be another file than -o")
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("select,schedule,select,schedule,lower", "select: select must come before schedule, got it after"),
        ("select,anchors,select,anchors,schedule,lower", "anchors: anchors must come before anchors, got it after"),
        ("select,schedule,anchors,lower", "anchors: anchors must come before schedule, got it after"),
        ("schedule,merge-heads,lower", "merge-heads: merge-heads must come before schedule, got it after"),
        ("select,lower,lower", "passes must end with lower"),
        ("vote,lower", "vote: threshold must be one of the store's none, got 0.9"),
        ("select,repeat,lower", "repeat: differences of rows must have been recorded with thresholds, got none"),
        ("anchors,lower", "anchors: select must come before, got none"),
    ],
)
def test_what_cannot_work_is_refused_before_any_unit_is_read(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: str, words: str
) -> None:
    monkeypatch.setattr(gather.StatisticsSource, "unit", None)
    refused(invoke(store, "-o", tmp_path / "p.plan", "--passes", passes), words)
    assert content(tmp_path) == {}


def test_decibels_need_a_prediction_before_any_unit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = stats.write_store(tmp_path / "two", stats.manifest(), ("s0", "s1"))
    monkeypatch.setattr(gather.StatisticsSource, "unit", None)
    result = invoke(two, "-o", tmp_path / "p.plan", "--target-db", 20)
    refused(result, "select: target-db must have a prediction to go by, got 20.0: it needs 2 samplings with a measured")


def interrupted(monkeypatch: pytest.MonkeyPatch, store: Path, plan: Path, after: int) -> Result:
    """A compilation with Ctrl-C after some units."""
    left, work = iter(range(after)), pipeline._work

    def some(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return work(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_work", some)
        return invoke(store, "-o", plan)


def test_an_interruption_has_a_code_of_its_own_and_leaves_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(interrupted(monkeypatch, store, tmp_path / "p.plan", 6), "calibatt-compile: interrupted", 130)
    assert list(tmp_path.iterdir()) == []


def limited() -> None:
    """No file may grow beyond what a tiny plan has: the disk is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))


def test_a_full_disk_is_told_with_the_file(store: Path, tmp_path: Path) -> None:
    line = [*COMMAND, str(store), "-o", str(tmp_path / "p.plan")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"calibatt-compile: \S+/\.p\.plan\S*: File too large\n", done.stderr)
    assert content(tmp_path) == {}


def test_a_report_that_cannot_be_written_does_not_deny_the_plan(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cli.report, "write", full)
    result = invoke(store, "-o", tmp_path / "p.plan", "--report", tmp_path / "r.json")
    refused(result, f"{tmp_path}/p.plan is written, but not all of what there is to say about it: {tmp_path}/r.json", 3)
    PlanFile.read(tmp_path / "p.plan").prove()
    assert sorted(content(tmp_path)) == ["p.plan"]


def test_a_closed_pipe_does_not_deny_the_plan(store: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    line = [*COMMAND, str(store), "-o", str(tmp_path / "p.plan")]
    done = subprocess.run(line, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(f"calibatt-compile: {tmp_path}/p.plan is written, but")
    assert done.stderr.count("\n") == 1
    PlanFile.read(tmp_path / "p.plan").prove()


def test_a_terminal_of_ascii_shows_the_report(store: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    line = [*COMMAND, str(store), "-o", str(tmp_path / "p.plan")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "times, from video to noise" in done.stdout.decode("ascii")


def test_names_in_a_store_do_nothing_to_a_terminal(store: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(store, tmp_path / "mine")
    (mine / "progress" / "\x1b[2Jgone").mkdir()
    result = invoke(mine, "-o", tmp_path / "p.plan")
    assert result.exit_code == 0, result.output
    assert "not counted: \\x1b[2Jgone" in result.stdout
    assert "\x1b" not in result.output
