"""The demo's report needs nothing but itself, and says what it was given; measures are what they are called."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from calibatt.plans import PlanFile
from calibatt.runtime import load_plan
from calibatt.tools.demo import measure, report
from calibatt.tools.demo_model.model import times
from calibatt.tools.evaluate.harness import about, executed_density
from calibatt.tools.evaluate.metrics import psnr_db
from calibatt.tools.studies import quality

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "plans" / "demo.plan"


def test_the_report_is_one_file_that_says_what_it_was_given(tmp_path: Path) -> None:
    video = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = [measure.Pair("a <b> prompt", 7, video, video + 0.02), measure.Pair("another", 8, video, video)]
    facts = {
        "density": 0.5,
        "dense_ms": 3000.0,
        "dense_spread_ms": 10.0,
        "planned_ms": 1500.0,
        "planned_spread_ms": 20.0,
    }
    facts |= {"device": "an abacus", "versions": "v1", "command": "make demo", "date": "2026-01-02"}
    report.write_report(tmp_path / "r.html", PlanFile.read(PLAN), "demo.plan", found, facts)
    page = (tmp_path / "r.html").read_text("utf-8")
    words = ("a &lt;b&gt; prompt", "seed 7", "<b>100.0 dB</b>", "2.00 x", "an abacus", "v1", "make demo", "2026-01-02")
    assert [text for text in words if text not in page] == []
    assert len(re.findall('<img alt="[^"]*" src="data:image/png;base64,', page)) == 4
    assert not re.search(r"<script|<link|https?://|\$\{", page)


def test_psnr_is_that_of_values_from_0_to_1() -> None:
    zero = torch.zeros(2, 3, 1, 2, 2)
    found = psnr_db(zero + torch.tensor([0.2, 0.0]).view(2, 1, 1, 1, 1), zero)
    assert found.tolist() == [pytest.approx(-20 * math.log10(0.1), abs=1e-4), 100]


def test_the_demo_plan_executes_half_of_dense_attention() -> None:
    assert 0.49 < executed_density(load_plan(PLAN), times()[:-1].tolist()) <= 0.5


def test_what_measured_is_named() -> None:
    found = about("it", SimpleNamespace(transformer=torch.nn.Linear(1, 1)))
    assert found["device"] == f"CPU, {torch.get_num_threads()} threads"
    assert found["command"].startswith("it")


@pytest.mark.parametrize(
    ("plan", "message"),
    [("pyproject.toml", "must begin with b'CALIBPLN'"), ("tests/plans/golden/tiny.plan", "layers must be 2, got 6")],
)
def test_quality_refuses_what_is_no_plan_of_the_demo_model(tmp_path: Path, plan: str, message: str) -> None:
    result = CliRunner().invoke(quality.main, [str(ROOT / plan), "-o", str(tmp_path / "q.json")])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "q.json").exists()


def test_dense_and_planned_attention_are_warmed_up_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    captured = []

    @contextmanager
    def attending(model: torch.nn.Module, attention: Any) -> Iterator[None]:
        captured.append(attention)
        yield

    def logged(name: str) -> Any:
        return lambda q, k, v, *_: log.append(name) or v

    monkeypatch.setattr(measure, "attending", attending)
    monkeypatch.setattr(measure, "planned_attention", logged("planned"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", logged("dense"))
    monkeypatch.setattr(measure, "generate", lambda *_: captured[0](*[torch.zeros(1)] * 3, 0, 1.0))
    model = torch.nn.Linear(1, 1)
    model.transformer = None
    plan = SimpleNamespace(schedule=lambda now, layer: None)
    (call,) = measure.attention_ms(model, plan, "a prompt", 1, repeats=3)
    assert [len(times) for times in call] == [3, 3]
    assert log == ["dense", "planned"] * 4
