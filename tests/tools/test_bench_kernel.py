"""`calibatt-bench kernel` on a CPU: both kernels there, in turns, in one file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from calibatt.plans import TokenGrid
from calibatt.tools.bench import kernel
from calibatt.tools.bench.__main__ import main


def test_kernels_are_measured_and_absent_ones_have_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = dataclasses.replace(kernel.CPU_SIZES[0], grid=TokenGrid(2, 8, 16), densities=(1.0, 0.5))
    monkeypatch.setattr(kernel, "CPU_SIZES", (size,))
    arguments = ["kernel", "--device", "cpu", "--rounds", "2", "-o", str(tmp_path / "kernels.json")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "kernels.json").read_text("utf-8"))
    found = {(row["backend"], row["density"]) for row in report["measurements"]}
    assert found == {("sdpa-flash", 1.0), ("torch", 1.0), ("torch", 0.5)}
    assert report["missing"]["sdpa-cudnn"] == "cuDNN needs a CUDA device"
    assert report["command"] == "calibatt-bench kernel --device cpu --rounds 2 --output kernels.json"


def test_a_kernel_that_computes_something_else_is_not_timed() -> None:
    out = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    missing: dict[str, str] = {}
    found = {
        ("sdpa-cudnn", 1.0): "not here",
        ("sdpa-flash", 1.0): lambda: out,
        ("hopper", 1.0): lambda: out * 1.01,
        ("flash-attention-4", 1.0): lambda: out * 1.05,
        ("triton", 0.5): lambda: out,
        ("flex-attention", 0.5): lambda: out * torch.nan,
        ("hopper overshooting", 1.0): lambda: out * 9,
    }
    made = kernel.agreeing(found, missing)
    assert [name for name, _ in made] == ["sdpa-flash", "hopper", "triton", "hopper overshooting"]
    assert set(missing) == {"sdpa-cudnn", "flash-attention-4", "flex-attention"}
    assert missing["flash-attention-4"] == "it must compute what others do, got an output that is 0.050 off"


def test_a_wrong_kernel_ends_the_command_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = dataclasses.replace(kernel.CPU_SIZES[0], grid=TokenGrid(2, 8, 16), densities=(1.0,))
    monkeypatch.setattr(kernel, "CPU_SIZES", (size,))
    dense = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(kernel, "attend", lambda q, k, v, *_: 2 * dense(q, k, v))
    result = CliRunner().invoke(main, ["kernel", "--device", "cpu", "--rounds", "1", "-o", str(tmp_path / "a.json")])
    assert result.exit_code == 1, result.output
    assert "not measured: torch: it must compute what others do, got an output that is 1.000 off" in result.output
    assert [row["backend"] for row in json.loads((tmp_path / "a.json").read_text())["measurements"]] == ["sdpa-flash"]


def test_the_host_does_not_wait_between_the_untimed_run_and_the_timed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, other: object) -> float:
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    size, run = kernel.CPU_SIZES[0], lambda: log.append("run")
    kernel.measure(size, {("a", 1.0): run}, torch.device("cuda"), 2)
    once = ["event", "run", "event", "wait"]
    assert log == 2 * once + 2 * ["run", *once]
