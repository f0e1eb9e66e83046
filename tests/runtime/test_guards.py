"""Plans at the extremes of the format: valid, right, and inside their tensors (`support.sanitize_kernels` on a GPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import judge
from support.guards import Guards, adversarial, run_guarded

from calibatt.plans import ModelSignature, PlanFile, Segment, StoredLayers, write_plan

CASES = adversarial(64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_extremes_are_computed_inside_their_tensors(backend: str, name: str) -> None:
    run_guarded(*CASES[name], backend, "cpu")


def test_extremes_are_plans(tmp_path: Path) -> None:
    """A file may say each of them."""
    for core, _, _ in CASES.values():
        model = ModelSignature("M", 1, core.heads, 16)
        plan = PlanFile(model, core.grid, core.blocks, (Segment(0, 1, 0.5),), StoredLayers.of([[core]]))
        write_plan(path := tmp_path / "a.plan", plan)
        judge.judge(path, found := judge.first(path))
        assert isinstance(found, PlanFile)


@pytest.mark.parametrize("where", ["before q", "after an output"])
def test_guards_see_one_element(where: str) -> None:
    guards = Guards()
    q = guards.around("q", torch.zeros(1, 2, 3, 4))
    with guards.around_outputs():
        out = torch.empty_like(q)
    guards.check()
    whole = guards._kept[0 if where == "before q" else -1][1]
    whole.view(-1)[0 if where == "before q" else -1] = 0
    with pytest.raises(AssertionError, match="written"):
        guards.check()
    assert out.shape == q.shape
