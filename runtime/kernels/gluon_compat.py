"""What differs between the releases of Triton for which the Gluon kernel was compiled: all drift is absorbed here.

Gluon is experimental and changes without notice; which releases are trusted is said in `runtime.backends.hopper`.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def describe(x: torch.Tensor, strides: list[int], tile: list[int], layout: Any) -> TensorDescriptor:
    """TMA descriptor of a tensor in tiles.

    Its fields are set one by one: the checks of its constructor take 10 us, and the caller has made them.
    """
    found = object.__new__(TensorDescriptor)
    found.base, found.shape, found.strides = x, list(x.shape), strides
    found.block_shape, found.layout, found.padding = tile, layout, "zero"
    return found


def launch(kernel: Any, known: dict[Any, Any], key: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """Launches a kernel; from the second time on without asking which variant fits the arguments (100 us).

    Args:
        kernel: The kernel.
        known: Compiled variants by key; grows.
        key: Stands for all that decides which variant fits: types, constants, and whether integers are 1 or multiples
            of 16. Pointers are always to multiples of 16 bytes.
        grid: The launch grid.
        arguments: By name, in the kernel's order, then launch options.
    """
    compiled = known.get(key)
    if compiled is None:
        known[key] = kernel[grid](**arguments)
    else:
        compiled[grid](*[arguments[name] for name in kernel.arg_names])


if hasattr(gl.shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def as_described(buffer, desc):
        """A ``[rows, D]`` shared tile with the leading ones and the layout of its descriptor's tiles."""
        return buffer.reinterpret(desc.dtype, desc.block_type.shape, desc.layout)

else:

    @gluon.jit
    def as_described(buffer, desc):
        """A ``[rows, D]`` shared tile with the leading ones and the layout of its descriptor's tiles."""
        return buffer._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


if hasattr(tma, "async_store"):

    @gluon.jit
    def load_tile(desc, coord, barrier, buffer):
        """Begins to copy what is at `coord` into a shared tile."""
        tma.async_load(desc, coord, barrier, as_described(buffer, desc))

    @gluon.jit
    def store_tile(desc, coord, buffer):
        """Begins to copy a shared tile to `coord`."""
        tma.async_store(desc, coord, as_described(buffer, desc))

else:

    @gluon.jit
    def load_tile(desc, coord, barrier, buffer):
        """Begins to copy what is at `coord` into a shared tile."""
        tma.async_copy_global_to_shared(desc, coord, barrier, as_described(buffer, desc))

    @gluon.jit
    def store_tile(desc, coord, buffer):
        """Begins to copy a shared tile to `coord`."""
        tma.async_copy_shared_to_global(desc, coord, as_described(buffer, desc))
