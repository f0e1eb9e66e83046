"""Launches a backend on a CUDA driver that only writes down what it is asked for; prints the records as JSON.

A program of its own, so that it can be run under another release of Triton. `LD_LIBRARY_PATH` must begin with a folder
where `build_driver` made the driver. Three calls are recorded: one that Triton launches, one of the same layout
(launched again, the way all later calls are), and one of other tensors of that layout.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from calibatt.plans import BF16, Blocks, TokenGrid
from calibatt.runtime.backends import hopper, load_backend
from calibatt.runtime.kernels import quantise
from calibatt.runtime.kernels.anchors import pack_queries, unpack_outputs
from calibatt.runtime.kernels.block_sparse import block_sparse_forward
from calibatt.runtime.kernels.hopper import hopper_forward
from calibatt.runtime.kernels.hopper_eight import hopper_eight_forward
from calibatt.runtime.schedule import ListedSchedule
from support.schedules import random_schedule

DRIVER = "libcuda.so.1"
STREAM = 77
MOST_LAUNCHES = 16
"""Of a call; as stub_cuda.c has room for."""
MOST_BYTES = 8192
SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}
CALLS = 2000


class Record(ctypes.Structure):
    """`Launch` of stub_cuda.c."""

    _fields_ = (
        ("function", ctypes.c_int),
        ("grid", ctypes.c_int * 3),
        ("block", ctypes.c_int),
        ("shared", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_ubyte * MOST_BYTES),
    )


def build_driver(folder: Path) -> None:
    """Compiles stub_cuda.c with the headers that Triton brings."""
    source = Path(__file__).with_name("stub_cuda.c")
    include = Path(nvidia.__file__).with_name("include")
    command = ["gcc", "-shared", "-fPIC", "-O1", f"-I{include}", str(source), "-o", str(folder / DRIVER)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def pretend_a_gpu() -> ctypes.CDLL:
    """Triton's driver for NVIDIA GPUs on the CPU's tensors; the library that it calls."""
    fake = nvidia.CudaDriver()
    fake.get_current_device = lambda: 0
    fake.get_current_stream = lambda device: STREAM
    fake.get_device_capability = lambda device=0: (9, 0)
    fake.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    driver.set_active(fake)
    torch.cuda.is_current_stream_capturing = lambda: False
    hopper.processors = lambda device: 132
    return ctypes.CDLL(DRIVER)


def declare(cuda: ctypes.CDLL, kernel: Any) -> None:
    """Tells the driver the sizes of a compiled kernel's parameters."""
    (compiled,) = next(iter(kernel.device_caches.values()))[0].values()
    declared = re.search(r"\.entry \w+\((.*?)\)", compiled.asm["ptx"], re.DOTALL).group(1)
    found = re.findall(r"\.param (?:\.align \d+ )?\.[bfsu](\d+)[^,]*?(?:\[(\d+)\])?(?:,|\s*$)", declared)
    sizes = [int(count) if count else SIZES[bits] for bits, count in found]
    assert len(sizes) == declared.count(".param"), declared
    cuda.declare(compiled.name.encode(), len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def records(cuda: ctypes.CDLL, count: int, names: dict[int, str], room: tuple[int, int]) -> list[dict[str, Any]]:
    """The last launches; addresses by name, those in the room (its start and stop) by their distance from its start."""
    found = []
    for record in (Record * MOST_LAUNCHES).in_dll(cuda, "last")[MOST_LAUNCHES - count :]:
        words = np.frombuffer(bytes(record.parameters[: record.bytes + -record.bytes % 4]), dtype=np.uint32).tolist()
        text: list[Any] = []
        while words:
            address = words[0] | words[1] << 32 if len(words) > 1 else 0
            if address in names:
                text.append(names[address])
                words = words[2:]
            elif room[0] <= address < room[1]:
                text.append(f"room + {address - room[0]}")
                words = words[2:]
            else:
                text.append(words.pop(0))
        facts = {"grid": list(record.grid), "block": record.block, "shared": record.shared, "stream": record.stream}
        found.append({**facts, "parameters": text})
    return found


def kernels_of(backend: str, anchored: bool, others: bool, precision: int) -> list[Any]:
    """What a call launches, in order, where all heads have one precision: 16 bits or `INT8_FP8`."""
    first = [quantise.survey, quantise.quantise]
    if backend == "triton":
        return [*([] if precision == BF16 else first), block_sparse_forward]
    if precision == BF16:
        return [*([pack_queries] if anchored else []), hopper_forward]
    last = [*([unpack_outputs] if anchored else []), *([hopper_forward] if others else [])]
    return [*first, hopper_eight_forward, *last]


def launch_case(
    cuda: ctypes.CDLL,
    backend: str,
    anchored: bool,
    lse: bool,
    head_dim: int,
    layout: str,
    others: bool = False,
    precision: int = BF16,
) -> dict[str, Any]:
    """What is launched at a first, a second and a third call, and microseconds of later ones."""
    grid, heads, batch = TokenGrid(2, 12, 26), 4, 2
    start, tokens = (7, 7 + grid.tokens + 40) if others else (0, grid.tokens)
    core = random_schedule(
        np.random.default_rng(0), grid, Blocks(128, 128), heads, 0.5, anchored_heads=[1, 3] if anchored else [],
        precisions=[precision] * heads,
    )  # fmt: skip
    bound = ListedSchedule(core).bind("cpu")
    run = load_backend(backend).run
    kernels = kernels_of(backend, anchored, others, precision)
    kept: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    empty = torch.Tensor.new_empty

    def new_empty(*args: Any, **options: Any) -> torch.Tensor:
        made.append(empty(*args, **options))
        return made[-1]

    torch.Tensor.new_empty = new_empty

    def inputs() -> list[torch.Tensor]:
        x = torch.zeros(batch, tokens, 3, heads, head_dim, dtype=torch.bfloat16)
        x = x if layout == "fused" else x.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
        kept.append(x)
        return [x[:, :, part].transpose(1, 2) for part in range(3)]

    def valid() -> torch.Tensor | None:
        return torch.full((batch,), tokens - 3, dtype=torch.int32) if others else None

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[dict[str, Any]]:
        made.clear()
        lengths = valid()
        out, _ = run(q, k, v, bound, 0.125, lse, start, lengths)
        kept.extend((out, *made, *([lengths] if others else [])))
        video = {"video of q": q[:, :, start:], "video of out": out[:, :, start:], "lengths": lengths} if others else {}
        moved = {**video, "q": q, "k": k, "v": v, "out": out, **{f"made {i}": x for i, x in enumerate(made)}}
        room = next((x for x in made if x.dtype == torch.uint8), None)
        at = (0, 0) if room is None else (room.data_ptr(), room.data_ptr() + room.numel())
        names = {x.data_ptr(): name for name, x in moved.items() if x is not room}
        return records(cuda, len(kernels), names, at)

    tensors = inputs()
    for kernel in kernels:
        kernel.device_caches.clear()
        cuda.declare(kernel.fn.__name__.encode(), 0, None)  # of an earlier case
    call(*tensors)
    for kernel in kernels:
        declare(cuda, kernel)
    bound._derived.clear()
    found = {"first": call(*tensors), "again": call(*tensors), "moved": call(*inputs())}
    torch.Tensor.new_empty = empty
    lengths = valid()
    begin = time.perf_counter()
    for _ in range(CALLS):
        run(*tensors, bound, 0.125, lse, start, lengths)
    return {**found, "us": (time.perf_counter() - begin) / CALLS * 1e6, "triton": triton.__version__}


def count_variants(cuda: ctypes.CDLL, backend: str, lengths: list[list[int]], precision: int = BF16) -> int:
    """The most variants of a kernel that are compiled for so many tokens before the video and after it, in turns."""
    grid = TokenGrid(2, 12, 26)
    core = random_schedule(
        np.random.default_rng(0), grid, Blocks(128, 128), 4, 0.5, anchored_heads=[1], precisions=[precision] * 4
    )
    bound, kernels = ListedSchedule(core).bind("cpu"), kernels_of(backend, True, True, precision)
    for kernel in kernels:
        kernel.device_caches.clear()
        cuda.declare(kernel.fn.__name__.encode(), 0, None)  # of an earlier case
    for before, after in lengths:
        x = torch.zeros(1, before + grid.tokens + after, 4, 128, dtype=torch.bfloat16).transpose(1, 2)
        valid = torch.tensor([x.shape[2] - after // 3], dtype=torch.int32)
        load_backend(backend).run(x, x, x, bound, 0.125, False, before, valid)
    return max(len(next(iter(kernel.device_caches.values()))[0]) for kernel in kernels)


if __name__ == "__main__":
    library = pretend_a_gpu()
    asked = json.loads(sys.argv[1])
    programs = {True: count_variants, False: launch_case}
    print(json.dumps([programs["lengths" in case](library, **case) for case in asked]))
