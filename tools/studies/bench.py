"""Many ways of choosing blocks on one model: what they see while it calibrates, what their masks cost, what comes out.

Everything stays on the device and runs in batches, so that a hundred generations of the demo model take minutes on a
GPU. T steps, L layers, H heads, P calibration samples, Q and K query and key blocks, C candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibatt.plans import Blocks
from calibatt.runtime import Plan, planned_attention
from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.device_schedule import DeviceSchedule
from calibatt.tools.calibrate.effects import block_statistics
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.evaluate.harness import Attention, attending, executed_density
from calibatt.tools.evaluate.metrics import ALWAYS, LATENT
from calibatt.tools.studies import masks
from calibatt.tools.studies.masks import with_top

Work = Sequence[tuple[str, int]]


def nearest(times: Sequence[float], now: float) -> int:
    """The index of the time that is nearest."""
    return min(range(len(times)), key=lambda index: abs(times[index] - now))


class Rule(Protocol):
    """Attention that executes a share of the blocks; see `harness.Attention`."""

    density: float
    """The share executed; of rules that look at the input, over all calls so far."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Moment:
    """One self-attention call of a batch of P calibration samples.

    Args:
        step: Of the sampler.
        layer: Of the model.
        q: ``(P, H, N, D)``.
        k: The same.
        v: The same.
        out: The same, of dense attention.
    """

    step: int
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor

    def reordered(self, order: Tensor | None) -> Moment:
        """The same with the tokens in another order."""
        if order is None:
            return self
        return Moment(self.step, self.layer, *(x[:, :, order] for x in (self.q, self.k, self.v, self.out)))


@dataclass(eq=False)
class Bench:
    """One sampler, what it is judged on, and what its plans are made from.

    Args:
        sampler: The sampler.
        blocks: Block sizes.
        held_out: Prompts to judge on.
        calibration: Prompts to calibrate on.
        batch: Videos generated at a time.
        like: Another bench of the same sampler, prompts and batch, whose dense videos are taken.
    """

    sampler: Sampler
    blocks: Blocks
    held_out: Work
    calibration: Work
    batch: int = 32
    like: Bench | None = None

    def __post_init__(self) -> None:
        self.device = next(self.sampler.transformer.parameters()).device
        self.signature = adapter_for(self.sampler.transformer).signature(self.sampler.transformer)

    @cached_property
    def dense(self) -> list[Tensor]:
        """Final latents of the held-out prompts by the model's own attention."""
        return self.like.dense if self.like else self.latents(self.held_out)

    @property
    def counts(self) -> dict[str, int]:
        """How many prompts it is judged and calibrated on."""
        return {"prompts": len(self.held_out), "calibration": len(self.calibration)}

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, L, H."""
        return len(self.sampler.times), self.signature.layers, self.signature.heads

    def step(self, now: float) -> int:
        """The sampler's step of a time."""
        return nearest(self.sampler.times, now)

    @torch.no_grad()
    def latents(self, work: Work) -> list[Tensor]:
        """Final latents ``(n, ...)`` of prompts and seeds, batch by batch, as the sampler made them."""
        parts = []
        for start in range(0, len(work), self.batch):
            prompts, seeds = zip(*work[start : start + self.batch], strict=True)
            parts.append(self.sampler.run_batch(prompts, seeds))
        return parts

    def judge(self, rule: Rule, *, timed: bool = True) -> dict[str, Any]:
        """Generates every held-out prompt by a rule: each metric against dense attention, and the density.

        Args:
            rule: The rule.
            timed: Also ``attention_ms``, milliseconds of attention a video: of the fastest batch after the first, in
                which kernels are compiled and masks put on the device. A single batch is generated twice.
        """
        works = [self.held_out[start : start + self.batch] for start in range(0, len(self.held_out), self.batch)]
        parts, spent = [], []
        for index, work in enumerate(works + works * (timed and len(works) == 1)):
            timer = _Timed(rule, self.device)
            with attending(self.sampler.transformer, timer):
                found = self.latents(work)
            parts += found if index < len(works) else []
            spent.append(timer.total_ms() / len(work))
        pairs = list(zip(parts, self.dense, strict=True))
        metrics = {LATENT.name: [value for pair in pairs for value in LATENT.measure(*pair).tolist()]}
        videos = [tuple(map(self.sampler.decode, pair)) for pair in pairs]
        metrics |= {m.name: [value for pair in videos for value in m.measure(*pair).tolist()] for m in ALWAYS}
        return {"density": float(rule.density), "attention_ms": min(spent[1:]) if timed else None, **metrics}

    def attention_ms(self, rule: Rule, videos: int, repeats: int = 2) -> float:
        """Attention time of a video by a rule, of the fastest of some batches of so many; the first warms up."""
        spent, work = [], self.held_out[:videos]
        for _ in range(1 + repeats):
            timed = _Timed(rule, self.device)
            with attending(self.sampler.transformer, timed):
                self.latents(work)
            spent.append(timed.total_ms() / len(work))
        return min(spent[1:])

    def calibrate(self, on_moment: Callable[[Moment], None]) -> None:
        """One dense pass over the calibration prompts, every call shown to `on_moment`."""

        def attention(q: Tensor, k: Tensor, v: Tensor, layer: int, now: float) -> Tensor:
            out = F.scaled_dot_product_attention(q, k, v)
            on_moment(Moment(self.step(now), layer, q, k, v, out))
            return out

        with attending(self.sampler.transformer, attention):
            self.latents(self.calibration)


class _Timed:
    """Attention, with the time that its calls take: on a GPU between two events around each, so that a GPU that waits
    for its host counts."""

    def __init__(self, attention: Attention, device: torch.device) -> None:
        self.attention = attention
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[Any, Any]] = []

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, now: float) -> Tensor:
        began = self._now()
        out = self.attention(q, k, v, layer, now)
        self.marks.append((began, self._now()))
        return out

    def total_ms(self) -> float:
        if not self.cuda:
            return sum(end - start for start, end in self.marks)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self.marks)


class Exact:
    """Dense attention by PyTorch, in the dtype in which the block-sparse kernel computes: what rounding alone costs.

    Args:
        kernels: What PyTorch may choose from on a GPU; all if absent.
    """

    density = 1.0

    def __init__(self, *kernels: SDPBackend) -> None:
        self.kernels = list(kernels)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        inputs = [x.to(masks.kernel_dtype(q)) for x in (q, k, v)]
        with sdpa_kernel(self.kernels) if self.kernels and q.is_cuda else nullcontext():
            return F.scaled_dot_product_attention(*inputs).to(q.dtype)


class Planned:
    """A plan, executed as the runtime does it.

    Args:
        bench: The bench.
        plan: The plan.
        backend: Of the runtime on a GPU, or ``auto``.
    """

    def __init__(self, bench: Bench, plan: Plan, backend: str = "triton") -> None:
        self.plan, self.density, self.backend = plan, executed_density(plan, bench.sampler.times), backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        inputs = [x.to(masks.kernel_dtype(q)) for x in (q, k, v)]
        backend = self.backend if q.is_cuda else "torch"
        out = planned_attention(*inputs, self.plan.schedule(time, layer), backend=backend)
        assert isinstance(out, Tensor)
        return out.to(q.dtype)


class Kept:
    """The same masks for every input.

    Args:
        bench: The bench.
        keep: bool ``(T, L, H, Q, K)``, a block in every row.
        order: int64 ``(N,)``, the order of tokens that the masks are of; raster order if absent.
    """

    def __init__(self, bench: Bench, keep: Tensor, order: Tensor | None = None) -> None:
        self.bench, self.keep, self.order = bench, keep, order
        self.density = float(keep.float().mean())
        self.bound: dict[tuple[int, int], DeviceSchedule] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        at = self.bench.step(time), layer
        if at not in self.bound:
            self.bound[at] = masks.bind_mask(self.keep[at], self.bench.sampler.grid, self.bench.blocks)
        if self.order is None:
            return masks.attend(q, k, v, self.bound[at])
        out = masks.attend(*(x[:, :, self.order] for x in (q, k, v)), self.bound[at])
        return torch.empty_like(out).index_copy_(2, self.order, out)


Score = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
"""``score(q, k, v, step, layer)``: ``(B, H, Q, K)`` of q, k, v ``(B, H, N, D)``."""


class PerInput:
    """Masks chosen from each input: the blocks whose score is above a threshold.

    Args:
        bench: The bench.
        score: The score.
        threshold: ``(T, L, H)``.
    """

    def __init__(self, bench: Bench, score: Score, threshold: Tensor) -> None:
        self.bench, self.score, self.threshold = bench, score, threshold
        self.shares: list[Tensor] = []

    @property
    def density(self) -> float:
        return float(torch.cat(self.shares).mean()) if self.shares else float("nan")

    def keep(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        """The masks of a call, bool ``(B, H, Q, K)``; they count in the density, that of each sample alike."""
        step = self.bench.step(time)
        score = self.score(q, k, v, step, layer)
        keep = with_top(score > self.threshold[step, layer][:, None, None], score)
        self.shares.append(keep.float().mean((1, 2, 3)))
        return keep

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        keep = self.keep(q, k, v, layer, time)
        return masks.masked_attention(q, k, v, keep, self.bench.sampler.grid, self.bench.blocks)


class BestOf:
    """For each input and head, the mask of two or more whose output is nearest to the exact one.

    Args:
        bench: The bench.
        keeps: Masks bool ``(H, Q, K)``.
    """

    def __init__(self, bench: Bench, keeps: Sequence[Tensor]) -> None:
        self.bound = [masks.bind_mask(keep, bench.sampler.grid, bench.blocks) for keep in keeps]
        self.density = float(torch.stack(list(keeps)).float().mean())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        dense = Exact()(q, k, v, layer, time)
        outs = torch.stack([masks.attend(q, k, v, bound) for bound in self.bound])
        best = (outs - dense).square().sum((-1, -2)).argmin(0)
        return outs.gather(0, best[None, :, :, None, None].expand(1, *outs.shape[1:]))[0]


def block_mass(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """Mean attention mass of every block, ``(B, H, Q, K)``, of q, k and v ``(B, H, N, D)``."""
    if q.is_cuda:
        q, k, v = (x.to(masks.KERNEL_DTYPE) for x in (q, k, v))
    mass, _ = block_statistics(*(x.flatten(0, 1) for x in (q, k, v)), blocks, 1)
    return mass.unflatten(0, q.shape[:2])


def see(bench: Bench, order: Tensor | None = None) -> Tensor:
    """Block mass ``(T, L, P, H, Q, K)`` in one dense pass over the calibration prompts, tokens in an order."""
    parts: dict[tuple[int, int], list[Tensor]] = {}

    def on_moment(moment: Moment) -> None:
        moment = moment.reordered(order)
        found = block_mass(moment.q, moment.k, moment.v, bench.blocks)
        parts.setdefault((moment.step, moment.layer), []).append(found)

    bench.calibrate(on_moment)
    steps, layers, _ = bench.shape
    return torch.stack([torch.stack([torch.cat(parts[t, layer]) for layer in range(layers)]) for t in range(steps)])
