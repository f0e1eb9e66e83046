"""Compiles the hopper kernels for sm_90a without a GPU; prints what each case uses, as JSON.

A program of its own, so that it can be run under another release of Triton. Its argument is a JSON list of cases:
``{"head_dim": 128, "block_k": 128, "dtype": "bf16", "anchored": true}``, and ``"precision": 2`` for heads of 8 bits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon._runtime import GluonASTSource

from calibatt.plans import BF16, INT8_FP8
from calibatt.runtime.kernels import hopper, hopper_eight

BITS = {"bf16": 16, "fp16": 16, "i8": 8, "fp8e4nv": 8}
POINTERS = {
    "lse_ptr": "*fp32",
    "lengths": "*i32",
    "tiles": "*i32",
    "columns": "*u16",
    "counter": "*i32",
    "receivers": "*i64",
    "slots": "*i32",
    "q_scales": "*fp32",
    "k_scales": "*fp32",
    "channels": "*fp32",
    "lse_shift": "*fp32",
    "packed_lse": "*fp32",
}
ONLY_ANCHORED = ("packed_q_desc", "packed_out_desc", "packed_lse", "receivers")
OPTIONS = {name: value for name, value in hopper.LAUNCH_OPTIONS.items() if name != "num_ctas"}


def compile_case(
    head_dim: int,
    block_k: int,
    dtype: str,
    anchored: bool,
    lse: bool = True,
    others: bool = False,
    precision: int = BF16,
) -> dict[str, Any]:
    """Registers, stack bytes (spills) and shared memory of the kernel as the launcher would configure it.

    With `others` and without `lse`, some of what stands after the video is padding.
    """
    in_e4m3 = precision == INT8_FP8
    if precision == BF16:
        kernel, slots = hopper.hopper_forward, hopper.kv_slots(head_dim, block_k)
    else:
        kernel, slots = hopper_eight.hopper_eight_forward, hopper_eight.kv_slots(head_dim, block_k, 1 if in_e4m3 else 2)
    constants = {
        "ANCHORED": anchored,
        "LSE": lse,
        "KV_SLOTS": slots,
        "OTHERS": others,
        "PADDED": others and not lse,
        "num_warps": OPTIONS["num_warps"],
    }

    def described(name: str) -> str:
        of, rows, row = dtype, block_k if name in ("k_desc", "v_desc") else 64, head_dim
        if precision != BF16 and name in ("q_desc", "k_desc"):
            of = "i8"
        if in_e4m3 and name == "v_desc":
            of, rows, row = "fp8e4nv", head_dim, block_k
        swizzle = min(128, row * BITS[of] // 8)
        layout = (
            f"swizzle_byte_width={swizzle}, element_bitwidth={BITS[of]}, rank=4, transposed=False, fp4_padded=False"
        )
        return f"tensordesc<{of}[1, 1, {rows}, {row}],NVMMASharedLayout({layout}, cga_layout=[])>"

    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        by_address = anchored or (others and precision == BF16)
        absent = {
            **dict.fromkeys(("lse_ptr", "lse_shift", "packed_lse"), not lse),
            "lengths": lse or not others,
            "out_ptr": not by_address,
        }
        if (not anchored and name in ONLY_ANCHORED) or absent.get(name, False):
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            signature[name] = described(name)
        else:
            signature[name] = {"out_ptr": f"*{dtype}", **POINTERS}.get(name, "fp32" if name == "scale_log2" else "i32")
            if signature[name].startswith("*") or name.startswith("out_stride_"):
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = GluonASTSource(kernel, signature, constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=OPTIONS)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        told = "" if precision == BF16 else told_by_ptxas(Path(folder, "kernel.ptx"), compiled.asm["ptx"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "triton": triton.__version__,
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
        "serialised": "are serialized" in told,
    }


def told_by_ptxas(path: Path, ptx: str) -> str:
    """What it says of a program, which Triton does not show: whether products are serialised, for instance."""
    path.write_text(ptx)
    command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", "/dev/null"]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout + result.stderr


if __name__ == "__main__":
    print(json.dumps([compile_case(**case) for case in json.loads(sys.argv[1])]))
