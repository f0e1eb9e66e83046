"""The studies of defaults and of robustness on tiny models, and what the study of sizes does when."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from support.sampler import CALIBRATED, TIMES, TinyVideoSampler, tiny_store

from calibatt.tools.calibrate import models
from calibatt.tools.demo_model import model as demo_model
from calibatt.tools.demo_model import sampler as demo_sampler
from calibatt.tools.demo_model import world
from calibatt.tools.demo_model.model import CONFIG, DemoModel
from calibatt.tools.demo_model.world import Clip
from calibatt.tools.evaluate import harness
from calibatt.tools.studies import defaults, robustness, sizes, stores
from calibatt.tools.studies.defaults import Defaults
from calibatt.tools.studies.judgements import Judgements, cell, mean_and_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]

TINY = {**CONFIG, "num_attention_heads": 2, "attention_head_dim": 32, "text_dim": 16, "ffn_dim": 32, "num_layers": 2}
CLIPS = {"small": Clip(4, 16), "medium": Clip(4, 24)}


def tiny_demo(path: Path | None = None, device: str = "cpu", clip: Clip | None = None, *rest: object) -> DemoModel:
    """In place of `DemoModel.load`: random weights, the same for every path but those of larger grids."""
    torch.manual_seed(int(path == demo_model.GROWN))
    model = DemoModel(TINY, CLIPS["medium"] if clip == CLIPS["medium"] else CLIPS["small"])
    for block in model.transformer.blocks:
        block.attn1.norm_q.weight.data *= 4
    model.steps = 2
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny_world(monkeypatch):
    monkeypatch.setattr(DemoModel, "load", staticmethod(tiny_demo))
    monkeypatch.setattr(demo_sampler, "trained", lambda name, device: (tiny_demo(), []))
    monkeypatch.setattr(robustness, "trained", lambda name, device: (tiny_demo(), []))
    monkeypatch.setattr(world, "CLIPS", CLIPS)
    monkeypatch.setattr(robustness, "STEPS", 2)


@pytest.mark.slow
def test_robustness_pairs_plans_of_one_place_with_those_of_another(tiny_world, tmp_path):
    output, markdown = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["--stores", tmp_path / "stores", "--samples", 2, "--vectors", 1, "--prompts", 2, "--style-steps", 2]
    arguments += ["--style-batch", 1, "--device", "cpu", "-o", output, "--table", markdown]
    found = CliRunner().invoke(robustness.main, [str(each) for each in arguments])
    assert found.exit_code == 0, found.output + repr(found.exception)
    result = json.loads(output.read_text())
    rows = {(row["used_on"], row["calibrated_on"]): row["psnr"] for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 * 2 + 4 * 2 * 3
    assert all(len(psnr) == 2 for psnr in rows.values())
    for kind in robustness.KINDS:
        for name in (f"{kind}: {words}" for words in robustness.halves(kind)):
            assert {calibrated for used, calibrated in rows if used == name} > {name, robustness.ALL}
            assert len({tuple(psnr) for (used, _), psnr in rows.items() if used == name}) == 3, name
    assert all(row["store"] == {"prompts": 2, "samplings": 2, "vectors": [1]} for row in result["rows"])
    said = [row["quick"] for row in result["rows"] if "quick" in row]
    assert len(said) == 3 * 2 + 4 * 2 * 2
    assert all(each["fits"] == (each["ratio"] <= 3) for each in said)
    assert "PlanMismatchError" in result["another_resolution"]
    assert set(result["style"]) == {"styled dense video", "dense video without it"}
    lines = markdown.read_text().splitlines()
    assert sum(line.startswith("| ") for line in lines) == len(rows) + 1
    joined = ["--case", "weights", "--join", output, "-o", tmp_path / "b.json"]
    again = CliRunner().invoke(robustness.main, [str(each) for each in [*arguments, *joined]])
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "b.json").read_text())["rows"] == result["rows"]


def test_prompts_of_a_half_have_its_words_alone():
    for kind in robustness.KINDS:
        for half, words in enumerate(robustness.halves(kind)):
            columns, _ = robustness.KINDS[kind]
            allowed = set(words.split(", "))
            scenes = torch.stack([world.parse(p) for p in robustness.prompts_of(kind, half, 8, test=True)])
            assert len(scenes) == 8
            assert world.held_out(scenes).all()
            for column in columns:
                assert {world.SLOTS[column][code] for code in scenes[:, column].tolist() if code >= 0} <= allowed


def test_a_half_has_as_many_prompts_as_were_asked_for(monkeypatch):
    monkeypatch.setattr(world, "scenes", lambda count, *_, **__: torch.zeros(count, 13, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must leave 8 prompts of 128, got 0: backgrounds: h-striped, v-striped"):
        robustness.prompts_of("backgrounds", 1, 8, test=True)


def test_the_style_lora_learns(tiny_world, tmp_path):
    video = torch.rand(1, 3, 2, 4, 4) * 2 - 1
    assert robustness.styled(video).std() < video.std()
    robustness.train_style(tmp_path / "style.safetensors", "cpu", 2, 1)
    model = tiny_demo().load_lora(tmp_path / "style.safetensors")
    assert any("lora_B" in name and bool(p.any()) for name, p in model.transformer.named_parameters())


@pytest.mark.slow
def test_defaults_change_one_thing_each(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SAMPLERS, "demo-medium", lambda steps, device: halved(steps))
    monkeypatch.setattr(defaults, "SAMPLES", 2)
    monkeypatch.setattr(defaults, "COUNTS", (1, 2, 4))
    monkeypatch.setattr(Defaults.__init__, "__defaults__", ((16, 32),))
    output, markdown = tmp_path / "a.json", tmp_path / "a.md"
    arguments = ["--stores", tmp_path / "stores", "--samples", 4, "--prompts", 2, "--densities", "0.5"]
    arguments += ["--device", "cpu", "-o", output, "--table", markdown]
    found = CliRunner().invoke(defaults.main, [str(each) for each in arguments])
    assert found.exit_code == 0, found.output + repr(found.exception)
    rows = {row["variant"]: row for row in json.loads(output.read_text())["rows"]}
    base = rows["defaults"]["psnr"]
    same = [name for name, row in rows.items() if row["psnr"] == base and name != "defaults"]
    assert not same
    assert len(rows) == 1 + 2 + 1 + 1 + 1 + 3 + 1 + 2 + 4  # half and a quarter of three times are one
    assert all(row["density"] <= 0.53 for row in rows.values())
    assert rows["defaults"]["store"] == {"prompts": 2, "samplings": 2, "vectors": [1]}
    assert rows["calibration prompts: 1, random vectors: 4"]["store"] == {"prompts": 1, "samplings": 1, "vectors": [4]}
    assert len(markdown.read_text().splitlines()) == 8 + 1 + len(rows)


def halved(steps: int | None) -> TinyVideoSampler:
    """The tiny sampler, with fewer of its steps."""
    sampler = TinyVideoSampler()
    sampler.times = list(TIMES)[:steps]
    return sampler


def test_a_store_grows_without_forgetting_what_it_was(tmp_path):
    found = stores.grown(tmp_path, TinyVideoSampler(), list(CALIBRATED), (1, 3), vectors=2, block_size=16)
    assert {count: len(store.samplings) for count, store in found.items()} == {1: 1, 3: 3}
    assert set(found[1].samplings) < set(found[3].samplings)
    once = stores.grown(tmp_path / "b", TinyVideoSampler(), list(CALIBRATED), (1,), vectors=2, block_size=16)[1]
    assert (found[1].unit(0, 1).effect == once.unit(0, 1).effect).all()


def test_a_store_at_some_times_is_that_of_these_times(tmp_path):
    store = tiny_store(tmp_path / "stats", CALIBRATED[:3])
    some = stores.AtTimes(store, (0, 2))
    assert some.manifest.times == (store.manifest.times[0], store.manifest.times[2])
    assert (some.unit(1, 0).effect == store.unit(2, 0).effect).all()
    assert some.table().time_level[1] == store.table().time_level[2]
    assert (some.table().window_error[1] == store.table().window_error[2]).all()
    for tables in some.table().samplings:
        tables.check(some.manifest)


def test_what_matters_most_comes_first():
    names, densities = sizes.CHOSEN, (0.2, 0.35, 0.1, 0.4)
    first = sorted(sizes.in_order(names, densities, first=True))
    core = [(name, density) for turn, name, density in first if turn == 0]
    assert set(core) == {(name, density) for name in names[:3] for density in (0.2, 0.35)}
    assert (1, sizes.OURS, 0.1) in first
    assert len(first) == len(names) * len(densities)
    others = sizes.in_order(names, densities, first=False)
    assert {name for _, name, _ in others} == {sizes.OURS}
    assert min(turn for turn, _, _ in others) == 1


@pytest.mark.slow
def test_sizes_judged_apart_are_joined_and_timed(tmp_path, monkeypatch):
    for name in ("demo", "demo-medium"):
        monkeypatch.setitem(models.SAMPLERS, name, lambda steps, device: TinyVideoSampler())
    tiny_store(tmp_path / "stats")
    tiny_store(tmp_path / "less", CALIBRATED[:2])

    def run(output: str, *options: object) -> dict:
        common = ["--densities", "0.3,0.6", "--prompts", 2, "--calibration", 2, "--device", "cpu", "--methods"]
        common += ["compiled;the paper's own method", "--plans", tmp_path / "plans", "-o", tmp_path / output]
        found = CliRunner().invoke(sizes.main, [str(each) for each in [*common, *options]])
        assert found.exit_code == 0, found.output + repr(found.exception)
        return json.loads((tmp_path / output).read_text())

    two = ["--stats", f"small={tmp_path / 'stats'}", "--stats", f"small={tmp_path / 'less'}"]
    small = run("small.json", *two)
    assert small["rows"][0]["method"] == sizes.DENSE
    assert {row["calibrated"] for row in small["rows"]} == {"6 samplings x 4", "2 samplings x 4"}
    assert len(small["rows"]) == 1 + 4 + 2
    counts = [row["store"]["samplings"] for row in small["rows"][1:]]
    assert counts == [int(row["calibrated"].split()[0]) for row in small["rows"][1:]]
    plans = list((tmp_path / "plans").iterdir())
    medium = run("medium.json", "--busy", "--stats", f"medium={tmp_path / 'stats'}")
    assert list((tmp_path / "plans").iterdir()) == plans  # none is compiled twice
    joined = ["--join", tmp_path / "small.json", "--join", tmp_path / "medium.json", "--table", tmp_path / "a.md"]
    every = run("all.json", *joined)
    assert every["rows"] == small["rows"] + medium["rows"]
    assert every["prompts"] == 2
    assert all(row["attention_ms"] is None for row in medium["rows"])
    timed = run("all.json", *two, "--timings", "--figure", tmp_path / "a.png")
    assert [row.get("timed_videos") for row in timed["rows"]] == [576] * 7 + [None] * 5
    assert [row["psnr"] for row in timed["rows"]] == [row["psnr"] for row in every["rows"]]
    assert "6 samplings x 4" in (tmp_path / "a.md").read_text()


def test_join_keeps_what_is_there(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"rows": [1], "prompts": 3, "about": {}}))
    judged = Judgements(tmp_path / "mine.json")
    judged.result |= {"style": 2}
    judged.join(tmp_path / "other.json")
    assert judged.result == {"rows": [1], "style": 2, "prompts": 3, "about": {}}


ABOUT = {"command": "it", "device": "an abacus", "versions": "torch 1", "date": "today"}
SETTINGS = {"prompts": 3, "store": {"samplings": 4}}


@pytest.mark.parametrize(
    ("about", "settings", "words"),
    [
        (ABOUT | {"device": "a slide rule"}, SETTINGS, "the same device, got 'an abacus' and"),
        (ABOUT | {"versions": "torch 2"}, SETTINGS, "the same versions, got 'torch 1' and"),
        (ABOUT, SETTINGS | {"prompts": 2}, "the same prompts, got 3 and"),
        (ABOUT, SETTINGS | {"store": {"samplings": 5}}, "the same store, got {'samplings': 4} and"),
        (ABOUT, SETTINGS | {"calibration": 1}, "the same calibration, got None and"),
    ],
)
def test_rows_of_other_settings_are_not_put_beside(tmp_path, about, settings, words):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"rows": [{"method": "x"}], "about": ABOUT, **SETTINGS}))
    Judgements(path).begin(ABOUT | {"date": "tomorrow"}, **SETTINGS)
    with pytest.raises(ValueError, match=re.escape(words)):
        Judgements(path).begin(about, **settings)
    if "calibration" not in settings:
        other = tmp_path / "b.json"
        other.write_text(json.dumps({"rows": [], "about": about, **settings}))
        with pytest.raises(ValueError, match=re.escape(words)):
            Judgements(path).join(other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 1}'])
def test_what_is_no_study_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json must be the JSON of a study, with its rows"):
        Judgements(tmp_path / "a.json")


def test_a_cell_says_what_differs():
    row = {"psnr": [30.0, 32.0], "target": 0.3, "density": 0.28, "attention_ms": 4.25}
    assert cell(row, {**row, "psnr": [29.0, 32.0]}) == "31.0 (1.0), 4.2 ms [+0.5 (0.5)] at 0.28"
    assert cell(row | {"density": 0.3, "attention_ms": None}, row) == "31.0 (1.0) [+0.0 (0.0)]"
    assert cell(None) == "not judged"


def test_counts_of_a_store_are_those_of_its_samplings(tmp_path):
    store = tiny_store(tmp_path / "stats", (*CALIBRATED[:2], (CALIBRATED[0][0], 77)))
    assert stores.sampling_counts(store) == {"prompts": 2, "samplings": 3, "vectors": [4]}


def test_a_told_command_has_no_folders(monkeypatch):
    monkeypatch.setattr("sys.argv", "x --stats small=/home/me/small --plans /home/me/kept -o a/b.json".split())
    assert harness.typed("sizes") == "sizes --stats small=small --plans kept -o a/b.json"


def published(name: str) -> list[dict]:
    """Rows of a file of docs/benchmarks, each with its PSNR as the page tells it."""
    docs = Path(__file__).parents[2] / "docs" / "benchmarks"
    rows = json.loads((docs / f"{name}_h200.json").read_text("utf-8"))["rows"]
    for row in rows:
        found = mean_and_error(row["psnr"])
        row["told"] = f"{found['mean']:.1f} ({found['standard_error']:.1f})"
    return rows


def test_published_tables_are_those_of_the_published_rows():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text("utf-8").splitlines()

    def told(begins: str, rows: list[dict]) -> None:
        assert rows, begins
        lines = [line for line in page if line.startswith(f"| {begins}")]
        assert any(all(row["told"] in line for row in rows) for line in lines), (begins, [r["told"] for r in rows])

    by_size = [row for row in published("sizes") if row["target"] in (0.2, 0.35)]
    names = dict(
        zip(sizes.CHOSEN, ("calibrated plan", "the paper's own method", "Sol-Attn |", "Sol-Attn, first"), strict=False)
    )
    names |= {
        "uniform: box": "uniform windows",
        "dynamic: top-p, one p": "dynamic top-p, one p",
        "compiled, no anchors": "no anc",
    }
    for method, begins in names.items():
        told(begins, [row for row in by_size if row["method"] == method])
    variants: dict[str, list[dict]] = {}
    for row in published("defaults"):
        variants.setdefault(row["variant"], []).append(row)
    begins = ("defaults", "16 prompts", "4 prompts |", "2 prompts", "1 prompt |", "4 of the 8", "2 of the 8")
    begins += ("the plan of time 0.45", "the plan of time 0.90", "the plan of time 1.00", "prices not")
    begins += ("masks by votes", "the same, tokens in cubes", "blocks of 64", "the same, raster order, blocks of 64")
    begins += ("the same, cubes, blocks of 64", "calibrated on 4", "4 prompts, 4 vec", "8 prompts, 4 vec")
    for text, rows in zip(begins, variants.values(), strict=True):
        told(text, rows)
    for row in published("robustness"):
        if "quick" in row:
            line = next(line for line in page if row["told"] in line and f"{row['quick']['ratio']:.2f}" in line)
            assert ("fits" in line) == row["quick"]["fits"]
    for name in ("few_steps", "few_steps_noise"):
        for method, begins in (("compiled", "calibrated plan"), ("dynamic: Sol-Attn", "Sol-Attn")):
            told(begins, [row for row in published(f"pareto_{name}") if row["method"] == method])
    eight = {"compiled": "all heads in 16", "compiled, 8 bits, equal density": "`--precision auto`, equal d"}
    eight |= {"compiled, 8 bits, equal time": "`--precision auto`, equal t"}
    for method, begins in eight.items():
        told(begins, [row for row in published("pareto_eight_bits") if row["method"] == method])
