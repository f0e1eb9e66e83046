"""The command line: statistics in, plan out; the same bytes every time; one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support import stats
from support.jobs import EIGHT

from calibatt.compiler import cost
from calibatt.compiler.cli import command
from calibatt.compiler.language import DEFAULT_PASSES, option_name
from calibatt.compiler.passes import PASSES
from calibatt.compiler.stats import StoreWriter
from calibatt.compiler.steps import segments
from calibatt.plans import PlanFile, told_precisions

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stats.write_store(tmp_path_factory.mktemp("stats") / "store", stats.manifest())


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_the_same_statistics_give_the_same_bytes(store: Path, tmp_path: Path) -> None:
    found = []
    for name in ("a.plan", "b.plan"):
        result = invoke(store, "-o", tmp_path / name, "--target-density", 0.6, "--notes", "a note")
        assert result.exit_code == 0, result.output
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]
    plan = PlanFile.read(tmp_path / "a.plan")
    assert plan.signature == stats.manifest().model
    assert plan.predicted["density"] <= 0.6
    assert plan.passes.startswith("select{target-density=0.6,")
    assert plan.notes == "a note"
    assert plan.provenance["samples"] == ["s0", "s1", "s2"]
    assert len(plan.provenance["prompts_digest"]) == 32
    assert plan.predicted["latent_db"]["samplings"] == 2
    assert [(part.start, part.stop, part.time) for part in plan.segments] == [(0, 0.5, 0.25), (0.5, 1, 0.75)]
    assert str(tmp_path) not in str(plan.provenance)


def test_a_store_in_two_folders_is_the_same_whatever_their_order(tmp_path: Path) -> None:
    names = (("s1",), ("s0", "s2"))
    parts = [stats.write_store(tmp_path / each[0], stats.manifest(), each) for each in names]
    for name, order in (("a", parts), ("b", parts[::-1])):
        assert invoke(*order, "-o", tmp_path / f"{name}.plan").exit_code == 0
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()
    assert PlanFile.read(tmp_path / "a.plan").provenance["samples"] == ["s0", "s1", "s2"]


@pytest.mark.parametrize("places", [("--precision",), ("--passes",)])
def test_precisions_are_asked_for_and_told(
    store: Path, tmp_path: Path, places: tuple[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cost.DEVICES, "test", EIGHT)
    (place,) = places
    more = [place, "auto" if place == "--precision" else DEFAULT_PASSES.replace("select", "select{precision=auto}")]
    report = tmp_path / "r.json"
    result = invoke(store, "-o", tmp_path / "p.plan", "--device", "test", *more, "--report", report)
    assert result.exit_code == 0, result.output
    plan, value = PlanFile.read(tmp_path / "p.plan"), json.loads(report.read_text())
    precisions = np.array([[schedule.head_precision for schedule in layers] for layers in plan.schedules])
    assert precisions.any()
    assert plan.passes.count("precision=auto") == 2
    assert value["precision"] == told_precisions(precisions)
    assert value["precision"] in " ".join(result.output.split())
    assert value["precision_by_layer"] == [told_precisions(precisions[:, layer]) for layer in range(2)]
    assert value["attention_cost"] == plan.predicted["cost"] <= 0.5 < plan.predicted["density"] == value["density"]
    assert f"{plan.predicted['cost']:.4f} of dense attention in 16 bit" in result.output
    invoke(store, "-o", tmp_path / "q.plan", "--device", "test")
    plain = PlanFile.read(tmp_path / "q.plan")
    assert not any(schedule.head_precision.any() for layers in plain.schedules for schedule in layers)
    assert plain.predicted["cost"] == pytest.approx(plain.predicted["density"])


def test_the_report(store: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = invoke(store, "-o", tmp_path / "p.plan", "--report", report, "--device", "cpu-2core", "--target-db", 12)
    assert result.exit_code == 0, result.output
    value = json.loads(report.read_text())
    plan = PlanFile.read(tmp_path / "p.plan")
    assert [each["name"] for each in value["accounts"]][::5] == ["dense", "lower"]
    assert value["passes"] == plan.passes
    assert value["file_bytes"] == (tmp_path / "p.plan").stat().st_size
    densities = [[schedule.density for schedule in layers] for layers in plan.schedules]
    np.testing.assert_allclose(value["density_by_time_and_layer"], densities)
    assert value["predicted_latent_db"]["mean"] >= 12
    assert value["predicted_latent_db"] == plan.predicted["latent_db"]
    assert len(value["levels"]) == 2
    assert value["device"]["name"] == "cpu-2core"
    assert sum(value["planned_ms"]) < sum(value["dense_ms"])
    heads = [[sum(counts.values()) for counts in layers] for layers in value["heads_by_time_and_layer"]]
    assert heads == [[3, 3], [3, 3]]
    assert value["accounts"][1]["findings"]["duality_gap"] >= 0
    assert sum(number for kind, number in value["heads_by_kind"].items() if kind.startswith("mask ")) == 2 * 2 * 3
    for expected in (
        "passes",
        "provenance: 3 samplings",
        "predicted latent SNR: ",
        "provisional",
        "predicted attention",
        "duality gap",
    ):
        assert expected in result.stdout


def test_the_report_says_what_a_unit_took(store: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    result = invoke(store, "-o", tmp_path / "p.plan", "--report", report)
    assert result.exit_code == 0, result.output
    value, size = json.loads(report.read_text()), (tmp_path / "p.plan").stat().st_size
    seconds = sum(each["seconds"] for each in value["accounts"])
    assert value["cost"]["units"] == 2 * 2
    assert value["cost"]["seconds_a_unit"] == pytest.approx(seconds / 4)
    assert value["cost"]["file_bytes_a_unit"] == pytest.approx(size / 4)
    assert f"ms and {size / 4:.0f} bytes each" in " ".join(result.output.split())


def test_the_report_as_a_page(store: Path, tmp_path: Path) -> None:
    result = invoke(store, "-o", tmp_path / "p.plan", "--report", tmp_path / "r.html", "--notes", "<b>")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!doctype html>")
    for expected in ("select{target-density=0.5", "duality gap", "predicted latent SNR", "660 TFLOP/s", "Density in %"):
        assert expected in page
    assert page.count("--share:") == 2 * 2
    assert page.index("<details>") < page.index("select{target-density=0.5")
    assert "http" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--passes", "vote,fly"],
            "a pass must be one of vote, select, anchors, repeat, merge-heads, schedule, lower, got 'fly'",
        ),
        (["--passes", "vote,select"], "passes must end with lower, got vote{agreement=0.5,threshold=0.9},select{"),
        (
            ["--passes", "lower", "--target-db", "1"],
            "and to a select, got --target-db with 'lower'",
        ),
        (
            ["--target-density", "0.5", "--target-db", "1"],
            "a budget must be one of --target-density and --target-db, got both",
        ),
        (
            ["--passes", "select{ target-db = 1},lower", "--target-density", "1"],
            "target-density or target-db must be given in --passes or on the command line",
        ),
        (
            ["--passes", "select{precision=bf16},lower", "--precision", "auto"],
            "precision must be given in --passes or on the command line, and to a select",
        ),
        (["--passes", "lower", "--precision", "bf16"], "precision must be given in --passes or on the command line"),
        (
            ["--precision", "auto", "--device", "h200-triton"],
            "precision must be bf16 on a device whose 8 bits were not measured, got auto, h200-triton",
        ),
        (["--target-density", "2"], "select: target-density must be in (0, 1], got 2.0"),
        (["--target-db", "inf"], "select: target-db must be finite, got inf"),
        (["--report", "none/r.json"], "none/r.json must be in a folder that exists, got no folder none"),
        (["--report", "/"], "/ must be a file, got a folder there"),
        (["--device", "abacus"], "device must be one of h200-hopper, h200-triton, cpu-2core, got 'abacus'"),
    ],
)
def test_mistakes_are_one_line(store: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = invoke(store, "-o", tmp_path / "p.plan", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("calibatt-compile: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "p.plan").exists()


def test_files_are_not_replaced_unless_forced(store: Path, tmp_path: Path) -> None:
    for name in ("p.plan", "r.json"):
        (tmp_path / name).write_text("precious")
        result = invoke(store, "-o", tmp_path / "p.plan", "--report", tmp_path / "r.json")
        assert result.exit_code == 2
        assert "must not exist (--force replaces it), got a file there" in result.stderr
        assert (tmp_path / name).read_text() == "precious"
    assert invoke(store, "-o", tmp_path / "p.plan", "--report", tmp_path / "r.json", "--force").exit_code == 0
    PlanFile.read(tmp_path / "p.plan")


def test_no_store_is_one_line(tmp_path: Path) -> None:
    result = invoke(tmp_path / "nowhere", "-o", tmp_path / "p.plan")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


def test_samplings_in_progress_are_told(store: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(store, tmp_path / "store")
    with StoreWriter.open(copy, stats.manifest()) as writer:
        writer.progress_folder("s9")
        writer.add(0, 0, stats.unit(stats.manifest(), "s9"))
    result = invoke(copy, "-o", tmp_path / "p.plan")
    assert result.exit_code == 0
    assert "samplings in progress, not counted: s9" in result.stdout
    assert PlanFile.read(tmp_path / "p.plan").provenance["samples"] == ["s0", "s1", "s2"]


def test_an_old_store_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "manifest.json").write_text('{"schema_version": 1}')
    result = invoke(tmp_path / "old", "-o", tmp_path / "p.plan")
    assert result.exit_code == 2
    assert "schema_version must be 4 (calibrate again: an earlier version measured something else), got 1" in (
        result.stderr
    )
    assert result.stderr.count("\n") == 1


def test_help_names_every_pass_and_option() -> None:
    text = invoke("--help").output
    for name, kind in PASSES.items():
        assert re.search(rf"^ +{name}\b", text, re.MULTILINE)
        for each in fields(kind()):
            assert option_name(each.name) + ("" if each.default is None else f"={each.default}") in text


def test_segments_cover_all_times() -> None:
    found = [(part.start, part.stop, part.time) for part in segments((0.0, 0.5, 1.0))]
    assert found == [(0.0, 0.25, 0.0), (0.25, 0.75, 0.5), (0.75, 1.0, 1.0)]
    assert [(part.start, part.stop) for part in segments((0.3,))] == [(0.0, 1.0)]


def test_it_compiles_without_torch(store: Path, tmp_path: Path) -> None:
    """In a fresh interpreter in which torch and triton cannot be imported, with another hash seed."""
    code = "import sys; sys.modules.update(torch=None, triton=None); from calibatt.compiler.cli import main; main()"
    for seed in ("1", "2"):
        command_line = [sys.executable, "-W", "error", "-c", code, str(store), "-o", str(tmp_path / f"{seed}.plan")]
        subprocess.run(command_line, check=True, cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True)
    assert (tmp_path / "1.plan").read_bytes() == (tmp_path / "2.plan").read_bytes()
