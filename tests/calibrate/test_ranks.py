"""Calibration by several processes: one store, the same statistics as of one process, and an end for all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from support.ranks import Torchrun, run_commands, run_ranks

from calibatt.compiler.stats import Store, StoreBusy, StoreWriter, refinement
from calibatt.plans.container import Container
from calibatt.tools.calibrate import __main__ as command
from calibatt.tools.calibrate.ranks import RankLostError, Ranks

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def arguments(folder: Path, model: str = "tiny_sampler") -> list[Any]:
    (folder / "prompts").write_text("\n".join(PROMPTS))
    chosen = ["--model", f"support.sampler:{model}", "--prompts", folder / "prompts", "--device", "cpu"]
    chosen += ["--block-size", "16", "--probes", "2", "--probe-samples", "3"]
    return [*chosen, "--refine", "--refine-blocks", "4", "-o"]


def measured(path: Path) -> dict[str, Any]:
    """Everything in a store but how long it took."""
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if file.suffix == ".unit":
            found[name] = file.read_bytes()
        elif file.suffix == ".refined":
            errors = Container.open(file, magic=refinement.MAGIC, version=refinement.VERSION, crc=True)
            found[name] = {time: errors.section(time).tolist() for time in errors.names}
        elif file.suffix == ".json":
            found[name] = json.loads(file.read_text())
            for part in (found[name], found[name].get("meta", {})):
                part.pop("seconds", None)
    return found


@pytest.fixture
def alone(tmp_path: Path, one_thread: None) -> dict[str, Any]:
    """What one process measures."""
    calibrate(arguments(tmp_path), tmp_path / "one")
    return measured(tmp_path / "one")


def calibrate(options: list[Any], path: Path) -> str:
    result = CliRunner().invoke(command.main, [str(option) for option in (*options, path)])
    assert result.exit_code == 0, result.output
    return result.stdout


def one_of_several(options: list[Any], path: Path) -> None:
    """In each process."""
    told = calibrate(options, path)
    assert told.count("5 recorded now, 5 refined") == int(os.environ["RANK"] == "0"), told


def test_two_processes_write_what_one_does(tmp_path: Path, alone: dict[str, Any]) -> None:
    run_commands(one_of_several, 2, tmp_path, arguments(tmp_path), tmp_path / "two")
    assert measured(tmp_path / "two") == alone
    store = Store.open(tmp_path / "two")
    assert (len(store.samples), len(store.probes), len(store.refined), store.interrupted) == (5, 6, 5, ())


@pytest.mark.timeout(120)
def test_a_failing_process_fails_all_and_one_process_can_continue(tmp_path: Path, alone: dict[str, Any]) -> None:
    options = arguments(tmp_path, "second_rank_fails")
    with Torchrun(2, "-m", "calibatt.tools.calibrate", *options, tmp_path / "two") as job:
        code, out, err = job.finish()
    assert (code, out) == (1, "")
    assert "calibatt-calibrate: rank 1: the sampler must sample, got an error" in err
    store = Store.open(tmp_path / "two")
    assert 1 <= len(store.samples) <= 4, "one of rank 1, and what rank 0 had by then"
    assert not store.probes
    assert "5 samples" in calibrate(options, tmp_path / "two")
    assert measured(tmp_path / "two") == alone


def test_work_is_divided_whole_and_evenly(tmp_path: Path) -> None:
    work = [(prompt, seed) for seed, prompt in enumerate("abcdefg")]

    class Writer:
        def done(self) -> tuple[str, ...]:
            return command.sample_name("b", 1), command.sample_name("c", 2)

        def interrupted(self) -> tuple[str, ...]:
            return ()

    class Alone(Ranks):
        """Hears what it says."""

        def from_first(self, value: Any) -> Any:
            return value

    parts = [
        command.outstanding(Writer(), work, work[:4], Alone(rank, 2), command.Console(quiet=True)) for rank in range(2)
    ]
    assert [[prompt for prompt, _ in todo] for todo, _ in parts] == [["a", "e", "g"], ["d", "f"]]
    assert [[prompt for prompt, _ in probed] for _, probed in parts] == [["a", "b"], ["c", "d"]]
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
    result = CliRunner().invoke(command.main, ["--model", "none", "-o", str(tmp_path / "s")])
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
