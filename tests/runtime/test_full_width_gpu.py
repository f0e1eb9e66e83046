"""Published models at their full width and sequence on a GPU, with two of their layers and random weights.

Dense, planned, compiled and put back; the truth of a sparse plan is the model's own code with explicit masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.masked import masked
from support.schedules import random_schedule

from calibatt.plans import Blocks, PlanFile, Segment, StoredLayers
from calibatt.runtime import Plan
from calibatt.runtime.adapters import adapter_for
from calibatt.tools.bench.published import MODELS, token_grid
from calibatt.tools.bench.variants import counted_calls

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

LAYERS = 2
DENSITY = 0.3
SEGMENTS = (Segment(0.0, 0.5, 0.25), Segment(0.5, 1.0, 0.75))
ROUNDING = 0.01
"""Relative distance of two exact ways to compute a forward in bfloat16."""


@dataclass(frozen=True)
class Wide:
    """A model on the GPU and the arguments of a forward.

    Args:
        model: Of `LAYERS` layers.
        inputs: Its arguments, at the noisiest time.
    """

    model: Any
    inputs: dict[str, Any]

    def __call__(self, **more: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.model(**{**self.inputs, **more})[0]

    def plan(self, dense: bool) -> Plan:
        """Every block in every head, half of the heads by lists; or sparse, every seventh head with anchors."""
        rng, grid = np.random.default_rng(0), token_grid(self.model, self.inputs)
        signature, blocks = adapter_for(self.model).signature(self.model), Blocks(128, 128)
        heads = range(signature.heads)
        options: dict[str, Any] = {"density": 1.0, "dense_heads": heads[::2]}
        if not dense:
            options = {"density": DENSITY, "dense_heads": heads[3::7], "shared_heads": heads[4::7]}
            options |= {"anchored_heads": heads[5::7], "patterns": 2, "anchors": ("random", "frames")}
        layers = [
            tuple(random_schedule(rng, grid, blocks, len(heads), **options) for _ in range(LAYERS)) for _ in SEGMENTS
        ]
        return Plan(PlanFile(signature, grid, blocks, SEGMENTS, StoredLayers.of(layers)))


@pytest.fixture(
    scope="module",
    params=[("wan-14b", "480p"), ("wan-14b", "720p"), ("wan-1.3b", "480p"), ("wan-1.3b", "720p"), ("mochi", "480p")],
    ids=" ".join,
)
def wide(request: pytest.FixtureRequest) -> Iterator[Wide]:
    """Attention is made to matter: keys are told apart, and gates are open."""
    name, size = request.param
    row, device = MODELS[name], torch.device("cuda")
    model = row.make(LAYERS, device)
    for key, parameter in model.named_parameters():
        if ".attn1.norm_q." in key or ".attn1.norm_k." in key:
            parameter.data.fill_(2)
        if key.endswith("scale_shift_table"):
            parameter.data.normal_(std=0.5)
    inputs = row.inputs(size, device)
    if (mask := inputs.get("encoder_attention_mask")) is not None:
        mask[:, -37:] = False
    yield Wide(model, inputs)
    torch.cuda.empty_cache()


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm())


@pytest.fixture
def compiled(wide: Wide) -> Iterator[Callable[..., torch.Tensor]]:
    """The forward compiled without a break in a graph: block by block, or as a whole where diffusers offers no more."""
    torch._dynamo.reset()
    if wide.model._repeated_blocks:
        wide.model.compile_repeated_blocks(fullgraph=True, dynamic=False)
        yield wide
        for block in wide.model.blocks:
            block._compiled_call_impl = None
    else:
        whole = torch.compile(wide.model, fullgraph=True, dynamic=False)
        yield Wide(whole, wide.inputs)


@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_a_dense_plan_changes_nothing_and_detach_everything_back(
    wide: Wide, compiled: Callable[..., torch.Tensor]
) -> None:
    """Eager first: a block that is compiled runs eagerly under the stance."""
    with torch.compiler.set_stance("force_eager"):
        plain = wide()
        with wide.plan(dense=True).attach(wide.model), counted_calls() as calls:
            assert far(wide(), plain) < ROUNDING
            assert calls() == LAYERS, "every self-attention once, no cross-attention"
        assert torch.equal(wide(), plain)
    with wide.plan(dense=True).attach(wide.model), counted_calls() as calls:
        assert far(compiled(), plain) < ROUNDING
        assert calls() == LAYERS
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(wide(), plain)


@pytest.mark.filterwarnings("ignore")  # inductor's own
def test_a_sparse_plan_is_the_stock_code_with_masks(wide: Wide, compiled: Callable[..., torch.Tensor]) -> None:
    plan = wide.plan(dense=False)
    with torch.compiler.set_stance("force_eager"):
        plain = wide()
        with masked(wide.model, plan):
            expected = wide()
        with plan.attach(wide.model):
            found = wide()
    with plan.attach(wide.model), counted_calls() as calls:
        fast = compiled()
        assert calls() == LAYERS
    assert far(found, expected) < ROUNDING
    assert far(fast, expected) < ROUNDING
    assert far(plain, expected) > 5 * ROUNDING, "the plan matters"
