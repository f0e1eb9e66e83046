"""Copies of rows and frames: what they lose, and what would be chosen by it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")

from support.sampler import TinyVideoSampler, tiny_refined

from calibatt.compiler.stats import Store
from calibatt.plans import Blocks, TokenGrid
from calibatt.tools.calibrate import models
from calibatt.tools.evaluate import copies
from calibatt.tools.evaluate.bench import Bench
from calibatt.tools.evaluate.copies import SIZES, anchors, copied, decided, measure, priced

pytestmark = pytest.mark.usefixtures("one_thread")
WORK = [("three", 1), ("four words", 2)]


def test_the_middle_stands_for_its_group() -> None:
    assert anchors(7, 3).tolist() == [1, 1, 1, 4, 4, 4, 6]
    assert anchors(5, 2).tolist() == [0, 0, 2, 2, 4]
    assert anchors(6, 8).tolist() == [2] * 6


@pytest.mark.parametrize("what", SIZES)
@pytest.mark.parametrize("size", [2, 3])
def test_copies_stay_in_their_frame_or_at_their_place(what: str, size: int) -> None:
    grid = TokenGrid(frames=5, height=4, width=3)
    out = torch.arange(2.0 * grid.video_tokens).view(2, grid.video_tokens, 1)
    found = copied(out, grid, what, size).view(2, 5, 4, 3)
    cells = out.view(2, 5, 4, 3)
    for frame, row in np.ndindex(5, 4):
        source = (frame, int(anchors(4, size)[row])) if what == "rows" else (int(anchors(5, size)[frame]), row)
        assert torch.equal(found[:, frame, row], cells[:, source[0], source[1]])


def test_errors_do_not_depend_on_batches_and_grow_with_the_groups() -> None:
    found = [
        measure(Bench(TinyVideoSampler(), Blocks(16, 16), WORK, WORK, torch.ones(3, 2), batch=batch), WORK)
        for batch in (1, 2)
    ]
    for what in SIZES:
        np.testing.assert_allclose(found[0][what], found[1][what], rtol=1e-4)
        assert (found[0][what] > 0).all()
        assert (np.median(found[0][what], (1, 2, 3))[-1] > np.median(found[0][what], (1, 2, 3))[0]).all()


def test_heads_choose_what_saves_most() -> None:
    """Of four heads the first takes frames of 8, the second rows of 4, the third nothing; the fourth was mistaken."""
    worth, weight = np.full((1, 1, 4), 8.0), np.full((1, 1, 4), 2.0)
    rows, frames = np.full((2, 3, 1, 1, 4), 100.0)
    frames[2, 0, 0, 0], frames[0, 0, 0, 0] = 0.5, 0.25  # 7 - 1 against 4 - 0.5
    rows[2, 0, 0, 1], frames[0, 0, 0, 1] = 0.5, 1.0  # 6 - 1 against 4 - 2
    frames[1, 0, 0, 3] = 1 / 6  # 16 / 3 - 1 / 3
    held_out = {"rows": rows, "frames": frames.copy()}
    held_out["frames"][1, 0, 0, 3] = 4.0  # 16 / 3 - 8
    found = decided(worth, np.full((1, 1, 4), 5.0), weight, {"rows": rows, "frames": frames}, held_out)
    assert found == {
        "rows": 0.25,
        "frames": 0.5,
        "saved": pytest.approx((6 + 5) / 20),
        "saved_held_out": pytest.approx((6 + 16 / 3 - 8) / 20),
    }


def test_from_a_store_to_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SAMPLERS, "demo", lambda steps, device: TinyVideoSampler())
    stats, prompts, output = tmp_path / "stats", tmp_path / "prompts.txt", tmp_path / "copies.json"
    tiny_refined(stats)
    prompts.write_text("five\nsix words\n", "utf-8")
    worth, loss = priced(Store.open((stats,)), 0.5)
    assert worth.shape == loss.shape == (3, 2, worth.shape[2])
    assert (worth > 0).all()
    assert (loss >= 0).all()
    assert loss.any()
    arguments = ["--stats", stats, "--held-out", prompts, "--prompts", 2, "--calibration", 2, "--device", "cpu"]
    found = CliRunner().invoke(copies.main, [*map(str, arguments), "-o", str(output)])
    assert found.exit_code == 0, found.output + repr(found.exception)
    value = json.loads(output.read_text("utf-8"))
    assert value["calibration"] == value["prompts"] == 2
    assert all(0 <= value[f"density {density:g}"]["frames"] <= 1 for density in copies.DENSITIES)
