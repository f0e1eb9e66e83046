"""What differs between the releases of Triton for which the Gluon kernel was compiled: all drift is absorbed here.

Gluon is experimental and changes without notice; which releases are trusted is said in `runtime.backends.hopper`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

MOST_MAPS = 1024
"""TMA descriptors that are kept, of 128 bytes each."""
ZERO_PADDING = 0
"""TMA reads 0 beyond the ends of a tensor."""


def describe(x: torch.Tensor, strides: list[int], tile: list[int], layout: Any) -> TensorDescriptor:
    """TMA descriptor of a tensor in tiles."""
    return TensorDescriptor(x, list(x.shape), strides, tile, layout)


class Launch:
    """A launch that Triton has made once, to be made again at other addresses.

    Triton's own launch asks which variant fits the arguments, describes tensors and looks every pointer up: 100 us.
    This one does what remains, without Triton's launch hooks (a profiler's).

    Args:
        kernel: The kernel; it is launched.
        grid: The launch grid.
        arguments: By name, in the kernel's order, then launch options. Tensors must stay where they are, unless they
            are moving.
        moving: Names of the tensors and descriptors whose addresses are told at every launch: always multiples of 16.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], moving: list[str]) -> None:
        self._compiled = kernel[grid](**arguments)
        self._launch = _raw_launch(self._compiled, grid)
        self._arguments: list[Any] = []
        described = iter(getattr(self._compiled.metadata, "tensordesc_meta", None) or ())
        places: dict[str, tuple[int, tuple[Any, ...] | None]] = {}
        for name in kernel.arg_names:
            value = arguments[name]
            place, facts = len(self._arguments), None
            if isinstance(value, TensorDescriptor):
                shape, strides = tuple(value.shape), tuple(value.strides)
                facts = _map_facts(next(described), shape, strides)
                self._arguments += [None, *shape, *strides]
            else:
                self._arguments.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
            places[name] = place, facts
        self._moving = [places[name] for name in moving]

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launches on a stream of the current device; `addresses` are those of what moves, in that order."""
        arguments = self._arguments.copy()
        for (place, facts), address in zip(self._moving, addresses, strict=True):
            arguments[place] = address if facts is None else _tensor_map(address, facts)
        self._launch(stream, arguments)


def _map_facts(meta: dict[str, Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Any, ...]:
    """All that a TMA descriptor is made of besides the address."""
    kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    return meta["swizzle"], meta["elem_size"], kind, tuple(meta["block_size"]), shape, strides, ZERO_PADDING


@functools.lru_cache(maxsize=MOST_MAPS)
def _tensor_map(address: int, facts: tuple[Any, ...]) -> Any:
    """A TMA descriptor: a value, which only its arguments decide. Models attend at few addresses, over and over."""
    utils = driver.active.utils
    fill = utils.fill_tma_descriptor_tiled if hasattr(utils, "launch") else utils.fill_tma_descriptor
    return fill(address, *facts)


def _raw_launch(compiled: Any, grid: tuple[int, int, int]) -> Callable[[int, list[Any]], None]:
    """What Triton calls in the end, as ``launch(stream, arguments)``: integers for pointers, descriptors encoded."""
    run, function, meta = compiled.run, compiled.function, compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size:
        raise RuntimeError(f"{compiled.name} must need no scratch memory, got a variant that does")
    utils = driver.active.utils
    if hasattr(utils, "launch"):
        raw, tail = utils.launch, (run.arg_annotations, run.kernel_signature)
        head = (function, run.launch_cooperative_grid, run.launch_pdl, meta, None, None, None, None, None, *tail)

        def launch(stream: int, arguments: list[Any]) -> None:
            raw(*grid, stream, *head, arguments)
    else:
        raw = run.launch
        if inspect.isfunction(raw):  # describes tensors, then calls the one that is wanted
            raw = inspect.getclosurevars(raw).nonlocals["launcher"]
        head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, meta, None, None, None)

        def launch(stream: int, arguments: list[Any]) -> None:
            raw(*grid, stream, *head, *arguments)

    return launch


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
