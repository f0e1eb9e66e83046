"""Options that benches and studies share: what is wrong is said in one line, before any work."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from calibatt.tools.bench.kernel import main as kernel
from calibatt.tools.bench.model import main as model
from calibatt.tools.bench.options import device_option, file_option
from calibatt.tools.bench.record import typed
from calibatt.tools.studies import (
    ablations,
    defaults,
    distill,
    energy,
    figures,
    pareto,
    quality,
    robustness,
    sizes,
    sweep,
    train,
)

MAINS = {
    "kernel": (kernel, ()),
    "model": (model, ()),
    "pareto": (pareto.main, ("--stats", "none")),
    "ablations": (ablations.main, ("--stats", "none")),
    "sizes": (sizes.main, ()),
    "defaults": (defaults.main, ("--stores", "none")),
    "robustness": (robustness.main, ("--stores", "none")),
    "quality": (quality.main, (__file__,)),
    "train": (train.main, ()),
    "distill": (distill.main, ()),
    "energy": (energy.main, ()),
    "sweep": (sweep.main, ()),
}


def refused(name: str, *options: object) -> str:
    """What a command says to a call that is wrong."""
    command, given = MAINS[name]
    result = CliRunner().invoke(command, [*given, *map(str, options)])
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit)
    return " ".join(result.output.split())


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:99", "cuda:x"])
@pytest.mark.parametrize("name", MAINS)
def test_a_device_that_is_not_there_is_refused(name: str, device: str, tmp_path: Path) -> None:
    said = refused(name, "--device", device, "-o", tmp_path / "out")
    assert "--device must be a " in said
    assert f"device of this machine, got '{device}'" in said


def test_what_needs_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("energy", "sweep", "train", "distill"):
        assert "device of this machine, got 'cuda'" in refused(name, "-o", tmp_path / "out")


def test_the_device_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and kernels of libraries are on the current device, whatever their tensors are on."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)

    @click.command()
    @device_option()
    def command(device: torch.device) -> None:
        click.echo(device)

    found = [CliRunner().invoke(command, ["--device", text]).output for text in ("cuda:1", "cuda", "auto", "cpu")]
    assert found == ["cuda:1\n", "cuda\n", "cuda\n", "cpu\n"]
    assert current == [1, 0, 0]


@pytest.mark.parametrize("text", ["half", "0", "1.5", "0.5,", "nan"])
@pytest.mark.parametrize("name", ["model", "pareto", "ablations", "sizes", "defaults"])
def test_densities_are_shares(name: str, text: str, tmp_path: Path) -> None:
    said = refused(name, "--densities", text, "-o", tmp_path / "a.json")
    assert f"--densities must be numbers in (0, 1] joined by commas, got '{text}'" in said


@pytest.mark.parametrize("name", [name for name in MAINS if name not in ("train", "distill", "energy", "sweep")])
def test_a_file_that_cannot_be_written_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "--output must name a file that can be written" in refused(name, "-o", tmp_path / "file" / "a.json")


@pytest.mark.parametrize("option", ["--table", "--figure"])
def test_so_are_tables_and_figures(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused("sizes", "-o", tmp_path / "a.json", option, tmp_path / "file" / "b")
    assert f"{option} must name a file that can be written" in said


def test_the_folder_of_a_file_is_made(tmp_path: Path) -> None:
    @click.command()
    @file_option("--out", text="A file.")
    def command(out: Path | None) -> None:
        click.echo(out is None or out.parent.is_dir())

    assert CliRunner().invoke(command, ["--out", str(tmp_path / "a" / "b" / "c")]).output == "True\n"
    assert CliRunner().invoke(command, []).output == "True\n"


@pytest.mark.parametrize("name", ["kernel", "sweep"])
def test_there_is_a_round_at_least(name: str, tmp_path: Path) -> None:
    assert "'--rounds': 0 is not in the range x>=1" in refused(name, "--rounds", 0, "-o", tmp_path / "a.json")


@pytest.mark.parametrize("name", ["pareto", "ablations"])
def test_a_store_that_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    said = refused(name, "-o", tmp_path / "a.json", "--device", "cpu")
    assert said.startswith(f"python -m calibatt.tools.studies.{name}: ")
    assert "none" in said


@pytest.mark.parametrize("text", ["[]", "{}", '{"measurements": []}'])
def test_a_report_without_measurements_is_not_drawn(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    result = CliRunner().invoke(figures.main, [str(path), "-o", str(tmp_path / "a.png")])
    assert result.exit_code == 2
    assert "must be of calibatt-bench kernel or model, with measurements" in " ".join(result.output.split())


def test_a_command_is_told_as_it_was_typed() -> None:
    @click.command()
    @click.option("--sizes")
    @click.option("--peers/--no-peers", default=True)
    @click.option("--trace", is_flag=True)
    @click.option("--rounds", default=3)
    @file_option("-o", "--output", text="A file.")
    def command(**_: object) -> None:
        click.echo(typed("it"))

    arguments = ["--sizes", "few heads,small", "--no-peers", "--trace", "-o", "/tmp/secret/a.json"]
    told = CliRunner().invoke(command, arguments).output
    assert told == "it --sizes 'few heads,small' --no-peers --trace --output a.json\n"


def test_commands_in_a_study_s_help_stay_lines() -> None:
    shown = CliRunner().invoke(pareto.main, ["--help"], terminal_width=120).output
    line = "calibatt-calibrate --model demo --samples 8 --thresholds 0.8,0.9,0.95 -o stats/"
    assert line in [each.strip() for each in shown.splitlines()]
