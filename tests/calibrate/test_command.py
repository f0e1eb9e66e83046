"""calibatt-calibrate as a user types it: what it says first, what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from support.sampler import tiny_store

from calibatt.compiler.stats import Store
from calibatt.tools.calibrate import __main__ as command
from calibatt.tools.calibrate import estimate, progress, work
from calibatt.tools.calibrate.calibration import Calibrator

TINY = "support.sampler:tiny_sampler"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a\n\nbb\nccc\n")
    return path


def run(*options: Any) -> Result:
    return CliRunner().invoke(command.main, [*map(str, options), "--device", "cpu"])


def test_it_measures_goes_on_and_skips_what_is_done(tmp_path: Path, prompts: Path) -> None:
    options = "--model", TINY, "--prompts", prompts, "--block-size", 16, "-o", tmp_path / "stats"
    done = run(*options, "--samples", 2)
    assert done.exit_code == 0, done.output
    assert re.search(r"2 samplings, \d\.\d MiB; 2 measured now", done.stdout)
    assert "squared effects of single blocks, from clean to noise:" in done.stdout
    more = run(*options)
    assert more.exit_code == 0, more.output
    assert "2 of 3 samplings are done: skipped" in more.stderr
    assert "3 samplings" in more.stdout
    assert "1 measured now" in more.stdout
    store = Store.open(tmp_path / "stats")
    assert {meta["prompt"] for meta in store.meta.values()} == {"a", "bb", "ccc"}
    assert store.unfinished == ()
    assert store.unit(0, 0).effect.dtype == np.uint8, "closed"
    assert [table.has_ladder for table in store.table().samplings].count(False) == 1, "the first one had no order yet"


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(tmp_path: Path, prompts: Path) -> None:
    done = run("--model", TINY, "--prompts", prompts, "--dry-run", "-o", tmp_path / "stats")
    assert done.exit_code == 0, done.output
    for told in ("3 of 3 steps, 3 forwards; 3 times measured", "9 forwards, 1 random vectors", "GB when finished"):
        assert told in done.stderr, told
    assert re.search(r"time +0\.\d\d hours \(0\.\d\d s a forward, \d\.\d\d s to differentiate it", done.stderr)
    assert "attention by PyTorch on the CPU" in done.stderr
    assert not (tmp_path / "stats").exists()


def test_the_disk_that_is_foretold_is_the_disk_that_is_used(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "stats")
    foretold = estimate.disk_bytes(store.manifest, len(store.samplings), 3, 4, 0).finished
    files = sum(1 for path in (tmp_path / "stats").rglob("*") if path.is_file())
    assert foretold <= store.size_bytes <= 1.1 * foretold + 4096 * files


def test_lines_in_a_log_say_how_much_is_left(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    done = run("--model", TINY, "--prompts", prompts, "--samples", 1, "-o", tmp_path / "stats")
    lines = re.findall(r"calibatt-calibrate: (\d+)% done, \d:\d\d:\d\d gone, \d:\d\d:\d\d left", done.stderr)
    assert len(lines) == 6, "three forwards, and each differentiated"
    assert lines[-1] == "100"
    assert sorted(lines, key=int) == lines


def test_memory_that_runs_out_ends_in_one_line(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("a long story of allocators")

    monkeypatch.setattr(Calibrator, "calibrate", out_of_memory)
    done = run("--model", TINY, "--prompts", prompts, "-o", tmp_path / "stats")
    assert done.exit_code == 2
    assert "device memory must suffice, got too little; --inputs-on-cpu takes less" in done.stderr
    assert "allocators" not in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--samples", 4), "--samples must be at most the 3 prompts of"),
        (("--times", 4), "the number of measured times must be at most 3 steps, got 4"),
        (("--times", 2, "--every", 2), "measured steps must be chosen by times or by every, got times 2, every 2"),
        (("--thresholds", "much"), "--thresholds must be numbers joined by commas, got 'much'"),
        (("--thresholds", "0.5,2"), "thresholds must be ascending floats in (0, 1]"),
        (("--model", "nowhere:sampler"), "--model nowhere:sampler must be a function that can be imported"),
        (("--model", "operator:is_"), "--model operator:is_ must return a Sampler, got bool without"),
    ],
)
def test_a_wrong_call_is_one_line_before_any_work(
    tmp_path: Path, prompts: Path, options: tuple[Any, ...], told: str
) -> None:
    done = run("--model", TINY, "--prompts", prompts, "-o", tmp_path / "stats", *options)
    assert done.exit_code == 2, done.output
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "stats").exists()


def test_a_store_is_continued_with_its_own_options(tmp_path: Path, prompts: Path) -> None:
    options = "--model", TINY, "--prompts", prompts, "--samples", 1, "-o", tmp_path / "stats"
    assert run(*options, "--block-size", 16).exit_code == 0
    done = run(*options, "--block-size", 32)
    assert done.exit_code == 2
    assert "blocks.block_q: 16, 32" in done.stderr


def test_an_image_for_each_prompt(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("one.png\ntwo.png\n")
    assert work.read_images(tmp_path / "images", ["a", "b"]) == {"a": "one.png", "b": "two.png"}
    with pytest.raises(ValueError, match="--images must name an image for each of 3 prompts, got 2"):
        work.read_images(tmp_path / "images", ["a", "b", "c"])


def test_help_says_what_is_measured_what_it_costs_and_how_to_get_cheaper() -> None:
    told = " ".join(CliRunner().invoke(command.main, ["--help"]).output.split())
    costs = "as long as generating it seven times", "which loses quality"
    for part in (*costs, "--dry-run", "How to get cheaper", "Run it again to continue"):
        assert part in told


def test_times_are_spread_from_the_first_step_to_the_last() -> None:
    assert work.spread(8, 8) == list(range(8))
    assert work.spread(50, 3) == [0, 24, 49]
    assert work.spread(2, 5) == [0, 1]


def test_names_in_a_store_do_nothing_to_a_terminal(tmp_path: Path, prompts: Path) -> None:
    options = "--model", TINY, "--prompts", prompts, "--samples", 1, "-o", tmp_path / "stats"
    assert run(*options).exit_code == 0
    (tmp_path / "stats" / "progress" / "\x1b[2J[bold]").mkdir()
    done = run(*options)
    assert done.exit_code == 0, done.output
    assert "sampling \\x1b[2J[bold] was interrupted: left aside" in done.stderr
    assert "\x1b" not in done.stderr


def test_no_store_in_a_store(tmp_path: Path, prompts: Path) -> None:
    options = "--model", TINY, "--prompts", prompts, "--samples", 1
    assert run(*options, "-o", tmp_path / "stats").exit_code == 0
    for place in ("more", "progress/more"):
        done = run(*options, "-o", tmp_path / "stats" / place)
        assert done.exit_code == 2
        assert f"{place} must not be in a store of statistics, got {(tmp_path / 'stats').resolve()}" in done.stderr
        assert not (tmp_path / "stats" / place).exists()


def test_prompts_of_an_editor_that_marks_utf_8(tmp_path: Path) -> None:
    (path := tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa boat\r\na lake\r\n")
    assert work.read_prompts(path) == ["a boat", "a lake"]


def test_a_device_is_one_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [work.pick_device(name) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    for other in ("cuda:2", "meta"):
        with pytest.raises(ValueError, match=f"--device must be a device of this machine, got '{other}'"):
            work.pick_device(other)
