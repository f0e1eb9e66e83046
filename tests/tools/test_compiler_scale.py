"""`python -m calibatt.tools.studies.compiler_scale` on small stores: both paths, one JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support import stats

from calibatt.compiler.stats import Store
from calibatt.tools.studies import compiler_scale
from calibatt.tools.studies.compiler_scale import main
from calibatt.tools.studies.synthetic import Synthetic


@pytest.mark.slow
def test_both_paths_are_measured(tmp_path: Path) -> None:
    store = stats.write_store(tmp_path / "store", stats.manifest())
    arguments = ["--store", store, "--arguments", "--target-density 0.6", "-o"]
    found = CliRunner().invoke(main, [*map(str, arguments), str(tmp_path / "found.json")])
    assert found.exit_code == 0, found.output
    value = json.loads((tmp_path / "found.json").read_text())
    assert value["statistics"] == "synthetic, 3 samplings x 2 layers x 2 times x 3 heads, 5 x 5 blocks"
    assert value["store"] == {"prompts": 3, "samplings": 3, "vectors": [stats.VECTORS]}
    for path, passes in (("defaults", 5), ("no anchors", 3)):
        of = value[path]
        assert len(of["passes"]) == 1 + passes
        assert all(each["density"] <= 0.6 for each in of["passes"][1:])
        assert of["compile"]["processor_seconds_per_unit"] > 0
        assert of["full_model"]["plan_mb"] > 0


def test_memory_is_that_of_the_command_alone() -> None:
    def run(size_mb: int) -> dict:
        return compiler_scale.run_measured([sys.executable, "-c", f"x = b'x' * {size_mb} * 10**6"])

    large, small = run(200), run(1)
    assert 200 < large["peak_mb_of_the_largest_process"] < 300
    assert small["peak_mb_of_the_largest_process"] < 100, "that of an earlier command does not count"
    assert large["processor_seconds"] > 0


def test_a_command_that_fails_is_one_line(tmp_path: Path) -> None:
    store = stats.write_store(tmp_path / "store", stats.manifest())
    arguments = ["--store", store, "--arguments", "--target-density much", "-o", tmp_path / "a.json"]
    found = CliRunner().invoke(main, [*map(str, arguments)])
    assert found.exit_code == 2
    assert "calibatt.compiler.cli ended with exit code 2" in found.output


def test_synthetic_statistics_are_those_of_a_store(tmp_path: Path) -> None:
    made = Synthetic(stats.manifest())
    made.write(tmp_path / "store", 3)
    store = Store.open(tmp_path / "store")
    unit, table = store.unit(0, 0), store.table()
    unit.check(store.manifest)
    assert unit.closed
    assert [each.has_ladder for each in table.samplings] == [False, True, True]
    total = sum(store.unit(0, layer).error_values().sum() for layer in range(2))
    assert abs(total - 1) < 0.05
    level = np.stack([each.level for each in table.samplings])
    ratio = level[:, 1] / level[:, 0]
    np.testing.assert_allclose(ratio, 10.0, rtol=1e-6)
