"""Compiles the Triton kernels for a GPU that need not be there; prints what each case uses, as JSON.

A program of its own, because the kernels must be defined without TRITON_INTERPRET. Its argument is a JSON list of
cases: ``{"arch": 90, "head_dim": 128, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": true}`` of the
block-sparse kernel, ``{"arch": 90, "k_blocks": 591}`` of the one that unpacks lists.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from calibatt.runtime.backends.triton import choose_config
from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.kernels.unpack import COLUMNS_AT_ONCE, unpack_lists

SHARED_BYTES = {80: 166_912, 90: 232_448}
"""Shared memory that one block may use."""


def compile_case(
    arch: int, head_dim: int, block_q: int, block_k: int, dtype: str, anchored: bool
) -> dict[str, int | str]:
    """Registers, stack bytes (spills) and shared memory of the kernel as the launcher would configure it."""
    config = choose_config(block_q, block_k, head_dim, SHARED_BYTES[arch])
    constants = {
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HEAD_DIM": head_dim,
        "PARTIAL": True,
        "ANCHORED": anchored,
        "LSE": True,
    }
    tensors = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    special = {**tensors, "lse_ptr": "*fp32", "columns_ptr": "*u16", "scale_log2": "fp32"}
    signature, aligned = {}, {}
    for index, name in enumerate(block_sparse_forward.arg_names):
        kind = "*i32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else special.get(name, kind)
        if signature[name].startswith("*") or "_stride_" in name:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(block_sparse_forward, signature, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    return {"config": str(config), **usage(source, arch, options)}


def compile_unpack(arch: int, k_blocks: int) -> dict[str, int | str]:
    """As `compile_case`, of `kernels.unpack`."""
    constants = {"WIDTH": -(-k_blocks // 8), "COLUMNS": COLUMNS_AT_ONCE}
    kinds = {"bits_ptr": "*u8", "starts_ptr": "*i32", "columns_ptr": "*u16", "lists": "i32", "k_blocks": "i32"}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(3)}
    source = ASTSource(unpack_lists, {**kinds, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    return usage(source, arch, {"num_warps": 1, "enable_fp_fusion": True})


def usage(source: ASTSource, arch: int, options: dict[str, int | bool]) -> dict[str, int | str]:
    """Compiles; what the compiled kernel uses."""
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", found).groups()
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    print(json.dumps([compile_unpack(**case) if "k_blocks" in case else compile_case(**case) for case in cases]))
