"""Profiles one forward: what it makes the host wait for, and where the device spends its time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

WHOLE = "calibatt_bench.whole"
LONGEST = 6
WAITS = re.compile(
    r"cu(da)?(Stream|Device|Event|Ctx)Synchronize(_ptsz)?"  # asked for
    r"|cudaMemcpy(_ptds)?|cuMemcpy(HtoD|DtoH|DtoD)?(_v2)?(_ptds)?"  # copies that return when they are done
    r"|Memcpy DtoH.*|Memcpy HtoD \(Pageable.*"  # copies that a host can only wait for
)
"""Names of events that mean: the host waited for the device, or had to."""


def traced(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profiles one call that has been warmed up.

    Args:
        call: What to run.
        device: Where.

    Returns:
        ``waits``: events by name that make the host wait for the device, of `WAITS`. ``items``: values read from
        tensors, on the CPU too. ``planned_calls``: calls of planned attention. On a GPU also ``host_ms`` until the call
        returned, ``device_ms`` of all kernels, and the ``longest`` kernels with their milliseconds and launches.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        with record_function(WHOLE):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    return summarised(profiler.events(), on_gpu)


def summarised(events: Any, on_gpu: bool) -> dict[str, Any]:
    """`traced` of the profiler's events: those that began while the call ran; a last wait for the device is none."""
    whole = next(event for event in events if event.name == WHOLE and event.device_type == DeviceType.CPU)
    begin, end = whole.time_range.start, whole.time_range.end
    host = Counter(
        event.name for event in events if event.device_type == DeviceType.CPU and begin <= event.time_range.start <= end
    )
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not _annotation(event)]
    found = host + Counter(event.name for event in kernels)
    report: dict[str, Any] = {
        "waits": {name: count for name, count in sorted(found.items()) if WAITS.fullmatch(name)},
        "items": host["aten::item"],
        "planned_calls": host["calibatt::attend"],
    }
    if on_gpu:
        spent: Counter[str] = Counter()
        for event in kernels:
            spent[event.name] += event.time_range.elapsed_us()
        report |= {
            "host_ms": (end - begin) / 1e3,
            "device_ms": spent.total() / 1e3,
            "longest": [
                {"kernel": name[:120], "ms": us / 1e3, "launches": found[name]}
                for name, us in spent.most_common(LONGEST)
            ],
        }
    return report


def _annotation(event: Any) -> bool:
    """Ranges that the profiler repeats on the device's timeline; they are no work."""
    return event.name == WHOLE or getattr(event, "is_user_annotation", False) or event.name.startswith("##")
