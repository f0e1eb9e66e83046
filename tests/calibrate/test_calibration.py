"""Samplings into a store: what is refused, what an interruption loses, and that going on gives the same store."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support import adjoint, wan

from calibatt.compiler.stats import SampleExists, Store, StoreWriter
from calibatt.tools.calibrate import effects, estimate
from calibatt.tools.calibrate.calibration import CalibrationError, Calibrator, Recording, sampling_name
from calibatt.tools.calibrate.chain import ChainError
from calibatt.tools.calibrate.gradients import Transformer
from calibatt.tools.calibrate.journal import Journal, JournalError
from calibatt.tools.calibrate.recording import recording
from calibatt.tools.calibrate.work import make_manifest

pytestmark = pytest.mark.usefixtures("one_thread")


class Pair(NamedTuple):
    sample: torch.Tensor
    word: str


WORK = (("a boat", 1), ("a cat", 2))
FORWARDS, TIMES, LAYERS = 6, 3, 2


def guided(**options: Any) -> Any:
    """Three steps of two forwards each."""
    return adjoint.small_wan(guidance_scale=5.0, **options)


def measure(folder: Path, sampler: Any = None, vectors: int = 2, **options: Any) -> Store:
    """What the command does: all prompts that are not done."""
    sampler = sampler or guided()
    with StoreWriter.open(folder, adjoint.manifest_of(sampler, **options)) as writer:
        calibrator = Calibrator(sampler, writer, vectors=vectors)
        for prompt, seed in WORK:
            if sampling_name(prompt, seed) not in writer.done():
                calibrator.calibrate(prompt, seed, steps=3)
    return Store.open(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return measure(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the first sampling alone."""
    folder = tmp_path_factory.mktemp("half")
    with StoreWriter.open(folder, adjoint.manifest_of(guided())) as writer:
        Calibrator(guided(), writer, vectors=2).calibrate(*WORK[0], steps=3)
    return folder


def assert_same(found: Store, expected: Store) -> None:
    """The same to rounding, with nothing left of what was in progress."""
    assert found.samplings == expected.samplings
    assert not found.unfinished
    for ours, theirs in zip(found.table().samplings, expected.table().samplings, strict=True):
        for name in ("level", "window_effect", "ladder_effect", "precision_effect"):
            a, b = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(np.nan_to_num(b)).max(), err_msg=name)
    for place in itertools.product(range(TIMES), range(LAYERS)):
        ours, theirs = found.unit(*place), expected.unit(*place)
        assert sorted(ours.samplings) == sorted(theirs.samplings)
        for name in ("effect_values", "error_values"):
            a, b = getattr(ours, name)(), getattr(theirs, name)()
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6 * b.max(), err_msg=name)
        np.testing.assert_allclose(ours.row_effect, theirs.row_effect, rtol=1e-5)
        np.testing.assert_allclose(ours.frame_effect, theirs.frame_effect, rtol=1e-5)


def test_the_second_sampling_has_a_ladder(reference: Store):
    first, second = (adjoint.tables_of(reference, *each) for each in WORK)
    assert np.isnan(first.ladder_effect).all()
    assert not first.has_ladder
    assert np.isfinite(second.ladder_effect).all()
    assert second.has_ladder
    assert second.ladder_effect.shape == (2, TIMES, LAYERS, 5, 2)
    small, large = (np.square(second.ladder_effect[:, :, :, rung]).mean() for rung in (0, -1))
    assert small > large > 0


def test_what_is_kept_of_a_sampling(reference: Store):
    for prompt, seed in WORK:
        meta = reference.meta[sampling_name(prompt, seed)]
        assert meta.pop("seconds") > 0
        facts = {"prompt": prompt, "seed": seed, "vectors": 2, "forwards": FORWARDS, "steps": 3}
        assert meta == facts | {"times": guided().times}
        assert set(reference.manifest.times) <= set(meta["times"])
    for time in range(TIMES):  # each sampling's effects are divided by its level
        units = [reference.unit(time, layer) for layer in range(LAYERS)]
        assert sum(unit.effect_values().sum() for unit in units) == pytest.approx(1, rel=1e-3)


def test_sampling_is_not_changed(tmp_path: Path):
    sampler = guided()
    with StoreWriter.open(tmp_path, adjoint.manifest_of(sampler)) as writer:
        found = Calibrator(sampler, writer).calibrate(*WORK[0])
    assert type(found) is torch.Tensor
    assert not found.requires_grad
    assert torch.equal(found, sampler.run(*WORK[0]))
    assert "forward" not in vars(sampler.transformer)


class StoppedError(Exception):
    """As if the job had been ended here."""


class Faults:
    """Counts what a calibration does, and stops it once before or after something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: Counter[str] = Counter()
        self.stop: tuple[str, int] | None = None
        for kind, owner, name in (
            ("pull", Transformer, "pull"), ("call", Recording, "collect"), ("add", StoreWriter, "add"),
            ("save", Journal, "_save"), ("finish", StoreWriter, "finish"), ("drop", StoreWriter, "drop_progress"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.counted(kind, getattr(owner, name)))

    def counted(self, kind: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if self.stop == (kind, self.done[kind]):
                self.stop = None
                raise StoppedError
            found = run(*args, **kwargs)
            self.done[kind] += 1
            return found

        return called

    def sampler(self) -> Any:
        """Counts forwards of the sampling itself, not those that are differentiated."""
        sampler = guided()
        run = sampler.transformer.forward
        counted = self.counted("forward", run)
        sampler.transformer.forward = lambda *args, **kwargs: (run if torch.is_grad_enabled() else counted)(
            *args, **kwargs
        )
        return sampler


STOPS = {
    "forward": (0, 3, 5), "pull": (0, 1, 3, 5), "call": (1, 6, 11), "add": range(6), "save": range(FORWARDS, 15, 1),
    "finish": (0,), "drop": (0,),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", STOPS)
def test_an_interrupted_sampling_is_continued(
    kind: str, reference: Store, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second sampling is stopped at many places. No forward (but the first, which proves the model) and no time
    that was finished is computed again, and the store is the one of a run without interruption.
    """
    faults = Faults(monkeypatch)
    for number in STOPS[kind]:
        folder = tmp_path / str(number)
        shutil.copytree(half, folder)
        faults.done.clear()
        faults.stop = kind, number
        with pytest.raises(StoppedError):
            measure(folder, faults.sampler())
        times_done = len(list(folder.glob("progress/*/time*.table")))
        begun = kind != "drop" and any(folder.glob("progress/*/forward0000.out"))
        before = faults.done["pull"]
        assert_same(measure(folder, faults.sampler()), reference)
        assert faults.done["forward"] == FORWARDS + begun
        assert 0 <= faults.done["pull"] - FORWARDS <= 2, (number, faults.done)
        assert faults.done["pull"] - before <= FORWARDS - 2 * max(0, times_done - 1)


def test_a_finished_sampling_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure(tmp_path)
    faults = Faults(monkeypatch)
    sampler = faults.sampler()
    with StoreWriter.open(tmp_path, adjoint.manifest_of(sampler)) as writer:
        with pytest.raises(SampleExists, match=r"must be measured once, got it again for"):
            Calibrator(sampler, writer).calibrate(*WORK[0])
    assert not faults.done


def stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int) -> None:
    with monkeypatch.context() as context:
        faults = Faults(context)
        faults.stop = kind, number
        with pytest.raises(StoppedError):
            measure(folder, faults.sampler())


def test_a_sampling_is_continued_as_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stopped(tmp_path / "vectors", monkeypatch, "pull", 3)
    with pytest.raises(
        JournalError, match=r"continued with \{'vectors': 2\}, got \{'vectors': 3\}; remove it to begin"
    ):
        measure(tmp_path / "vectors", vectors=3)
    stopped(tmp_path / "guidance", monkeypatch, "forward", 5)
    weaker = adjoint.small_wan(guidance_scale=4.0)
    with pytest.raises(JournalError, match=r"forward 2 must be given what it was when .* \(prompts, guidance, sched"):
        measure(tmp_path / "guidance", weaker)
    without = adjoint.small_wan(guidance_scale=1.0)
    with pytest.raises(JournalError, match=r"forward 1 must be given what it was"):
        measure(tmp_path / "guidance", without)
    stopped(tmp_path / "weights", monkeypatch, "pull", 3)
    changed = guided()
    with torch.no_grad():
        changed.transformer.proj_out.weight.mul_(1.1)
    with pytest.raises(JournalError, match=r"must be the one that .* was begun with \(weights, LoRA, precision\), got"):
        measure(tmp_path / "weights", changed)


def test_outputs_are_given_back_as_the_model_returns_them(
    reference: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Some pipelines ask for an object: what was kept of it is tensors, the object is that of the first forward."""

    def objects() -> Any:
        sampler = guided()
        forward = type(sampler.transformer).forward
        monkeypatch.setattr(
            sampler.transformer, "forward",
            lambda *args, **kwargs: Pair(*forward(sampler.transformer, *args, **kwargs), "kept"),
        )  # fmt: skip
        return sampler

    stopped(tmp_path, monkeypatch, "pull", 3)
    assert_same(measure(tmp_path, objects()), reference)


def test_a_damaged_journal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stopped(tmp_path, monkeypatch, "pull", 3)
    for path in tmp_path.glob("progress/*/forward0002.out"):
        path.write_bytes(b"")
    with pytest.raises(JournalError, match=r"forward0002.out must be whole, got .*; remove .* to begin anew"):
        measure(tmp_path)


def test_a_users_own_pipeline_call_is_recorded(reference: Store, tmp_path: Path):
    sampler = guided()
    pipe = sampler.pipe
    with StoreWriter.open(tmp_path, adjoint.manifest_of(sampler)) as writer:
        calibrator = Calibrator(sampler, writer, vectors=2)
        for prompt, seed in WORK:
            with calibrator.recording(prompt, seed, steps=3) as found:
                latents = pipe(
                    **wan.embedded(prompt), height=64, width=96, num_frames=9, num_inference_steps=3,
                    guidance_scale=5.0, generator=torch.Generator().manual_seed(seed), output_type="latent",
                ).frames  # fmt: skip
                found.final = latents * 1.0  # arithmetic of the user's own
    assert_same(Store.open(tmp_path), reference)


def test_a_video_that_is_decoded_while_it_is_recorded_is_the_stock_one(reference: Store, tmp_path: Path):
    """Its VAE computes without the graph of the sampling; the final latent is what the last step returned."""
    sampler = guided()
    arguments = {**sampler.arguments, **wan.embedded("a boat"), "output_type": "np"}

    def generate() -> np.ndarray:
        return sampler.pipe(**arguments, generator=torch.Generator().manual_seed(1)).frames

    shown = generate()
    with recording(sampler, tmp_path, "a boat", 1, vectors=2, times=3, block_size=16):
        found = generate()
    np.testing.assert_array_equal(found, shown)
    tables = Store.open(tmp_path).table().samplings[0]
    expected = adjoint.tables_of(reference).window_effect
    assert tables.window_effect.shape == expected.shape
    np.testing.assert_array_equal(tables.window_effect != 0, expected != 0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_sampling_under_autocast_is_differentiated_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dtypes: set[torch.dtype] = set()
    collect = Recording.collect
    monkeypatch.setattr(Recording, "collect", lambda *args: dtypes.add(args[3].q.dtype) or collect(*args))
    sampler = guided()
    run = sampler.run

    def casting(prompt: str, seed: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(prompt, seed)

    sampler.run = casting
    measure(tmp_path, sampler)
    assert dtypes == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")


def test_embeddings_made_under_inference_mode_can_be_used(reference: Store, tmp_path: Path):
    sampler = guided()

    def embedded(prompt: str) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            return {name: x.clone() for name, x in wan.embedded(prompt).items()}

    sampler._prompt_arguments = embedded
    assert_same(measure(tmp_path, sampler), reference)


def test_what_cannot_be_measured_is_refused(tmp_path: Path):
    sampler = guided()
    manifest = adjoint.manifest_of(sampler)
    run = sampler.run

    def refused(error: type[Exception], match: str, change: Callable[[], torch.Tensor]) -> None:
        sampler.run = lambda prompt, seed: change()
        with StoreWriter.open(tmp_path, manifest) as writer, pytest.raises(error, match=match):
            Calibrator(sampler, writer).calibrate("a dog", 1)
        assert "forward" not in vars(sampler.transformer)

    refused(ChainError, "the final latent must depend on the transformer's outputs", lambda: run("a", 1).detach())
    refused(CalibrationError, "must have a forward at every recorded time, got none at", lambda: torch.zeros(3))
    refused(CalibrationError, "must give its final latent, got none", lambda: None)
    with torch.inference_mode():
        refused(ChainError, "must run without torch.inference_mode", lambda: run("b", 1))
    large = adjoint.small_wan(guidance_scale=5.0, height=128)
    other = large.run
    large.transformer.forward = sampler.transformer.forward
    sampler.transformer, kept = large.transformer, sampler.transformer
    del large.transformer.forward
    refused(CalibrationError, "a forward must have TokenGrid.*, got TokenGrid", lambda: other("c", 1))
    sampler.transformer = kept
    with StoreWriter.open(tmp_path, manifest) as writer:
        with pytest.raises(CalibrationError, match=r"the manifest must be of TokenGrid.*height=8.*, got TokenGrid"):
            Calibrator(large, writer)


def test_latents_may_be_changed_in_place_and_other_arguments_not(reference: Store, tmp_path: Path):
    sampler = guided()
    step, text = sampler.pipe.scheduler.step, wan.embedded("a boat")
    sampler._prompt_arguments = lambda prompt: text if prompt == "a boat" else wan.embedded(prompt)

    def doubled(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> Any:
        model_output *= 1.0
        found = step(model_output, timestep, sample, **options)
        sample.mul_(1.0)
        return found

    sampler.pipe.scheduler.step = doubled
    assert_same(measure(tmp_path / "latents", sampler), reference)
    sampler.pipe.scheduler.step = lambda *a, **k: (text["prompt_embeds"].mul_(1.0), doubled(*a, **k))[1]
    with StoreWriter.open(tmp_path / "text", adjoint.manifest_of(sampler)) as writer:
        with pytest.raises(
            ChainError, match=r"arguments of forward [45] must stay as they are .*, got one that was changed"
        ):
            Calibrator(sampler, writer).calibrate("a boat", 1)


def test_counts_of_the_papers_method(tmp_path: Path):
    """Votes of every call, both branches of guidance; differences of rows and frames."""
    sampler = adjoint.small_wan(guidance_scale=5.0)
    thresholds = (0.5, 0.9)
    seen: list[Any] = []
    collect = Recording.collect
    with pytest.MonkeyPatch.context() as context:
        context.setattr(Recording, "collect", lambda *args: seen.append(args[3]) or collect(*args))
        store = measure(tmp_path, sampler, thresholds=thresholds)
    unit = store.unit(0, 1)
    assert unit.vote_samples == 4
    assert unit.votes.shape == (2, 2, 5, 3)
    calls = [call for call in seen if call.layer == 1]
    mine = [*calls[0:2], *calls[6:8]]  # of both samplings, those of the least noisy step, which is pulled first
    votes, rows = 0, 0.0
    for call in mine:
        mass, _ = effects.block_statistics(call.q, call.k, call.v, adjoint.BLOCKS, effects.ERROR_STRIDE)
        votes = votes + effects.keep_planes(mass, thresholds).int().numpy()
        rows = rows + effects.row_differences(call.out, sampler.grid, 1).numpy() / len(mine)
    np.testing.assert_array_equal(unit.votes, votes)
    np.testing.assert_allclose(unit.row_difference, rows, rtol=1e-5)


VICTIMS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_calibration import guided, measure
guided().run("a boat", 1)  # what is made at first use
drawn, kills = random.Random(0), 0
for _ in range(int(os.environ.get("KILLS", 10))):
    job = os.fork()
    if not job:
        measure(Path(sys.argv[1]))
        os._exit(0)
    time.sleep(drawn.uniform(0.02, 0.15))
    os.kill(job, signal.SIGKILL)
    kills += os.WIFSIGNALED(os.waitpid(job, 0)[1])
print(kills)
"""


@pytest.mark.slow
def test_kills_lose_the_step_in_progress_alone(reference: Store, tmp_path: Path):
    """A job that is killed ten times, or ``KILLS``, at any moment ends with the store of one that was not."""
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", VICTIMS, str(tmp_path)], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2
    assert_same(measure(tmp_path), reference)


def test_a_step_that_is_not_measured_is_not_taken_for_its_neighbour():
    """Steps less than a thousandth apart, as a large shift makes them."""
    known = SimpleNamespace(
        manifest=SimpleNamespace(times=(0.5, 1.0)), sampler=SimpleNamespace(times=[1.0, 0.9992, 0.5])
    )
    assert [Calibrator.moment(known, now) for now in (1.0, 0.99995, 0.9992, 0.5004, 0.7)] == [1, 1, None, 0, None]


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_forwards_before_the_first_measured_one_are_not_differentiated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is asked of them: the noisy expert's, where the other one is measured."""
    sampler = wan.sampler(8, pipe=wan.pipeline(experts=2), transformer=name)
    done: list[int] = []
    pull = Transformer.pull
    monkeypatch.setattr(Transformer, "pull", lambda *args: done.append(1) or pull(*args))
    with StoreWriter.open(tmp_path, make_manifest(sampler, block_size=32)) as writer:
        calibrator = Calibrator(sampler, writer)
        forwards, pulled = estimate.forwards_of(calibrator)
        assert (forwards, pulled) == (8, 8 if name == "transformer" else len(sampler.times))
        calibrator.calibrate("a boat", 1)
    assert len(done) == pulled


def test_inputs_of_blocks_go_to_the_cpu_for_every_transformer(tmp_path: Path):
    """Of two experts both are differentiated, whichever is measured."""
    sampler = wan.sampler(8, pipe=wan.pipeline(experts=2))
    with StoreWriter.open(tmp_path, make_manifest(sampler, block_size=32)) as writer:
        calibrator = Calibrator(sampler, writer)
        assert len(calibrator.models) == 2
        calibrator.keep_inputs(on_cpu=True)
        assert [each.inputs_on_cpu for each in calibrator.models] == [True, True]
