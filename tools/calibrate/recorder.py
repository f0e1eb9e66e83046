"""Records samples into a store, one (time, layer) at a time, while the model computes what it always does."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from calibatt.compiler.stats import Manifest, StoreWriter, UnitStatistics
from calibatt.runtime.adapters import Adapter, adapter_for
from calibatt.tools.calibrate.listen import Call, ListenError, listening
from calibatt.tools.calibrate.sampler import OnStep, Sampler

UNITS_AHEAD = 2
"""Units that wait in memory to be written while the model goes on."""
TIME_TOLERANCE = 1e-3
"""How far the time that a forward receives may be from the sampler's: timesteps are rounded to a thousandth."""


class Measure(Protocol):
    """`calibatt.tools.calibrate.statistics.unit_statistics`, or what stands in for it in a test."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        *,
        manifest: Manifest,
        projection: Tensor,
        residual_square: float,
        seed: int,
    ) -> UnitStatistics: ...


def nearest_step(times: Sequence[float], wanted: float) -> int:
    """The step whose time is nearest; of two, the noisier."""
    return min(range(len(times)), key=lambda step: abs(times[step] - wanted))


def recorded_steps(manifest: Manifest, times: Sequence[float]) -> tuple[int, ...]:
    """The sampler's step nearest to each of the manifest's times.

    Raises:
        ListenError: Two times share a step: the schedule is too coarse.
    """
    steps = tuple(nearest_step(times, wanted) for wanted in manifest.times)
    if len(set(steps)) < len(steps):
        shared = [wanted for wanted, step in zip(manifest.times, steps, strict=True) if steps.count(step) > 1]
        raise ListenError(f"each recorded time must have a step of its own, got {len(times)} steps for times {shared}")
    return steps


class StepCounter:
    """Which step a forward belongs to, by its time, and which of the step's forwards it is (0 first)."""

    def __init__(self, times: Sequence[float]) -> None:
        self._times = times
        self._seen = [0] * len(times)

    def __call__(self, now: float) -> tuple[int, int]:
        """Step and number of the next forward.

        Raises:
            ListenError: No step has this time.
        """
        step = nearest_step(self._times, now)
        if abs(self._times[step] - now) > TIME_TOLERANCE:
            raise ListenError(f"a forward's time must be one of the sampler's {len(self._times)}, got {now}")
        self._seen[step] += 1
        return step, self._seen[step] - 1


def sample_name(prompt: str, seed: int, branch: int = 0) -> str:
    """A name that only this prompt, seed and branch have, so that stores made apart merge by copying."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=6).hexdigest()
    return f"{digest}-s{seed}" + (f"-b{branch}" if branch else "")


class Recorder:
    """Records samples of one sampler.

    Args:
        sampler: What to run.
        manifest: What to measure; its times must each have a step of their own.
        measure: Computes the statistics of one call.
        adapter: The model's row; found by its class if absent.
        on_unit: Called after every unit.

    Raises:
        ListenError: The manifest is of another model or grid, or two of its times share a step.
    """

    def __init__(
        self,
        sampler: Sampler,
        manifest: Manifest,
        measure: Measure,
        *,
        adapter: Adapter | None = None,
        on_unit: Callable[[], None] = lambda: None,
    ) -> None:
        self.sampler = sampler
        self.manifest = manifest
        self.adapter = adapter or adapter_for(sampler.transformer)
        self.steps = recorded_steps(manifest, sampler.times)
        """The step at which each of the manifest's times is recorded."""
        self._measure = measure
        self._on_unit = on_unit
        if (signature := self.adapter.signature(sampler.transformer)) != manifest.model:
            raise ListenError(f"the manifest must be of {signature}, got {manifest.model}")
        if sampler.grid != manifest.grid:
            raise ListenError(f"the manifest must be of {sampler.grid}, got {manifest.grid}")

    def record(
        self,
        writer: StoreWriter,
        prompt: str,
        seed: int,
        *,
        branch: int = 0,
        on_step: OnStep | None = None,
        **meta: Any,
    ) -> Tensor:
        """Samples a prompt and records it; an exception leaves an interrupted sample that counts for nothing.

        Args:
            writer: Of a store of this manifest.
            prompt: What to sample.
            seed: Of the noise.
            branch: Which of a step's forwards is recorded: with guidance in two forwards, each is a sample of its own.
            on_step: Handed to the sampler.
            meta: More to keep of the sample; JSON values.

        Returns:
            The final latent, just as without recording.

        Raises:
            ListenError: A forward is not as the manifest says, or a recorded step has no such branch.
            StoreError: The store cannot take the sample.
        """
        name = sample_name(prompt, seed, branch)
        sample = writer.begin(name)
        count = StepCounter(self.sampler.times)
        begun = time.perf_counter()
        written = [0] * len(self.steps)
        writes: list[Future[int]] = []
        here = 0

        def on_forward(now: float) -> bool:
            nonlocal here
            step, number = count(now)
            here = self.steps.index(step) if step in self.steps else -1
            return here >= 0 and number == branch

        def on_call(call: Call) -> None:
            unit = self._measure(
                call.q,
                call.k,
                call.v,
                call.out,
                manifest=self.manifest,
                projection=call.projection,
                residual_square=call.residual_square,
                seed=zlib.crc32(f"{name}/{here}/{call.layer}".encode()),
            )
            if len(writes) >= UNITS_AHEAD:
                writes.pop(0).result()
            writes.append(files.submit(sample.write, here, call.layer, unit))
            written[here] += 1
            self._on_unit()

        with (
            ThreadPoolExecutor(1) as files,
            listening(self.sampler.transformer, self.manifest.grid, on_forward, on_call, self.adapter),
        ):
            final = self.sampler.run(prompt, seed, on_step=on_step)
            for write in writes:
                write.result()
        if absent := [self.manifest.times[index] for index, units in enumerate(written) if not units]:
            raise ListenError(f"every recorded step must have a forward {branch}, got none at times {absent}")
        known = {"prompt": prompt, "seed": seed, "branch": branch, "steps": len(self.sampler.times)}
        sample.finish({**known, "seconds": time.perf_counter() - begun, **meta})
        return final
