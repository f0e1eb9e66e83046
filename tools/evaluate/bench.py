"""Many ways of choosing blocks on one model: what they see while it calibrates, what their masks cost, what comes out.

Everything stays on the device and runs in batches, so that a hundred generations of the demo model take minutes on a
GPU. T steps, L layers, H heads, P calibration samples, Q and K query and key blocks, C candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from calibatt.compiler.budget import choose
from calibatt.plans import Blocks
from calibatt.runtime import Plan
from calibatt.runtime.adapters import Arguments, adapter_for
from calibatt.runtime.intercept import InterceptedSite, Interception
from calibatt.runtime.schedule import DeviceSchedule
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.statistics import block_statistics, projection_factor
from calibatt.tools.evaluate import masks
from calibatt.tools.evaluate.harness import Attention, attending, executed_density
from calibatt.tools.evaluate.masks import with_top
from calibatt.tools.evaluate.metrics import ALWAYS

Work = Sequence[tuple[str, int]]


class Rule(Protocol):
    """Attention that executes a share of the blocks; see `harness.Attention`."""

    density: float
    """The share executed; of rules that look at the input, over all calls so far."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Moment:
    """One self-attention call of all calibration samples.

    Args:
        step: Of the sampler.
        layer: Of the model.
        q: ``(P, H, N, D)``.
        k: The same.
        v: The same.
        out: The same, what the model's own attention returns.
        factor: float32 ``(H, D, D)`` of `projection_factor`.
        square: float32 ``(P,)``, mean over tokens of the squared norm of the residual stream.
    """

    step: int
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    factor: Tensor
    square: Tensor

    def reordered(self, order: Tensor | None) -> Moment:
        """The same with the tokens in another order."""
        if order is None:
            return self
        tensors = (x[:, :, order] for x in (self.q, self.k, self.v, self.out))
        return Moment(self.step, self.layer, *tensors, self.factor, self.square)


@dataclass(eq=False)
class Bench:
    """One sampler, what it is judged on, and what its plans are made from.

    Args:
        sampler: The sampler.
        blocks: Block sizes.
        held_out: Prompts to judge on.
        calibration: Prompts to calibrate on; one batch.
        weight: float32 ``(T, L)`` or ``(T, L, H)``, what an error costs at each step, layer and head; it becomes the
            latter.
        batch: Videos generated at a time.
    """

    sampler: Sampler
    blocks: Blocks
    held_out: Work
    calibration: Work
    weight: Tensor
    batch: int = 32
    dense: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.device = next(self.sampler.transformer.parameters()).device
        self.adapter = adapter_for(self.sampler.transformer)
        self.signature = self.adapter.signature(self.sampler.transformer)
        weight = self.weight if self.weight.ndim == 3 else self.weight[..., None]
        self.weight = weight.to(self.device).expand(self.shape)
        self.dense = self.videos(self.held_out)

    @property
    def shape(self) -> tuple[int, int, int]:
        """T, L, H."""
        return len(self.sampler.times), self.signature.layers, self.signature.heads

    def step(self, now: float) -> int:
        """The sampler's step of a time."""
        return min(range(len(self.sampler.times)), key=lambda index: abs(self.sampler.times[index] - now))

    @torch.no_grad()
    def videos(self, work: Work) -> Tensor:
        """Videos ``(n, 3, F, H, W)`` of prompts and seeds."""
        parts = []
        for start in range(0, len(work), self.batch):
            prompts, seeds = zip(*work[start : start + self.batch], strict=True)
            parts.append(self.sampler.decode(self.sampler.run_batch(prompts, seeds)))
        return torch.cat(parts)

    def judge(self, rule: Rule) -> dict[str, Any]:
        """Generates every held-out prompt by a rule: each metric against the dense video, density, and the attention
        time of a video of the fastest batch (the first one of a rule may compile kernels)."""
        parts, spent = [], []
        for start in range(0, len(self.held_out), self.batch):
            work = self.held_out[start : start + self.batch]
            timed = _Timed(rule, self.device)
            with attending(self.sampler.transformer, timed):
                parts.append(self.videos(work))
            spent.append(timed.total_ms() / len(work))
        videos = torch.cat(parts)
        found = {metric.name: metric.measure(videos, self.dense).tolist() for metric in ALWAYS}
        return {"density": float(rule.density), "attention_ms": min(spent), **found}

    @contextmanager
    def observing(self, on_moment: Callable[[Moment], None]) -> Iterator[None]:
        """Shows every call to `on_moment`, and lets the model compute what it always does."""
        heads, dim = self.signature.heads, self.signature.head_dim
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def enter_block(site: InterceptedSite, arguments: Arguments) -> None:
            residual, gate = self.adapter.residual(arguments), self.adapter.gate(site.block, arguments)
            if gate.ndim != 2:
                raise ValueError(f"all tokens must have one time, got gates of shape {tuple(gate.shape)}")
            if self.adapter.output_norm is not None:
                raise ValueError(
                    f"attention must be added as it is, got {self.adapter.architecture}, which normalises it"
                )
            projection = gate[0].float()[:, None] * self.adapter.output_weight(site).float()
            square = residual.float().square().sum(-1).mean(1)
            seen[site.layer] = projection_factor(projection, heads, dim), square

        def attend(q: Tensor, k: Tensor, v: Tensor, site: InterceptedSite, now: float) -> Tensor:
            out = site.stock(q, k, v)
            tensors = (x.transpose(1, 2) for x in (q, k, v, out))
            on_moment(Moment(self.step(now), site.layer, *tensors, *seen.pop(site.layer)))
            return out

        model = self.sampler.transformer
        interception = Interception(
            model, self.adapter, attend, begin=lambda a: float(self.adapter.time(a)), enter_block=enter_block
        )
        try:
            with torch.no_grad():
                yield
        finally:
            interception.detach()

    def calibrate(self, on_moment: Callable[[Moment], None]) -> dict[int, Tensor]:
        """One dense pass over the calibration prompts; the latents that enter each step, and the final one at T."""
        latents: dict[int, Tensor] = {}
        prompts, seeds = zip(*self.calibration, strict=True)
        with self.observing(on_moment):
            last = self.sampler.run_batch(prompts, seeds, on_step=lambda step, x: latents.__setitem__(step, x.clone()))
        latents[len(self.sampler.times)] = last
        return latents


class _Timed:
    """Attention, with the device time that its calls take."""

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
    """Dense attention by PyTorch, in the dtype in which the block-sparse kernel computes: half of the floor."""

    density = 1.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        dtype = masks.KERNEL_DTYPE if q.is_cuda else q.dtype
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype)).to(q.dtype)


class Planned:
    """A plan, executed by the kernel for the device."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.plan, self.density = plan, executed_density(plan, bench.sampler.times)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        with self.plan.schedule(time, layer).bind(q.device).lowered() as bound:
            return masks.attend(q, k, v, bound)


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
        return float(torch.stack(self.shares).mean()) if self.shares else float("nan")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
        step = self.bench.step(time)
        score = self.score(q, k, v, step, layer)
        keep = with_top(score > self.threshold[step, layer][:, None, None], score)
        self.shares.append(keep.float().mean())
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


def statistics(q: Tensor, k: Tensor, values: Tensor, blocks: Blocks, stride: int = 1) -> tuple[Tensor, Tensor]:
    """Block mass and block error ``(B, H, Q, K)`` of q, k and values ``(B, H, N, D)``; see `block_statistics`."""
    if q.is_cuda:
        from calibatt.tools.calibrate.kernels import block_statistics as measure

        q, k, values = (x.to(masks.KERNEL_DTYPE) for x in (q, k, values))
    else:
        measure = block_statistics
    batch = q.shape[:2]
    folded = (x.reshape(-1, *x.shape[2:]) for x in (q, k, values))
    return tuple(x.unflatten(0, batch) for x in measure(*folded, blocks, stride))


def projected(v: Tensor, factor: Tensor) -> Tensor:
    """Values behind the output projection, centred: what `block_statistics` wants."""
    behind = v.float() @ factor
    return behind - behind.mean(2, keepdim=True)


@dataclass(frozen=True, eq=False)
class Seen:
    """What calibration saw: block mass, and block error relative to the residual stream, ``(T, L, P, H, Q, K)``;
    the factors and squares of `Moment` by step and layer; latents by step, the final one at T."""

    mass: Tensor
    error: Tensor
    factor: dict[tuple[int, int], Tensor]
    square: dict[tuple[int, int], Tensor]
    latents: dict[int, Tensor]


def see(bench: Bench, order: Tensor | None = None) -> Seen:
    """One dense pass over the calibration prompts."""
    steps, layers, heads = bench.shape
    tokens = bench.sampler.grid.tokens
    sizes = bench.blocks.q_blocks(tokens), bench.blocks.k_blocks(tokens)
    mass = torch.zeros(steps, layers, len(bench.calibration), heads, *sizes, device=bench.device)
    error = torch.zeros_like(mass)
    factor: dict[tuple[int, int], Tensor] = {}
    square: dict[tuple[int, int], Tensor] = {}

    def on_moment(moment: Moment) -> None:
        moment = moment.reordered(order)
        at = moment.step, moment.layer
        factor[at], square[at] = moment.factor, moment.square
        mass[at], lost = statistics(moment.q, moment.k, projected(moment.v, moment.factor), bench.blocks)
        error[at] = lost / moment.square[:, None, None, None]

    return Seen(mass, error, factor, square, bench.calibrate(on_moment))


def quantile_threshold(scores: Tensor, share: float) -> Tensor:
    """The threshold above which `share` of the scores lie, ``()``; nothing is dropped at a share of 1."""
    flat = scores.flatten().sort(descending=True).values
    if share >= 1:
        return flat[-1] - 1
    at = max(1, round(share * len(flat)))
    return (flat[at - 1] + flat[min(at, len(flat) - 1)]) / 2


def head_thresholds(scores: Tensor, shares: Sequence[float]) -> Tensor:
    """For each head the thresholds above which shares of its scores lie.

    Args:
        scores: ``(T, L, ..., H, Q, K)``; what stands between L and H counts as more scores of the head.
        shares: Ascending.

    Returns:
        ``(C, T, L, H)``.
    """
    flat = scores.movedim(-3, 2).flatten(3).sort(-1, descending=True).values
    count = flat.shape[-1]
    found = []
    for share in shares:
        at = max(1, round(share * count))
        middle = (flat[..., at - 1] + flat[..., min(at, count - 1)]) / 2
        found.append(flat[..., -1] - 1 if share >= 1 else middle)
    return torch.stack(found)


@dataclass(frozen=True, eq=False)
class Measured:
    """Candidates of every head, measured on the calibration prompts: squared error relative to the residual stream and
    density, both ``(C, T, L, H)``."""

    error: Tensor
    density: Tensor

    @classmethod
    def joined(cls, several: Sequence[Measured]) -> Measured:
        return cls(torch.cat([one.error for one in several]), torch.cat([one.density for one in several]))


Candidates = Callable[[Moment], Tensor]
"""Masks at a moment: bool ``(C, H, Q, K)``, or ``(C, P, H, Q, K)`` where they depend on the input."""


def measure(bench: Bench, candidates: Candidates, count: int, order: Tensor | None = None) -> Measured:
    """Executes every candidate on dense trajectories of the calibration prompts: exact output errors."""
    error = torch.zeros(count, *bench.shape, device=bench.device)
    density = torch.zeros_like(error)

    def on_moment(moment: Moment) -> None:
        moment = moment.reordered(order)
        keep = candidates(moment)
        for index, one in enumerate(keep):
            inputs = moment.q, moment.k, moment.v
            if one.ndim == 3:
                out = masks.attend(*inputs, masks.bind_mask(one, bench.sampler.grid, bench.blocks))
            else:
                out = masks.masked_attention(*inputs, one, bench.sampler.grid, bench.blocks)
            change = ((out - moment.out).float() @ moment.factor).square().sum(-1).mean(-1)
            at = index, moment.step, moment.layer
            error[at] = (change / moment.square[:, None]).mean(0)
            density[at] = one.float().mean((-1, -2)).view(-1, one.shape[-3]).mean(0)

    bench.calibrate(on_moment)
    return Measured(error, density)


def budgeted(found: Measured, weight: Tensor, density: float) -> Tensor:
    """The compiler's own choice under one budget: candidates ``(T, L, H)`` of least error times weight.

    Args:
        found: The candidates.
        weight: ``(T, L)``, or ``(T, L, H)``.
        density: Most blocks computed, as a share of dense attention.
    """
    heads = weight if weight.ndim == 3 else weight[..., None]
    loss, use = (
        x.flatten(1).T.double().cpu().numpy() for x in (found.error * heads.to(found.error.device), found.density)
    )
    choice = choose(np.ascontiguousarray(loss), np.ascontiguousarray(use), density * loss.shape[0])
    if choice is None:
        least = float(use.min(1).mean())
        raise ValueError(f"density must be at least what the candidates can keep, {least:.3f}, got {density}")
    return torch.from_numpy(choice.pick).view(found.error.shape[1:]).to(found.error.device)


def probe_weights(bench: Bench, seen: Seen, keep: Tensor, by_head: bool = False) -> Tensor:
    """What an error costs, probed on every calibration prompt: attention is masked at one step and layer or head alone.

    Args:
        bench: The bench.
        seen: Of the same prompts, in raster order.
        keep: bool ``(T, L, H, Q, K)``, the masks that make the errors.
        by_head: Mask one head at a time.

    Returns:
        ``(T, L, P)``, or ``(T, L, H, P)``: relative squared error of the final latent / error made.
    """
    steps, layers, heads = bench.shape
    prompts, seeds = zip(*bench.calibration, strict=True)
    final = seen.latents[steps]
    size = final.flatten(1).square().mean(1)
    found = torch.zeros(steps, layers, heads if by_head else 1, len(prompts), device=bench.device)
    for step in range(steps):
        for layer in range(layers):
            bound = masks.bind_mask(keep[step, layer], bench.sampler.grid, bench.blocks)
            for part in range(found.shape[2]):
                made: list[Tensor] = []

                def attention(
                    q: Tensor,
                    k: Tensor,
                    v: Tensor,
                    at: int,
                    now: float,
                    here: tuple[int, int] = (step, layer),
                    bound: DeviceSchedule = bound,
                    part: int = part,
                    made: list[Tensor] = made,
                ) -> Tensor:
                    out = F.scaled_dot_product_attention(q, k, v)
                    if (bench.step(now), at) != here:
                        return out
                    other = masks.attend(q, k, v, bound)
                    if by_head:
                        other = torch.cat([out[:, :part], other[:, part : part + 1], out[:, part + 1 :]], 1)
                    change = ((other - out).float() @ seen.factor[here]).square().sum(-1).mean(-1)
                    made.append(change.sum(1) / seen.square[here])
                    return other

                with attending(bench.sampler.transformer, attention):
                    after = bench.sampler.run_batch(prompts, seeds, step, seen.latents[step])
                moved = (after - final).flatten(1).square().mean(1) / size
                found[step, layer, part] = moved / made[0].clamp(min=1e-20)
    return found if by_head else found[:, :, 0]
