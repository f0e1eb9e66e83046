"""Measures samplings into a store: each is recorded as it runs, then differentiated, last step first.

A journal stores every forward of both halves, so that a job that was killed loses only the step in progress.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from calibatt.compiler.stats import Manifest, SampleExists, SamplingTables, StoreWriter, window_keep
from calibatt.compiler.stats.codes import MOST
from calibatt.runtime.adapters import Adapter
from calibatt.tools.calibrate.attention import kernel_name
from calibatt.tools.calibrate.chain import Chain, ChainError, Cotangents, Given, Traced, floating, plain, replaced
from calibatt.tools.calibrate.gradients import AttentionCall, Transformer
from calibatt.tools.calibrate.journal import Journal
from calibatt.tools.calibrate.listening import listening
from calibatt.tools.calibrate.sampler import Latent, Sampler, parts, transformers_of
from calibatt.tools.calibrate.sums import LayerSums, Moment, table_of, tables_of

TIME_TOLERANCE = 1e-3
"""How far the time that a forward receives may be from the manifest's: timesteps are rounded to a thousandth."""
BACKWARD_COST = 5.0
"""About how many forwards the backward part of one takes; used by the progress bar only."""

OnProgress = Callable[[float], None]
"""Called with the work done since the last call, in forwards."""


class CalibrationError(ValueError):
    """A sampling differs from what the manifest says should be measured."""


def sampling_name(prompt: str, seed: int) -> str:
    """A name that only this prompt and seed have, so that stores made apart can be compiled together."""
    return f"{hashlib.blake2b(prompt.encode(), digest_size=6).hexdigest()}-s{seed}"


@dataclass(eq=False)
class Forward:
    """One forward of a transformer in a sampling.

    Args:
        number: Counted over all transformers.
        transformer: The transformer that is called.
        given: Its arguments.
        versions: How often each argument had been changed in place; a later change would corrupt the derivatives.
        time: Its denoising time.
        moment: Index of the manifest's time at which it is measured; None if it is not measured.
        autocast: Device type, dtype, and whether it ran under `torch.autocast`.
    """

    number: int
    transformer: Transformer
    given: Given
    versions: list[int]
    time: float
    moment: int | None
    autocast: tuple[str, torch.dtype, bool]


class Calibrator:
    """Measures samplings of one sampler.

    Args:
        sampler: What to run.
        writer: Writes the store.
        vectors: Random vectors of the final latent for each sampling.
        inputs_on_cpu: Keep what enters the blocks of a forward on the CPU.
        adapter: The model's row; found by its class if absent.
        on_progress: Called with the work done since the last call, in forwards.

    Raises:
        CalibrationError: The manifest is of another model or grid.
    """

    def __init__(
        self,
        sampler: Sampler,
        writer: StoreWriter,
        *,
        vectors: int = 1,
        inputs_on_cpu: bool = False,
        adapter: Adapter | None = None,
        on_progress: OnProgress = lambda work: None,
    ) -> None:
        self.sampler, self.writer, self.vectors = sampler, writer, vectors
        self.manifest: Manifest = writer.manifest
        self.on_progress = on_progress
        rows = transformers_of(sampler, adapter)
        self.models = [Transformer(model, row, inputs_on_cpu=inputs_on_cpu) for model, row in rows.items()]
        """All transformers of the sampling, the measured one first."""
        self.transformer = self.models[0]
        if (signature := self.transformer.adapter.signature(sampler.transformer)) != self.manifest.model:
            raise CalibrationError(f"the manifest must be of {signature}, got {self.manifest.model}")
        if sampler.grid != self.manifest.grid:
            raise CalibrationError(f"the manifest must be of {sampler.grid}, got {self.manifest.grid}")
        self.windows = [
            window_keep(window, self.manifest.grid, self.manifest.blocks) for window in self.manifest.windows
        ]

    def calibrate(self, prompt: str, seed: int, **meta: Any) -> Latent:
        """Measures one prompt, or continues one that was interrupted.

        Args:
            prompt: What to sample.
            seed: Seed of the noise and of the random vectors.
            meta: More facts to store with the sampling; JSON values.

        Returns:
            The final latent, just as without measuring.

        Raises:
            CalibrationError, ChainError: It cannot be measured.
            StoreError: The store cannot take it.
        """
        with self.recording(prompt, seed, **meta) as recording:
            recording.final = self.sampler.run(prompt, seed)
        latents = tuple(map(plain, parts(recording.final)))
        return latents[0] if len(latents) == 1 else latents

    @contextmanager
    def recording(self, prompt: str, seed: int, **meta: Any) -> Iterator[Recording]:
        """Records the sampling that happens inside, whoever runs it, and measures it afterwards.

        The caller puts the final latent into ``recording.final``, as it comes out of the sampling. Of a video with
        sound that is both latents: the mean of what each loses, relative to its own size, is measured.

        Raises:
            CalibrationError, ChainError: It cannot be measured.
            StoreError: The store cannot take it.
        """
        name = sampling_name(prompt, seed)
        if name in self.writer.done():
            raise SampleExists(f"sampling {name!r} must be measured once, got it again for {self.writer.path}")
        journal = Journal(self.writer.progress_folder(name))
        journal.begin({"vectors": self.vectors})
        recording = Recording(self, journal)
        begun = time.perf_counter()
        with listening(self.models, recording.hear):
            yield recording
        if recording.final is None:
            raise CalibrationError("a recorded sampling must give its final latent, got none")
        tables = recording.measure(name, seed)
        known = {"prompt": prompt, "seed": seed, "vectors": self.vectors, "forwards": len(recording.forwards)}
        known["times"] = [float(now) for now in self.sampler.times]  # of all steps: some may not be measured
        seconds = recording.journal.seconds + time.perf_counter() - begun
        self.writer.finish(name, tables, {**known, "seconds": seconds, **meta})
        self.writer.drop_progress(name)

    def rehearse(self, prompt: str, seed: int, forwards: int) -> tuple[tuple[float, float], str]:
        """Seconds that a forward takes, and that its differentiation with all measurements takes; nothing is stored.

        Args:
            prompt: The prompt of the sampling that is begun.
            seed: Seed of the noise.
            forwards: How many forwards to run; the last one is timed.

        Returns:
            Both numbers of seconds, and the library whose attention kernels computed.

        Raises:
            CalibrationError, ChainError: The model cannot be measured.
        """
        recording = Recording(self, Journal(None), forwards)
        with suppress(_EnoughError), listening(self.models, recording.hear):
            self.sampler.run(prompt, seed)
        return recording.rehearse()

    def moment(self, now: float) -> int | None:
        """Index of the manifest's time at which a step is measured; None if another step is nearer to it."""
        times = self.manifest.times
        nearest = min(range(len(times)), key=lambda index: abs(times[index] - now))
        apart = abs(times[nearest] - now)
        closer = any(abs(step - now) < apart for step in self.sampler.times)
        return nearest if apart <= TIME_TOLERANCE and not closer else None

    def keep_inputs(self, *, on_cpu: bool) -> None:
        """Sets, for all transformers, where the inputs of blocks wait for the backward."""
        for each in self.models:
            each.inputs_on_cpu = on_cpu


class _EnoughError(Exception):
    """Ends a sampling after enough forwards."""


class Recording:
    """One sampling, while it runs and while it is measured; see `Calibrator.recording`.

    Args:
        calibrator: The calibrator that measures it.
        journal: Stores what has been done of it.
        most: Most forwards of the measured transformer: the sampling is ended after them. All are run if absent.
    """

    def __init__(self, calibrator: Calibrator, journal: Journal, most: int | None = None) -> None:
        self.calibrator, self.journal = calibrator, journal
        self._most, self._seconds, self._kernels = most, 0.0, ""
        self.final: Latent | None = None
        self.forwards: list[Forward] = []
        self._chain = Chain()
        self._moments: dict[int, Moment] = {}
        self._name = ""
        self._tables: dict[int, dict[str, np.ndarray]] = {}
        self._returned: dict[Transformer, Any] = {}
        """What the last computed forward of each transformer returned: stored outputs are given back in this form."""

    def hear(self, transformer: Transformer, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a forward of a transformer and adds it to the chain."""
        if torch.is_inference_mode_enabled():
            raise ChainError("a recorded sampling must run without torch.inference_mode (torch.no_grad is fine)")
        names = [*inspect.signature(type(transformer.model).forward).parameters][1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        # Copies of latents: some pipelines write the next ones over them.
        latents = [arguments.get(name) for name in ("hidden_states", "audio_hidden_states")]
        copied = tree_map_only(Tensor, lambda x: x.clone() if any(x is y for y in latents) else x, (args, kwargs))
        given, inputs = Given.of(*copied)
        now, number = float(transformer.adapter.time(arguments)), len(self.forwards)
        moment = None
        if transformer is self.calibrator.transformer:
            if self._most is not None and len(self._measured()) == self._most:
                raise _EnoughError
            if (grid := transformer.adapter.token_grid(transformer.model, arguments)) != self.calibrator.manifest.grid:
                raise CalibrationError(f"a forward must have {self.calibrator.manifest.grid}, got {grid}")
            moment = self.calibrator.moment(now)
        if moment is not None:
            self._moments.setdefault(moment, Moment()).numbers.append(number)
        if not inputs and self.forwards and abs(now - self.forwards[0].time) > TIME_TOLERANCE:
            raise ChainError(
                f"forward {number} (time {now:.3f}) must depend on those before by differentiation, got no graph"
            )
        versions = [x._version if isinstance(x, Tensor) else 0 for x in given.flat]
        device = next(iter(floating(given.flat))).device
        autocast = device.type, torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        forward = Forward(number, transformer, given, versions, now, moment, autocast)
        self.forwards.append(forward)
        marks = [now, *(float(x.double().norm()) for x in floating(given.flat))]
        kept = self.journal.output(number, marks)
        if kept is None or transformer not in self._returned:  # the first is computed again: is the model the same?
            begun = self._now()
            with torch.no_grad():
                self._returned[transformer] = given.call(run)
            self._seconds = self._now() - begun
            made = floating(self._returned[transformer])
            if kept is None:
                self.journal.keep_output(number, marks, made)
            else:
                self.journal.compare(kept, made)
        returned = self._returned[transformer]
        if kept is not None:
            returned = replaced(returned, [x.to(device) for x in kept])
        self.calibrator.on_progress(1.0)
        tensors = [x.detach() for x in floating(returned)]
        leaves = self._chain.add(f"forward {number} (time {now:.3f})", inputs, tensors, partial(self._pull, forward))
        with torch.enable_grad():  # copies: a pipeline may change what it gets
            return replaced(returned, [leaf.clone().as_subclass(Traced) for leaf in leaves])

    def measure(self, name: str, seed: int) -> SamplingTables:
        """Differentiates the sampling and adds its measurements to the store, one time after the other.

        Raises:
            CalibrationError: The sampling did not go through the manifest's times.
            ChainError: It cannot be differentiated.
        """
        self._name, self._tables = name, self.journal.tables()
        self.differentiate(seed)
        return tables_of([self._tables[index] for index in range(len(self.calibrator.manifest.times))])

    def differentiate(self, seed: int) -> None:
        """Pulls the gradients of random vectors back through the sampling: `collect` is given every measured call.

        Raises:
            CalibrationError: The sampling did not go through the manifest's times.
            ChainError: It cannot be differentiated.
        """
        manifest = self.calibrator.manifest
        if absent := [now for index, now in enumerate(manifest.times) if index not in self._moments]:
            raise CalibrationError(f"a sampling must have a forward at every recorded time, got none at {absent}")
        ends = () if self.final is None else parts(self.final)
        if not all(x.requires_grad for x in ends):
            raise ChainError(
                "the final latent must depend on the transformer's outputs by differentiation, got no graph"
            )
        cotangents = [
            [_cotangent(x, seed, vector, index) / len(ends) ** 0.5 for index, x in enumerate(ends)]
            for vector in range(self.calibrator.vectors)
        ]
        first = min(number for moment in self._moments.values() for number in moment.numbers)
        self._chain.pull(ends, cotangents, first=first)

    def rehearse(self) -> tuple[tuple[float, float], str]:
        """Differentiates each forward by itself, for `Calibrator.rehearse`."""
        seconds, kernels = 0.0, ""
        for forward in self._measured():
            forward.moment, moment = forward.moment or 0, Moment()
            like = self._chain.links[forward.number].like
            drawn = [
                [torch.randn(shape, device=device) * 1e-3 for shape, _, device in like]
                for _ in range(self.calibrator.vectors)
            ]
            begun = self._now()
            self._differentiated(forward, drawn, partial(self.collect, forward, moment))
            seconds = self._now() - begun
            kernels = self._kernels
        return (self._seconds, seconds), kernels

    def _measured(self) -> list[Forward]:
        return [forward for forward in self.forwards if forward.transformer is self.calibrator.transformer]

    def _now(self) -> float:
        """Seconds of a clock; where forwards are timed, it first waits for the device."""
        if self._most is not None and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _pull(self, forward: Forward, cotangents: Cotangents) -> Cotangents:
        moment = Moment([forward.number]) if forward.moment is None else self._moments[forward.moment]
        self.calibrator.on_progress(BACKWARD_COST)
        # Gradients of a time are collected forward by forward, and stored when all are there.
        if all(map(self.journal.has_gradients, moment.numbers)):
            device = next(iter(floating(forward.given.flat))).device
            return [[x.to(device) for x in some] for some in self.journal.gradients(forward.number)]
        now = [x._version if isinstance(x, Tensor) else 0 for x in forward.given.flat]
        if now != forward.versions:
            raise ChainError(
                f"arguments of forward {forward.number} must stay as they are until it has been differentiated, "
                "got one that was changed in place"
            )
        collect = None if forward.moment is None else partial(self.collect, forward, moment)
        gradients = self._differentiated(forward, cotangents, collect)
        moment.pulled[forward.number] = gradients
        if len(moment.pulled) == len(moment.numbers):
            if forward.moment is not None and moment.layers:
                self._finish(forward.moment, moment)
            self.journal.keep_gradients(moment.pulled)
            moment.pulled, moment.layers = {}, {}
        return gradients

    def _differentiated(self, forward: Forward, cotangents: Cotangents, collect: Any) -> Cotangents:
        """Gradients of a forward's inputs, as it ran."""
        kind, dtype, enabled = forward.autocast
        with torch.autocast(kind, dtype) if enabled else nullcontext():
            return forward.transformer.pull(forward.given, cotangents, collect)

    def collect(self, forward: Forward, moment: Moment, call: AttentionCall) -> None:
        """Adds the measurements of one call to the sums of its layer."""
        self._kernels = kernel_name(call.q)
        assert forward.moment is not None
        if call.layer not in moment.layers:
            moment.layers[call.layer] = self._empty_sums(forward.moment, call)
        moment.layers[call.layer].add(call, self.calibrator.manifest)

    def _empty_sums(self, moment: int, call: AttentionCall) -> LayerSums:
        """Empty sums of a layer, with the masks to measure: all windows, and the ladder from earlier samplings."""
        ours, unit = self.calibrator, self.calibrator.writer.read_unit(moment, call.layer)
        earlier = None if unit is None or self._name in unit.samplings else unit
        return LayerSums.empty(ours.manifest, ours.vectors, ours.windows, earlier, call.q.device)

    def _finish(self, index: int, moment: Moment) -> None:
        """Puts a time that has been measured into the store."""
        manifest, layers = self.calibrator.manifest, range(self.calibrator.manifest.model.layers)
        if absent := [layer for layer in layers if layer not in moment.layers]:
            raise CalibrationError(f"a forward must call every self-attention, got none in layers {absent}")
        what = f"effects at time {manifest.times[index]:.3f} must be"
        if wrong := [layer for layer in layers if not moment.layers[layer].is_finite()]:
            raise CalibrationError(f"{what} finite, got NaN or infinity in layers {wrong}")
        level = float(sum(moment.layers[layer].level() for layer in layers))
        if not 1 / MOST <= level <= MOST:
            raise CalibrationError(f"{what} {1 / MOST:g} to {MOST:g}, got a sum of {level}")
        if index not in self._tables:
            # Before the units hold this sampling: after that, the ladder of earlier samplings cannot be made again.
            self._tables[index] = table_of([moment.layers[layer] for layer in layers], manifest, level)
            self.journal.keep_table(index, self._tables[index])
        for layer in layers:
            unit = moment.layers[layer].unit(self._name, manifest, level)
            self.calibrator.writer.add(index, layer, unit)


def _cotangent(latent: Tensor, seed: int, vector: int, index: int) -> Tensor:
    """A standard normal vector of the latent's shape / ||latent||, the same on every device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + vector * 1_009 + index)
    drawn = torch.randn(latent.shape, generator=generator)
    return (drawn / float(plain(latent).double().norm())).to(latent.device)
