"""Predicted milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.jobs import compiled

from calibatt.compiler.cost import DEVICES, Device, Speed, device_named
from calibatt.compiler.errors import CompileError
from calibatt.plans import Blocks


def test_milliseconds_are_those_of_blocks() -> None:
    device = Device("toy", "made up", tflops=2.0)
    assert device.block_ms(Blocks(64, 32), 16) == pytest.approx(4 * 64 * 32 * 16 / 2e12 * 1e3)
    job, accounts = compiled("select{target-density=0.7},anchors,schedule,lower", copies=1e-3)
    computed = sum(unit.lowered.computed_blocks(head) for unit in job.all for head in range(unit.heads))
    assert accounts[-1].predicted_ms == pytest.approx(computed * job.device.block_ms(job.manifest.blocks, 8))
    assert accounts[0].predicted_ms == pytest.approx(accounts[-1].predicted_ms / accounts[-1].density)


BENCH = Path(__file__).parents[2] / "docs" / "benchmarks" / "kernels_h200.json"


@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_wan_takes_what_was_measured(backend: str) -> None:
    """The published measurements of 480p and 720p: exact where the coefficient comes from, near elsewhere."""
    report = json.loads(BENCH.read_text("utf-8"))
    sizes = {size["name"]: size for size in report["sizes"]}
    device = DEVICES[f"h200-{backend}"]
    for record in report["measurements"]:
        if record["backend"] != backend or record["size"] not in ("480p", "720p"):
            continue
        size = sizes[record["size"]]
        blocks = record["density"] * size["heads"] * (size["tokens"] / 128) ** 2
        found = blocks * device.block_ms(Blocks(), size["head_dim"])
        exact = (record["size"], round(record["density"], 1)) == ("720p", 0.3)
        assert found == pytest.approx(record["median_ms"], rel=0.005 if exact else 0.17), record


def test_speeds_of_8_bits_are_those_measured_and_linear_between() -> None:
    speed = Speed({300: 0.5, 100: 0.9})
    assert [speed.block(tokens) for tokens in (1, 100, 200, 300, 10**6)] == pytest.approx([0.9, 0.9, 0.7, 0.5, 0.5])


def test_devices_say_where_they_come_from() -> None:
    assert all(device.name == name and device.source for name, device in DEVICES.items())
    with pytest.raises(CompileError, match="device must be one of h200-hopper, h200-triton, cpu-2core, got 'abacus'"):
        device_named("abacus")
