"""Evaluation of plans on a tiny random video transformer, from the command line down."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("diffusers")

from support.plans import tiny_plan as support_plan
from support.sampler import CALIBRATED, TIMES, TinyVideoSampler, tiny_plan, tiny_store
from support.schedules import random_schedule

from calibatt.compiler.stats import Store
from calibatt.plans import (
    Blocks,
    Container,
    PlanFile,
    StoredLayers,
    TokenGrid,
    schedule_of,
    write_container,
    write_plan,
)
from calibatt.plans.plan import MAGIC, VERSION
from calibatt.runtime import ListedSchedule, Plan
from calibatt.runtime.reference import reference_attention
from calibatt.tools.calibrate import calibration, models
from calibatt.tools.calibrate.effects import block_effects, mask_words
from calibatt.tools.calibrate.gradients import AttentionCall
from calibatt.tools.calibrate.pipeline import PipelineError
from calibatt.tools.evaluate import __main__ as command
from calibatt.tools.evaluate import effects, evaluation, metrics
from calibatt.tools.inspect_plan.__main__ import main as inspect
from calibatt.tools.studies import masks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    path = folder / "tiny.plan"
    store = tiny_store(folder / "stats")
    write_plan(path, tiny_plan(store))
    write_plan(folder / "dense.plan", tiny_plan(store, 0.95))
    return path


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch) -> TinyVideoSampler:
    """What `--model demo` stands for here."""
    found = TinyVideoSampler()
    monkeypatch.setitem(models.SAMPLERS, "demo", lambda steps, device: found)
    return found


def evaluate(tmp_path: Path, *options: object, prompts: str = "three\nfour words\n") -> Result:
    path = tmp_path / "prompts.txt"
    path.write_text(prompts)
    arguments = ["--prompts", path, "--head-prompts", 1, "--floor-prompts", 1, "--device", "cpu", *options]
    return CliRunner().invoke(command.main, [str(argument) for argument in arguments])


def table(folder: Path) -> dict:
    found = json.loads((folder / "report.json").read_text())
    del found["about"]
    return found


def test_a_report_goes_on_where_it_stopped_and_says_the_same_again(tmp_path, plan_path, sampler):
    options = ("--plan", plan_path, "--seeds", 2)
    first = evaluate(tmp_path, *options, "-o", tmp_path / "a")
    assert first.exit_code == 0, first.output
    found = table(tmp_path / "a")
    (plan,) = found["plans"]
    assert [row["seed"] for row in plan["by_prompt"]] == [5000, 5001, 5002, 5003]
    assert plan["metrics"]["psnr"]["count"] == 4
    assert plan["metrics"]["psnr"]["worst"] == min(row["psnr"] for row in plan["by_prompt"])
    assert found["floor"]["psnr"]["mean"] > plan["metrics"]["psnr"]["mean"] + 20
    assert "not available" in found["not_available"].get("lpips", "not available")
    assert plan["predicted_latent_db"]["samplings"] == len(CALIBRATED) - 1
    assert plan["metrics"]["latent"]["count"] == 4
    assert plan["heads"]["first_order_latent"]["mean"] == pytest.approx(plan["metrics"]["latent"]["mean"], abs=8)
    assert 0.3 < plan["heads"]["ratio"] < 3
    page = (tmp_path / "a" / "report.html").read_text()
    order = sorted(plan["by_prompt"], key=lambda row: row["latent"])
    assert page.count("data:image/png") == 4
    places = [page.index(f"seed {row['seed']}<br>") for row in order]
    assert places == sorted(places)

    runs = sampler.runs
    assert evaluate(tmp_path, *options, "-o", tmp_path / "a").exit_code == 0
    assert sampler.runs == runs
    assert evaluate(tmp_path, *options, "-o", tmp_path / "b").exit_code == 0
    assert table(tmp_path / "a") == found == table(tmp_path / "b")


def test_a_plan_of_fewer_times_than_steps_promises_what_all_steps_do(tmp_path, sampler):
    """Density, signal-to-noise and squared effect are those of all eight steps, of which three were calibrated."""
    sampler.times = [1.0, 0.95, 0.9, 0.82, 0.74, 0.64, 0.5, 0.3]
    store = tiny_store(tmp_path / "stats", times=sampler.times, recorded=(1.0, 0.82, 0.3))
    write_plan(tmp_path / "few.plan", tiny_plan(store, 0.5))
    found = evaluate(tmp_path, "--plan", tmp_path / "few.plan", "-o", tmp_path / "a")
    assert found.exit_code == 0, found.output
    (plan,) = table(tmp_path / "a")["plans"]
    assert 0.49 < plan["density"] <= 0.5 + 1e-12
    assert plan["density"] == pytest.approx(PlanFile.read(tmp_path / "few.plan").predicted["density"])
    assert plan["predicted_latent_db"]["mean"] == pytest.approx(plan["metrics"]["latent"]["mean"], abs=5)
    assert 1 / 3 < plan["heads"]["ratio"] < 3


def test_another_setting_needs_another_folder(tmp_path, plan_path, sampler):
    assert evaluate(tmp_path, "--plan", plan_path, "-o", tmp_path / "a").exit_code == 0
    sampler.times = [1.0, 0.4]
    found = evaluate(tmp_path, "--plan", plan_path, "-o", tmp_path / "a")
    assert found.exit_code == 2
    assert "times [1.0, 0.4]" in found.output


def test_the_gate_and_the_stamp(tmp_path, plan_path, sampler):
    path = tmp_path / "stamped.plan"
    path.write_bytes(plan_path.read_bytes())
    options = ("--plan", path, "-o", tmp_path / "a", "--stamp")
    assert evaluate(tmp_path, *options, "--require", "latent>=1,broken<=0").exit_code == 0
    shown = CliRunner().invoke(inspect, [str(path)]).output
    assert "passed: latent>=1" in " ".join(shown.split())
    assert PlanFile.read(path).schedules[0][0].density == PlanFile.read(plan_path).schedules[0][0].density
    runs = sampler.runs
    assert evaluate(tmp_path, *options, "--require", "psnr>=99,flicker<=1").exit_code == 1
    assert sampler.runs == runs, "a stamp makes no other plan"
    verdict = PlanFile.read(path).provenance["evaluation"]
    assert verdict["verdict"].startswith("FAILED: psnr>=99")
    assert verdict["videos"] == 2


def sabotaged(plan: PlanFile, step: int, layer: int, head: int) -> PlanFile:
    """The plan with a head that keeps just the blocks farthest from the diagonal; its promise stays as it was."""
    schedules = [list(layers) for layers in plan.schedules]
    old = schedules[step][layer]
    keep = np.stack([old.tile_keep(each) for each in range(old.heads)])
    far = np.arange(old.k_blocks)
    keep[head] = far == (far[:, None] + old.k_blocks // 2) % old.k_blocks
    schedules[step][layer] = schedule_of(old.grid, old.blocks, [*np.packbits(keep, axis=2, bitorder="little")])
    return replace(plan, schedules=StoredLayers.of(schedules))


def test_a_sabotaged_head_is_found_and_named(tmp_path, plan_path, sampler):
    plan = PlanFile.read(plan_path)
    segment, layer, head = 0, 0, 0
    assert plan.schedules[segment][layer].head_density(head) > 0.7, "a head that the compiler found worth its blocks"
    bad = tmp_path / "bad.plan"
    write_plan(bad, sabotaged(plan, segment, layer, head))
    found = evaluate(tmp_path, "--plan", plan_path, "--plan", bad, "-o", tmp_path / "a", "--require", "broken<=0")
    assert found.exit_code == 1
    assert f"bad.plan: broken: layer {layer}, head {head} at time {plan.segments[segment].time:.3f}" in found.output
    good, worse = table(tmp_path / "a")["plans"]
    assert not good["heads"]["broken"]
    assert len(worse["heads"]["broken"]) == 1
    assert worse["difference_from_first"]["psnr"]["mean"] < 0
    assert "Broken: layer" in (tmp_path / "a" / "report.html").read_text()


def test_every_broken_head_is_counted(tmp_path, plan_path, sampler, monkeypatch):
    """Not those alone that the report has room for."""
    monkeypatch.setattr(evaluation, "SUSPECTS", 1)
    monkeypatch.setattr(evaluation, "BROKEN_RATIO", 0.0)
    assert evaluate(tmp_path, "--plan", plan_path, "-o", tmp_path / "a").exit_code == 0
    (plan,) = table(tmp_path / "a")["plans"]
    broken = plan["heads"]["broken"]
    assert len(broken) > 1
    assert all(row["share"] >= evaluation.BROKEN_SHARE for row in broken)


def test_the_drift_check(tmp_path, plan_path, sampler):
    fits = evaluate(tmp_path, "--plan", plan_path, "--quick")
    assert fits.exit_code == 0, fits.output
    assert ": fits:" in fits.output
    torch.manual_seed(1)
    for block in sampler.transformer.blocks:
        for part in (block.attn1.to_q, block.attn1.to_k):
            part.weight.data = torch.randn_like(part.weight) * part.weight.std()
        block.attn1.to_v.weight.data *= 5
    drifted = evaluate(tmp_path, "--plan", plan_path, "--quick")
    assert drifted.exit_code == 1, drifted.output
    assert "HAS DRIFTED" in drifted.output


@pytest.mark.parametrize(
    ("options", "prompts", "words"),
    [
        (("-o", "x"), f"{CALIBRATED[0][0]}\n", "prompts must be held out"),
        ((), "three\n", "-o must name the folder"),
        (("--quick", "--stamp"), "three\n", "--quick must come without"),
        (("-o", "x", "--require", "psnr=30"), "three\n", "--require must read name>=number"),
        (("-o", "x", "--require", "psnr.median>=3"), "three\n", "got 'psnr.median>=3'"),
        (("-o", "x", "--require", "ratio.worst<=3"), "three\n", "ratio has no .worst, got 'ratio.worst<=3'"),
        (("-o", "x", "--require", "broken.worst<=0"), "three\n", "broken has no .worst, got 'broken.worst<=0'"),
        (("--quick", "-o", "x"), "three\n", "--quick must come without"),
    ],
)
def test_a_wrong_call_is_one_line(tmp_path, plan_path, sampler, options, prompts, words):
    found = evaluate(tmp_path, "--plan", plan_path, *options, prompts=prompts)
    assert found.exit_code == 2
    assert words in found.output
    assert len(found.output.strip().splitlines()) == 1
    assert sampler.runs == 0


@pytest.mark.parametrize(("require", "options"), [("vmaf>=90", ()), ("broken<=0", ("--head-prompts", 0))])
def test_what_will_not_be_measured_cannot_be_required(tmp_path, plan_path, sampler, require, options):
    """And is refused before anything is measured."""
    found = evaluate(tmp_path, "--plan", plan_path, "-o", tmp_path / "a", "--require", require, *options)
    assert found.exit_code == 2
    assert "--require must name what is measured (latent, psnr, ssim, flicker" in found.output
    assert sampler.runs == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"latent": "high"}', '{"latent": NaN}', "[" * 100_000])
@pytest.mark.parametrize("which", ["", ".heads", "floor"])
def test_a_damaged_cell_is_one_line(tmp_path, plan_path, sampler, which, text):
    options = ("--plan", plan_path, "-o", tmp_path / "a")
    assert evaluate(tmp_path, *options).exit_code == 0
    cells = [path for path in (tmp_path / "a" / "cells").rglob("*.json") if path.name != "settings.json"]
    kind = {"": lambda p: p.parent.name != "floor" and ".heads" not in p.name, ".heads": lambda p: ".heads" in p.name}
    cell = next(filter(kind.get(which, lambda path: path.parent.name == which), cells))
    cell.write_text(text)
    found = evaluate(tmp_path, *options)
    assert found.exit_code == 2, found.exception
    assert found.output.startswith(f"calibatt-evaluate: {cell} must")
    assert "remove the file, and it is measured again" in found.output
    assert found.output.count("\n") == 1
    cell.unlink()
    assert evaluate(tmp_path, *options).exit_code == 0


@pytest.mark.parametrize("samples", [3, "abc", {"a": 1}, [1, None, {}], None])
def test_provenance_is_anybodys(tmp_path, plan_path, sampler, samples):
    plan = PlanFile.read(plan_path)
    write_plan(tmp_path / "p.plan", replace(plan, provenance={"samples": samples}))
    assert evaluate(tmp_path, "--plan", tmp_path / "p.plan", "--quick").exit_code == 0


def test_a_plan_that_promises_nothing_is_judged_by_its_error_alone(tmp_path, plan_path, sampler):
    plan = PlanFile.read(plan_path)
    write_plan(tmp_path / "old.plan", replace(plan, predicted={}))
    assert evaluate(tmp_path, "--plan", tmp_path / "old.plan", "-o", tmp_path / "a").exit_code == 0
    (found,) = table(tmp_path / "a")["plans"]
    assert "ratio" not in found["heads"]
    assert "does not say what calibration promised" in (tmp_path / "a" / "report.html").read_text()
    required = evaluate(tmp_path, "--plan", tmp_path / "old.plan", "-o", tmp_path / "a", "--require", "broken<=0")
    assert required.exit_code == 2, "no head can be called broken where nothing is promised"
    assert "--require must name what is measured (latent, psnr, ssim, flicker" in required.output
    assert "got 'broken'" in required.output
    quick = evaluate(tmp_path, "--plan", tmp_path / "old.plan", "--quick")
    assert quick.exit_code == 2
    assert "compile it again" in quick.output


def test_a_sampler_that_cannot_decode_is_judged_on_latents(tmp_path, plan_path, sampler):
    def refuse() -> None:
        raise PipelineError("the pipeline must have a VAE, got none")

    sampler.check_decode, sampler.decode = refuse, None
    found = evaluate(tmp_path, "--plan", plan_path, "-o", tmp_path / "a", "--head-prompts", 0)
    assert found.exit_code == 0, found.output
    assert "videos: judged on final latents alone: the pipeline must have a VAE, got none" in found.output
    values = table(tmp_path / "a")
    assert set(values["plans"][0]["metrics"]) == {"latent"}
    assert values["plans"][0]["heads"] == {}
    assert "data:image/png" not in (tmp_path / "a" / "report.html").read_text()


BEFORE = 5
"""Tokens before the video."""


def call_of(grid: TokenGrid, heads: int, vectors: int) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    tokens = BEFORE + grid.tokens + 3
    q, k, v, *grads = (torch.randn(heads, tokens, 16, generator=generator) for _ in range(3 + vectors))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return AttentionCall(0, q, k, v, out, None, grads, 2.0, slice(BEFORE, BEFORE + grid.tokens))


def test_effects_of_a_schedule_are_those_of_its_masks_and_copies():
    grid, blocks = TokenGrid(2, 5, 7), Blocks(16, 16)
    call = call_of(grid, 3, 2)
    core = random_schedule(np.random.default_rng(0), grid, blocks, 3, 0.4)
    keep = torch.from_numpy(np.stack([core.tile_keep(head) for head in range(3)]))
    _, expected, _ = block_effects(call, mask_words(keep[None]), 1, blocks)
    torch.testing.assert_close(effects.plan_effects(call, ListedSchedule(core)), expected[:, 0], rtol=1e-3, atol=1e-4)
    anchored = ListedSchedule(random_schedule(np.random.default_rng(0), grid, blocks, 3, 0.4, anchored_heads=[1, 2]))
    out, _ = reference_attention(*(x[None] for x in (call.q, call.k, call.v)), anchored, video_start=BEFORE)
    change = torch.stack([((out[0] - call.out) * grad).sum((1, 2)) / 2.0 for grad in call.grads])
    torch.testing.assert_close(effects.plan_effects(call, anchored).float(), change, rtol=1e-3, atol=1e-4)


class Guided(TinyVideoSampler):
    """Two forwards at each time."""

    def run(self, prompt: str, seed: int) -> torch.Tensor:
        latent = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        text = torch.randn(2, 1, 3, 16, generator=torch.Generator().manual_seed(len(prompt)))
        for now, then in zip(TIMES, [*TIMES[1:], 0.0], strict=True):
            with torch.no_grad():
                time = torch.full((1,), now * 1000)
                one, other = (self.transformer(latent, time, each, return_dict=False)[0] for each in text)
            latent = latent + (then - now) * (other + 2.0 * (one - other))
        return latent


def test_effects_add_up_to_what_a_plan_does_to_the_latent(plan_path):
    """Small masks, guidance: all signed effects together are the change of the latent along the random vectors."""
    plan, sampler = Plan(PlanFile.read(plan_path.with_name("dense.plan"))), Guided()
    found = effects.measure_plans(sampler, [plan], "three", 1, 3, sorted(TIMES))
    assert found.shape == (1, 3, 3, 2, 2)
    dense = sampler.run("three", 1)
    with plan.attach(sampler.transformer):
        change = sampler.run("three", 1) - dense
    expected = [float((calibration._cotangent(dense, 1, vector, 0) * change).sum()) for vector in range(3)]
    np.testing.assert_allclose(found[0].sum((1, 2, 3)), expected, rtol=0.2, atol=0.2 * np.abs(expected).max())


def test_segments_that_few_steps_leave_out_are_promised_by_the_nearest(plan_path):
    plan = PlanFile.read(plan_path)
    prices = np.array(plan.predicted["head_price"])
    np.testing.assert_allclose(effects.promised(plan, TIMES), prices)
    found = effects.promised(plan, (1.0, 0.4))
    np.testing.assert_allclose(found, [prices[0], np.zeros((2, 2)), prices[1] + prices[2]])
    signed = np.arange(16.0).reshape(4, 2, 2)
    summed = effects.by_segment(plan, signed, (0.3, 0.4, 0.8, 1.0))
    np.testing.assert_allclose(summed, [signed[0] + signed[1], signed[2], signed[3]])


def video(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_metrics_agree_with_their_definitions():
    latent = video(1, 2, 4, 3, 5, 5)
    assert metrics.latent_db(latent * 1.01, latent).tolist() == pytest.approx([40.0, 40.0], abs=1e-3)
    assert metrics.latent_db(latent, latent).tolist() == [100.0, 100.0]
    reference = video(0, 2, 3, 3, 16, 16) * 0.5
    assert metrics.psnr_db(reference + 0.02, reference).tolist() == pytest.approx([40.0, 40.0], abs=1e-4)
    assert metrics.psnr_db(reference, reference).tolist() == [100.0, 100.0]
    assert metrics.ssim(reference, reference).tolist() == pytest.approx([1.0, 1.0])
    assert metrics.flicker(reference + 0.1, reference).abs().max() < 1e-7
    other = reference.clone()
    other[:, :, 1] += 0.2  # a tenth of the range, on one frame of three: both changes differ
    assert metrics.flicker(other, reference).tolist() == pytest.approx([0.1, 0.1], abs=1e-6)
    with pytest.raises(ValueError, match="at least 11 pixels"):
        metrics.ssim(reference[..., :8], reference[..., :8])


def test_ssim_agrees_with_its_formula_in_one_window():
    x, y = ((video(seed, 1, 1, 1, 11, 11) + 1) / 2 for seed in (1, 2))
    axis = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = torch.from_numpy(np.outer(axis, axis) / axis.sum() ** 2)
    mx, my = (float((window * v).sum()) for v in (x, y))
    vx, vy = (float((window * v * v).sum()) - m * m for v, m in ((x, mx), (y, my)))
    both = float((window * x * y).sum()) - mx * my
    expected = (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert float(metrics.ssim(x * 2 - 1, y * 2 - 1)) == pytest.approx(expected, rel=1e-5)


def test_a_summary_finds_the_worst():
    found = metrics.summarise([3.0, 1.0, 2.0], higher_is_better=False)
    assert (found.mean, found.worst, found.worst_at, found.count) == (2.0, 3.0, 0, 3)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert metrics.summarise([3.0, 1.0], higher_is_better=True).worst_at == 1
    with pytest.raises(ValueError, match="at least one number"):
        metrics.summarise([], True)


@pytest.mark.gpu
def test_a_mask_bound_on_a_gpu_is_what_it_is_on_a_cpu() -> None:
    grid, blocks = TokenGrid(2, 5, 27), Blocks(64, 64)
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand((3, blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens)), generator=generator) < 0.5
    keep[..., 0] = True
    q, k, v = (torch.randn((2, 3, grid.tokens, 32), generator=generator) for _ in range(3))
    expected = masks.attend(q, k, v, masks.bind_mask(keep, grid, blocks))
    found = masks.attend(q.cuda(), k.cuda(), v.cuda(), masks.bind_mask(keep.cuda(), grid, blocks))
    torch.testing.assert_close(found.cpu(), expected, atol=5e-3, rtol=5e-3)


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, plan_path, sampler, monkeypatch):
    store = tiny_store(tmp_path / "stats")
    inside = evaluate(tmp_path, "--plan", plan_path, "-o", tmp_path / "stats" / "report")
    assert inside.exit_code == 2
    assert "must not be in a store of statistics" in inside.output
    assert Store.open(tmp_path / "stats") == store
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    stamp = evaluate(tmp_path, "--plan", plan_path, "-o", tmp_path / "a", "--stamp")
    assert stamp.exit_code == 2
    assert "--stamp must be able to replace" in stamp.output
    assert sampler.runs == 0


@pytest.mark.parametrize("change", ["model", "resolution", "lists"])
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_measured(tmp_path, plan_path, sampler, change):
    path, plan = tmp_path / "p.plan", PlanFile.read(plan_path)
    if change == "lists":  # damaged, with right digests
        file = Container.open(plan_path, magic=MAGIC, version=VERSION)
        sections = {name: file.section(name) for name in file.names}
        sections["0/masks"] = sections["0/masks"][::-1]
        write_container(path, magic=MAGIC, version=VERSION, header=file.header, sections=sections)
    else:
        other = support_plan() if change == "model" else replace_grid(plan)
        write_plan(path, other)
    found = evaluate(tmp_path, "--plan", path, "-o", tmp_path / "a")
    assert found.exit_code == 2, found.exception
    assert found.output.startswith(f"calibatt-evaluate: {path}")
    assert found.output.count("\n") == 1
    assert sampler.runs == 0


def replace_grid(plan: PlanFile) -> PlanFile:
    """A dense plan of the same model for videos of one frame more."""
    grid = replace(plan.grid, frames=plan.grid.frames + 1)
    heads = plan.signature.heads
    dense = random_schedule(np.random.default_rng(0), grid, plan.blocks, heads, dense_heads=range(heads))
    layers = (dense,) * plan.signature.layers
    return replace(plan, grid=grid, schedules=StoredLayers.of([layers] * len(plan.segments)))


def test_video_and_sound_lose_relative_to_their_own_sizes():
    video, sound = torch.ones(2, 4, 3), torch.full((2, 5), 100.0)
    found = metrics.latent_db((video * 1.2, sound * torch.tensor([[1.0], [1.4]])), (video, sound))
    torch.testing.assert_close(
        found, -10 * torch.tensor([0.04 / 2, (0.04 + 0.16) / 2]).double().log10(), rtol=1e-5, atol=0
    )
