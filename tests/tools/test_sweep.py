"""What a sweep says of the triton backend's table."""

from __future__ import annotations

import torch

from calibatt.tools.bench.kernel import GPU_SIZES
from calibatt.tools.studies.sweep import ranking


def test_configurations_are_ranked_against_the_tables() -> None:
    size = GPU_SIZES[0]
    milliseconds = {
        "triton": {0.5: 4.0, 0.1: 1.0},
        "Config(slower)": {0.5: 8.0, 0.1: 2.0},
        "Config(faster)": {0.5: 2.0, 0.1: 0.5},
        "hopper": {0.5: 1.0, 0.1: 1.0},
    }
    records = [
        {"size": name, "backend": backend, "density": density, "median_ms": ms}
        for name in (size.name, "another size")
        for backend, times in milliseconds.items()
        for density, ms in times.items()
    ]
    faster, slower = ranking(records, size, torch.device("cpu"))
    assert faster == "sm90, head_dim 128, 480p: 2.000 x the table's: Config(faster)"
    assert slower.endswith("0.500 x the table's: Config(slower)")


def test_there_is_no_ranking_without_a_sweep() -> None:
    assert ranking([], GPU_SIZES[0], torch.device("cpu")) == []
