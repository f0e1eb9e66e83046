"""What differs in Gluon between the releases of Triton for which the kernel was compiled: all drift is absorbed here.

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
    """TMA descriptor of a tensor in tiles."""
    return TensorDescriptor(x, list(x.shape), strides, tile, layout)


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
