"""What a plan costs and saves on the demo model: videos dense and planned, their difference, attention times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from calibatt.runtime import Plan, planned_attention
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import DemoModel, generate
from calibatt.tools.evaluate.harness import attending
from calibatt.tools.evaluate.metrics import latent_db, psnr_db


@dataclass(frozen=True)
class Pair:
    """One held-out prompt, generated twice from the same noise.

    Args:
        prompt: The sentence.
        seed: Of the noise.
        dense: ``(3, F, H, W)`` video of the stock model.
        planned: ``(3, F, H, W)`` video under the plan.
    """

    prompt: str
    seed: int
    dense: Tensor
    planned: Tensor

    @property
    def psnr_db(self) -> float:
        return float(psnr_db(self.planned[None], self.dense[None]))

    @property
    def latent_db(self) -> float:
        """Signal-to-noise of the final latent; this model's latents are videos."""
        return float(latent_db(self.planned[None], self.dense[None]))


def held_out_prompts(count: int, seed: int = 6) -> list[str]:
    """Sentences of scenes that neither training nor calibration ever sees."""
    return [world.sentence(s) for s in world.scenes(count, torch.Generator().manual_seed(seed), test=True)]


def pairs(
    model: DemoModel, plan: Plan, prompts: list[str], first_seed: int, done: Callable[[], None] = lambda: None
) -> list[Pair]:
    """Generates every prompt by the stock model and under the plan, from the same noise.

    Args:
        model: The model.
        plan: A plan for it.
        prompts: What to generate.
        first_seed: Of the noise of the first prompt; +1 for each further one.
        done: Called after each prompt.
    """
    found = []
    for seed, prompt in enumerate(prompts, first_seed):
        dense = generate(model, [prompt], [seed])[0]
        with plan.attach(model.transformer):
            planned = generate(model, [prompt], [seed])[0]
        found.append(Pair(prompt, seed, dense.cpu(), planned.cpu()))
        done()
    return found


def attention_ms(model: DemoModel, plan: Plan, prompt: str, seed: int, repeats: int = 2) -> list[list[list[float]]]:
    """Milliseconds of self-attention on the queries, keys and values of one real generation.

    Every call is run by PyTorch's scaled_dot_product_attention and by the plan, in turn: once each untimed, which warms
    both up, then `repeats` times each. A time is that of the clock until the device is done, launching included.

    Returns:
        [calls in order][dense, planned][repeats]
    """
    device = next(model.parameters()).device
    calls: list[list[list[float]]] = []

    def timed(run: Callable[[], Tensor], into: list[float]) -> Tensor:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        out = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        into.append((time.perf_counter() - began) * 1e3)
        return out

    def attention(q: Tensor, k: Tensor, v: Tensor, layer: int, now: float) -> Tensor:
        schedule = plan.schedule(now, layer)
        times: list[list[float]] = [[], []]
        for _ in range(1 + repeats):
            out = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), times[0])
            timed(lambda: planned_attention(q, k, v, schedule), times[1])
        calls.append([each[1:] for each in times])
        return out

    with attending(model.transformer, attention):
        generate(model, [prompt], [seed])
    return calls


def total_ms(calls: list[list[list[float]]], which: int) -> tuple[float, float]:
    """Sum over calls of the median, and half the spread between the sums of the fastest and the slowest."""
    medians = sum(statistics.median(call[which]) for call in calls)
    spread = (sum(max(call[which]) for call in calls) - sum(min(call[which]) for call in calls)) / 2
    return medians, spread
