"""The journey from a model to a judged plan, on models so small that a CPU takes it: it proves the path, no numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")

from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import InterceptedSite, Interception
from calibatt.tools.calibrate.models import make_sampler
from calibatt.tools.studies import journey, structured
from calibatt.tools.studies.structured import SETTINGS

MODULE = "calibatt.tools.studies.structured"
TINY = ("tiny", "mochi_tiny")
STAGES = "calibrate,compile,inspect,generate"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:In CPU autocast"),
]


def bench(folder: Path, *options: str, code: int = 0) -> Any:
    """The report of a command on a CPU."""
    output = folder / "journey.json"
    arguments = ["--device", "cpu", "--block-size", "16", "-o", str(output), *options]
    result = CliRunner().invoke(journey.main, arguments)
    assert result.exit_code == code, result.output
    return json.loads(output.read_text("utf-8"))


def near_mass(name: str) -> torch.Tensor:
    """Attention of video tokens to those at most one frame, row or column away, ``(layers, 3, heads)``."""
    sampler = make_sampler(f"{MODULE}:{name}", 2, "cpu")
    grid, found = sampler.grid, {}
    places = torch.cartesian_prod(*(torch.arange(size) for size in (grid.frames, grid.height, grid.width)))
    near = (places[:, None] - places).abs() <= 1  # (N, N, 3)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, site: InterceptedSite, _: Any) -> torch.Tensor:
        scores = torch.einsum("nhd,mhd->hnm", q[0], k[0]) * q.shape[-1] ** -0.5
        video = scores.softmax(-1)[:, : len(places), : len(places)]
        found.setdefault(site.layer, torch.einsum("hnm,nma->ah", video, near.float()) / len(places))
        return site.stock(q, k, v)

    interception = Interception(sampler.transformer, adapter_for(sampler.transformer), attend)
    sampler.run("a cat", 0)
    interception.detach()
    return torch.stack([found[layer] for layer in sorted(found)])


@pytest.mark.parametrize("name", TINY)
def test_heads_differ_in_reach_along_every_axis(name: str) -> None:
    mass = near_mass(name)
    assert mass.shape == (2, 3, 4)
    least, most = mass.amin(-1), mass.amax(-1)
    assert (most[:, 0] > 2 * least[:, 0]).all()  # frames: nine of them
    assert (most - least > 0.1).all()


@pytest.mark.parametrize("name", TINY)
def test_samplers_repeat_and_layers_follow_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERS", "1")
    sampler = make_sampler(f"{MODULE}:{name}", 2, "cpu")
    assert adapter_for(sampler.transformer).signature(sampler.transformer).layers == 1
    assert len(sampler.times) == sampler.branches == 2
    assert sampler.pipe.vae is None
    first, again, other = sampler.run("a cat", 0), sampler.run("a cat", 0), sampler.run("a dog", 0)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite().all()


def test_settings_have_functions_and_published_sizes() -> None:
    for name, setting in SETTINGS.items():
        assert getattr(structured, name) == setting.sampler
        if "tiny" not in name:
            every = 6 if setting.is_mochi else 4
            latent = ((setting.frames - 1) // every + 1, setting.height // 8, setting.width // 8)
            assert latent in setting.row.sizes.values()
            assert setting.transformer(torch.device("meta"), 1).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "forwards"), [("tiny", 2), ("mochi_tiny", 1)])
def test_calibration_is_measured_in_parts(name: str, forwards: int, tmp_path: Path) -> None:
    options = ["--layers", "1", "--steps", "3", "--inputs", "device,cpu", "--to-samples", "5", "--to-steps", "7"]
    report = bench(tmp_path, "--model", name, "--measure", "calibrate", *options)
    assert report["layers"] == 1
    assert report["command"] == (
        f"calibatt-bench journey --model {name} --layers 1 --measure calibrate --steps 3 "
        "--block-size 16 --inputs device,cpu --to-samples 5 --to-steps 7 --device cpu --output journey.json"
    )
    assert [record["inputs"] for record in report["calibrate"]] == ["device", "cpu"]
    for record in report["calibrate"]:
        counts = {kind: len(seconds) for kind, seconds in record["all_seconds"].items()}
        assert counts == {"forward": 3 * forwards, "backward": 2 * forwards, "measured": forwards, "store": 1}
        whole = record["extrapolated"]
        assert whole["forward_s"] == pytest.approx(5 * 7 * forwards * record["forward_s"])
        assert whole["disk_open_gb"] == pytest.approx(7e-9 * record["disk_open_bytes"])
        parts = ("forward", "backward", "statistics", "store", "close")
        assert whole["hours"] == pytest.approx(sum(whole[f"{part}_s"] for part in parts) / 3600)
        assert 0 < record["disk_closed_bytes"] < record["disk_open_bytes"]


def test_the_whole_journey_by_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--model", "mochi_tiny", "--layers", "1", "--steps", "2", "--generate-steps", "2", "--samples", "3"]
    report = bench(tmp_path, *options, "--held-out", "1", "--stages", STAGES, "--work", str(tmp_path / "work"))
    assert str(tmp_path) not in report["command"]
    assert [record["stage"] for record in report["stages"]] == STAGES.split(",")
    records = {record["stage"]: record for record in report["stages"]}
    assert all(record["seconds"] > 0 and record["exit_code"] == 0 for record in records.values())
    calibrate = records["calibrate"]
    assert calibrate["store"] == records["compile"]["store"] == {"prompts": 3, "samplings": 3, "vectors": [1]}
    assert calibrate["disk_peak_gb"] >= calibrate["disk_gb"] > 0
    assert records["compile"]["density"] == pytest.approx(0.5, abs=0.02)
    assert records["compile"]["predicted_latent_db"]["mean"] > 20
    assert records["generate"]["measured_latent_db"] > 20
    assert [row["prompt"] for row in records["generate"]["prompts"]] == ["held-out prompt 0"]


def test_a_stage_that_fails_ends_the_journey(tmp_path: Path) -> None:
    found = bench(tmp_path, "--model", "tiny", "--stages", "inspect,evaluate", code=1)
    assert [(record["stage"], record["exit_code"]) for record in found["stages"]] == [("inspect", 2)]


def test_nothing_begins_when_time_is_over(tmp_path: Path) -> None:
    found = bench(tmp_path, "--model", "tiny", "--seconds", "0", code=1)
    assert found["stages"] == [{"stage": "calibrate", "stopped": "out of time"}]


def test_what_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for options, words in (
        (["--layers", "9"], "--layers must be at most the model's 2, got 9"),
        (["--inputs", "disk"], "--inputs must be some of device, cpu; got 'disk'"),
    ):
        result = CliRunner().invoke(journey.main, ["--model", "tiny", "--device", "cpu", *options])
        assert result.exit_code == 2
        assert words in " ".join(result.output.split())
