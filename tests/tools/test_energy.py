"""What the energy bench makes of windows: on a clock and a meter that are made up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from click.testing import CliRunner

from calibatt.plans import BF16, INT8, INT8_FP8, TokenGrid
from calibatt.tools.bench.kernel import GPU_SIZES
from calibatt.tools.studies import energy
from calibatt.tools.studies.energy import Case, cases, compared, measure


class World:
    """A device on which a call takes `seconds` and uses `joules`; it is the meter too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.used = 0.0
        self.runs: list[str] = []
        monkeypatch.setattr(energy.time, "perf_counter", lambda: self.now)

    def case(self, kernel: str, seconds: float, joules: float, flops: float = 1e12) -> Case:
        def run() -> None:
            self.now += seconds
            self.used += joules
            self.runs.append(kernel)

        return Case(kernel, 0.5, flops, run)

    def joules(self) -> float:
        return self.used

    def megahertz(self) -> int:
        return 1400


def test_windows_are_filled_and_divided_by_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    made = [world.case("hopper", 0.01, 7.0), world.case("flash-attention-4 sparse", 0.02, 10.0)]
    records = measure(made, 3, 0.2, world, lambda: None)
    assert [(row["kernel"], row["ms"], row["joules"]) for row in records] == [
        ("hopper", pytest.approx(10), pytest.approx(7)),
        ("flash-attention-4 sparse", pytest.approx(20), pytest.approx(10)),
    ]
    assert [row["watts"] for row in records] == [pytest.approx(700), pytest.approx(500)]
    assert [row["tflops"] for row in records] == [pytest.approx(100), pytest.approx(50)]
    assert [row["picojoules_a_flop"] for row in records] == [pytest.approx(7), pytest.approx(10)]
    assert {row["mhz"] for row in records} == {1400}
    # Two calls to time one; then in each round a fifth of a window, and a window.
    assert world.runs.count("hopper") == 2 + 3 * (4 + 20)
    assert world.runs.count("flash-attention-4 sparse") == 2 + 3 * (2 + 10)
    found = compared([{"size": "480p", **row} for row in records])
    assert found == [
        {
            "size": "480p",
            "density": 0.5,
            "kernel": "flash-attention-4 sparse",
            "time": pytest.approx(2),
            "energy": pytest.approx(10 / 7),
        }
    ]


def test_kernels_that_are_not_there_have_a_reason() -> None:
    size = dataclasses.replace(GPU_SIZES[0], grid=TokenGrid(1, 16, 16), heads=1, densities=(1.0, 0.5))
    missing: dict[str, str] = {}
    found = cases(size, ["hopper", "sdpa-cudnn", "sdpa-flash"], torch.zeros, torch.device("cpu"), missing)
    assert [(case.kernel, case.density) for case in found] == [("sdpa-flash", 1.0)]
    assert found[0].flops == 4 * 256**2 * 128
    assert missing["sdpa-cudnn"] == "cuDNN needs a CUDA device"
    assert "the device must be cuda, got cpu" in missing["hopper"]


def test_kernels_of_8_bits_are_the_backend_on_such_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "supports", lambda *_: [])
    size = dataclasses.replace(GPU_SIZES[0], grid=TokenGrid(1, 16, 16), heads=2, densities=(0.5,))
    kernels = ["hopper", "hopper int8 QK", "hopper int8 QK with fp8 PV"]
    found = cases(size, kernels, torch.zeros, torch.device("cpu"), {})
    assert [case.kernel for case in found] == kernels
    for case, precision in zip(found, (BF16, INT8, INT8_FP8), strict=True):
        *_, schedule, backend = case.run.args
        assert (schedule.precisions, backend) == ({precision}, "hopper")


def test_a_device_without_a_meter_is_refused() -> None:
    result = CliRunner().invoke(energy.main, ["--device", "cpu"])
    assert result.exit_code == 2
    assert "--device must be a cuda device of this machine, got 'cpu'" in result.output
