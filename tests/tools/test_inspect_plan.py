"""The inspector tells the truth about a plan, and says what is wrong with a bad file in one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from rich.console import Console
from support.plans import frames_plan, tiny_plan, tiny_schedule
from support.schedules import layer_schedules

from calibatt.plans import LayerSchedule, PlanFile, Segment, write_plan
from calibatt.tools.inspect_plan import drawing, summary
from calibatt.tools.inspect_plan.__main__ import main

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "plans" / "golden" / "tiny.plan"


def inspect(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_json_holds_the_values() -> None:
    result = inspect(GOLDEN, "--json")
    assert result.exit_code == 0
    values = json.loads(result.output)
    plan = frames_plan()
    assert values["model"]["architecture"] == "TinyTransformer"
    assert values["grid"]["tokens"] == 78
    assert values["blocks"] == {"block_q": 16, "block_k": 16, "q_blocks": 5, "k_blocks": 5}
    kinds = {"dense": 4, "sparse": 6, "anchored": 6}
    assert values["heads"] == kinds | {"with_anchor_frames": 2, "sharing_lists": 8}
    assert values["precisions"] == {"16 bit": 12, "int8 QK": 2, "int8 QK with fp8 PV": 2}
    assert values["layer_eight_bit"] == [[0.0, 0.0], [0.5, 0.5]]
    assert values["layer_density"] == [
        [pytest.approx(plan.schedules[s][layer].density) for layer in (0, 1)] for s in (0, 1)
    ]
    means = [np.mean([layer.density for layer in plan.schedules[segment]]) for segment in (0, 1)]
    assert values["density"] == pytest.approx((means[0] + means[1]) / 2)
    assert values["segments"][1]["start"] == 0.375
    assert values["segments"][1]["heads"] == {"dense": 2, "sparse": 2, "anchored": 4}
    assert values["section_bytes"] == plan.section_bytes()
    assert values["predicted_forward_ms"] == {"planned": (1.125 + 1.625) / 2, "dense": 2.0}
    assert values["passes"] == plan.passes
    assert values["digest"] == PlanFile.read(GOLDEN).digest
    assert values["file_bytes"] == GOLDEN.stat().st_size


def test_the_density_is_the_compilers_own() -> None:
    """A plan has one density, whoever tells it: that of the calibrated sampler, not of evenly spread time."""
    plan = PlanFile.read(ROOT / "plans" / "demo.plan")
    told = json.loads(inspect(ROOT / "plans" / "demo.plan", "--json").output)["density"]
    assert told == pytest.approx(plan.predicted["density"])
    assert told <= 0.5


def test_means_are_over_the_steps_of_the_sampling(tmp_path: Path) -> None:
    """Of a plan that says its steps: one in the first segment, three in the second."""
    plan = tiny_plan(scheduler_hint={"times": [1.0, 0.75, 0.375, 0.25]})
    write_plan(tmp_path / "plan", plan)
    values = json.loads(inspect(tmp_path / "plan", "--json").output)
    means = [np.mean([layer.density for layer in plan.schedules[segment]]) for segment in (0, 1)]
    assert [each["steps"] for each in values["segments"]] == [1, 3]
    assert values["density"] == pytest.approx((means[0] + 3 * means[1]) / 4)
    assert means[0] != means[1]
    assert values["predicted_forward_ms"] == {"planned": (1.125 + 3 * 1.625) / 4, "dense": 2.0}
    told = f"{values['density']:.1%} of the blocks of dense attention, mean over 4 steps of a sampling"
    assert told in " ".join(inspect(tmp_path / "plan").output.split())
    assert "mean over segments (the plan does not say its steps)" in " ".join(inspect(GOLDEN).output.split())


def test_the_terminal_summary_says_it_all() -> None:
    result = inspect(GOLDEN)
    assert result.exit_code == 0
    for words in (
        "TinyTransformer: 2 layers x 4 heads x 8 channels",
        "2 frames x 3 rows x 13 tokens = 78 video tokens",
        "4 dense, 6 sparse, 6 anchored (2 by frames)",
        "75.0% of heads in 16 bit, 12.5% of heads in int8 QK, 12.5% of heads in int8 QK with fp8 PV",
        "a layer has 25.0% in 8 bits",
        "vote{agreement=0.5} select{max-error=0.02} lower",
        "flow shift: 5",
        "samples: 3",
        "layers 480 B, tile_order 288 B, masks 72 B, all other sections 352 B",
        "attention: 1.38 ms a forward, 2 ms dense, 1.45 times as fast",
        "CC0-1.0",
        "layer 1",
        "0.75 0.25",
    ):
        assert words in " ".join(result.output.split())


def test_predictions_are_told_in_words(tmp_path: Path) -> None:
    snr = {"mean": 33.94, "standard_error": 0.42, "samplings": 7}
    predicted = {
        "latent_db": snr,
        "head_price": [[[1e-4] * 4] * 2] * 2,
        "density": 0.5,
        "cost": 0.4,
        "device": "abacus",
    }
    plan = tiny_plan(predicted=predicted, provenance={"samples": [f"s{index}" for index in range(8)]})
    write_plan(tmp_path / "plan", plan)
    text = shown(plan, tmp_path / "plan", 200)
    for words in (
        "signal-to-noise of the final latent: 33.9 dB (standard error 0.4, 7 samplings that measured a ladder)",
        "were the errors of heads independent of each other: 28.0 dB",
        "device: abacus",
        "cost: 40.0% of that of dense attention in 16 bit",
        "all heads in 16 bit",
        "samples: 8 values",
    ):
        assert words in text
    assert not set("{}[]") & set("".join(text.split("passes")[0] + text.split("lower")[1]))
    assert json.loads(inspect(tmp_path / "plan", "--json").output)["predicted"] == predicted
    other = tiny_plan(predicted={**predicted, "latent_db": None})
    assert "latent_db" not in shown(other, tmp_path / "plan", 200)


def test_what_was_evaluated_is_told_in_words(tmp_path: Path) -> None:
    summary_of = {"mean": 33.9412, "standard_error": 0.4237, "worst": 23.9, "spread": [1, {"a": 2}]}
    stamp = {"verdict": "passed: psnr>=30 (39.7)", "metrics": {"psnr": summary_of, "ssim": [1, 2]}, "videos": 64}
    provenance = {"evaluation": stamp, "sizes": [480, 832], "nested": {"list": [{"a": 1}], "digest": b"12"}}
    write_plan(tmp_path / "plan", tiny_plan(provenance=provenance))
    text = shown(PlanFile.read(tmp_path / "plan"), tmp_path / "plan", 200)
    for words in (
        "evaluated   passed: psnr>=30 (39.7)",
        "psnr, dB: 33.94 ± 0.42, the worst video 23.9",
        "ssim: 1 x 2",
        "videos: 64",
        "sizes: 480 x 832",
        "nested: digest 2 B, list 1 value",
    ):
        assert words in text
    assert not set("{}[]'") & set(text.split("provenance")[1])
    for odd in ("by eye", {"metrics": None}, {"metrics": {}}):
        write_plan(tmp_path / "plan", tiny_plan(provenance={"evaluation": odd}))
        assert "evaluated " in inspect(tmp_path / "plan").output


@pytest.mark.parametrize(("eights", "words"), [((1, 2), "from 25.0% of its heads (layer 0) to 50.0% (layer 1)")])
def test_layers_in_8_bits_are_told_by_their_ends(eights: tuple[int, int], words: str) -> None:
    precisions = np.zeros((3, 2, 4), np.uint8)
    for layer, count in enumerate(eights):
        precisions[:, layer, :count] = 1
    assert words in summary._precision_lines(precisions)[1]


def shown(plan: PlanFile, path: Path, width: int, colours: bool = False) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=colours, color_system="truecolor" if colours else None)
    summary.show(plan, path, console)
    return text.getvalue()


def test_the_heat_map_is_coloured_and_fits_a_narrow_terminal(tmp_path: Path) -> None:
    edges = np.linspace(0, 1, 31).tolist()
    plan = tiny_plan(
        segments=tuple(Segment(edges[index], edges[index + 1], edges[index]) for index in range(30)),
        schedules=((tiny_schedule(1), tiny_schedule(2)),) * 30,
        predicted={"told": "soon"},
    )
    write_plan(tmp_path / "plan", plan)
    narrow = shown(plan, tmp_path / "plan", 60)
    assert "layer 0  " + "▒" * 30 in narrow
    assert max(len(line) for line in narrow.splitlines()) <= 60
    assert "told: soon" in narrow
    red, green, blue = summary.colour(plan.schedules[0][0].density)
    assert f"48;2;{red};{green};{blue}m" in shown(plan, tmp_path / "plan", 200, colours=True)


def test_colours_go_from_end_to_end() -> None:
    assert summary.colour(0.0) == summary.GRADIENT[0]
    assert summary.colour(1.0) == summary.GRADIENT[-1]
    assert summary.colour(0.4) == summary.GRADIENT[2]


@settings(max_examples=40)
@given(layer_schedules())
def test_a_mask_drawn_token_by_token_is_the_mask(schedule: LayerSchedule) -> None:
    tokens = schedule.grid.tokens
    for head in range(schedule.heads):
        source, keep = schedule.dense(head)
        kept = keep[:, np.arange(tokens) // schedule.blocks.block_k][..., None]
        copied = (source != np.arange(tokens))[:, None, None]
        expected = np.where(kept, np.where(copied, drawing.COPIED, drawing.COMPUTED), drawing.DROPPED)
        np.testing.assert_allclose(drawing.mask_image(schedule, head, tokens), expected, atol=1e-9)


@given(layer_schedules())
def test_a_small_picture_of_a_mask_keeps_its_mean(schedule: LayerSchedule) -> None:
    full = drawing.mask_image(schedule, 0, schedule.grid.tokens)
    small = drawing.mask_image(schedule, 0, 7)
    np.testing.assert_allclose(small.mean(axis=(0, 1)), full.mean(axis=(0, 1)), atol=1e-9)


def test_draws_a_mask_and_the_overview(tmp_path: Path) -> None:
    mask, overview = tmp_path / "mask.png", tmp_path / "overview.png"
    options = ("--layer", 1, "--head", 3, "--time", 0.9, "--png", mask, "--overview-png", overview)
    result = inspect(GOLDEN, *options)
    assert (result.exit_code, result.output) == (0, "")
    for path in (mask, overview):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_title_of_a_mask_has_its_density() -> None:
    plan = tiny_plan()
    figure = drawing.mask_figure(plan, 1, 3, 0.9, "tiny.plan")
    texts = [text.get_text() for text in figure.texts]
    density = plan.schedules[1][1].head_density(3)
    assert texts[0] == f"layer 1, head 3, time 0.9: density {density:.1%}"
    assert texts[1] == "tiny.plan · listed blocks · 4 of 6 rows computed · segment 0.375 to 1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--layer", 0), "there is no --png"),
        (("--png", "x.png"), "needs --layer and --head"),
        (("--png", "x.png", "--layer", 2, "--head", 0), "--layer must be 0 to 1 in this plan, got 2"),
        (("--png", "x.png", "--layer", 0, "--head", 4), "--head must be 0 to 3 in this plan, got 4"),
        (("--png", "x.png", "--layer", 0, "--head", 0, "--time", 1.5), "--time"),
        (("--png", "x.png", "--layer", 0, "--head", 0, "--time", "nan"), "--time must be from 0 to 1, got nan"),
        (("--png", GOLDEN, "--layer", 0, "--head", 0), "--png and --overview-png must name files of their own"),
        (("--overview-png", GOLDEN), "--png and --overview-png must name files of their own"),
        (("--overview-png", "x", "--png", "./x", "--layer", 0, "--head", 0), "must name files of their own"),
        (("--png", "none/x.png", "--layer", 0, "--head", 0), "none/x.png: No such file or directory"),
    ],
)
def test_a_wrong_call_is_told(options: tuple[object, ...], words: str) -> None:
    result = inspect(GOLDEN, *options)
    assert result.exit_code == 2
    assert words in result.output


def test_a_bad_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    cut = tmp_path / "cut.plan"
    cut.write_bytes(GOLDEN.read_bytes()[:-1])
    for path, words in (
        (cut, "cut.plan: the file must reach byte"),
        (ROOT / "pyproject.toml", "pyproject.toml: the file must begin with b'CALIBPLN'"),
        (tmp_path / "none.plan", "none.plan: No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        for options in ((), ("--json",), ("--overview-png", tmp_path / "x.png")):
            result = inspect(path, *options)
            assert result.exit_code == 2
            assert words in result.output
            assert len(result.output.splitlines()) == 1
            assert result.output.startswith("calibatt-inspect: ")


def test_runs_as_a_folder_and_without_torch(tmp_path: Path) -> None:
    """``python tools/inspect_plan FILE``, in a fresh interpreter in which torch and triton cannot be imported."""
    code = (
        "import runpy, sys\n"
        "sys.modules['torch'] = sys.modules['triton'] = None\n"
        f"sys.argv = ['tools/inspect_plan', {str(GOLDEN)!r}, '--overview-png', {str(tmp_path / 'overview.png')!r}]\n"
        "runpy.run_path('tools/inspect_plan', run_name='__main__')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert (tmp_path / "overview.png").exists()


def test_a_plan_cannot_command_the_terminal(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan", tiny_plan(notes="\x1b[2Jgone", provenance={"\x07": "\x1b]0;title"}))
    output = inspect(tmp_path / "plan").output
    assert "\x1b" not in output
    assert "\\x1b[2Jgone" in output
    assert "\x07" not in output


def test_a_missing_matplotlib_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "calibatt.tools.inspect_plan.drawing")
    monkeypatch.delattr("calibatt.tools.inspect_plan.drawing")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = inspect(GOLDEN, "--overview-png", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "matplotlib must be installed: pip install 'calibatt[tools]'" in result.output


@pytest.mark.parametrize("option", ["--png", "--overview-png"])
def test_no_picture_is_in_a_store(option: str, tmp_path: Path) -> None:
    (tmp_path / "store" / "units").mkdir(parents=True)
    (manifest := tmp_path / "store" / "manifest.json").write_text("{}")
    what = ["--layer", 0, "--head", 0] if option == "--png" else []
    result = inspect(GOLDEN, *what, option, manifest)
    assert result.exit_code == 2
    assert "must not be in a store of statistics" in " ".join(result.output.split())
    assert manifest.read_text() == "{}"


def test_two_plans_are_compared(tmp_path: Path) -> None:
    assert "the same, byte for byte" in inspect(GOLDEN, "--diff", GOLDEN).output
    first, second = tiny_schedule(1), tiny_schedule(2)
    write_plan(tmp_path / "a", tiny_plan(schedules=((first, first), (first, first)), notes="\x1bone"))
    write_plan(tmp_path / "b", tiny_plan(schedules=((first, first), (first, second)), notes="two"))
    text = inspect(tmp_path / "a", "--diff", tmp_path / "b").output
    assert "- notes: \\x1bone\n+ notes: two" in text
    assert "100.0%" in text
    write_plan(tmp_path / "d", tiny_plan(provenance={"same": 1, "samples": ["a"] * 4}))
    write_plan(tmp_path / "e", tiny_plan(provenance={"same": 1, "samples": ["b"] * 4}))
    text = inspect(tmp_path / "d", "--diff", tmp_path / "e").output
    assert "- provenance: samples 4 values\n+ provenance: samples 4 values, but not the same\n" in text
    value = json.loads(inspect(tmp_path / "a", "--diff", tmp_path / "b", "--json").output)
    keeps = [np.concatenate([each.tile_keep(head) for head in range(3)]) for each in (first, second)]
    both, either = (keeps[0] & keeps[1]).sum(), (keeps[0] | keeps[1]).sum()
    same = keeps[0].sum() + first.tile_keep(3).sum()
    assert value["segments"][1]["heads_of_other_rows"] == 1, "the last head's anchors are others"
    assert value["segments"][0]["in_common"] == 1
    assert value["segments"][1]["in_common"] == pytest.approx((same + both) / (same + either))
    assert value["segments"][1]["densities"] == pytest.approx([first.density, (first.density + second.density) / 2])
    write_plan(tmp_path / "c", tiny_plan(segments=(Segment(0.0, 1.0, 0.5),), schedules=((first, first),)))
    assert "segments" in json.loads(inspect(tmp_path / "a", "--diff", tmp_path / "c", "--json").output)["header"]
    assert inspect(GOLDEN, "--diff", tmp_path / "none").exit_code == 2


def test_help_teaches() -> None:
    text = inspect("--help").output
    for words in ("dense", "sparse", "anchored", "density", "--layer 12 --head 3", "Exit codes"):
        assert words in text
