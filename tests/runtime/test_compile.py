"""The kernels compile for GPUs that this machine need not have, and use of an SM what their launchers count on."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support import compile_hopper, compile_kernel
from support.releases import OLDER_TRITON, run_program

from calibatt.plans import INT8, INT8_FP8
from calibatt.runtime.backends.hopper import TESTED_RELEASES, refused_release

pytestmark = pytest.mark.slow

TABLE = [
    {"sm": sm, "head_dim": head_dim, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": True}
    for sm in (80, 89, 90, 100, 120)
    for head_dim in (64, 128, 256)
]
SM90 = [
    {"sm": 90, "head_dim": 16, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": True},
    {"sm": 90, "head_dim": 32, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": True},
    {"sm": 90, "head_dim": 64, "block_q": 128, "block_k": 128, "dtype": "fp16", "anchored": False},
    {"sm": 90, "head_dim": 128, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": False},
    {"sm": 90, "head_dim": 128, "block_q": 64, "block_k": 64, "dtype": "bf16", "anchored": False},
    {"sm": 90, "head_dim": 64, "block_q": 16, "block_k": 16, "dtype": "bf16", "anchored": True},
    {"sm": 90, "head_dim": 256, "block_q": 256, "block_k": 256, "dtype": "bf16", "anchored": True},
]
TABLE_EIGHT = [
    {**TABLE[0], "sm": sm, "head_dim": head_dim, "precision": precision, "others": head_dim == 128}
    for sm, head_dim, precision in (
        (80, 128, INT8), (89, 128, INT8_FP8), (90, 128, INT8), (90, 128, INT8_FP8), (90, 64, INT8), (90, 64, INT8_FP8),
    )
]  # fmt: skip
ROWS_OF_WGMMA = 64
MOST_STACK_BYTES = {80: 32, 89: 32, 90: 128, 100: 192, 120: 32}
"""Of a thread. Where two programs share an SM, 128 registers each are some too few."""
HOPPER = [
    {"head_dim": 128, "block_k": 128, "dtype": "bf16", "anchored": False, "lse": False},
    {"head_dim": 128, "block_k": 128, "dtype": "bf16", "anchored": True},
    {"head_dim": 128, "block_k": 128, "dtype": "fp16", "anchored": True},
    {"head_dim": 128, "block_k": 64, "dtype": "bf16", "anchored": True},
    {"head_dim": 64, "block_k": 128, "dtype": "bf16", "anchored": True},
    {"head_dim": 64, "block_k": 64, "dtype": "fp16", "anchored": True},
]
HOPPER_EIGHT = [
    {"head_dim": 128, "block_k": 128, "dtype": "bf16", "anchored": False, "lse": False, "precision": INT8_FP8},
    {"head_dim": 128, "block_k": 128, "dtype": "fp16", "anchored": True, "precision": INT8},
    {"head_dim": 64, "block_k": 64, "dtype": "fp16", "anchored": True, "precision": INT8_FP8},
]
ANCHORED_STACK_BYTES = 64
"""A thread's place in the copies of anchor rows: written once a launch and read once a tile, never within a step."""
OTHERS_STACK_BYTES = 192
"""The same of prefix and suffix: the consumers' are moved between tiles, never within a step."""
EIGHT_STACK_BYTES = 256
"""Of heads of 8 bits: two sums in fp32 leave few registers (under the older release, which executed it, 8 bytes, and 64
with prefix and suffix).
"""
MORE_STACK_BYTES = 128
"""With prefix and suffix, beyond `MOST_STACK_BYTES`."""


def check_table(folder: str | None) -> list[dict[str, int | str]]:
    """Compiles every row of the triton backend's table with the installed triton or with the one in a folder."""
    cases = TABLE + SM90 + [{**case, "others": True} for case in TABLE if case["sm"] in (80, 90)]
    usages = run_program(compile_kernel, cases, folder)
    for case, usage in zip(cases, usages, strict=True):
        most = MOST_STACK_BYTES[case["sm"]] + (MORE_STACK_BYTES if case.get("others") else 0)
        assert usage["stack_bytes"] <= most, (case, usage)
        assert usage["programs"] >= (1 if case["head_dim"] == 256 else 2), (case, usage)
        assert (usage["wgmma"] > 0) == (case["sm"] == 90 and case["block_q"] >= ROWS_OF_WGMMA), (case, usage)
    return usages


def check_eight(folder: str | None) -> None:
    """The same of heads of 8 bits; sums of e4m3 begin anew with each product."""
    for case, usage in zip(TABLE_EIGHT, run_program(compile_kernel, TABLE_EIGHT, folder), strict=True):
        assert usage["stack_bytes"] <= EIGHT_STACK_BYTES, (case, usage)
        assert usage["programs"] >= 1, (case, usage)
        assert (usage["wgmma"] > 0) == (case["sm"] == 90), (case, usage)
        assert usage["e4m3_chained"] == 0, (case, usage)
        assert (usage["e4m3"] > 0) == (case["precision"] == INT8_FP8), (case, usage)


def test_the_table_under_the_installed_triton() -> None:
    check_table(None)
    check_eight(None)


def test_the_table_under_the_oldest_tested_triton() -> None:
    folder = older_triton()
    assert {usage["triton"] for usage in check_table(folder)} == {TESTED_RELEASES[0]}
    check_eight(folder)


def older_triton() -> str:
    """The folder of the oldest tested release; skips the test if there is none."""
    folder = os.environ.get(OLDER_TRITON)
    if folder is None:
        pytest.skip(f"{OLDER_TRITON} must be a folder with triton {TESTED_RELEASES[0]}")
    return folder


def test_hopper_compiles_under_the_installed_triton() -> None:
    check_hopper(None)


def test_hopper_compiles_under_the_oldest_tested_triton() -> None:
    folder = older_triton()
    assert {usage["triton"] for usage in check_hopper(folder)} == {TESTED_RELEASES[0]}


def check_hopper(folder: str | None) -> list[dict[str, Any]]:
    """Compiles every case with the installed triton or with the one in a folder."""
    cases = HOPPER + [{**case, "others": True} for case in HOPPER[::2]]
    cases += HOPPER_EIGHT + [{**case, "others": True} for case in HOPPER_EIGHT[:2]]
    usages = run_program(compile_hopper, cases, folder)
    for case, usage in zip(cases, usages, strict=True):
        most = ANCHORED_STACK_BYTES if case["anchored"] else 0
        most += EIGHT_STACK_BYTES if "precision" in case else 0
        assert usage["stack_bytes"] <= most + (OTHERS_STACK_BYTES if case.get("others") else 0), (case, usage)
        assert usage["registers"] == 168, (case, usage)
        assert usage["shared_bytes"] <= compile_kernel.SM_SHARED_BYTES[90] - compile_kernel.RESERVED_BYTES, (
            case,
            usage,
        )
        assert usage["wgmma"] > 0, (case, usage)
        assert not usage["serialised"], (case, usage)
    return usages


def test_an_untested_triton_is_refused() -> None:
    assert refused_release(f"{TESTED_RELEASES[0]}+git1234") is None
    assert refused_release("3.10.0") == "triton must be 3.6.0 or 3.9.0, for which the kernel was tested, got 3.10.0"
