"""A model that nobody knows: the row of docs/models.md is all it takes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from support.masked import masked
from support.schedules import random_schedule
from torch import Tensor, nn

from calibatt.plans import Blocks, ModelSignature, PlanFile, Segment, StoredLayers, TokenGrid
from calibatt.runtime import Plan, UnknownModelError

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
GRID = TokenGrid(frames=2, height=3, width=8)
LAYERS, HEADS, HEAD_DIM = 2, 2, 16


class MyProcessor:
    def __call__(self, attention: nn.Module, x: Tensor) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        return dispatch_attention_fn(q, k, v).flatten(2)


class MyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM)
        self.processor = MyProcessor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


class MyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MyAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


class MyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=HEADS, head_dim=HEAD_DIM)
        self.layers = nn.ModuleList(MyLayer() for _ in range(LAYERS))

    def forward(self, video: Tensor, text: Tensor, sigma: Tensor) -> Tensor:
        x = torch.cat([video.flatten(2).transpose(1, 2), text], 1) * sigma.view(-1, 1, 1)
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_row_of_the_page_is_enough() -> None:
    block = next(part for part in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S) if "row =" in part)
    assert len(block.splitlines()) <= 14, "about ten lines"
    names: dict[str, Any] = {"torch": torch}
    exec(block, names)
    row = names["row"]
    torch.manual_seed(0)
    model = MyTransformer().eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    layers = tuple(random_schedule(rng, GRID, Blocks(16, 16), HEADS, 0.4, anchored_heads=[1]) for _ in range(LAYERS))
    signature = ModelSignature("MyTransformer", LAYERS, HEADS, HEAD_DIM)
    plan = Plan(PlanFile(signature, GRID, Blocks(16, 16), (Segment(0.0, 1.0, 0.5),), StoredLayers.of([layers])))
    inputs = torch.randn(2, HEADS * HEAD_DIM, 2, 3, 8), torch.randn(2, 5, HEADS * HEAD_DIM), torch.tensor([0.5, 0.9])
    stock = model(*inputs)
    with pytest.raises(UnknownModelError, match="or come with an adapter of its own, got MyTransformer"):
        plan.attach(model)
    with masked(model, plan, row):
        expected = model(*inputs)
    with plan.attach(model, adapter=row):
        found = model(*inputs)
        assert model(*(x[:0] for x in inputs)).shape == (0, *expected.shape[1:])
        compiled = torch.compile(model, fullgraph=True, backend="eager")(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, stock, rtol=1e-3)
    assert torch.equal(model(*inputs), stock)
