"""The kernels compile for GPUs that this machine need not have, without spilling registers on the main one."""

from __future__ import annotations

import os

import pytest
from support import compile_hopper, compile_kernel
from support.releases import OLDER_TRITON, run_program

from calibatt.runtime.backends.hopper import TESTED_RELEASES, refused_release

SM90 = [
    {"arch": 90, "head_dim": 128, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": True},
    {"arch": 90, "head_dim": 64, "block_q": 128, "block_k": 128, "dtype": "fp16", "anchored": True},
    {"arch": 90, "head_dim": 128, "block_q": 64, "block_k": 64, "dtype": "bf16", "anchored": False},
]
OTHERS = [
    {"arch": 90, "head_dim": 64, "block_q": 16, "block_k": 16, "dtype": "bf16", "anchored": True},
    {"arch": 90, "head_dim": 256, "block_q": 256, "block_k": 256, "dtype": "bf16", "anchored": True},
    {"arch": 80, "head_dim": 128, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": True},
]
HOPPER = [
    {"head_dim": 128, "block_k": 128, "dtype": "bf16", "anchored": False, "lse": False},
    {"head_dim": 128, "block_k": 128, "dtype": "bf16", "anchored": True},
    {"head_dim": 128, "block_k": 128, "dtype": "fp16", "anchored": True},
    {"head_dim": 128, "block_k": 64, "dtype": "bf16", "anchored": True},
    {"head_dim": 64, "block_k": 128, "dtype": "bf16", "anchored": True},
    {"head_dim": 64, "block_k": 64, "dtype": "fp16", "anchored": True},
]
ANCHORED_STACK_BYTES = 64
"""A thread's place in the copies of anchor rows: written once a launch and read once a tile, never within a step."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int]]:
    return run_program(compile_kernel, SM90 + OTHERS)


def test_sm90_uses_the_tensor_cores_and_spills_nothing(compiled: list[dict[str, int]]) -> None:
    for case, usage in zip(SM90, compiled, strict=False):
        assert usage["wgmma"] > 0, (case, usage)
        assert usage["stack_bytes"] == 0, (case, usage)


def test_shared_memory_fits(compiled: list[dict[str, int]]) -> None:
    for case, usage in zip(SM90 + OTHERS, compiled, strict=True):
        assert usage["shared_bytes"] <= compile_kernel.SHARED_BYTES[case["arch"]], (case, usage)


def test_hopper_compiles_under_the_installed_triton() -> None:
    check_hopper(None)


def test_hopper_compiles_under_the_oldest_tested_triton() -> None:
    folder = os.environ.get(OLDER_TRITON)
    if folder is None:
        pytest.skip(f"{OLDER_TRITON} must be a folder with triton {TESTED_RELEASES[0]}")
    assert {usage["triton"] for usage in check_hopper(folder)} == {TESTED_RELEASES[0]}


def check_hopper(folder: str | None) -> list[dict[str, int | str]]:
    """Compiles every case with the installed triton or with the one in a folder."""
    usages = run_program(compile_hopper, HOPPER, folder)
    for case, usage in zip(HOPPER, usages, strict=True):
        assert usage["stack_bytes"] <= (ANCHORED_STACK_BYTES if case["anchored"] else 0), (case, usage)
        assert usage["registers"] == 168, (case, usage)
        assert usage["shared_bytes"] <= compile_kernel.SHARED_BYTES[90], (case, usage)
        assert usage["wgmma"] > 0, (case, usage)
    return usages


def test_an_untested_triton_is_refused() -> None:
    assert refused_release(f"{TESTED_RELEASES[0]}+git1234") is None
    assert refused_release("3.10.0") == "triton must be 3.6.0 or 3.9.0, for which the kernel was tested, got 3.10.0"
