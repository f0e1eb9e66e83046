"""Predicted milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.jobs import compiled

from calibatt.compiler.cost import DEVICES, Device, device_named
from calibatt.compiler.errors import CompileError
from calibatt.plans import Blocks


def test_milliseconds_are_the_sum_of_blocks_tiles_and_stores() -> None:
    device = Device("toy", "made up", tflops=2.0, tile_us=3.0, store_us=0.5)
    blocks = Blocks(64, 32)
    block_ms = 4 * 64 * 32 * 16 / 2e12 * 1e3
    assert device.block_ms(blocks, 16) == pytest.approx(block_ms)
    assert device.predict_ms(10, 7, 100, blocks, 16) == pytest.approx(7 * block_ms + 10 * 3e-3 + 100 * 0.5e-3)


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
        tiles = size["heads"] * -(-size["tokens"] // 128)
        blocks = record["density"] * size["heads"] * (size["tokens"] / 128) ** 2
        found = device.predict_ms(tiles, blocks, size["heads"] * size["tokens"], Blocks(), size["head_dim"])
        exact = (record["size"], round(record["density"], 1)) == ("720p", 0.3)
        assert found == pytest.approx(record["median_ms"], rel=0.005 if exact else 0.17), record


def test_tiles_and_stores_of_a_job_are_paid() -> None:
    job, accounts = compiled("select{target-density=0.7},anchors,schedule,lower", copies=1e-3)
    tiles = sum(len(unit.lowered.tile_order) for unit in job.all)
    job.device = Device("toy", "made up", tflops=1e9, tile_us=1000.0, store_us=0.0)
    assert sum(job.unit_ms(*unit.computed()) for unit in job.all) == pytest.approx(tiles)
    job.device = Device("toy", "made up", tflops=1e9, tile_us=0.0, store_us=1000.0)
    assert sum(job.unit_ms(*unit.computed()) for unit in job.all) == pytest.approx(2 * 2 * 3 * job.manifest.grid.tokens)
    assert job.units * job.dense_unit_ms == pytest.approx(2 * 2 * 3 * job.manifest.grid.tokens)
    assert accounts[-1].predicted_ms < accounts[0].predicted_ms


def test_devices_say_where_they_come_from() -> None:
    assert all(device.name == name and device.source for name, device in DEVICES.items())
    with pytest.raises(CompileError, match="device must be one of h200-hopper, h200-triton, cpu-2core, got 'abacus'"):
        device_named("abacus")
