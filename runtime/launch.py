"""Launches a kernel again without Triton's overhead, and knows what TMA requires of tensors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from triton.runtime import driver

KNOWN_RELEASES = ("3.6.0", "3.9.0")
"""Of Triton, whose call of the driver `Launch` makes itself: the tests compare it with Triton's own under both."""
ALIGNED_BYTES = 16
"""Of addresses and strides that TMA takes, and that Triton tells apart when it compiles."""
MOST_MAPS = 1024
"""How many TMA descriptors of each kind are cached, of 128 bytes each."""
MOST_KINDS = 256
"""How many kinds of TMA descriptors are cached: every length of a sequence has its own."""
MOST_LAYOUTS = 64
"""How many launches of one schedule are cached."""
ZERO_PADDING = 0
"""TMA reads 0 beyond the ends of a tensor."""

_NOTHING = nullcontext()


def is_known_release(version: str = triton.__version__) -> bool:
    """Whether `Launch` may be used with a release of Triton."""
    return version.split("+")[0] in KNOWN_RELEASES


class Launch:
    """A launch that Triton has made once, to be made again at other addresses.

    Triton's own launch asks which variant fits the arguments, describes tensors and looks every pointer up: 50 to 100
    us. This one does what remains, without Triton's launch hooks (a profiler's).

    Args:
        kernel: The kernel; it is launched.
        grid: The launch grid.
        arguments: By name, in the kernel's order, then launch options. Tensors must stay where they are, unless they
            are moving.
        moving: Names of the tensors and descriptors whose addresses are passed at every launch: always multiples of 16.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], moving: list[str]) -> None:
        self._compiled = kernel[grid](**arguments)
        self._launch = _raw_launch(self._compiled, grid)
        self._arguments: list[Any] = []
        described = iter(getattr(self._compiled.metadata, "tensordesc_meta", None) or ())
        places: dict[str, tuple[int, _TensorMaps | None]] = {}
        for name in kernel.arg_names:
            value = arguments[name]
            place, maps = len(self._arguments), None
            if hasattr(value, "block_shape"):  # a TMA descriptor, Triton's or Gluon's
                shape, strides = tuple(value.shape), tuple(value.strides)
                maps = _tensor_maps(_map_facts(next(described), shape, strides))
                self._arguments += [None, *shape, *strides]
            else:
                self._arguments.append(value.data_ptr() if isinstance(value, torch.Tensor) else value)
            places[name] = place, maps
        self._moving = [places[name] for name in moving]

    def __call__(self, stream: int, *addresses: int) -> None:
        """Launches on a stream of the current device; `addresses` are those of what moves, in that order."""
        arguments = self._arguments.copy()
        for (place, maps), address in zip(self._moving, addresses, strict=True):
            arguments[place] = address if maps is None else maps[address]
        self._launch(stream, arguments)


class _TensorMaps(dict[int, Any]):
    """The TMA descriptors of one kind, by address: values that nothing else decides.

    Models attend at few addresses, over and over.
    """

    def __init__(self, facts: tuple[Any, ...]) -> None:
        super().__init__()
        self._facts = facts

    def __missing__(self, address: int) -> Any:
        if len(self) == MOST_MAPS:
            self.clear()
        utils = driver.active.utils
        fill = utils.fill_tma_descriptor_tiled if hasattr(utils, "launch") else utils.fill_tma_descriptor
        self[address] = made = fill(address, *self._facts)
        return made


_tensor_maps = functools.lru_cache(MOST_KINDS)(_TensorMaps)
"""One for each kind, which all launches share."""


def _map_facts(meta: dict[str, Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[Any, ...]:
    """All that a TMA descriptor is made of besides the address."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST  # where there is TMA

    kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    return meta["swizzle"], meta["elem_size"], kind, tuple(meta["block_size"]), shape, strides, ZERO_PADDING


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


def keep(launches: dict[Any, Any], layout: Any, launch: Any) -> None:
    """Caches a launch; if there are too many, the others are dropped."""
    if len(launches) == MOST_LAYOUTS:
        launches.clear()
    launches[layout] = launch


def layout_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, addresses: Sequence[int]) -> tuple[Any, ...]:
    """All that decides about a launch for q, k and v, which have one shape, dtype and device, but their addresses.

    Of these only whether they are multiples of `ALIGNED_BYTES`: the last number is 0 if all are.
    """
    q_at, k_at, v_at = addresses
    return q.shape, q.dtype, q.stride(), k.stride(), v.stride(), (q_at | k_at | v_at) % ALIGNED_BYTES


def on_device(index: int) -> AbstractContextManager[object]:
    """Makes a CUDA device the current one, if it is not; nothing for -1, the CPU."""
    if index < 0 or index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(index)


def addressable(x: torch.Tensor) -> torch.Tensor:
    """x itself, or a copy if TMA cannot address it: its start and its strides must be multiples of 16 bytes, not 0, and
    its channels side by side.
    """
    unit = ALIGNED_BYTES // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    together = x.stride(-1) == 1 or x.shape[-1] == 1
    if x.data_ptr() % ALIGNED_BYTES == 0 and together and all(s > 0 and s % unit == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def addressable_lengths(lengths: torch.Tensor | None) -> torch.Tensor | None:
    """Lengths side by side at an address that is a multiple of 16, as all that move."""
    if lengths is None or (lengths.is_contiguous() and lengths.data_ptr() % ALIGNED_BYTES == 0):
        return lengths
    return lengths.clone(memory_format=torch.contiguous_format)


def tile_strides(x: torch.Tensor) -> list[int]:
    """Strides of ``(B, H, N, D)`` for TMA; that of a dimension of one may be any."""
    head_dim = x.shape[3]
    strides = [stride if size > 1 else head_dim for stride, size in zip(x.stride()[:3], x.shape, strict=False)]
    return [*strides, 1]
