"""The oracle is what the design says in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schedules import OTHERS, grids, layer_schedules, random_schedule

from calibatt.plans import Blocks, LayerSchedule, TokenGrid
from calibatt.runtime import reference
from calibatt.runtime.schedule import ListedSchedule


@settings(max_examples=20)
@given(
    layer_schedules(grid=grids(max_width=9), heads=st.integers(1, 2)),
    st.sampled_from(OTHERS),
    st.sampled_from(OTHERS),
    st.integers(0, 3),
)
def test_reference_is_the_definition_one_query_at_a_time(
    core: LayerSchedule, prefix: int, suffix: int, padding: int
) -> None:
    schedule = ListedSchedule(core)
    tokens, block_k = prefix + core.grid.tokens + suffix, core.blocks.block_k
    end = tokens - min(padding, suffix)
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, core.heads, tokens, 4))
    lengths = torch.tensor([end], dtype=torch.int32) if padding else None
    out, lse = reference.reference_attention(
        *map(torch.from_numpy, (q, k, v)), schedule, scale=0.7, video_start=prefix, lengths=lengths
    )

    def is_video(token: int) -> bool:
        return 0 <= token - prefix < core.grid.tokens

    for head in range(core.heads):
        source, keep = core.dense(head)
        for i in range(tokens):
            keys, own = list(range(end)), i
            if is_video(i):
                keys = [j for j in keys if not is_video(j) or keep[i - prefix, (j - prefix) // block_k]]
                own = prefix + source[i - prefix]
            weights = np.exp(k[0, head, keys] @ q[0, head, own] * 0.7)
            np.testing.assert_allclose(
                out[0, head, i], weights @ v[0, head, keys] / weights.sum(), rtol=1e-9, atol=1e-12
            )
            np.testing.assert_allclose(lse[0, head, i], np.log(weights.sum()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scores", [1, 1000])
def test_chunks_and_a_choice_of_queries_change_nothing(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TokenGrid(frames=2, height=3, width=7)
    core = random_schedule(np.random.default_rng(0), grid, Blocks(16, 16), 2, anchored_heads=[1])
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 8, generator=torch.Generator().manual_seed(0)).double()
    out, lse = reference.reference_attention(q, k, v, ListedSchedule(core))
    monkeypatch.setattr(reference, "CHUNK_SCORES", scores)
    queries = torch.tensor([grid.tokens - 1, 0, 11])
    part, part_lse = reference.reference_attention(q, k, v, ListedSchedule(core), queries=queries)
    torch.testing.assert_close(part, out[:, :, queries])
    torch.testing.assert_close(part_lse, lse[:, :, queries])
