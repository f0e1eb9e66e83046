"""Compiles the hopper kernel for sm_90a without a GPU; prints what each case uses, as JSON.

A program of its own, so that it can be run under another release of Triton. Its argument is a JSON list of cases:
``{"head_dim": 128, "block_k": 128, "dtype": "bf16", "anchored": true}``.
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
from triton.experimental.gluon._runtime import GluonASTSource

from calibatt.runtime.kernels import hopper

DESCRIBED = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4, transposed=False, fp4_padded=False"
POINTERS = {
    "lse_ptr": "*fp32",
    "lengths": "*i32",
    "tiles": "*i32",
    "columns": "*u16",
    "counter": "*i32",
    "receivers": "*i64",
}
ONLY_ANCHORED = ("packed_q_desc", "receivers")
OPTIONS = {name: value for name, value in hopper.LAUNCH_OPTIONS.items() if name != "num_ctas"}


def compile_case(
    head_dim: int, block_k: int, dtype: str, anchored: bool, lse: bool = True, others: bool = False
) -> dict[str, int | str]:
    """Registers, stack bytes (spills) and shared memory of the kernel as the launcher would configure it.

    With `others` and without `lse`, some of what stands after the video is padding.
    """
    kernel = hopper.hopper_forward
    constants = {
        "ANCHORED": anchored,
        "LSE": lse,
        "KV_SLOTS": hopper.kv_slots(head_dim, block_k),
        "OTHERS": others,
        "PADDED": others and not lse,
        "num_warps": OPTIONS["num_warps"],
    }

    def described(rows: int) -> str:
        return f"tensordesc<{dtype}[1, 1, {rows}, {head_dim}],{DESCRIBED}, cga_layout=[])>"

    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        absent = {"lse_ptr": not lse, "lengths": lse or not others, "out_ptr": not (anchored or others)}
        if (not anchored and name in ONLY_ANCHORED) or absent.get(name, False):
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            signature[name] = described(block_k if name in ("k_desc", "v_desc") else 64)
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
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "triton": triton.__version__,
        "registers": int(registers),
        "stack_bytes": int(stack),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    print(json.dumps([compile_case(**case) for case in json.loads(sys.argv[1])]))
