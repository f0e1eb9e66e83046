"""The time weight, probed: errors are made at one time alone, and the final latent says what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

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


def residual_error(call: Call, other: Tensor) -> float:
    """What another output changes in the residual stream, summed over heads: mean ||dO_h W_h||^2 / mean ||x||^2."""
    heads, _, head_dim = call.out.shape
    slices = call.projection.view(-1, heads, head_dim).permute(1, 2, 0)
    change = other.float() - call.out.float()
    square = sum(float((part @ piece).square().sum(-1).mean()) for part, piece in zip(change, slices, strict=True))
    return square / call.residual_square


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
        layers: bool = False,
    ) -> Probe | None:
        """Replaces every layer's attention at one step by masked attention; all later steps are dense.

        Args:
            name: Of the sample.
            time_index: Of the probe.
            step: The sampler's step of that time; one of those given to the trajectory.
            keep: The masks.
            blocks: Their block sizes.
            adapter: The model's row; found by its class if absent.
            layers: Also disturb each layer alone, for this one step, and compare the latents that leave it.

        Returns:
            The probe (the first also bears the seconds of a dense run made for it alone), or None where the masks
            changed nothing, so that nothing can be said of the time.
        """
        begun = time.perf_counter()

        def disturb(only: int | None) -> tuple[float, Tensor]:
            return self._disturbed(step, keep, blocks, adapter, only)

        injected, final = disturb(None)
        change = _relative_square(final, self.final)
        if not injected or not change:
            return None
        factors: tuple[float, ...] = ()
        if layers:
            dense = self.latents.get(step + 1, self.final)
            alone = [disturb(layer) for layer in range(len(adapter_sites(self.sampler, adapter)))]
            factors = _layer_factors([(error, _relative_square(after, dense)) for error, after in alone])
        seconds, self._unbilled_seconds = time.perf_counter() - begun + self._unbilled_seconds, 0.0
        return Probe(name, time_index, change / injected, injected, change, seconds, factors)

    def _disturbed(
        self, step: int, keep: Keep, blocks: Blocks, adapter: Adapter | None, only: int | None
    ) -> tuple[float, Tensor]:
        """Masks attention at a step, of all layers or of one.

        Returns:
            The error made, relative to the residual stream, summed over layers and heads; and the final latent, or,
            for one layer, the latent that leaves the step.
        """
        count = StepCounter(self.sampler.times)
        injected, forwards = 0.0, 0
        branches: set[tuple[int, int]] = set()

        def on_forward(now: float) -> bool:
            nonlocal forwards
            here = count(now)[0] == step
            forwards += here
            return here

        def on_call(call: Call) -> Tensor | None:
            nonlocal injected
            branches.add((forwards, call.sample))
            if only not in (None, call.layer):
                return None
            other = masked_output(call.q, call.k, call.v, keep(call.layer), blocks)
            injected += residual_error(call, other)
            return other

        def on_step(now: int, latent: Tensor) -> None:
            if only is not None and now == step + 1:
                raise _Reached(latent)

        with listening(self.sampler.transformer, self.sampler.grid, on_forward, on_call, adapter, batches=True):
            try:
                latent = self.sampler.run(self.prompt, self.seed, step, self.latents[step], on_step)
            except _Reached as reached:
                latent = reached.latent
        # Several forwards or samples of a step are branches of guidance, each with errors of its own.
        return injected / max(len(branches), 1), latent


def adapter_sites(sampler: Sampler, adapter: Adapter | None) -> tuple[Site, ...]:
    """The self-attention layers of a sampler's transformer."""
    model = sampler.transformer
    return tuple((adapter or adapter_for(model)).sites(model))


def _relative_square(latent: Tensor, dense: Tensor) -> float:
    dense = dense.to(latent.device).double()
    return float((latent.double() - dense).square().mean() / dense.square().mean())


def _layer_factors(found: list[tuple[float, float]]) -> tuple[float, ...]:
    """What each layer's (error, change) says relative to all of them; none where a layer's masks changed nothing."""
    if not all(error and change for error, change in found):
        return ()
    mean = sum(change for _, change in found) / sum(error for error, _ in found)
    return tuple(change / error / mean for error, change in found)
