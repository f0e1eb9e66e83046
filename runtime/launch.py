"""Launches kernels again without Triton's overhead, and knows what TMA requires of tensors."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime import driver

KNOWN_RELEASES = ("3.6.0", "3.9.0")
"""Of Triton, whose call of the driver `Launches` makes itself: the tests compare it with Triton's own under both."""
ALIGNED_BYTES = 16
"""Of addresses and strides that TMA takes, and that Triton tells apart when it compiles."""
MOST_MAPS = 1024
"""How many TMA descriptors of each kind are cached, of 128 bytes each."""
MOST_KINDS = 256
"""How many kinds of TMA descriptors are cached: every length of a sequence has its own."""
MOST_LAYOUTS = 64
"""For how many layouts of q, k and v the launches of one schedule are cached."""
MOST_PLACES = 16
"""For how many sets of addresses the arguments of these are cached."""
ROOM_ALIGNED_BYTES = 256
ARRIVALS = 4
"""How many counters there are before those of `kernels.quantise`, which are then aligned."""
ZERO_PADDING = 0
"""TMA reads 0 beyond the ends of a tensor."""

_NOTHING = nullcontext()


def is_known_release(version: str = triton.__version__) -> bool:
    """Whether `Launches` may be used with a release of Triton."""
    return version.split("+")[0] in KNOWN_RELEASES


@dataclass(frozen=True, eq=False)
class Moving:
    """An argument that is elsewhere at every call.

    Args:
        value: A tensor or a TMA descriptor.
        base: Which of `BASES` it is in.
        offset: Where in there, in bytes; with that, all addresses are multiples of 16.
    """

    value: Any
    base: str
    offset: int = 0

    def view(self, x: torch.Tensor) -> Moving:
        """A view of this tensor."""
        return Moving(x, self.base, self.offset + x.data_ptr() - self.value.data_ptr())

    def described(self, value: Any) -> Moving:
        """A TMA descriptor of this tensor."""
        return Moving(value, self.base, self.offset)


class Given(NamedTuple):
    """What the launches of a call read and write besides what stays where it is and the room.

    Args:
        q: ``(B, H, N, D)``.
        k: As q.
        v: As q.
        out: As q.
        counters: int32, 0 before and after: the first one for tiles, those from `ARRIVALS` on for `kernels.quantise`,
            two for each head of a sample.
        lse: fp32 ``(B, H, N)``, or absent.
        lengths: int32 ``(B,)``, or absent.
    """

    q: Moving
    k: Moving
    v: Moving
    out: Moving
    counters: Moving
    lse: Moving | None
    lengths: Moving | None

    @classmethod
    def of(cls, *tensors: torch.Tensor | None) -> Given:
        """Tensors in this order."""
        return cls(*(None if x is None else Moving(x, name) for name, x in zip(cls._fields, tensors, strict=True)))  # type: ignore[arg-type]


BASES = (*Given._fields, "room")
"""What is elsewhere at every call. Absent ones have the address 0."""


def make_room(like: torch.Tensor, arrays: dict[str, tuple[Sequence[int], torch.dtype]]) -> dict[str, Moving]:
    """Arrays that follow each other in one piece of memory, on the device of a tensor.

    Args:
        like: The tensor.
        arrays: Name, shape and dtype of each.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in arrays.values()]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ROOM_ALIGNED_BYTES) * ROOM_ALIGNED_BYTES)
    memory = like.new_empty(starts[-1], dtype=torch.uint8)
    return {
        name: Moving(memory[start : start + size].view(dtype).view(tuple(shape)), "room", start)
        for (name, (shape, dtype)), start, size in zip(arrays.items(), starts, sizes, strict=False)
    }


@dataclass(frozen=True, eq=False)
class Call:
    """A launch to be made.

    Args:
        kernel: The kernel.
        grid: The launch grid.
        arguments: By name, in the kernel's order, launch options included. Tensors must stay where they are, unless
            they are `Moving`.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]

    def launch(self) -> Any:
        """Launches by Triton; returns the compiled kernel."""
        values = self.arguments.items()
        plain = {name: value.value if isinstance(value, Moving) else value for name, value in values}
        return self.kernel[self.grid](**plain)


class Launches:
    """Launches that Triton has made once, to be made again at other addresses.

    Triton's own launch asks which variant fits the arguments, describes tensors and looks every pointer up: 50 to 100
    us. These do what remains, without Triton's launch hooks (a profiler's).

    Args:
        calls: What to launch, in order; it is launched.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._launches = [_Launch(call) for call in calls]
        self._made: dict[tuple[int, ...], list[tuple[Callable[..., None], tuple[Any, ...]]]] = {}
        moving = (value for call in calls for value in call.arguments.values() if isinstance(value, Moving))
        in_room = (each for each in moving if each.base == "room")
        self.room_bytes = max((each.offset + _nbytes(each.value) for each in in_room), default=0)
        """What the arrays in the room take."""

    def __call__(self, *places: int) -> None:
        """Launches on a stream of the current device: `places` are the stream and the addresses of `BASES`."""
        made = self._made.get(places)
        if made is None:
            made = [launch.at(places[0], places[1:]) for launch in self._launches]
            keep(self._made, places, made, MOST_PLACES)
        for function, arguments in made:
            function(*arguments)


class _Launch:
    """One of `Launches`."""

    def __init__(self, call: Call) -> None:
        self._compiled = compiled = call.launch()  # Triton 3.9 unloads a kernel that nobody holds
        self._raw = _raw_launch(compiled, call.grid)
        self._arguments: list[Any] = []
        self._moving: list[tuple[int, int, int, _TensorMaps | None]] = []
        described = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        for name in call.kernel.arg_names:
            value, place, maps = call.arguments[name], len(self._arguments), None
            plain = value.value if isinstance(value, Moving) else value
            if hasattr(plain, "block_shape"):  # a TMA descriptor, Triton's or Gluon's
                shape, strides = tuple(plain.shape), tuple(plain.strides)
                maps = _tensor_maps(_map_facts(next(described), shape, strides))
                self._arguments += [None, *shape, *strides]
            else:
                self._arguments.append(plain.data_ptr() if isinstance(plain, torch.Tensor) else plain)
            if isinstance(value, Moving):
                self._moving.append((place, BASES.index(value.base), value.offset, maps))

    def at(self, stream: int, addresses: tuple[int, ...]) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """What to call, and with which arguments, on a stream and where `BASES` are at these addresses."""
        arguments = self._arguments.copy()
        for place, base, offset, maps in self._moving:
            address = addresses[base] + offset
            arguments[place] = address if maps is None else maps[address]
        return self._raw(stream, arguments)


def _nbytes(value: Any) -> int:
    return int(value.nbytes if isinstance(value, torch.Tensor) else value.base.nbytes)


def run_again(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | None,
    return_lse: bool,
    made: dict[Any, Launches],
    facts: tuple[Any, ...],
    calls: Callable[[Given], list[Call]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by launches that are made again where tensors of this layout were seen before; what TMA cannot address
    is copied first.

    Args:
        q: ``(B, H, N, D)``, as k and v.
        k: As q.
        v: As q.
        lengths: int32 ``(B,)``, or absent.
        return_lse: Whether lse is asked for.
        made: What was launched for the schedule.
        facts: What else decides about the launches.
        calls: What to launch.

    Returns:
        out: ``(B, H, N, D)``, laid out in memory as q.
        lse: fp32 ``(B, H, N)`` if asked for.
    """
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr()
    lengths = addressable_lengths(lengths)
    layout = (*layout_of(q, k, v, addresses), lengths is None, return_lse, *facts)
    launches = made.get(layout)
    if launches is None:
        fit = addressable(q), addressable(k), addressable(v)
        if any(one is not other for one, other in zip(fit, (q, k, v), strict=True)):
            return run_again(*fit, lengths, return_lse, made, facts, calls)
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if return_lse else None
    index = q.get_device()
    with on_device(index):
        if launches is not None:
            stream = driver.active.get_current_stream(index)
            counters = _counters(q, stream)
            room = q.new_empty(launches.room_bytes, dtype=torch.uint8) if launches.room_bytes else None
            more = (x.data_ptr() if x is not None else 0 for x in (out, counters, lse, lengths, room))
            launches(stream, *addresses, *more)
            return out, lse
        interpreted = triton.knobs.runtime.interpret
        counters = _counters(q, 0 if interpreted else driver.active.get_current_stream(index))
        first = calls(Given.of(q, k, v, out, counters, lse, lengths))
        if is_known_release() and not interpreted:
            keep(made, layout, Launches(first), MOST_LAYOUTS)
        else:
            for call in first:
                call.launch()
    return out, lse


_counters_of: dict[tuple[torch.device, int], torch.Tensor] = {}
"""One array for each stream of each device."""


def _counters(q: torch.Tensor, stream: int) -> torch.Tensor:
    """Where the programs of a launch count, int32; 0 before and after.

    Launches on one stream follow each other and share them. A CUDA graph, which may be replayed on any stream, has its
    own for every call, and sets them itself.
    """
    key, least = (q.device, stream), ARRIVALS + 2 * q.shape[0] * q.shape[1]
    if stream and torch.cuda.is_current_stream_capturing():
        return torch.zeros(least, dtype=torch.int32, device=q.device)
    counters = _counters_of.get(key)
    if counters is None or counters.numel() < least:
        counters = _counters_of[key] = torch.zeros(least, dtype=torch.int32, device=q.device)
    return counters


class _TensorMaps(dict[int, Any]):
    """The TMA descriptors of one kind, by address: values that nothing else decides.

    Models attend at few addresses, over and over.
    """

    def __init__(self, facts: tuple[Any, ...]) -> None:
        super().__init__()
        self._facts = facts

    def __missing__(self, address: int) -> Any:
        if len(self) >= MOST_MAPS:
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


def _raw_launch(compiled: Any, grid: tuple[int, int, int]) -> Callable[[int, list[Any]], tuple[Any, tuple[Any, ...]]]:
    """What Triton calls in the end, of ``(stream, arguments)``, and with what: integers for pointers, descriptors
    encoded.
    """
    run, function, meta = compiled.run, compiled.function, compiled.packed_metadata
    if run.global_scratch_size or run.profile_scratch_size:
        raise RuntimeError(f"{compiled.name} must need no scratch memory, got a variant that does")
    utils = driver.active.utils
    if hasattr(utils, "launch"):
        tail = (run.arg_annotations, run.kernel_signature)
        head = (function, run.launch_cooperative_grid, run.launch_pdl, meta, None, None, None, None, None, *tail)
        return lambda stream, arguments: (utils.launch, (*grid, stream, *head, arguments))
    raw = run.launch
    if inspect.isfunction(raw):  # describes tensors, then calls the one that is wanted
        raw = inspect.getclosurevars(raw).nonlocals["launcher"]
    head = (function, run.launch_cooperative_grid, run.launch_pdl, None, None, meta, None, None, None)
    return lambda stream, arguments: (raw, (*grid, stream, *head, *arguments))


def keep(made: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Caches a value; if there are too many, the others are dropped."""
    if len(made) >= most:  # several threads may add at once
        made.clear()
    made[key] = value


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
