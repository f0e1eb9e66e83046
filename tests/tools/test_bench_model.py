"""Benchmarks of whole models: on a model so small that a CPU proves the path, never the time."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from support import quantised
from torch.autograd import DeviceType

pytest.importorskip("diffusers")

from calibatt.plans import Blocks, ModelSignature, TokenGrid
from calibatt.runtime import Plan
from calibatt.runtime.adapters import ADAPTERS, adapter_for
from calibatt.tools.bench import derived, forwards, model, variants
from calibatt.tools.bench.__main__ import main
from calibatt.tools.bench.published import MODELS, token_grid
from calibatt.tools.bench.trace import WAITS, WHOLE, summarised
from calibatt.tools.studies import figures

CPU, META = torch.device("cpu"), torch.device("meta")
LAYERS = 3


def bench(command: str, output: Path, *options: str) -> Any:
    """The report of a command on the tiny model."""
    arguments = [command, "--model", "tiny", "--device", "cpu", "-o", str(output), *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(output.read_text("utf-8"))


def drawn(path: Path) -> Path:
    """The picture of a report."""
    picture = path.with_suffix(".png")
    result = CliRunner().invoke(figures.main, [str(path), "-o", str(picture)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return picture


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bench")
    options = ["--modes", "eager,regional", "--rounds", "2", "--steps", "3", "--trace"]
    found = bench("model", folder / "model.json", *options)
    return {**found, "picture": drawn(folder / "model.json")}


def rows(report: Any, kind: str, **wanted: Any) -> list[Any]:
    return [row for row in report[kind] if all(row[key] == value for key, value in wanted.items())]


def test_a_report_says_what_was_measured(report: Any) -> None:
    assert report["command"] == (
        "calibatt-bench model --model tiny --modes eager,regional --rounds 2 --steps 3 --trace --device cpu "
        "--output model.json"
    )
    assert {"date", "device", "versions", "threads", "weights", "masks", "states"} <= set(report)
    assert report["layers"] == report["published_layers"] == LAYERS
    assert [(size["name"], size["tokens"]) for size in report["sizes"]] == [("small", 256), ("smaller", 144)]
    assert report["missing"] == {"flash-attention-4": "FlashAttention-4 needs a CUDA device"}


def test_every_case_is_timed_and_nothing_compiles_meanwhile(report: Any) -> None:
    cases = {(size, mode) for size in ("small", "smaller") for mode in ("eager", "regional")}
    for size, mode in cases:
        here = rows(report, "forwards", size=size, mode=mode)
        assert [row["attention"] for row in here] == ["sdpa", "copy", "plan 0.5", "plan 0.3"]
        here += rows(report, "samplings", size=size, mode=mode)
        assert [row["attention"] for row in here[4:]] == ["sdpa", "plan 0.5", "plan 0.3"]
        assert all(0 < row["min_ms"] <= row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in here)
        assert [row["rounds"] for row in here] == [2] * 4 + [1] * 3
        assert [row["recompiled_graphs"] for row in here] == [0] * 7


def test_densities_are_those_executed(report: Any) -> None:
    for name, density in (("plan 0.5", 0.5), ("plan 0.3", 0.3)):
        for row in rows(report, "forwards", attention=name) + rows(report, "samplings", attention=name):
            assert row["density"] == pytest.approx(density, abs=0.02)
    for row in report["attachments"]:
        assert row["executed_density"] == pytest.approx(float(row["attention"].split()[1]), abs=0.02)
        assert row["segments"] == 3
        assert row["index_bytes_a_segment"] > 0
        assert row["attach_s"] > 0
        assert row["attach_device_bytes"] is None


def test_every_case_was_checked(report: Any) -> None:
    assert len(report["checks"]) == len(report["forwards"])
    for check in report["checks"]:
        assert check["finite"]
        assert check["first_call_s"] > 0
        assert (check["plan_bytes"] is not None) == check["attention"].startswith("plan")
        assert check["planned_calls"] == LAYERS * check["attention"].startswith("plan")
        assert check["difference_to_dense"] == 0 or check["attention"] != "sdpa"
        assert check["difference_to_dense"] > 0 or check["attention"] == "sdpa"


def test_traces_count_what_the_host_waits_for(report: Any) -> None:
    assert [(row["size"], row["mode"], row["attention"]) for row in report["traces"]] == [
        (size, "regional", attention) for size in ("small", "smaller") for attention in ("sdpa", "plan 0.3")
    ]
    for row in report["traces"]:
        assert row["waits"] == {}
        assert row["planned_calls"] == LAYERS * (row["attention"] == "plan 0.3")
        assert row["items"] == (2 + 2 * LAYERS) * (row["attention"] == "plan 0.3")


def test_a_picture_is_drawn(report: Any) -> None:
    assert report["picture"].read_bytes()[:4] == b"\x89PNG"
    assert report["picture"].stat().st_size > 20_000


def test_plans_in_8_bits_stand_beside_those_in_16(tmp_path: Path) -> None:
    options = ["--sizes", "smaller", "--densities", "0.5", "--precisions", "bf16,int8_fp8", "--modes", "eager"]
    found = bench("model", tmp_path / "model.json", *options, "--rounds", "1", "--steps", "0")
    names = ["plan 0.5", "plan 0.5 int8_fp8"]
    assert [row["attention"] for row in found["forwards"]] == ["sdpa", "copy", *names]
    wide, eight = (rows(found, "checks", attention=name)[0]["difference_to_dense"] for name in names)
    assert wide != eight
    assert eight == pytest.approx(wide, rel=0.2)


def test_a_step_cache_skips_a_fixed_share(tmp_path: Path) -> None:
    """Nothing new is compiled for it, and in a forward that is skipped only the first layer attends."""
    options = ["--sizes", "smaller", "--densities", "0.8,0.5", "--modes", "regional", "--rounds", "1", "--steps", "5"]
    found = bench("model", tmp_path / "model.json", *options, "--skip", "0.4", "--layers", "2")
    assert [(row["attention"], row["skip"], row["skipped_forwards"]) for row in found["samplings"]] == [
        ("sdpa", 0, 0), ("sdpa", 0.4, 2), ("plan 0.5", 0, 0), ("plan 0.5", 0.4, 2)
    ]  # fmt: skip
    assert {row["recompiled_graphs"] for row in found["samplings"]} == {0}
    assert len(found["of_all_layers"]) == 4


def test_what_a_step_cache_would_give_with_all_layers() -> None:
    def sampling_ms(layers: int, computed: int, skipped: int) -> float:
        return (computed + skipped) * 2.0 + (computed * layers + skipped) * 7.0

    place = {"size": "s", "mode": "regional", "linears": "fp8", "attention": "plan 0.3", "steps": 20}
    samplings = [
        {
            **place,
            "skip": skip,
            "skipped_forwards": int(20 * skip),
            "median_ms": sampling_ms(2, 20 - int(20 * skip), int(20 * skip)),
        }
        for skip in (0, 0.4)
    ]
    plain, cached = derived.of_all_layers(samplings, 2, 40)
    assert plain["layer_ms"] == cached["layer_ms"] == pytest.approx(7)
    assert plain["all_layers_ms"] == pytest.approx(sampling_ms(40, 20, 0))
    assert cached["all_layers_ms"] == pytest.approx(sampling_ms(40, 12, 8))
    assert derived.of_all_layers(samplings[1:], 2, 40) == []


def test_two_kinds_of_linears_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured against its own dense model. A CPU multiplies in e4m3 too, with one scale, if it may."""
    quantised.require("torchao")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    monkeypatch.setattr("torchao.quantization.PerRow", importlib.import_module("torchao.quantization").PerTensor)
    options = ["--sizes", "smaller", "--densities", "0.5", "--modes", "regional", "--rounds", "1", "--steps", "0"]
    found = bench("model", tmp_path / "model.json", *options, "--linears", "bf16,fp8")
    kinds = [("bf16", name) for name in ("sdpa", "copy", "plan 0.5")] + [
        ("fp8", name) for name in ("sdpa", "copy", "plan 0.5")
    ]
    assert [(row["linears"], row["attention"]) for row in found["forwards"]] == kinds
    assert {check["difference_to_dense"] for check in rows(found, "checks", attention="sdpa")} == {0}
    plans = {row["linears"]: row for row in rows(found, "derived", attention="plan 0.5")}
    for kind, plan in plans.items():
        dense = rows(found, "forwards", attention="sdpa", linears=kind)[0]
        assert plan["speedup"] == dense["median_ms"] / plan["ms"]
    assert drawn(tmp_path / "model.json").stat().st_size > 20_000


def test_fp8_linears_cannot_be_made_here() -> None:
    quantised.require("torchao")
    result = CliRunner().invoke(main, ["model", "--model", "tiny", "--device", "cpu", "--linears", "fp8"])
    assert result.exit_code == 2
    assert "--linears fp8 cannot be made here: torchao says Float8 dynamic quant" in " ".join(result.output.split())


def test_fp8_linears_need_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    result = CliRunner().invoke(main, ["model", "--model", "tiny", "--device", "cpu", "--linears", "fp8"])
    assert result.exit_code == 2
    assert "--linears fp8 needs torchao (pip install torchao)" in " ".join(result.output.split())


def test_what_follows_from_the_times() -> None:
    times = {("sdpa-cudnn", 1): 10, ("copy", 0): 4, ("flash-attention-4", 1): 9, ("plan", 0.5): 8}
    forwards = [
        {"size": "s", "mode": "eager", "linears": "bf16", "attention": name, "density": density, "median_ms": ms}
        for (name, density), ms in times.items()
    ]
    dense, flash, against_dense, against_flash = derived.derived(forwards)
    assert dense["attention_share"] == pytest.approx(0.6)
    assert flash["attention_share"] == pytest.approx(5 / 9)
    assert against_dense["bound_ms"] == 7
    assert against_dense["ratio_to_bound"] == pytest.approx(8 / 7)
    assert against_dense["speedup"] == pytest.approx(10 / 8)
    assert (against_flash["against"], against_flash["bound_ms"]) == ("flash-attention-4", 6.5)
    assert derived.derived([row for row in forwards if row["attention"] != "copy"]) == []


def test_a_whole_model_can_be_compiled_and_time_is_kept(tmp_path: Path) -> None:
    options = ["--sizes", "small", "--layers", "1", "--rounds", "1", "--steps", "0", "--densities", "1"]
    found = bench("model", tmp_path / "full.json", *options, "--modes", "full", "--no-peers")
    assert [row["attention"] for row in found["forwards"]] == ["sdpa", "copy", "plan 1"]
    assert {row["recompiled_graphs"] for row in found["forwards"]} == {0}
    assert rows(found, "checks", attention="plan 1")[0]["difference_to_dense"] < 1e-5
    assert (found["missing"], found["samplings"]) == ({}, [])
    late = bench("model", tmp_path / "late.json", *options, "--modes", "eager", "--no-peers", "--seconds", "0")
    assert (late["missing"], late["forwards"]) == ({"small": "out of time"}, [])


def test_wrong_results_and_cases_that_fail_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["model", "--model", "tiny", "--device", "cpu", "--sizes", "small", "--modes", "eager", "--no-peers"]
    options += ["--rounds", "1", "--layers", "1", "-o", str(tmp_path / "report.json")]
    monkeypatch.setattr(variants, "_copy", lambda q, k, v, site, context: v * torch.nan)
    with pytest.raises(
        forwards.BenchError, match="small, eager, bf16 linears, copy: the result must be finite, got 4096"
    ):
        CliRunner().invoke(main, options, catch_exceptions=False)
    monkeypatch.setattr(variants, "_copy", lambda q, k, v, site, context: v[:, 1:])
    result = CliRunner().invoke(main, options, catch_exceptions=False)
    assert result.exit_code == 1
    assert "not measured: small, eager, bf16 linears, copy: RuntimeError: " in result.output
    assert json.loads((tmp_path / "report.json").read_text())["derived"] == []


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--sizes", "small,huge", "--sizes must be some of small, smaller; got 'huge'"),
        ("--modes", "fast", "--modes must be some of eager, regional, full; got 'fast'"),
        ("--densities", "0.5,2", r"--densities must be numbers in (0, 1] joined by commas, got '0.5,2'"),
        ("--layers", "4", "--layers must be at most the model's 3, got 4"),
        ("--linears", "int4", "--linears must be some of bf16, fp8; got 'int4'"),
        ("--skip", "1", "Invalid value for '--skip': 1.0 is not in the range 0<=x<1"),
    ],
)
def test_wrong_calls_are_refused(option: str, value: str, told: str) -> None:
    result = CliRunner().invoke(main, ["model", "--model", "tiny", "--device", "cpu", option, value])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--layers", "1"], "--skip needs --layers to be at least 2, of which a cache computes one, got 1"),
        (["--modes", "full"], "--skip needs --modes eager or regional: no step cache can decide in one graph"),
    ],
)
def test_nothing_can_be_skipped(options: list[str], told: str) -> None:
    result = CliRunner().invoke(main, ["model", "--model", "tiny", "--device", "cpu", "--skip", "0.5", *options])
    assert result.exit_code == 2
    assert told in " ".join(result.output.split())


def test_flash_attention_4_is_one_of_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def peer(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return lambda: F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(variants, "dense_peer", peer)
    variant = variants.Variant(variants.FLASH_4, 1.0, lambda model: variants._through(model, variants._flash_4))
    monkeypatch.setattr(model, "flash_attention_4", lambda device: variant)
    options = ["--sizes", "small", "--rounds", "1", "--steps", "0", "--densities", "0.3"]
    found = bench("model", tmp_path / "flash.json", *options)
    checks = rows(found, "checks", attention=variants.FLASH_4)
    assert [(check["mode"], check["difference_to_dense"] < 1e-6) for check in checks] == [
        ("eager", True),
        ("regional", True),
    ]
    assert found["missing"] == {}
    against = [row["against"] for row in rows(found, "derived", attention="plan 0.3", mode="eager")]
    assert against == ["sdpa", variants.FLASH_4]


def test_dense_kernels_that_disagree_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "dense_peer", lambda name, q, k, v: lambda: v.mean(2, keepdim=True).expand_as(v))
    variant = variants.Variant(variants.FLASH_4, 1.0, lambda model: variants._through(model, variants._flash_4))
    monkeypatch.setattr(model, "flash_attention_4", lambda device: variant)
    monkeypatch.setattr(forwards, "MOST_OFF", 1e-6)  # attention matters little in a model of random weights
    options = ["model", "--model", "tiny", "--device", "cpu", "--sizes", "small", "--modes", "eager", "--steps", "0"]
    with pytest.raises(forwards.BenchError, match="flash-attention-4: dense kernels must agree, got a result"):
        CliRunner().invoke(main, options, catch_exceptions=False)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_model_without_regions_runs_eager_and_as_a_whole(tmp_path: Path) -> None:
    """Text is a part of Mochi's sequence, and its attention is no dispatched function of diffusers."""
    options = ["--model", "tiny-mochi", "--densities", "0.5", "--rounds", "1", "--steps", "2"]
    found = bench("model", tmp_path / "mochi.json", *options)
    assert found["sizes"][0]["grid"] == {"frames": 4, "height": 8, "width": 8}
    assert found["missing"] == {variants.FLASH_4: "FlashAttention-4 needs a CUDA device"}
    assert {(row["mode"], row["attention"]): row["planned_calls"] for row in found["checks"]} == {
        (mode, name): LAYERS * (name == "plan 0.5")
        for mode in ("eager", "full")
        for name in ("sdpa", "copy", "plan 0.5")
    }
    refused = CliRunner().invoke(main, ["model", "--model", "tiny-mochi", "--modes", "regional"])
    assert refused.exit_code == 2
    assert "must be eager or full: diffusers compiles MochiTransformer3DModel only as a whole" in refused.output


def test_published_models_are_of_known_families_and_sizes() -> None:
    assert {row.architecture for row in MODELS.values()} <= {row.architecture for row in ADAPTERS}
    for name, parameters in (("wan-14b", 14.3e9), ("wan-1.3b", 1.42e9)):
        row = MODELS[name]
        made = row.make(1, META)
        count = sum(parameter.numel() for parameter in made.parameters())
        block = sum(parameter.numel() for parameter in made.blocks.parameters())
        assert count + (row.layers - 1) * block == pytest.approx(parameters, rel=0.01)
        signature = adapter_for(made).signature(made)
        assert (signature.heads, signature.head_dim) == (row.config["num_attention_heads"], 128)
        kept = {key for key, value in made.named_parameters() if value.dtype == torch.float32}
        assert {
            "scale_shift_table",
            "blocks.0.norm2.weight",
            "condition_embedder.time_embedder.linear_1.weight",
        } <= kept
        assert not any(".attn1." in key or ".ffn." in key for key in kept)
        for size, tokens in (("480p", 32_760), ("720p", 75_600)):
            assert token_grid(made, row.inputs(size, CPU)).tokens == tokens


def test_mochi_is_as_published() -> None:
    """All its layers but the last, which does not follow the text any further, are alike."""
    row = MODELS["mochi"]
    made = row.make(3, META)
    first, middle, _ = (sum(each.numel() for each in block.parameters()) for block in made.transformer_blocks)
    count = sum(parameter.numel() for parameter in made.parameters())
    assert first == middle
    assert count + (row.layers - 3) * middle == pytest.approx(10.03e9, rel=0.005)
    assert token_grid(made, row.inputs("480p", CPU)) == TokenGrid(28, 30, 53)
    assert adapter_for(made).time(row.inputs("480p", CPU)) == pytest.approx(0.999)


def test_h3_is_as_published_and_runs_as_one_packed_sequence(tmp_path: Path) -> None:
    row = MODELS["h3"]
    made = row.make(1, META)
    count, block = (sum(x.numel() for x in part.parameters()) for part in (made, made.transformer_blocks))
    assert count + (row.layers - 1) * block == pytest.approx(33e9, rel=0.02)
    for size, frames, tokens in (("5s", 37, 37_710), ("10s", 72, 73_386), ("15s", 107, 109_062)):
        inputs = row.inputs(size, CPU)
        assert len(inputs["position_ids"]) == tokens + row.text_tokens
        grid = token_grid(made, inputs)
        assert (grid.frames, grid.height, grid.width) == (frames, 24, 42)
    assert adapter_for(made).time(inputs) == pytest.approx(0.999)
    options = ["--model", "tiny-h3", "--densities", "0.5", "--rounds", "1", "--steps", "0", "--modes", "eager"]
    found = bench("model", tmp_path / "h3.json", *options)
    assert [row["planned_calls"] for row in found["checks"]] == [0, 0, LAYERS]


def test_plans_of_the_bench_have_their_density_and_a_segment_for_each_step() -> None:
    grid, signature = TokenGrid(4, 8, 8), ModelSignature("WanTransformer3DModel", 10, 2, 16)
    plan = Plan(variants.plan_shaped(signature, grid, Blocks(16, 16), 0.4, 4))
    assert variants.planned(plan, 0.4).density == pytest.approx(0.4, abs=0.02)
    times: list[float] = []

    def forward(timestep: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        times.append(float(timestep.max()) / 1000)
        return hidden_states

    noise = {"hidden_states": torch.zeros(1, 4, 4, 16, 16)}
    forwards.sample(MODELS["tiny"], forward, noise, 4)
    falling = [times.pop(0) for _ in range(4)]
    forwards.sample(MODELS["tiny-mochi"], forward, noise, 4)
    assert [1 - time for time in times] == pytest.approx(falling), "Mochi's rise"
    times[:] = falling
    assert [plan.file.segment_index(time) for time in times] == [3, 2, 1, 0]
    lists = [plan.schedule(time, layer).core.col_idx.tobytes() for time in times[2:] for layer in range(10)]
    assert lists[0] == lists[8]
    assert lists[0] != lists[10]
    assert lists[0] == lists[11]
    assert len(set(lists)) == variants.DISTINCT


def event(name: str, start: float, device: DeviceType = DeviceType.CPU, us: float = 1.0) -> Any:
    time = SimpleNamespace(start=start, end=start + us, elapsed_us=lambda: us)
    return SimpleNamespace(name=name, device_type=device, time_range=time)


def test_waits_are_told_from_everything_else() -> None:
    events = [
        event(WHOLE, 10, us=100),
        event("cudaStreamSynchronize", 20),
        event("aten::item", 19),
        event("cudaMemcpyAsync", 21),
        event("calibatt::attend", 22),
        event("cudaDeviceSynchronize", 120),  # the profiler's own, after the call
        event("Memcpy DtoH (Device -> Pageable)", 20, DeviceType.CUDA, 2.0),
        event("Memcpy HtoD (Pinned -> Device)", 20, DeviceType.CUDA, 3.0),
        event("hopper_forward", 30, DeviceType.CUDA, 2000.0),
        event("hopper_forward", 2030, DeviceType.CUDA, 2000.0),
        event(WHOLE, 30, DeviceType.CUDA, 4000.0),
    ]
    found = summarised(events, on_gpu=True)
    assert found["waits"] == {"Memcpy DtoH (Device -> Pageable)": 1, "cudaStreamSynchronize": 1}
    assert (found["items"], found["planned_calls"], found["host_ms"]) == (1, 1, 0.1)
    assert found["device_ms"] == pytest.approx(4.005)
    assert found["longest"][0] == {"kernel": "hopper_forward", "ms": 4.0, "launches": 2}
    assert WAITS.fullmatch("cuStreamSynchronize")
    assert WAITS.fullmatch("cudaMemcpy")
    assert not WAITS.fullmatch("cudaStreamWaitEvent")
