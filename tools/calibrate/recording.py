"""Recording from Python: whatever a program generates, as statistics that `calibatt-compile` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from os import PathLike
from pathlib import Path
from typing import Any

from calibatt.compiler.stats import StoreWriter
from calibatt.runtime.adapters import Adapter
from calibatt.tools.calibrate.calibration import Calibrator, Recording
from calibatt.tools.calibrate.chain import Traced
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.work import check_sampler, default_vectors, device_of, make_manifest


@contextmanager
def recording(
    sampler: Sampler,
    path: str | PathLike[str],
    prompt: str,
    seed: int = 0,
    *,
    vectors: int | None = None,
    adapter: Adapter | None = None,
    **options: Any,
) -> Iterator[Recording]:
    """Records one generation into a store while somebody else's code runs it, and differentiates it at the end.

    The model computes what it always does, bit for bit. Its transformer must go once through the sampler's times::

        sampler = PipelineSampler(pipe, num_inference_steps=30, height=480, width=832, num_frames=81)
        with recording(sampler, "stats/", "a boat", seed=1, times=15, block_size=128):
            video = pipe("a boat", num_inference_steps=30, height=480, width=832, num_frames=81).frames

    The final latent is what the pipeline's schedulers return last. Where there is no such scheduler, or the pipeline
    changes latents afterwards, the program sets it: ``with recording(...) as sampling: ...; sampling.final = latent``.

    Args:
        sampler: Describes the generation: its grid, its times and its transformer. It is not run.
        path: The store to create or continue.
        prompt: What is generated; with the seed it names the sampling.
        seed: Seed of the noise.
        vectors: Random vectors of the final latent; `default_vectors` if absent.
        adapter: The model's row; found by its class if absent.
        options: Options of `make_manifest`; the same for all samplings of a store.

    Raises:
        CalibrationError: A forward is not one of the sampler's, or one that must be measured is missing.
        ChainError: The generation cannot be differentiated.
        StoreError: The store has other options, has this sampling, or is in use.
    """
    check_sampler(sampler, adapter)
    manifest = make_manifest(sampler, adapter=adapter, **options)
    count = vectors or default_vectors(sampler.grid, device_of(sampler))
    with StoreWriter.open(Path(path), manifest) as writer:
        calibrator = Calibrator(sampler, writer, vectors=count, adapter=adapter)
        with calibrator.recording(prompt, seed) as sampling:
            with _last_step(getattr(sampler, "pipe", None), sampling):
                yield sampling
        writer.close_units()


@contextmanager
def _last_step(pipe: Any, sampling: Recording) -> Iterator[None]:
    """Takes what the pipeline's schedulers return last as the final latent; sound may have a scheduler of its own."""
    last: dict[int, Traced] = {}

    def watched(kind: type) -> type:
        @wraps(kind.step)  # type: ignore[attr-defined]
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            result = kind.step(scheduler, *args, **kwargs)  # type: ignore[attr-defined]
            values = result if isinstance(result, tuple) else tuple(result.values())
            last.update((id(scheduler), x) for x in values[:1] if isinstance(x, Traced))
            sampling.final = tuple(last.values()) or sampling.final
            return result

        return type(kind.__name__, (kind,), {"step": step})

    named = (getattr(pipe, name, None) for name in ("scheduler", "audio_scheduler"))
    kinds = [(scheduler, type(scheduler)) for scheduler in named if hasattr(scheduler, "step")]
    for scheduler, kind in kinds:
        scheduler.__class__ = watched(kind)
    try:
        yield
    finally:
        for scheduler, kind in kinds:
            scheduler.__class__ = kind
