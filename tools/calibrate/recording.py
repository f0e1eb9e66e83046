"""Recording from Python: whatever a program generates, as statistics that `calibatt-compile` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from calibatt.compiler.stats import StoreWriter
from calibatt.tools.calibrate.__main__ import make_manifest, pick_branches
from calibatt.tools.calibrate.recorder import Recorder
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.statistics import unit_statistics


@contextmanager
def recording(
    sampler: Sampler,
    path: str | PathLike[str],
    prompt: str,
    seed: int = 0,
    *,
    branches: int | None = None,
    **options: Any,
) -> Iterator[None]:
    """Records one generation into a store while somebody else's code runs it.

    The model computes what it always does, bit for bit. Its transformer must go once through the sampler's times::

        sampler = PipelineSampler(pipe, num_inference_steps=30, height=480, width=832, num_frames=81)
        with recording(sampler, "stats/", "a boat", seed=1, times=15, block_size=128):
            video = pipe("a boat", num_inference_steps=30, height=480, width=832, num_frames=81).frames

    Args:
        sampler: Says the grid and the times of the generation, and which transformer is meant; it is not run.
        path: The store to create or continue.
        prompt: What is generated; with the seed it names the sample.
        seed: Of the noise.
        branches: Branches of guidance to record, each as a sample of its own; all that the sampler knows if absent.
        options: Of `make_manifest`; the same for all of a store.

    Raises:
        ListenError: A forward is not one of the sampler's, or some that must be recorded did not come.
        StoreError: The store has other options, has this sample, or is in use.
    """
    manifest = make_manifest(sampler, **options)
    recorder, count = Recorder(sampler, manifest, unit_statistics), pick_branches(sampler, branches)
    with StoreWriter.open(Path(path), manifest) as writer:
        with recorder.recording(writer, prompt, seed, branches=range(count)):
            yield
