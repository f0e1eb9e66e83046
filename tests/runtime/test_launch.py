"""What the kernels' backends launch, seen by a CUDA driver without a GPU: later launches are those that Triton made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support import launch_kernels
from support.releases import OLDER_TRITON, run_program

from calibatt.plans import BF16, INT8_FP8

pytestmark = pytest.mark.slow

CASES = [
    {"backend": "hopper", "anchored": False, "lse": False, "head_dim": 128, "layout": "fused"},
    {"backend": "hopper", "anchored": True, "lse": True, "head_dim": 64, "layout": "fused"},
    {"backend": "hopper", "anchored": True, "lse": False, "head_dim": 128, "layout": "heads first"},
    {"backend": "hopper", "anchored": False, "lse": True, "head_dim": 128, "layout": "fused", "others": True},
    {"backend": "hopper", "anchored": True, "lse": True, "head_dim": 128, "layout": "heads first", "others": True},
    {"backend": "hopper", "anchored": False, "lse": False, "head_dim": 128, "layout": "fused", "precision": INT8_FP8},
    {
        "backend": "hopper",
        "anchored": True,
        "lse": True,
        "head_dim": 128,
        "layout": "heads first",
        "others": True,
        "precision": INT8_FP8,
    },
    {"backend": "triton", "anchored": True, "lse": True, "head_dim": 128, "layout": "fused", "others": True},
    {"backend": "triton", "anchored": False, "lse": False, "head_dim": 128, "layout": "fused"},
    {"backend": "triton", "anchored": True, "lse": True, "head_dim": 64, "layout": "heads first"},
    {"backend": "triton", "anchored": True, "lse": True, "head_dim": 128, "layout": "fused", "precision": INT8_FP8},
]
LENGTHS = [[37, 1], [0, 300], [1001, 0], [16, 128], [1, 2048]]
THREADS = {"hopper": 384, "triton": 256}
"""Of a block."""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", ["installed", "oldest"])
def test_later_launches_are_those_that_triton_made(tmp_path: Path, release: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc must be there, as for Triton on a GPU")
    older = os.environ.get(OLDER_TRITON)
    if release == "oldest" and older is None:
        pytest.skip(f"{OLDER_TRITON} must be a folder with a release of triton")
    launch_kernels.build_driver(tmp_path)
    folders = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH"), str(tmp_path))
    lengths = [{"backend": backend, "lengths": LENGTHS} for backend in THREADS]
    lengths += [{"backend": backend, "lengths": LENGTHS, "precision": INT8_FP8} for backend in THREADS]
    records = run_program(launch_kernels, CASES + lengths, older if release == "oldest" else None, **folders)
    variants = [records.pop() for _ in lengths]
    assert variants == [2, 1, 1, 1], "text of another length compiles nothing; triton has one of its kernel for 16 bits"
    for case, found in zip(CASES, records, strict=True):
        assert found["again"] == found["first"], case
        assert found["moved"] == found["first"], case
        eight = case.get("precision", BF16) != BF16
        forward = next(each for each in found["first"][::-1] if each["block"] == THREADS[case["backend"]])
        assert forward["block"] == THREADS[case["backend"]]
        assert forward["stream"] == launch_kernels.STREAM
        moving = {"q", "k", "v", "out"} | ({"lengths"} if case.get("others") else set())
        assert moving <= {parameter for each in found["first"] for parameter in each["parameters"]}
        others = eight and case.get("others", False)
        assert len(found["first"]) == 1 + (case["anchored"] and case["backend"] == "hopper") + 2 * eight + others
