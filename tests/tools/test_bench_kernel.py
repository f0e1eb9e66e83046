"""`calibatt-bench kernel` on a CPU: both kernels there, in turns, in one file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
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
