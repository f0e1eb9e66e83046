"""The study of methods: masks through the plans' kernels, patterns, rules that look at the input, budgets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend

pytest.importorskip("diffusers")

from support.sampler import CALIBRATED, GRID, TIMES, TinyVideoSampler, tiny_store

from calibatt.compiler.bits import pack
from calibatt.compiler.stats import Store, window_keep
from calibatt.plans import Blocks, TokenGrid, schedule_of
from calibatt.runtime.reference import reference_attention
from calibatt.runtime.schedule import ListedSchedule
from calibatt.tools.calibrate import models
from calibatt.tools.calibrate.effects import keep_planes
from calibatt.tools.studies import ablations, baselines, bench, candidates, masks, pareto, sizes, sol_attn, study
from calibatt.tools.studies.bench import Bench, Kept
from calibatt.tools.studies.judgements import mean_and_error

BLOCKS = Blocks(16, 16)
WORK = [("three", 1), ("four words", 2)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "stats"
    tiny_store(folder)
    return folder


def tiny_bench() -> Bench:
    return Bench(TinyVideoSampler(), BLOCKS, WORK, WORK, batch=1)


def random_masks(*shape: int, seed: int = 0) -> torch.Tensor:
    score = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return masks.with_top(score > 0.6, score)


def qkv(batch: int, heads: int, grid: TokenGrid) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, grid.tokens, 16, generator=generator) for _ in range(3)]


def test_a_mask_of_every_sample_is_executed():
    grid = TokenGrid(2, 5, 7)  # 70 tokens: the last block is partial
    q, k, v = qkv(2, 3, grid)
    keep = random_masks(2, 3, 5, 5)
    out = masks.masked_attention(q, k, v, keep, grid, BLOCKS)
    for sample in range(2):
        schedule = ListedSchedule(schedule_of(grid, BLOCKS, [*pack(keep[sample].numpy())]))
        schedule.core.check()
        here = slice(sample, sample + 1)
        want, _ = reference_attention(q[here], k[here], v[here], schedule)
        torch.testing.assert_close(out[here], want)


def test_masks_of_reordered_tokens_are_undone():
    found = tiny_bench()
    order = baselines.cube_order(GRID)
    keep = random_masks(3, 2, 2, 16, 16)
    q, k, v = qkv(1, 2, GRID)
    out = Kept(found, keep, order)(q, k, v, 1, TIMES[2])
    schedule = ListedSchedule(schedule_of(GRID, BLOCKS, [*pack(keep[2, 1].numpy())]))
    want, _ = reference_attention(q[:, :, order], k[:, :, order], v[:, :, order], schedule)
    torch.testing.assert_close(out[:, :, order], want)


@pytest.mark.parametrize("kind", baselines.PATTERNS)
def test_a_pattern_has_any_density_and_keeps_what_is_near(kind):
    score = baselines.pattern(kind, GRID, BLOCKS)
    assert score.shape == (16, 16)
    for share in (0.1, 0.35, 0.8):
        keep = score > candidates.quantile_threshold(score, share)
        assert float(keep.float().mean()) == pytest.approx(share, abs=1 / 256)
        assert int(keep.sum(1).max() - keep.sum(1).min()) <= 1
    assert (score.diagonal() > -4).all(), "a block's own keys are among the first that are kept"


def test_patterns_are_those_of_their_descriptions():
    grid = TokenGrid(4, 4, 16)  # a block is a row
    keep = baselines.pattern("frames", grid, BLOCKS) > -4
    assert torch.equal(keep, torch.block_diag(*[torch.ones(4, 4)] * 4).bool())
    keep = baselines.pattern("rows", grid, BLOCKS) > -4
    assert torch.equal(keep, torch.eye(4).repeat(4, 4).bool())
    for kind in ("radial", "spatial"):  # frame 2, row 0: the first frame is kept soon
        near = baselines.pattern(kind, grid, BLOCKS)[8].argsort(descending=True).tolist()
        assert near.index(8) == 0, kind
        assert {0, 1, 2, 3} < set(near[:8]), kind


def test_cubes_are_whole():
    order = baselines.cube_order(TokenGrid(4, 8, 8))
    at = baselines.coordinates(TokenGrid(4, 8, 8))[order]
    assert (at.view(4, 64, 3).amax(1) - at.view(4, 64, 3).amin(1) == 3).all()
    assert order.sort().values.tolist() == list(range(256))
    with pytest.raises(ValueError, match=r"multiples of 4, got \(2, 8, 8\)"):
        baselines.cube_order(TokenGrid(2, 8, 8))


def test_top_p_as_a_score_is_top_p():
    mass = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    score = baselines.mass_before(mass)
    for threshold, plane in zip((0.3, 0.8), keep_planes(mass, (0.3, 0.8)), strict=True):
        assert torch.equal(score > -threshold, plane)


def test_skip_softmax_skips_what_stays_below_the_running_maximum():
    grid = TokenGrid(2, 5, 7)
    q, k, _ = qkv(1, 2, grid)
    score = baselines.skip_softmax_score(q, k, BLOCKS)
    scores = (q @ k.mT / 4)[0]
    for head in range(2):
        for i in range(5):
            rows = scores[head, i * 16 : (i + 1) * 16]
            running = torch.full((len(rows),), -torch.inf)
            for j in range(5):
                largest = rows[:, j * 16 : (j + 1) * 16].amax(1)
                running = torch.maximum(running, largest)
                assert float(score[0, head, i, j]) == pytest.approx(float((largest - running).max()), abs=1e-5)


def test_sol_attn_counts_what_it_skips_by_means():
    grid = TokenGrid(2, 5, 7)  # 70 tokens: the last block has 6
    q, k, v = (x.double() for x in qkv(1, 1, grid))
    score = (
        torch.stack([block.mean(0) for block in q[0, 0].split(16)])
        @ torch.stack([block.mean(0) for block in k[0, 0].split(16)]).mT
    )
    above = (score - score.mean(1, keepdim=True)) / score.std(1, keepdim=True, correction=0)
    torch.testing.assert_close(sol_attn.standing(q, k, BLOCKS)[0, 0].double(), above, atol=1e-4, rtol=1e-4)
    keep = masks.with_top(above > 0.5, above)
    sampler = SimpleNamespace(grid=grid)
    fake = SimpleNamespace(blocks=BLOCKS, sampler=sampler, step=lambda time: 0)
    rule = sol_attn.SolAttn(fake, torch.full((1, 1, 1), 0.5))
    out = rule(q.float(), k.float(), v.float(), 0, 1.0)[0, 0]
    assert rule.density == pytest.approx(float(keep.float().mean()))
    for token in range(70):
        weights, values = [], []
        for block, (keys, vectors) in enumerate(zip(k[0, 0].split(16), v[0, 0].split(16), strict=True)):
            if keep[token // 16, block]:
                weights += (keys @ q[0, 0, token] / 4).exp().tolist()
                values += list(vectors)
            else:
                weights.append(len(keys) * float((keys.mean(0) @ q[0, 0, token] / 4).exp()))
                values.append(vectors.sum(0) / len(keys))
        want = (torch.tensor(weights).double()[:, None] * torch.stack(values)).sum(0) / sum(weights)
        torch.testing.assert_close(out[token].double(), want, atol=1e-5, rtol=1e-5)
    dense = sol_attn.SolAttn(fake, torch.full((1, 1, 1), -torch.inf))(q.float(), k.float(), v.float(), 0, 1.0)
    torch.testing.assert_close(
        dense.double(), torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rules_run_on_a_gpu_in_sixteen_bits(dtype):
    grid, blocks = TokenGrid(4, 16, 16), Blocks(128, 128)
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 2, 1024, 64, device="cuda", generator=generator).to(dtype) for _ in range(3))
    fake = SimpleNamespace(blocks=blocks, sampler=SimpleNamespace(grid=grid), step=lambda time: 0)
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    for rule in (
        bench.Exact(SDPBackend.CUDNN_ATTENTION),
        sol_attn.SolAttn(fake, torch.full((1, 1, 2), -torch.inf).cuda()),
    ):
        out = rule(q, k, v, 0, 1.0)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), dense, atol=2e-2, rtol=2e-2)
    keep = random_masks(2, 2, 8, 8).cuda()
    out, lse = masks.masked_with_lse(q, k, v, keep, grid, blocks)
    on_cpu = [x.float().cpu() for x in (q, k, v)]
    want, want_lse = masks.masked_with_lse(*on_cpu, keep.cpu(), grid, blocks)
    torch.testing.assert_close(out.float().cpu(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.cpu(), want_lse, atol=1e-2, rtol=1e-2)


def test_dense_steps_count_in_sol_attn(store):
    made = study.Study(Bench(TinyVideoSampler(), BLOCKS, WORK, CALIBRATED, batch=2), Store.open(store))
    rule = made.sol(0.6, 1)
    assert rule.threshold[0].max() == -torch.inf
    assert made.bench.judge(rule)["density"] == pytest.approx(0.6, abs=0.1)
    with pytest.raises(ValueError, match=r"must be above that of 1 dense steps of 3, got 0\.3"):
        made.sol(0.3, 1)


def test_thresholds_give_their_shares():
    scores = torch.rand(2, 3, 4, 2, 5, 10, generator=torch.Generator().manual_seed(0))
    found = candidates.head_thresholds(scores, (0.1, 0.5, 1.0))
    assert found.shape == (3, 2, 3, 2)
    over = (scores > found[:, :, :, None, :, None, None]).float().mean((3, 5, 6))
    torch.testing.assert_close(over, torch.tensor([0.1, 0.5, 1.0])[:, None, None, None].expand_as(over))


def test_errors_are_measured_exactly_and_a_budget_is_kept():
    found = tiny_bench()
    mass = bench.see(found)
    assert mass.shape == (3, 2, 2, 2, 16, 16)
    assert torch.allclose(mass.sum(-1), torch.ones(()), atol=1e-4)
    score = mass.mean(2)
    thresholds = candidates.head_thresholds(score, (0.2, 0.6, 1.0))
    keep = masks.with_top(score > thresholds[..., None, None], score.expand(3, *score.shape))
    measured = candidates.measure(found, lambda m: keep[:, m.step, m.layer], 3)
    assert (measured.error[2] < 1e-6).all()
    assert (measured.error[0] >= measured.error[1]).float().mean() > 0.9
    assert measured.density[:, 0, 0, 0].tolist() == pytest.approx(keep[:, 0, 0, 0].float().mean((1, 2)).tolist())
    by_input = candidates.measure(found, lambda m: keep[:, m.step, m.layer, None], 3)
    torch.testing.assert_close(by_input.error, measured.error, rtol=1e-3, atol=1e-6)
    pick = candidates.budgeted(measured, torch.ones(3, 2, 2), 0.5)
    assert 0.4 < float(measured.density.gather(0, pick[None]).mean()) <= 0.5
    with pytest.raises(ValueError, match="at least what the candidates can keep"):
        candidates.budgeted(measured, torch.ones(3, 2, 2), 0.01)


def test_errors_are_priced_as_the_store_prices_windows(store):
    opened = Store.open(store)
    found = study.Study(Bench(TinyVideoSampler(), BLOCKS, WORK, CALIBRATED, batch=2), opened)
    window = torch.from_numpy(window_keep(opened.manifest.windows[0], GRID, BLOCKS)).expand(1, 2, 16, 16)
    error = candidates.measure(found.bench, lambda moment: window, 1).error[0]
    table = opened.table()
    told = (table.window_error[:, :, 0] * table.time_level[:, None, None])[::-1]  # steps fall
    ratio = (error * found.price).log() - torch.from_numpy(told.copy()).log()
    assert ratio.abs().mean() < 1.5
    assert found.price[0].sum() > 0


def test_milliseconds_leave_the_first_batch_out(monkeypatch):
    """It compiles kernels, and puts masks on the device."""
    spent = iter([100.0, 8.0, 6.0])
    monkeypatch.setattr(bench._Timed, "total_ms", lambda self: next(spent))
    made = tiny_bench()
    assert made.judge(bench.Exact())["attention_ms"] == 8.0
    spent = iter([100.0, 8.0])
    single = Bench(made.sampler, BLOCKS, WORK, WORK, batch=2)
    runs = single.sampler.runs
    found = single.judge(bench.Exact())
    assert found["attention_ms"] == 4.0
    assert len(found["psnr"]) == 2
    assert single.sampler.runs == runs + 3  # dense, the rule, the rule again
    spent = iter([100.0])
    assert single.judge(bench.Exact(), timed=False)["attention_ms"] is None


def test_samples_count_alike_in_the_density_of_uneven_batches():
    made = Bench(TinyVideoSampler(), BLOCKS, [*WORK, ("five words", 3)], WORK, batch=2)

    def score(q, k, v, step, layer):
        few = torch.zeros(len(q), 2, 16, 16)
        return few if len(q) == 2 else few + 1

    rule = bench.PerInput(made, score, torch.full((3, 2, 2), 0.5))
    assert made.judge(rule, timed=False)["density"] == pytest.approx((2 / 16 + 1) / 3)


def test_a_prompt_of_the_store_is_not_held_out(store, tmp_path, monkeypatch):
    monkeypatch.setitem(models.SAMPLERS, "demo", lambda steps, device: TinyVideoSampler())
    (tmp_path / "prompts.txt").write_text(f"three\n{CALIBRATED[2][0]}\n")
    arguments = ["--stats", store, "--held-out", tmp_path / "prompts.txt", "-o", tmp_path / "a.json"]
    found = CliRunner().invoke(pareto.main, [*map(str, arguments), "--device", "cpu"])
    assert found.exit_code == 2
    assert f"must be none that --stats was made of, got '{CALIBRATED[2][0]}'" in " ".join(found.output.split())


@pytest.mark.slow
def test_every_method_runs_and_says_the_same_again(store, tmp_path, monkeypatch):
    monkeypatch.setitem(models.SAMPLERS, "demo", lambda steps, device: TinyVideoSampler())
    monkeypatch.setattr(study, "SHARES", (0.2, 0.6))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("three\nfour words\n")

    def run(name: str, *options: object) -> dict:
        arguments = ["--stats", store, "--held-out", prompts, "--calibration", 1, "--densities", "0.5", "--batch", 2]
        output = tmp_path / name
        found = CliRunner().invoke(
            pareto.main, [str(a) for a in [*arguments, "-o", output, "--device", "cpu", *options]]
        )
        assert found.exit_code == 0, found.output + repr(found.exception)
        return json.loads(output.read_text())

    figure = tmp_path / "figure.png"
    first = run("a.json", "--figure", figure)
    assert {row["method"] for row in first["rows"]} == {
        "dense: block-sparse kernel",
        "dense: PyTorch",
        *study.METHODS,
    }
    assert figure.read_bytes().startswith(b"\x89PNG")
    for row in first["rows"]:
        assert len(row["psnr"]) == 2
        free = row["method"].startswith(("d", "the paper")) or "equal time" in row["method"]
        assert row["density"] <= 1.0 if free else abs(row["density"] - 0.5) < 0.12, row
    assert first["store"] == {"prompts": 6, "samplings": 6, "vectors": [4]}
    assert first["prompts"] == 2  # as many as the file has
    exact = [row for row in first["rows"] if row["target"] == 1.0]
    assert all(min(row["psnr"]) > 80 for row in exact)
    names = f"{study.OURS}; budget: random"
    again = run("b.json", "--methods", names)
    values = {(row["method"], row["target"]): row["psnr"] for row in first["rows"]}
    assert all(values[row["method"], row["target"]] == row["psnr"] for row in again["rows"])
    assert len(run("b.json", "--methods", names)["rows"]) == 4
    assert np.isfinite([row["mean"] for row in again["difference_from_ours_db"]]).all()


@pytest.mark.slow
def test_the_study_of_sizes_says_density_and_speed_at_equal_quality(store, tmp_path, monkeypatch):
    for name in ("demo", "demo-medium"):
        monkeypatch.setitem(models.SAMPLERS, name, lambda steps, device: TinyVideoSampler())
    output, figure, markdown = (tmp_path / name for name in ("a.json", "a.png", "a.md"))
    arguments = ["--stats", f"small={store}", "--stats", f"medium={store}", "--densities", "0.3,0.6", "--prompts", 2]
    arguments += ["--calibration", 2, "--device", "cpu", "-o", output, "--figure", figure, "--table", markdown]
    found = CliRunner().invoke(sizes.main, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output + repr(found.exception)
    result = json.loads(output.read_text())
    assert {row["size"] for row in result["rows"]} == {"small", "medium"}
    assert {row["method"] for row in result["rows"]} <= {sizes.DENSE, *sizes.CHOSEN}
    small, medium = ([r["psnr"] for r in result["rows"] if r["size"] == size] for size in ("small", "medium"))
    assert small == medium
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = markdown.read_text()
    assert text.count("| compiled |") == 1  # the two are of as many tokens here
    assert "not judged" in text  # Sol-Attn's dense step alone takes 0.33
    count = len(result["rows"])
    assert CliRunner().invoke(sizes.main, [str(argument) for argument in arguments]).exit_code == 0
    assert len(json.loads(output.read_text())["rows"]) == count
    for text, message in (("huge=x", "SIZE one of small, medium, large; got 'huge=x'"), ("small", "SIZE=FOLDER")):
        refused = CliRunner().invoke(sizes.main, ["--stats", text, "-o", str(output)])
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())


def test_speed_up_is_read_at_equal_quality():
    rows = [{"density": d, "psnr": [p, p], "attention_ms": m} for d, p, m in ((0.1, 20.0, 10.0), (0.3, 30.0, 20.0))]
    assert sizes.speed_up_at(rows, 60.0, 25.0) == pytest.approx(4.0)
    assert sizes.speed_up_at(rows, 60.0, 35.0) is None


def test_the_published_table_is_that_of_the_published_rows():
    docs = Path(__file__).parents[2] / "docs"
    result = json.loads((docs / "benchmarks" / "pareto_h200.json").read_text("utf-8"))
    page = (docs / "evaluation.md").read_text("utf-8")
    rows = {(row["method"], row["target"]): mean_and_error(row["psnr"]) for row in result["rows"]}
    methods = {method for method, target in rows if target < 1}
    assert len(methods) == 11
    for method in methods:
        found = [rows[method, density] for density in (0.2, 0.35, 0.5)]
        told = " | ".join(f"{each['mean']:.1f} ({each['standard_error']:.1f})" for each in found)
        assert f"| {told} |" in page, (method, told)


def test_ablations_change_one_thing_each(store, tmp_path, monkeypatch):
    monkeypatch.setitem(models.SAMPLERS, "demo", lambda steps, device: TinyVideoSampler())
    tiny_store(tmp_path / "less", CALIBRATED[:3])
    prompts, output, markdown = (tmp_path / name for name in ("prompts.txt", "a.json", "a.md"))
    prompts.write_text("three\nfour words\n")
    arguments = ["--stats", store, "--stats", store, "--stats", tmp_path / "less", "--held-out", prompts]
    arguments += ["--densities", "0.5", "--calibration", 2, "--device", "cpu", "-o", output, "--table", markdown]
    found = CliRunner().invoke(ablations.main, [str(argument) for argument in arguments])
    assert found.exit_code == 0, found.output + repr(found.exception)
    rows = {row["variant"]: row for row in json.loads(output.read_text())["rows"]}
    base = rows[ablations.BASE]["psnr"]
    assert rows["again"]["psnr"] == base
    assert [rows[n]["store"]["samplings"] for n in ("defaults", "calibration prompts: 3")] == [6, 3]
    assert rows["calibration prompts: 3"]["psnr"] != base
    assert rows["no windows"]["psnr"] != base
    assert rows["no anchors, one density everywhere"]["density"] == pytest.approx(0.5, abs=0.05)
    assert all(row["density"] <= 0.51 for name, row in rows.items() if name != "the paper's own method")
    lines = markdown.read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(rows) + 1
    assert "Traceback" not in found.output
