"""What the hopper backend launches, seen by a CUDA driver without a GPU: later launches are those that Triton made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import launch_hopper
from support.releases import OLDER_TRITON, run_program

CASES = [
    {"anchored": False, "lse": False, "head_dim": 128, "layout": "fused"},
    {"anchored": True, "lse": True, "head_dim": 64, "layout": "fused"},
    {"anchored": True, "lse": False, "head_dim": 128, "layout": "heads first"},
]


@pytest.mark.parametrize("release", ["installed", "oldest"])
def test_later_launches_are_those_that_triton_made(tmp_path: Path, release: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc must be there, as for Triton on a GPU")
    older = os.environ.get(OLDER_TRITON)
    if release == "oldest" and older is None:
        pytest.skip(f"{OLDER_TRITON} must be a folder with a release of triton")
    launch_hopper.build_driver(tmp_path)
    folders = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH"), str(tmp_path))
    records = run_program(launch_hopper, CASES, older if release == "oldest" else None, **folders)
    for case, found in zip(CASES, records, strict=True):
        assert found["again"] == found["first"], case
        assert found["moved"] == found["first"], case
        forward = found["first"][-1]
        assert forward["block"] == 384
        assert forward["stream"] == launch_hopper.STREAM
        assert [len(found["first"]), {"q", "k", "v", "out"} <= set(forward["parameters"])] == [
            1 + case["anchored"],
            True,
        ]
