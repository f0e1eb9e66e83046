"""The scripts in examples/ do what they say; pipelines are small and random here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support import wan

import calibatt

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parent.parent / "examples"
CALL = {"height": 128, "width": 192, "num_frames": 17, "num_inference_steps": 2, "guidance_scale": 1.0}


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_plan(path: Path, model: Any, reach: int) -> str:
    near = np.abs(np.subtract.outer(np.arange(30), np.arange(30))) <= reach
    plan = calibatt.plan_from_masks(np.broadcast_to(near, (2, 2, 30, 30)), (5, 8, 12), (16, 16), model=model)
    plan.save(path)
    return str(path)


def of_pipelines(module: ModuleType, monkeypatch: pytest.MonkeyPatch, experts: int) -> Any:
    """The pipeline that the example gets instead of a model's weights."""
    pipe = wan.pipeline(experts)
    monkeypatch.setattr(module.WanPipeline, "from_pretrained", lambda name, torch_dtype: pipe)
    monkeypatch.setattr(module, "SIZE", {**CALL, "prompt_arguments": wan.embedded})
    monkeypatch.delitem(module.SIZE, "num_inference_steps")
    return pipe


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {"own_masks", "wan", "wan22_two_experts"}


def test_own_masks() -> None:
    assert example("own_masks").main() < 1e-5


def test_wan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, one_thread: None) -> None:
    module = example("wan")
    pipe = of_pipelines(module, monkeypatch, 1)
    assert module.sampler(2, "cpu").grid == calibatt.PipelineSampler(pipe, prompt_arguments=wan.embedded, **CALL).grid
    plan = save_plan(tmp_path / "wan.plan", pipe.transformer, 3)
    dense, planned = module.dense_and_planned(pipe, plan, **wan.embedded("a boat"), **CALL)
    assert dense.shape == planned.shape == (17, 128, 192, 3)
    assert not np.array_equal(dense, planned)
    assert np.array_equal(module.dense_and_planned(pipe, plan, **wan.embedded("a boat"), **CALL)[0], dense)
    assert "transformer: WanTransformer3DModel" in (told := capsys.readouterr().out)
    assert "PSNR" in told


def test_wan22_two_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, one_thread: None) -> None:
    module = example("wan22_two_experts")
    pipe = of_pipelines(module, monkeypatch, 2)
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", lambda: None)
    high, low = module.high(4, "cpu"), module.low(4, "cpu")
    assert (high.transformer, low.transformer) == (pipe.transformer, pipe.transformer_2)
    assert min(high.times) > max(low.times)
    plans = [save_plan(tmp_path / f"{reach}.plan", each.transformer, reach) for reach, each in ((1, high), (2, low))]
    videos = [module.planned(pipe, *each, **wan.embedded("a boat"), **CALL) for each in (plans, plans[::-1])]
    assert not np.array_equal(*videos)
    assert "transformer_2: WanTransformer3DModel" in capsys.readouterr().out
