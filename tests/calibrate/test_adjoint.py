"""What calibration says of masks against finite differences, through whole samplings of diffusers' pipelines."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.transformers import transformer_kandinsky
from support import adjoint, batched, families, quantised, text_after, wan

from calibatt.compiler.stats import Manifest, SamplingTables
from calibatt.tools.calibrate.chain import ChainError
from calibatt.tools.calibrate.pipeline import PipelineSampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported"),
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword"),  # of DPM++ itself
]

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 1000, "flow_shift": 3.0}
SCHEDULERS = {
    "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "lcm": lambda: diffusers.FlowMatchLCMScheduler(shift=3.0),
    "stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler(scheduler: str, guidance: float, tmp_path: Path):
    sampler = adjoint.small_wan(scheduler=SCHEDULERS[scheduler](), guidance_scale=guidance)
    adjoint.assert_effects_agree(sampler, adjoint.calibrated(sampler, tmp_path))


def cogvideox_dpm() -> Any:
    sampler = batched.cogvideox(4.0)
    sampler.pipe.scheduler = diffusers.CogVideoXDPMScheduler()
    return sampler


FAMILIES = {
    "ltx": lambda: batched.ltx(1.0),
    "ltx, guidance in one batch": lambda: batched.ltx(4.0),
    "cogvideox": lambda: batched.cogvideox(1.0),
    "cogvideox, guidance in one batch": lambda: batched.cogvideox(4.0),
    "cogvideox, dpm": cogvideox_dpm,
    "mochi, guidance in one batch": lambda: batched.mochi(4.0),
    "hunyuan": lambda: text_after.hunyuan(None, "cpu"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path):
    sampler = FAMILIES[family]()
    adjoint.assert_effects_agree(sampler, adjoint.calibrated(sampler, tmp_path, vectors=2))


ELSEWHERE = ("wan", "ltx", "cogvideox", "mochi", "hunyuan")


@pytest.mark.filterwarnings("ignore:.timesteps. were passed without .sigmas.")
@pytest.mark.parametrize("name", sorted({*families.FAMILIES} - {*ELSEWHERE, "skyreels_forcing"}))
def test_every_kind_of_pipeline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Image to video, conditions, times for each token. Attention says little in these models: a longer step."""
    if name.startswith("kandinsky5"):  # it rounds queries and keys to bfloat16, which differences cannot follow
        exact = SimpleNamespace(**{**vars(torch), "bfloat16": torch.float32})
        monkeypatch.setattr(transformer_kandinsky, "torch", exact)
    pipe, prompt_arguments, arguments = families.pipeline(name)
    sampler = PipelineSampler(pipe, prompt_arguments=prompt_arguments, **arguments)
    adjoint.assert_effects_agree(
        sampler, adjoint.calibrated(sampler, tmp_path, vectors=2), step=0.2 if name == "kandinsky5_i2v" else 0.8
    )


def test_a_scheduler_that_keeps_what_is_written_over_is_refused(tmp_path: Path):
    """Each frame has one, which keeps a view of the latents before they first come from the model."""
    pipe, prompt_arguments, arguments = families.pipeline("skyreels_forcing")
    sampler = PipelineSampler(pipe, prompt_arguments=prompt_arguments, **arguments)
    with pytest.raises(ChainError, match="must have no view that something else kept"):
        adjoint.calibrated(sampler, tmp_path)


@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_each_expert_through_the_other_one(expert: str, tmp_path: Path):
    sampler = adjoint.small_wan(wan.pipeline(experts=2), steps=8, transformer=expert, guidance_scale=3.0)
    assert len(sampler.times) > 1
    adjoint.assert_effects_agree(sampler, adjoint.calibrated(sampler, tmp_path))


def test_a_denoiser_that_the_sampler_does_not_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the final latent came through it, forwards before it would have a wrong gradient."""
    monkeypatch.setattr(PipelineSampler, "other_transformers", ())
    first, second = (
        adjoint.small_wan(wan.pipeline(experts=2), steps=8, transformer=name)
        for name in ("transformer", "transformer_2")
    )
    with pytest.raises(ChainError, match=r"from the transformers of its sampler alone, got .* on the way; a further"):
        adjoint.calibrated(first, tmp_path / "first")
    adjoint.assert_effects_agree(second, adjoint.calibrated(second, tmp_path / "second"))


def test_a_lora_beside_the_weights_and_fused(tmp_path: Path):
    found = []
    for fused in (False, True):
        pipe = wan.pipeline()
        torch.manual_seed(2)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        pipe.transformer.add_adapter(
            peft.LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        )
        if fused:
            pipe.transformer.fuse_lora()
        sampler = adjoint.small_wan(pipe)
        store = adjoint.calibrated(sampler, tmp_path / str(fused))
        adjoint.assert_effects_agree(sampler, store)
        found.append((adjoint.tables_of(store), store.unit(0, 1)))
    (beside, unit), (merged, other) = found
    np.testing.assert_allclose(beside.level, merged.level, rtol=1e-4)
    np.testing.assert_allclose(beside.window_effect, merged.window_effect, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(unit.effect_peak, other.effect_peak, rtol=1e-3)


@pytest.mark.parametrize("kind", quantised.KINDS)
def test_quantised_models(kind: str, tmp_path: Path):
    quantised.require(kind)
    pipe = wan.pipeline()
    pipe.transformer = quantised.model(kind)
    sampler = adjoint.small_wan(pipe, guidance_scale=5.0)
    adjoint.assert_effects_agree(sampler, adjoint.calibrated(sampler, tmp_path), 0.05 if kind == "int8" else 0.01)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> SamplingTables:
    """What a sampling with guidance says, in float32."""
    sampler = adjoint.small_wan(guidance_scale=5.0)
    return adjoint.tables_of(adjoint.calibrated(sampler, tmp_path_factory.mktemp("guided")))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
def test_half_precision(dtype: torch.dtype, most: float, guided: SamplingTables, tmp_path: Path):
    """Root mean square over all windows, within what rounding does to effects that are differences."""
    pipe = wan.pipeline()
    pipe.transformer.to(dtype)
    found = adjoint.tables_of(adjoint.calibrated(adjoint.small_wan(pipe, guidance_scale=5.0), tmp_path))
    change = np.square(found.window_effect - guided.window_effect).mean() / np.square(guided.window_effect).mean()
    assert change < most**2
    np.testing.assert_allclose(found.level, guided.level, rtol=most)


def sequential(model: torch.nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def grouped(model: torch.nn.Module, folder: Path) -> None:
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, num_blocks_per_group=1, offload_to_disk_path=str(folder))


@pytest.mark.parametrize("offload", [sequential, grouped])
def test_offloaded_models(offload: Callable[[torch.nn.Module, Path], None], guided: SamplingTables, tmp_path: Path):
    pipe = wan.pipeline()
    for model in (pipe.vae, pipe.transformer):
        offload(model, tmp_path / "weights" / type(model).__name__)
    found = adjoint.tables_of(adjoint.calibrated(adjoint.small_wan(pipe, guidance_scale=5.0), tmp_path / "stats"))
    np.testing.assert_allclose(found.window_effect, guided.window_effect, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found.level, guided.level, rtol=1e-5)


VECTORS = 64


def test_the_price_of_a_mask_is_what_running_it_changes(tmp_path: Path):
    """At guidance 5, in one head at one step, the mask run whole: the mean of its squared effects over random vectors
    is the relative squared change of the final latent, to 10 %.

    Masks are those of two windows, whose changes are 0.0002 to 0.007 of the latent. For every mask, <u, dz>^2 of the
    change that it really makes is averaged over the same vectors as its price. With the norm of the change, which is
    the mean over all vectors there are, the means over these 64 agree to the 18 % that are their standard deviation.
    """
    sampler = adjoint.small_wan(guidance_scale=5.0)
    store = adjoint.calibrated(sampler, tmp_path, vectors=VECTORS)
    manifest, tables = store.manifest, adjoint.tables_of(store)
    latent = sampler.run(adjoint.PROMPT, adjoint.SEED)
    clean, drawn = adjoint.flat(latent), torch.stack(adjoint.random_vectors(latent, VECTORS))
    prices, norms = [], []
    for window, time, layer, head in itertools.product((0, 5), range(3), range(2), range(2)):
        one = only(manifest, time, layer, window, head)
        change = adjoint.disturbed(sampler, manifest, one, 1.0) - clean
        price = float(np.square(tables.window_effect[:, time, layer, window, head]).mean())
        ran = float((drawn @ change).square().mean())
        assert price == pytest.approx(ran, rel=0.1), (window, time, layer, head)
        prices.append(price)
        norms.append(float((change.norm() / clean.norm()).square()))
    assert np.mean(np.array(prices) / norms) == pytest.approx(1, rel=0.2)


def only(manifest: Manifest, time: int, layer: int, window: int, head: int) -> adjoint.Coefficient:
    """One mask, whole."""
    found = np.zeros((len(manifest.windows), manifest.model.heads))
    found[window, head] = 1
    return lambda now, place: found if place == layer and abs(now - manifest.times[time]) < 1e-3 else 0 * found
