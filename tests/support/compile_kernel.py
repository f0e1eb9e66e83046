"""Compiles the Triton kernels for a GPU that need not be there; prints what each case uses, as JSON.

A program of its own, because the kernels must be defined without TRITON_INTERPRET, and so that it can be run under
another release of Triton. Its argument is a JSON list of cases:
``{"sm": 90, "head_dim": 128, "block_q": 128, "block_k": 128, "dtype": "bf16", "anchored": true}`` of the block-sparse
kernel, with ``"precision": 2`` for heads of `INT8_FP8`; ``{"sm": 90, "k_blocks": 591}`` of the one that unpacks lists.
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

from calibatt.plans import BF16, INT8_FP8
from calibatt.runtime.backends.triton import TMA_SINCE, table_row
from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.kernels.unpack import COLUMNS_AT_ONCE, unpack_lists

SM_SHARED_BYTES = {80: 167_936, 89: 102_400, 90: 233_472, 100: 233_472, 120: 102_400}
RESERVED_BYTES = 1024
"""Of shared memory, for each block: one alone may use the rest."""
SM_REGISTERS = 65_536
REGISTER_UNIT = 8
"""Registers of a thread are given out by so many."""
SM_TENSOR_COLUMNS = 512
"""Of tensor memory, from sm100 on."""


def compile_case(
    sm: int,
    head_dim: int,
    block_q: int,
    block_k: int,
    dtype: str,
    anchored: bool,
    others: bool = False,
    precision: int = BF16,
) -> dict[str, int | str]:
    """Registers, stack bytes (spills), shared memory and programs an SM, as the launcher would configure the kernel."""
    config = table_row(sm)[head_dim].fit(block_q, block_k)
    constants = {
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "HEAD_DIM": head_dim,
        "TMA": sm >= TMA_SINCE,
        "PARTIAL": True,
        "ANCHORED": anchored,
        "LSE": True,
        "OTHERS": others,
        "PADDED": others,
        "IN_INT8": precision != BF16,
        "IN_E4M3": precision == INT8_FP8,
    }
    row = f"{config.block_n}, {head_dim}"
    codes = dtype if precision == BF16 else "i8"
    values, column = ("fp8e4nv", f"{head_dim}, {config.block_n}") if precision == INT8_FP8 else (dtype, row)

    def tile(kind: str, shape: str) -> str:
        return f"tensordesc<{kind}[1, 1, {shape}]>" if sm >= TMA_SINCE else f"*{kind}"

    scales = dict.fromkeys(("q_scales_ptr", "k_scales_ptr", "channels_ptr", "lse_shift_ptr"), "*fp32")
    if precision == BF16:
        constants.update(dict.fromkeys((*scales, "slots_ptr", "eight_heads", "q_groups", "key_blocks")))
    special = {
        "q_ptr": f"*{codes}",
        "out_ptr": f"*{dtype}",
        "k": tile(codes, row),
        "v": tile(values, column),
        **scales,
        "lse_ptr": "*fp32",
        "columns_ptr": "*u16",
        "scale_log2": "fp32",
    }
    signature, aligned = {}, {}
    for index, name in enumerate(block_sparse_forward.arg_names):
        kind = "*i32" if name.endswith("_ptr") else "i32"
        if name == "lengths_ptr" and not others:
            constants[name] = None
        signature[name] = "constexpr" if name in constants else special.get(name, kind)
        if signature[name].startswith("*") or "_stride_" in name:
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(block_sparse_forward, signature, constants, aligned)
    return {"config": str(config), **usage(source, sm, config.options)}


def compile_unpack(sm: int, k_blocks: int) -> dict[str, int | str]:
    """As `compile_case`, of `kernels.unpack`."""
    constants = {"WIDTH": -(-k_blocks // 8), "COLUMNS": COLUMNS_AT_ONCE}
    kinds = {"bits_ptr": "*u8", "starts_ptr": "*i32", "columns_ptr": "*u16", "lists": "i32", "k_blocks": "i32"}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(3)}
    source = ASTSource(unpack_lists, {**kinds, **dict.fromkeys(constants, "constexpr")}, constants, aligned)
    return usage(source, sm, {"num_warps": 1, "enable_fp_fusion": True})


def usage(source: ASTSource, sm: int, options: dict[str, int | bool]) -> dict[str, int | str]:
    """Compiles; what the compiled kernel uses."""
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", found).groups())
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    given = -(-registers // REGISTER_UNIT) * REGISTER_UNIT * 32 * options["num_warps"]
    programs = min(SM_REGISTERS // given, SM_SHARED_BYTES[sm] // (shared + RESERVED_BYTES))
    return {
        "triton": triton.__version__,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": shared,
        "programs": min(programs, SM_TENSOR_COLUMNS // columns) if columns else programs,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "e4m3": compiled.asm["ptx"].count(".e4m3.e4m3"),
        "e4m3_chained": len(re.findall(r"tt\.dot %\w+, %\w+, (?!%cst).*f8E4M3FN", compiled.asm["ttir"])),
    }


if __name__ == "__main__":
    cases = json.loads(sys.argv[1])
    print(json.dumps([compile_unpack(**case) if "k_blocks" in case else compile_case(**case) for case in cases]))
