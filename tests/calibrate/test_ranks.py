"""Calibration by several processes: one store, the same statistics as of one process, and an end for all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from support.ranks import Torchrun, run_commands, run_ranks

from calibatt.compiler.stats import Store, StoreBusy, StoreWriter
from calibatt.tools.calibrate import __main__, command
from calibatt.tools.calibrate.calibration import sampling_name
from calibatt.tools.calibrate.ranks import RankLostError, Ranks

pytestmark = pytest.mark.slow

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def arguments(folder: Path, model: str = "tiny_sampler") -> list[Any]:
    (folder / "prompts").write_text("\n".join(PROMPTS))
    chosen = ["--model", f"support.sampler:{model}", "--prompts", folder / "prompts", "--device", "cpu"]
    return [*chosen, "--block-size", "16", "-o"]


def same(one: Path, other: Path, tolerance: float = 0.05) -> None:
    """Two closed stores say the same within what is promised: each value was rounded, in whatever order they came."""
    stores = Store.open(one), Store.open(other)
    assert stores[0].samplings == stores[1].samplings
    manifest = stores[0].manifest
    for time in range(len(manifest.times)):
        for layer in range(manifest.model.layers):
            a, b = (store.unit(time, layer) for store in stores)
            assert sorted(a.samplings) == sorted(b.samplings)
            np.testing.assert_allclose(a.effect_values(), b.effect_values(), rtol=2 * tolerance)
            np.testing.assert_allclose(a.error_values(), b.error_values(), rtol=2 * tolerance)
            np.testing.assert_allclose(a.row_effect, b.row_effect, rtol=1e-4)
    for a, b in zip(*(store.table().samplings for store in stores), strict=True):
        np.testing.assert_allclose(a.level, b.level, rtol=1e-6)
        np.testing.assert_allclose(a.window_effect, b.window_effect, rtol=1e-4, atol=1e-7)


@pytest.fixture
def alone(tmp_path: Path, one_thread: None) -> Path:
    """What one process measures."""
    calibrate(arguments(tmp_path), tmp_path / "one")
    return tmp_path / "one"


def calibrate(options: list[Any], path: Path) -> str:
    result = CliRunner().invoke(__main__.main, [str(option) for option in (*options, path)])
    assert result.exit_code == 0, result.output
    return result.stdout


def one_of_several(options: list[Any], path: Path) -> None:
    """In each process."""
    told = calibrate(options, path)
    assert told.count("5 measured now") == int(os.environ["RANK"] == "0"), told


def test_two_processes_write_what_one_does(tmp_path: Path, alone: Path) -> None:
    run_commands(one_of_several, 2, tmp_path, arguments(tmp_path), tmp_path / "two")
    same(tmp_path / "two", alone)
    assert Store.open(tmp_path / "two").unfinished == ()


def test_two_shards_are_one_store(tmp_path: Path, alone: Path) -> None:
    options = arguments(tmp_path)
    (tmp_path / "prompts").write_text("\n".join(PROMPTS[:2]))
    calibrate(options, tmp_path / "first")
    (tmp_path / "prompts").write_text("\n".join(PROMPTS[2:]))
    calibrate(["--seed", "2", *options], tmp_path / "second")
    merged, whole = Store.open([tmp_path / "first", tmp_path / "second"]), Store.open(alone)
    assert merged.samplings == whole.samplings
    for layer in range(merged.manifest.model.layers):
        values = merged.unit(0, layer).effect_values(), whole.unit(0, layer).effect_values()
        np.testing.assert_allclose(*values, rtol=0.1)  # rounded by up to 4.4 % each


@pytest.mark.timeout(120)
def test_a_failing_process_fails_all_and_one_process_can_continue(tmp_path: Path, alone: Path) -> None:
    options = arguments(tmp_path, "second_rank_fails")
    with Torchrun(2, "-m", "calibatt.tools.calibrate", *options, tmp_path / "two") as job:
        code, out, err = job.finish()
    assert (code, out) == (1, "")
    assert "calibatt-calibrate: rank 1: the sampler must sample, got an error" in err
    store = Store.open(tmp_path / "two")
    assert 1 <= len(store.samplings) <= 4, "one of rank 1, and what rank 0 had by then"
    assert "5 samplings" in calibrate(options, tmp_path / "two")
    same(tmp_path / "two", alone)


def test_work_is_divided_whole_and_evenly(tmp_path: Path) -> None:
    work = [(prompt, seed) for seed, prompt in enumerate("abcdefg")]

    class Writer:
        path = tmp_path

        def done(self) -> tuple[str, ...]:
            return sampling_name("b", 1), sampling_name("c", 2)

    class Alone(Ranks):
        """Hears what it says."""

        def from_first(self, value: Any) -> Any:
            return value

    (tmp_path / "progress").mkdir()
    parts = [command.outstanding(Writer(), work, Alone(rank, 2), command.Console(quiet=True)) for rank in range(2)]
    assert [[prompt for prompt, _ in todo] for todo in parts] == [["a", "e", "g"], ["d", "f"]]
    assert Ranks().share(work) == work


def one_goes(folder: Path) -> None:
    """The second rank ends without a word; the first must not wait for it."""
    rank = Ranks(dist.get_rank(), dist.get_world_size())
    assert rank.total(rank.rank + 1) == 3
    assert rank.from_first(("x", rank.rank)) == ("x", 0)
    rank.wait()
    if not rank.is_first:
        os._exit(0)
    with pytest.raises(RankLostError, match="all 2 ranks must go on to the end, got one that failed"):
        rank.wait()
    (folder / "told").touch()


def test_nobody_waits_for_a_rank_that_is_gone(tmp_path: Path) -> None:
    run_ranks(one_goes, 2, tmp_path, tmp_path)
    assert (tmp_path / "told").exists()


def test_ranks_of_an_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert Ranks.of_environment() == Ranks(0, 1, 0)
    for name, value in zip(names, "371", strict=True):
        monkeypatch.setenv(name, value)
    assert Ranks.of_environment() == Ranks(3, 7, 1)
    result = CliRunner().invoke(__main__.main, ["--model", "none", "-o", str(tmp_path / "s")])
    assert result.exit_code == 2
    assert result.output.startswith("calibatt-calibrate: rank 3: --model must be one of demo")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match="--nproc-per-node must be at most the 1 GPUs of a machine, got a rank 1 there"
    ):
        Ranks(3, 7, 1).own_device("cuda")
    assert Ranks(3, 7, 1).own_device("cuda:0") == "cuda:0"


def test_another_job_is_kept_out(tmp_path: Path) -> None:
    manifest = command.make_manifest(command.make_sampler("support.sampler:tiny_sampler", None, "cpu"), block_size=16)
    with command.open_store(tmp_path, manifest, Ranks()):
        with pytest.raises(StoreBusy):
            command.open_store(tmp_path, manifest, Ranks())
        StoreWriter.join(tmp_path, manifest).close()
