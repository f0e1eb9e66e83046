"""Plans from block masks of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import schedules
from support.masked import masked
from support.wan import transformer

from calibatt.plans import DENSE, Blocks, ModelSignature, SchemaError, TokenGrid
from calibatt.runtime import UnknownModelError, load_plan, plan_from_masks

GRID, BLOCKS = TokenGrid(2, 3, 13), Blocks(16, 32)
SIGNATURE = ModelSignature("TinyTransformer", layers=2, heads=3, head_dim=8)
SHAPE = (2, 3, 5, 3)


def random_masks(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Each block kept or not, and one in every row kept for sure."""
    rng = np.random.default_rng(seed)
    masks = rng.random(shape) < 0.3
    np.put_along_axis(masks, rng.integers(shape[-1], size=(*shape[:-1], 1)), True, axis=-1)
    return masks


@given(st.data())
def test_every_head_at_every_time_keeps_its_mask(data: st.DataObject) -> None:
    grid, blocks = data.draw(schedules.grids()), data.draw(schedules.all_blocks())
    segments = data.draw(st.integers(1, 11))
    model = ModelSignature("A", data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 8)
    shape = (segments, model.layers, model.heads, blocks.q_blocks(grid.tokens), blocks.k_blocks(grid.tokens))
    masks = random_masks(shape, data.draw(st.integers(0, 9)))
    masks[data.draw(st.integers(0, segments - 1)), 0, 0] = True
    edges = np.linspace(0, 1, segments + 1)
    plan = plan_from_masks(masks, grid, blocks, model=model, segments=edges)
    plan.file.prove()
    for segment, time in enumerate((edges[1:] + edges[:-1]) / 2):
        for layer in range(model.layers):
            core = plan.file.schedule(time, layer)
            for head in range(model.heads):
                assert np.array_equal(core.tile_keep(head), masks[segment, layer, head])
                assert (core.head_list[head] == DENSE) == masks[segment, layer, head].all()


def test_tensors_are_masks_and_one_segment_needs_no_axis() -> None:
    masks = random_masks(SHAPE)
    plans = [plan_from_masks(each, (2, 3, 13), (16, 32), model=SIGNATURE) for each in (masks, torch.tensor(masks))]
    assert [plan.schedule(0.0, 1).density for plan in plans] == [pytest.approx(masks[1].mean())] * 2
    assert plans[0].segments == plans[1].segments
    assert plans[0].grid == GRID


def test_equal_heads_share_their_lists() -> None:
    masks = random_masks(SHAPE)
    masks[:, 2] = masks[:, 0]
    heads = plan_from_masks(masks, GRID, BLOCKS, model=SIGNATURE).file.schedules.schedule(0, 1)
    assert heads.head_list.tolist() == [0, 5, 0]
    assert len(heads.list_bits) == 10


def test_a_plan_is_saved_and_runs_as_masked_attention(tmp_path: Path, one_thread: None) -> None:
    model: Any = transformer(0)
    grid = TokenGrid(2, 4, 6)
    masks = random_masks((2, 2, 2, 3, 3))
    made = plan_from_masks(masks, grid, (16, 16), model=model, segments=(0, 0.5, 1), notes="of a test")
    made.save(tmp_path / "own.plan")
    plan = load_plan(tmp_path / "own.plan")
    assert plan.file.notes == "of a test"
    latents, text = torch.randn(1, 16, 2, 8, 12), torch.randn(1, 5, 16)
    for timestep in (900, 100):
        arguments = (latents, torch.tensor([timestep]), text)
        with torch.no_grad():
            with masked(model, plan):
                expected = model(*arguments, return_dict=False)[0]
            with plan.attach(model):
                torch.testing.assert_close(model(*arguments, return_dict=False)[0], expected, rtol=0, atol=5e-6)
            assert (model(*arguments, return_dict=False)[0] - expected).abs().max() > 1e-3, "the masks must matter"


def test_what_is_refused() -> None:
    masks = random_masks(SHAPE)

    def make(
        masks: Any = masks, grid: Any = GRID, blocks: Any = BLOCKS, model: Any = SIGNATURE, **options: Any
    ) -> None:
        plan_from_masks(masks, grid, blocks, model=model, **options)

    shape = r"masks must be bool of \(segments, layers, heads, query blocks, key blocks\) = "
    with pytest.raises(ValueError, match=shape + r"\(1, 2, 3, 5, 3\), .*; got float64 of \(2, 3, 5, 3\)"):
        make(masks.astype(float))
    with pytest.raises(ValueError, match=r"got uint8 of \(2, 3, 5, 3\)"):
        make(torch.tensor(masks).byte())
    with pytest.raises(ValueError, match=shape + r"\(1, 2, 3, 5, 5\), .*; got bool of \(2, 3, 5, 3\)"):
        make(blocks=(16, 16))
    with pytest.raises(ValueError, match=shape + r"\(2, 2, 3, 5, 3\), .*; got bool of \(2, 3, 5, 3\)"):
        make(segments=(0, 0.5, 1))
    masks[1, 2, 3] = False
    with pytest.raises(ValueError, match="a key block in every row, got none in segment 0, layer 1, head 2, row 3"):
        make()
    for edges in ((), (1.0,), (0.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.0, float("nan"), 1.0), (0.1, 1.0)):
        with pytest.raises(ValueError, match=r"segments must be edges that rise from 0 to 1, got \["):
            make(segments=edges)
    with pytest.raises(SchemaError, match=r"blocks\.block_q must be one of .*, got 100"):
        make(blocks=(100, 128))
    with pytest.raises(SchemaError, match=r"grid\.height must be a positive integer, got 0"):
        make(grid=(2, 0, 13))
    with pytest.raises(UnknownModelError):
        make(model=torch.nn.Linear(1, 1))
