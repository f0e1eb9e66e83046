"""`calibatt-bench compiler` on a small store: both paths, one JSON."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from support import stats
from support.jobs import write_store

from calibatt.tools.bench.compiler import main


def test_both_paths_are_measured(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", stats.manifest())
    arguments = ["--store", store, "--ladders", "row+own", "--arguments", "--target-density 0.6", "-o"]
    found = CliRunner().invoke(main, [*map(str, arguments), str(tmp_path / "found.json")])
    assert found.exit_code == 0, found.output
    value = json.loads((tmp_path / "found.json").read_text())
    assert value["statistics"] == "synthetic, 3 samples x 2 layers x 2 times x 3 heads, 5 x 5 blocks"
    assert value["refinement"].startswith("made up, measured: ladders row+own at 0.02, ")
    for path, menu in (("unrefined", "windows+cuts"), ("refined", "windows+ladders")):
        of = value[path]
        assert f"menu={menu}," in of["passes"][2]["passes"]
        assert [each["density"] <= 0.6 for each in of["passes"][2:]] == [True] * 5
        assert of["compile"]["processor_seconds_per_unit"] > 0
        assert of["full_model"]["plan_mb"] > 0
