"""The time weight, probed: errors are made at one time alone, and the final latent says what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from calibatt.compiler.stats import Probe
from calibatt.plans import Blocks
from calibatt.runtime.adapters import Adapter, Site, adapter_for
from calibatt.tools.calibrate.listen import Call, listening
from calibatt.tools.calibrate.recorder import StepCounter
from calibatt.tools.calibrate.sampler import Sampler

Keep = Callable[[int], Tensor]
"""A layer's mask, bool ``(H, Q, K)``."""


def masked_output(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, blocks: Blocks) -> Tensor:
    """Attention over the kept blocks alone, by PyTorch, one query block at a time.

    Args:
        q: ``(H, N, D)``.
        k: ``(H, N, D)``.
        v: ``(H, N, D)``.
        keep: bool ``(H, Q, K)``; every query block keeps a key block.
        blocks: Block sizes.

    Returns:
        ``(H, N, D)`` of q's dtype.
    """
    tokens, keep = q.shape[1], keep.to(q.device)
    parts = []
    for block, start in enumerate(range(0, tokens, blocks.block_q)):
        mask = keep[:, block].repeat_interleave(blocks.block_k, 1)[:, None, :tokens]
        part = torch.nn.functional.scaled_dot_product_attention(
            q[None, :, start : start + blocks.block_q], k[None], v[None], attn_mask=mask[None]
        )
        parts.append(part[0])
    return torch.cat(parts, 1)


def residual_errors(call: Call, other: Tensor) -> Tensor:
    """What another output changes in the residual stream, ``(H,)``: mean ||dO_h W_h||^2 / mean ||x||^2."""
    heads, _, head_dim = call.out.shape
    slices = call.projection.view(-1, heads, head_dim).permute(1, 2, 0)
    change = other.float() - call.out.float()
    square = [(part @ piece).square().sum(-1).mean() for part, piece in zip(change, slices, strict=True)]
    return torch.stack(square) / call.residual_square


def residual_error(call: Call, other: Tensor) -> float:
    """The same, summed over heads."""
    return float(residual_errors(call, other).double().sum())


STEP, FINAL = "step", "final"
"""How far what one layer or head did is followed: to the latent that leaves the step, or to the end."""


class _Reached(Exception):
    """The latent that was wanted; the rest of the run is not."""

    def __init__(self, latent: Tensor) -> None:
        super().__init__()
        self.latent = latent


class Trajectory:
    """One dense run of a sample: its final latent, and the latents from which probes start.

    Args:
        sampler: What to run.
        prompt: Of the sample.
        seed: Of the sample.
        steps: Steps that will be probed; the latents that enter them and leave them are kept, on the CPU.
        run: ``run(on_step=...)`` samples it and returns the final latent; the sampler's own run if absent.
    """

    def __init__(
        self,
        sampler: Sampler,
        prompt: str,
        seed: int,
        steps: Iterable[int],
        run: Callable[..., Tensor] | None = None,
    ) -> None:
        wanted = {step + more for step in steps for more in (0, 1)}
        self.sampler = sampler
        self.prompt = prompt
        self.seed = seed
        self.latents: dict[int, Tensor] = {}

        def on_step(step: int, latent: Tensor) -> None:
            if step in wanted:
                self.latents[step] = latent.detach().to("cpu", copy=True)

        begun = time.perf_counter()
        self.final = run(on_step=on_step) if run else sampler.run(prompt, seed, on_step=on_step)
        self._unbilled_seconds = 0.0 if run else time.perf_counter() - begun

    def probe(
        self,
        name: str,
        time_index: int,
        step: int,
        keep: Keep,
        blocks: Blocks,
        adapter: Adapter | None = None,
        *,
        layers: str | None = None,
        heads: str | None = None,
    ) -> Probe | None:
        """Replaces every layer's attention at one step by masked attention; all later steps are dense.

        Args:
            name: Of the sample.
            time_index: Of the probe.
            step: The sampler's step of that time; one of those given to the trajectory.
            keep: The masks.
            blocks: Their block sizes.
            adapter: The model's row; found by its class if absent.
            layers: Also disturb each layer alone, and follow that to `STEP` or `FINAL`.
            heads: The same with each head alone. Heads followed to the end say what layers would: those are not then.

        Returns:
            The probe (the first also bears the seconds of a dense run made for it alone), or None where the masks
            changed nothing, so that nothing can be said of the time.
        """
        begun = time.perf_counter()
        errors: list[Tensor] = []

        def mask(call: Call, branch: int) -> Tensor:
            other = masked_output(call.q, call.k, call.v, keep(call.layer), blocks)
            errors.append(residual_errors(call, other))
            return other

        final, branches = self._disturbed(step, adapter, FINAL, mask)
        injected = float(torch.stack(errors).double().sum()) / branches if errors else 0.0
        change = self._change(final, step, FINAL)
        if not injected or not change:
            return None
        found: dict[str, Any] = {}
        if layers or heads:
            found = self._by_part(step, keep, blocks, adapter, None if heads == FINAL else layers, heads)
        seconds, self._unbilled_seconds = time.perf_counter() - begun + self._unbilled_seconds, 0.0
        return Probe(name, time_index, change / injected, injected, change, seconds, **found)

    def _by_part(
        self, step: int, keep: Keep, blocks: Blocks, adapter: Adapter | None, layers: str | None, heads: str | None
    ) -> dict[str, Any]:
        """What a probe says of layers and heads alone."""
        by_layer: list[tuple[float, float]] = []
        by_head: list[list[tuple[float, float]]] = []
        for layer in range(len(adapter_sites(self.sampler, adapter))):
            masked = _Masked(layer, keep(layer), blocks)
            if layers:
                latent, branches = self._disturbed(step, adapter, layers, masked.whole)
                by_layer.append((float(masked.errors.sum()) / branches, self._change(latent, step, layers)))
            for head in range(self._heads(adapter)) if heads else ():
                masked.only = head
                latent, branches = self._disturbed(step, adapter, heads, masked.part)
                by_head += [[]] if head == 0 else []
                by_head[-1].append((float(masked.errors[head]) / branches, self._change(latent, step, heads)))
        found: dict[str, Any] = {}
        if layers == STEP:
            found["layer_factors"] = _layer_factors(by_layer)
        elif layers:
            found["layer_weights"] = tuple(_ratio(change, error) for error, change in by_layer)
        if heads == STEP:
            every = [pair for row in by_head for pair in row]
            mean = _ratio(sum(change for _, change in every), sum(error for error, _ in every)) or 1.0
            found["head_factors"] = tuple(
                tuple(_ratio(change, error * mean) for error, change in row) for row in by_head
            )
        elif heads:
            found["head_weights"] = tuple(tuple(_ratio(change, error) for error, change in row) for row in by_head)
        return found

    def _heads(self, adapter: Adapter | None) -> int:
        model = self.sampler.transformer
        return (adapter or adapter_for(model)).signature(model).heads

    def _change(self, latent: Tensor, step: int, reach: str) -> float:
        dense = self.final if reach == FINAL else self.latents.get(step + 1, self.final)
        return _relative_square(latent, dense)

    def _disturbed(
        self, step: int, adapter: Adapter | None, reach: str, other: Callable[[Call, int], Tensor | None]
    ) -> tuple[Tensor, int]:
        """Replaces attention at one step.

        Args:
            step: Which.
            adapter: The model's row.
            reach: Follow it to `STEP` or `FINAL`.
            other: ``other(call, branch)`` stands in for a call's output, or None; branches of guidance (`Call.branch`)
                have errors of their own.

        Returns:
            The latent reached, and the number of branches.
        """
        count = StepCounter(self.sampler.times)
        forwards = 0
        branches: set[int] = set()

        def on_forward(now: float) -> bool:
            nonlocal forwards
            here = count(now)[0] == step
            forwards += here
            return here

        def on_step(now: int, latent: Tensor) -> None:
            if reach == STEP and now == step + 1:
                raise _Reached(latent)

        def on_call(call: Call) -> Tensor | None:
            branch = call.branch(forwards - 1)
            branches.add(branch)
            return other(call, branch)

        with listening(self.sampler.transformer, self.sampler.grid, on_forward, on_call, adapter, batches=True):
            try:
                latent = self.sampler.run(self.prompt, self.seed, step, self.latents[step], on_step)
            except _Reached as reached:
                latent = reached.latent
        return latent, max(len(branches), 1)


class _Masked:
    """The masked output of one layer, computed once for every branch of a step: what enters the layer is always dense.

    Args:
        layer: Which.
        keep: Its masks.
        blocks: Their block sizes.
    """

    def __init__(self, layer: int, keep: Tensor, blocks: Blocks) -> None:
        self.layer, self.keep, self.blocks = layer, keep, blocks
        self.only = 0
        """The head that `part` replaces."""
        self.made: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def errors(self) -> Tensor:
        """Errors of the heads ``(H,)``, summed over branches."""
        return torch.stack([errors for _, errors in self.made.values()]).double().sum(0)

    def whole(self, call: Call, branch: int) -> Tensor | None:
        """All heads masked."""
        if call.layer != self.layer:
            return None
        if branch not in self.made:
            other = masked_output(call.q, call.k, call.v, self.keep, self.blocks)
            self.made[branch] = other, residual_errors(call, other)
        return self.made[branch][0]

    def part(self, call: Call, branch: int) -> Tensor | None:
        """One head masked."""
        other = self.whole(call, branch)
        if other is None:
            return None
        out = call.out.clone()
        out[self.only] = other[self.only]
        return out


def adapter_sites(sampler: Sampler, adapter: Adapter | None) -> tuple[Site, ...]:
    """The self-attention layers of a sampler's transformer."""
    model = sampler.transformer
    return tuple((adapter or adapter_for(model)).sites(model))


def _relative_square(latent: Tensor, dense: Tensor) -> float:
    dense = dense.to(latent.device).double()
    return float((latent.double() - dense).square().mean() / dense.square().mean())


def _ratio(change: float, error: float) -> float:
    """0 where nothing was changed or no error made: nothing can be said."""
    return change / error if change > 0 and error > 0 else 0.0


def _layer_factors(found: list[tuple[float, float]]) -> tuple[float, ...]:
    """What each layer's (error, change) says relative to all of them; none where a layer's masks changed nothing."""
    if not all(error and change for error, change in found):
        return ()
    mean = sum(change for _, change in found) / sum(error for error, _ in found)
    return tuple(change / error / mean for error, change in found)
