"""The examples in the docstrings of what `calibatt` offers, and of what all reports share."""

from __future__ import annotations

import doctest
import inspect
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support import api, wan

import calibatt
from calibatt.plans import page, readable

ROOT = Path(__file__).parent.parent
OFFERED = sorted({*calibatt.__all__} - {"__version__"})


@pytest.mark.parametrize("name", OFFERED)
def test_the_examples_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """In a folder with the demo's plan; `pipe`, `plan`, `size` and `embed` stand for a user's own."""
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "demo.plan").symlink_to(ROOT / "plans" / "demo.plan")
    monkeypatch.chdir(tmp_path)
    offered, pipe = getattr(calibatt, name), wan.pipeline()
    near = np.abs(np.subtract.outer(np.arange(4), np.arange(4))) <= 1
    known = {
        **vars(sys.modules[offered.__module__]),
        "load_plan": calibatt.load_plan,
        "torch": torch,
        "pipe": pipe,
        "embed": wan.embedded,
        "size": {"height": 128, "width": 192, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 1.0},
        "plan": calibatt.plan_from_masks(np.broadcast_to(near, (2, 2, 4, 4)), (5, 8, 12), model=pipe.transformer),
    }
    examples = doctest.DocTestParser().get_doctest(inspect.getdoc(offered) or "", known, name, None, None)
    assert examples.examples, f"{name} must have an example"
    told: list[str] = []
    assert doctest.DocTestRunner().run(examples, out=told.append).failed == 0, "".join(told)


@pytest.mark.parametrize("module", [page, readable])
def test_the_examples_of_reports_are_true(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed


def test_the_page_of_the_api_is_made_of_these_docstrings() -> None:
    assert (ROOT / "docs" / "api.md").read_text("utf-8") == api.page(), "see tests/support/api.py"
