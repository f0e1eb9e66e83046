"""What may compute a model's self-attention while it is timed: the model itself, another kernel, a copy, a plan.

A variant is put into the model and taken out again; cross-attention is the model's own in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibatt.compiler.steps import segments
from calibatt.plans import (
    BF16,
    INT8,
    INT8_FP8,
    Blocks,
    EncodedLayer,
    ModelSignature,
    PlanFile,
    StoredLayers,
    TokenGrid,
    encode,
)
from calibatt.runtime import Plan, ops
from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import Interception
from calibatt.tools.bench.peers import dense_peer
from calibatt.tools.bench.schedules import in_precision, structured_schedule

FLASH_4 = "flash-attention-4"
COPY = "copy"
NAMES = {"bf16": BF16, "int8": INT8, "int8_fp8": INT8_FP8}
"""Of precisions of heads."""
DISTINCT = 8
"""Layers of a plan that have masks of their own; the others repeat them, in index arrays of their own."""
SHIFT = 5.0
"""Of the schedulers of large models: how much denser times are near the noise."""


@dataclass(frozen=True)
class Variant:
    """One way to compute self-attention.

    Args:
        name: For people and for the report.
        density: Share of dense work that it executes; 0 computes no attention.
        attached: Puts it into the model; leaving the context takes it out.
        planned: Whether a plan is at work.
    """

    name: str
    density: float
    attached: Callable[[nn.Module], AbstractContextManager[Any]]
    planned: bool = False


def dense(model: Any) -> Variant:
    """The model's own attention by the dense kernel of PyTorch where the model is: cuDNN's on a GPU.

    Where diffusers lets one choose, the model's cross-attention uses that kernel too from here on, in every variant.
    """
    on_gpu = next(model.parameters()).is_cuda
    name = "sdpa-cudnn" if on_gpu else "sdpa"
    if on_gpu and adapter_for(model).dispatch != "dispatch_attention_fn":
        return Variant(name, 1.0, lambda model: _through(model, _cudnn))
    model.set_attention_backend("_native_cudnn" if on_gpu else "native")
    return Variant(name, 1.0, lambda model: nullcontext())


def copied() -> Variant:
    """No attention: the values are copied, so that what remains is everything else."""
    return Variant(COPY, 0.0, lambda model: _through(model, _copy))


def flash_attention_4(device: torch.device) -> Variant | str:
    """FlashAttention-4, dense; or why it is not available here."""
    if device.type != "cuda":
        return "FlashAttention-4 needs a CUDA device"
    few = torch.zeros(1, 1, 128, 128, dtype=torch.bfloat16, device=device)
    found = dense_peer(FLASH_4, few, few, few)
    return found if isinstance(found, str) else Variant(FLASH_4, 1.0, lambda model: _through(model, _flash_4))


def planned(plan: Plan, density: float) -> Variant:
    """A plan at work.

    Args:
        plan: For the models that it will be attached to.
        density: Its name in the report; the executed density is the plan's.
    """
    layers = [packed for _, _, packed in plan.file.walk()]
    executed = [packed.density for packed in layers]
    names = {name for name, precision in NAMES.items() if precision in layers[0].head_precision} - {"bf16"}
    return Variant(
        " ".join([f"plan {density:g}", *sorted(names)]), sum(executed) / len(executed), plan.attach, planned=True
    )


def plan_shaped(
    signature: ModelSignature,
    grid: TokenGrid,
    blocks: Blocks,
    density: float,
    steps: int,
    masks: int = DISTINCT,
    precision: int = BF16,
) -> PlanFile:
    """A plan of `kernel.structured_schedule`'s masks, every head listed, with a segment for each step of a sampling.

    Args:
        signature: The model it is for.
        grid: The token sequence.
        blocks: Block sizes.
        density: Share of key blocks kept, mean over a layer's tiles.
        steps: Of the sampling.
        masks: Layers with masks of their own at most.
        precision: Of all heads; one of `plans.PRECISIONS`.
    """
    made: list[EncodedLayer] = []
    for seed in range(min(masks, signature.layers)):
        schedule = structured_schedule(grid, blocks, signature.heads, density, seed=seed)
        made.append(encode(in_precision(schedule, precision).core, None))
    # The next segment has the masks of the one before, one layer on: other lists at equal cost.
    stored = [[made[(layer + at) % len(made)] for layer in range(signature.layers)] for at in range(steps)]
    even = [1 - step / steps for step in range(steps)]
    return PlanFile(
        signature=signature,
        grid=grid,
        blocks=blocks,
        segments=segments(sorted(SHIFT * part / (1 + (SHIFT - 1) * part) for part in even)),
        schedules=StoredLayers("", grid, blocks, signature.heads, range(steps), stored),
        notes=f"synthetic structured masks of density {density:g}, for benchmarks of speed",
    )


@contextmanager
def counted_calls() -> Iterator[Callable[[], int]]:
    """Counts the calls of planned attention, in compiled code too: the op runs Python every time."""
    attend, calls = ops.attend, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return attend(*args, **kwargs)

    ops.attend = counting
    try:
        yield lambda: calls
    finally:
        ops.attend = attend


class _Forced:
    """What a step cache takes for its threshold, to skip a fixed share of forwards instead of those that change little.

    Args:
        share: Of the forwards, spread evenly; the first is always computed.
    """

    def __init__(self, share: float) -> None:
        self.share, self.forwards, self.skipped = share, 1, 0

    def __lt__(self, change: float) -> bool:
        """``change > threshold``: whether all blocks are computed; asked once a forward, but for the first."""
        self.forwards += 1
        skip = int(self.share * self.forwards) > self.skipped
        self.skipped += skip
        return not skip


@contextmanager
def step_cache(model: Any, share: float) -> Iterator[Callable[[], int]]:
    """FirstBlockCache of diffusers on a model, made to skip all blocks but the first in a share of the forwards.

    With random weights its own rule would skip by chance. What it computes for that rule is computed all the same.

    Args:
        model: A transformer of diffusers of two blocks or more.
        share: Below 1; 0: no cache.

    Returns:
        How many forwards it has skipped.
    """
    if not share:
        yield lambda: 0
        return
    from diffusers import FirstBlockCacheConfig  # not needed by the commands beside this one

    forced: Any = _Forced(share)
    model.enable_cache(FirstBlockCacheConfig(threshold=forced))
    try:
        with model.cache_context("sampling"):
            yield lambda: forced.skipped
    finally:
        model.disable_cache()


def _through(model: nn.Module, attend: Callable[..., Tensor]) -> Interception:
    return Interception(model, adapter_for(model), attend)


@torch.library.custom_op("calibatt_bench::copy", mutates_args=())
def copy_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A copy of v ``(B, N, H, D)``; an op, so that no compiler finds out that q and k are not needed."""
    return v.new_empty(v.shape).copy_(v)


@torch.library.custom_op("calibatt_bench::flash_attention_4", mutates_args=())
def run_flash_4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of q, k, v ``(B, N, H, D)`` by FlashAttention-4."""
    return _by_peer(FLASH_4, q, k, v)


@torch.library.custom_op("calibatt_bench::cudnn", mutates_args=())
def run_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of q, k, v ``(B, N, H, D)`` by cuDNN."""
    return _by_peer("sdpa-cudnn", q, k, v)


def _by_peer(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    run = dense_peer(name, *(x.transpose(1, 2) for x in (q, k, v)))
    assert not isinstance(run, str), run
    return run().transpose(1, 2).contiguous()


@copy_values.register_fake
@run_flash_4.register_fake
@run_cudnn.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


def _copy(q: Tensor, k: Tensor, v: Tensor, site: Any, context: Any) -> Tensor:
    return torch.ops.calibatt_bench.copy(q, k, v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, site: Any, context: Any) -> Tensor:
    return torch.ops.calibatt_bench.cudnn(q, k, v)


def _flash_4(q: Tensor, k: Tensor, v: Tensor, site: Any, context: Any) -> Tensor:
    return torch.ops.calibatt_bench.flash_attention_4(q, k, v)
