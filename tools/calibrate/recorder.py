"""Records samples into a store, one (time, layer) at a time, while the model computes what it always does."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
        branches: Sequence[int] | None = None,
        on_step: OnStep | None = None,
        **meta: Any,
    ) -> Tensor:
        """Samples a prompt and records it; an exception leaves interrupted samples that count for nothing.

        Args:
            writer: Of a store of this manifest.
            prompt: What to sample.
            seed: Of the noise.
            branch: Which branch of guidance to record, if it is one.
            branches: Which branches to record, as of `recording`.
            on_step: Handed to the sampler.
            meta: More to keep of the sample; JSON values.

        Returns:
            The final latent, just as without recording.

        Raises:
            ListenError, StoreError: As of `recording`.
        """
        branches = (branch,) if branches is None else branches
        with self.recording(writer, prompt, seed, branches=branches, **meta):
            return self.sampler.run(prompt, seed, on_step=on_step)

    @contextmanager
    def recording(
        self, writer: StoreWriter, prompt: str, seed: int, *, branches: Sequence[int] = (0,), **meta: Any
    ) -> Iterator[None]:
        """Records the sampling that happens inside, whoever runs it: the model computes what it always does.

        Args:
            writer: Of a store of this manifest.
            prompt: What is sampled; with the seed it names the sample.
            seed: Of the noise.
            branches: Which branches of guidance are recorded, each as a sample of its own: the samples of a step's
                forwards, numbered through; two forwards, or one of a batch of two, have 0 and 1.
            meta: More to keep of the samples; JSON values.

        Raises:
            ListenError: A forward is not as the manifest says, or a recorded step has no such branch.
            StoreError: The store cannot take the samples.
        """
        names = {branch: sample_name(prompt, seed, branch) for branch in branches}
        samples = {branch: writer.begin(name) for branch, name in names.items()}
        count = StepCounter(self.sampler.times)
        begun = time.perf_counter()
        written = {branch: [0] * len(self.steps) for branch in branches}
        writes: list[Future[int]] = []
        here = forward = 0

        def on_forward(now: float) -> bool:
            nonlocal here, forward
            step, forward = count(now)
            here = self.steps.index(step) if step in self.steps else -1
            return here >= 0 and forward <= max(branches)

        def on_call(call: Call) -> None:
            branch = call.branch(forward)
            if branch not in samples:
                return
            unit = self._measure(
                call.q,
                call.k,
                call.v,
                call.out,
                manifest=self.manifest,
                projection=call.projection,
                residual_square=call.residual_square,
                seed=zlib.crc32(f"{names[branch]}/{here}/{call.layer}".encode()),
            )
            if len(writes) >= UNITS_AHEAD:
                writes.pop(0).result()
            writes.append(files.submit(samples[branch].write, here, call.layer, unit))
            written[branch][here] += 1
            self._on_unit()

        model, grid = self.sampler.transformer, self.manifest.grid
        with (
            ThreadPoolExecutor(1) as files,
            listening(model, grid, on_forward, on_call, self.adapter, batches=True),
        ):
            yield
            for write in writes:
                write.result()
        for branch, counts in written.items():
            if absent := [self.manifest.times[index] for index, units in enumerate(counts) if not units]:
                raise ListenError(f"every recorded step must have a forward {branch}, got none at times {absent}")
        known = {"prompt": prompt, "seed": seed, "steps": len(self.sampler.times)}
        for branch, sample in samples.items():
            sample.finish({**known, "branch": branch, "seconds": time.perf_counter() - begun, **meta})
