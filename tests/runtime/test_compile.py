"""The triton kernel compiles for GPUs that this machine need not have, without spilling registers on the main one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import compile_kernel

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


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, compile_kernel.__file__, json.dumps(SM90 + OTHERS)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_sm90_uses_the_tensor_cores_and_spills_nothing(compiled: list[dict[str, int]]) -> None:
    for case, usage in zip(SM90, compiled, strict=False):
        assert usage["wgmma"] > 0, (case, usage)
        assert usage["stack_bytes"] == 0, (case, usage)


def test_shared_memory_fits(compiled: list[dict[str, int]]) -> None:
    for case, usage in zip(SM90 + OTHERS, compiled, strict=True):
        assert usage["shared_bytes"] <= compile_kernel.SHARED_BYTES[case["arch"]], (case, usage)
