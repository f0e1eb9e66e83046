"""Measures, to first order, what each head of a plan does to the final latent, by differentiating dense samplings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from calibatt.compiler.prediction import log_bias
from calibatt.compiler.stats import Manifest
from calibatt.plans import PlanFile
from calibatt.runtime import AttentionSchedule, Plan, planned_attention
from calibatt.tools.calibrate.calibration import Calibrator, Forward, Recording
from calibatt.tools.calibrate.estimate import wants_cpu
from calibatt.tools.calibrate.gradients import AttentionCall
from calibatt.tools.calibrate.journal import Journal
from calibatt.tools.calibrate.listening import listening
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.sums import Moment
from calibatt.tools.evaluate.harness import Floats


@dataclass(frozen=True)
class NoStore:
    """Takes the place of a store where nothing is stored."""

    manifest: Manifest


class PlanRecording(Recording):
    """A sampling in which plans are measured instead of blocks.

    Args:
        calibrator: The calibrator of the sampler.
        plans: Plans for its model.
    """

    def __init__(self, calibrator: Calibrator, plans: Sequence[Plan]) -> None:
        super().__init__(calibrator, Journal(None))
        model, times = calibrator.manifest.model, len(calibrator.manifest.times)
        self.plans = plans
        self.effects = np.zeros((len(plans), calibrator.vectors, times, model.layers, model.heads))
        """Signed effects ``(plans, V, T, L, H)``; those of all forwards of one time are added."""

    def collect(self, forward: Forward, moment: Moment, call: AttentionCall) -> None:
        for index, plan in enumerate(self.plans):
            measured = plan_effects(call, plan.schedule(forward.time, call.layer))
            self.effects[index, :, forward.moment, call.layer] += measured.cpu().numpy()


def plan_effects(call: AttentionCall, schedule: AttentionSchedule) -> Tensor:
    """Signed effects float64 ``(V, H)`` of computing a call by a schedule: the sum over tokens of <g, o' - o>."""
    with torch.no_grad():
        planned = planned_attention(*(x[None] for x in (call.q, call.k, call.v)), schedule, video_start=call.span[0])
    schedule.unbind()
    assert isinstance(planned, Tensor)
    change = planned[0].float() - call.out.float()
    products = [(change * grad.float()).sum((1, 2), dtype=torch.float64) for grad in call.grads]
    return torch.stack(products) / call.scale


def measure_plans(
    sampler: Sampler, plans: Sequence[Plan], prompt: str, seed: int, vectors: int, times: Sequence[float]
) -> Floats:
    """Signed effects of what plans do at some times of one dense sampling.

    Args:
        sampler: The sampler.
        plans: Plans for its model and grid.
        prompt: The prompt to sample.
        seed: Seed of the noise and of the random vectors.
        vectors: How many random vectors, V.
        times: T times of the sampler, ascending.

    Returns:
        float64 ``(plans, V, T, L, H)``.

    Raises:
        CalibrationError, ChainError: The sampling cannot be differentiated, or the plans are of another model or grid.
    """
    manifest = Manifest(plans[0].signature, plans[0].grid, plans[0].blocks, tuple(times), shares=())
    calibrator = Calibrator(sampler, NoStore(manifest), vectors=vectors)  # type: ignore[arg-type]
    calibrator.keep_inputs(on_cpu=wants_cpu(calibrator))
    recording = PlanRecording(calibrator, plans)
    with listening(calibrator.models, recording.hear):
        recording.final = sampler.run(prompt, seed)
    recording.differentiate(seed)
    return recording.effects


def visited(plan: PlanFile, times: Sequence[float]) -> list[int]:
    """The segments that a sampler's times fall into, ascending."""
    return sorted({plan.segment_index(now) for now in times})


def by_segment(plan: PlanFile, effects: Floats, times: Sequence[float]) -> Floats:
    """Effects ``(..., T, L, H)`` at some times, added up over the times of each segment: ``(..., segments, L, H)``."""
    sums = np.zeros((*effects.shape[:-3], len(plan.segments), *effects.shape[-2:]))
    for index, now in enumerate(times):
        sums[..., plan.segment_index(now), :, :] += effects[..., index, :, :]
    return sums


def promised(plan: PlanFile, times: Sequence[float]) -> Floats | None:
    """Squared effects that the plan's header promises, ``(segments, L, H)``; None for a plan that does not say.

    A sampler of few steps skips segments. A step then does the work of several, so the promise of a skipped segment is
    added to that of the nearest segment that the sampler visits.
    """
    values = plan.predicted.get("head_price")
    if values is None:
        return None
    prices = np.array(values, np.float64)
    promise, known = np.zeros_like(prices), visited(plan, times)
    for index, segment in enumerate(plan.segments):
        promise[min(known, key=lambda other: abs(plan.segments[other].time - segment.time))] += prices[index]
    return promise


def first_order_db(effects: Floats) -> Floats:
    """Signal-to-noise of the final latent of each prompt, dB ``(P,)``, from all effects ``(P, V, T, L, H)`` of a plan:
    they are added before they are squared."""
    squared: Floats = (effects.sum((2, 3, 4)) ** 2).mean(1) / log_bias(effects.shape[1])
    return -10 * np.log10(np.maximum(squared, 1e-30))
