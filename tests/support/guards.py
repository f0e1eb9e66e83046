"""Plans at every extreme that the format allows, and tensors with regions around them that nobody may touch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from calibatt.plans import DENSE, Blocks, LayerSchedule, TokenGrid
from calibatt.runtime.ops import planned_attention
from calibatt.runtime.schedule import ListedSchedule
from support.budget import check_against_oracle
from support.schedules import random_schedule

GUARD_TOKENS = 300
"""Before and after the tokens of each sample: more than a tile and a block."""
GUARD_ELEMENTS = 1 << 16
"""Before and after what is allocated meanwhile."""
CHANNELS_OF = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def adversarial(block_k: int) -> dict[str, tuple[LayerSchedule, int, int]]:
    """Valid schedules of blocks of 128 queries by name, each with the tokens before and after the video."""
    rng, blocks = np.random.default_rng(0), Blocks(128, block_k)

    def made(grid: TokenGrid, heads: int, density: float = 0.3, **more: Any) -> LayerSchedule:
        return random_schedule(rng, grid, blocks, heads, density, **more)

    def all_to(core: LayerSchedule, block: int) -> LayerSchedule:
        """The same key block in each list."""
        keep = np.zeros((len(core.list_bits), core.k_blocks), np.bool_)
        keep[:, block] = True
        return replace(core, list_bits=np.packbits(keep, axis=1, bitorder="little"))

    odd, rows = TokenGrid(3, 5, 23), TokenGrid(5, 60, 1)  # 345 tokens; rows of one token
    last = -(-odd.tokens // block_k) - 1
    sparse = made(odd, 3, 0.0)
    every = list(range(6))
    overlapping = made(odd, 2, 0.5)
    return {
        "one token": (made(TokenGrid(1, 1, 1), 2), 0, 0),
        "one token between one and one": (made(TokenGrid(1, 1, 1), 2), 1, 1),
        "one token, a long prefix": (made(TokenGrid(1, 1, 1), 2), 257, 0),
        "no list at all": (made(odd, 3, dense_heads=[0, 1, 2]), 1, 1),
        "the last partial block alone": (all_to(sparse, last), 0, 0),
        "the last partial block alone, with a suffix of one": (all_to(sparse, last), 0, 1),
        "the first block alone": (all_to(sparse, 0), 1, 0),
        "every block listed": (made(odd, 3, 1.0), 127, 129),
        "a token beyond a block": (made(TokenGrid(1, 1, 257), 3), 0, 0),
        "a token short of a block": (made(TokenGrid(1, 1, 255), 3), 1, 1),
        "a pattern for each head": (made(odd, 6, anchored_heads=every, anchors=("random", "frames", "every")), 1, 1),
        "rows of one token, each an anchor": (made(rows, 6, anchored_heads=every, anchors="every"), 0, 1),
        "rows of one token, one a frame": (made(rows, 6, anchored_heads=every, anchors="frame"), 1, 0),
        "one frame for all": (made(odd, 6, anchored_heads=every, anchors="video"), 0, 0),
        "dense heads of one frame": (made(odd, 3, dense_heads=[0, 1, 2], anchored_heads=[1, 2], anchors="video"), 1, 1),
        "lists that overlap": (_overlapping(overlapping), 0, 1),
        "last tile first": (replace(sparse, tile_order=sparse.tile_order[::-1].copy()), 0, 0),
        "many heads": (made(TokenGrid(1, 2, 65), 64, shared_heads=list(range(1, 64))), 1, 1),
    }


def _overlapping(core: LayerSchedule) -> LayerSchedule:
    """The second head's lists begin in the middle of the first one's; the rest is nobody's."""
    assert DENSE not in core.head_list
    return replace(core, head_list=np.array([0, 1], np.int32))


class Guards:
    """Tensors whose surroundings are NaN, of known bits; `check` looks at them."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def _filled(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=like.dtype, device=like.device)

    def around(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A copy of x ``(B, H, N, D)`` laid out ``(B, N, H, D)``, between tokens that are not its own."""
        batch, heads, tokens, channels = x.shape
        whole = self._filled((batch, tokens + 2 * GUARD_TOKENS, heads, channels), x)
        inside = whole[:, GUARD_TOKENS : GUARD_TOKENS + tokens].transpose(1, 2)
        inside.copy_(x)
        self._kept.append((name, whole, whole.view(CHANNELS_OF[x.dtype]).clone()))
        return inside

    @contextmanager
    def around_outputs(self) -> Iterator[None]:
        """What is allocated meanwhile by `torch.empty_like` and `Tensor.new_empty` has guards, too."""
        like, new = torch.empty_like, torch.Tensor.new_empty

        def guarded(plain: torch.Tensor) -> torch.Tensor:
            if plain.dtype not in CHANNELS_OF:
                return plain
            whole = self._filled((plain.numel() + 2 * GUARD_ELEMENTS,), plain)
            self._kept.append(("out", whole, whole.view(CHANNELS_OF[plain.dtype]).clone()))
            return whole[GUARD_ELEMENTS:].as_strided(plain.shape, plain.stride(), GUARD_ELEMENTS)

        with (
            mock.patch.object(torch, "empty_like", lambda x, **more: guarded(like(x, **more))),
            mock.patch.object(torch.Tensor, "new_empty", lambda x, *size, **more: guarded(new(x, *size, **more))),
        ):
            yield

    def check(self) -> None:
        """Asserts that every guard is as it was."""
        for name, whole, before in self._kept:
            now = whole.view(before.dtype)
            if name == "out":
                edges = (slice(GUARD_ELEMENTS), slice(-GUARD_ELEMENTS, None))
                assert all(torch.equal(now[edge], before[edge]) for edge in edges), "written beyond an output"
            else:
                assert torch.equal(now, before), f"written into {name} or around it"


def run_guarded(
    core: LayerSchedule,
    before: int,
    after: int,
    backend: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 16,
) -> None:
    """Runs a schedule twice with guards around everything, without and with padding, and compares with the oracle.

    NaN is what guards hold: it reaches an output where anything of them is read.
    """
    core.check()
    schedule, tokens = ListedSchedule(core), before + core.grid.tokens + after
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([before + core.grid.tokens, tokens], dtype=torch.int32, device=device)
    for lengths in (None, ends):
        guards = Guards()
        drawn = torch.randn(3, 2, core.heads, tokens, head_dim, generator=generator).to(device, dtype)
        q, k, v = (guards.around(name, x) for name, x in zip("qkv", drawn, strict=True))
        more: dict[str, Any] = {"video_start": before, "lengths": lengths}
        for _ in range(2):  # the second launch is not prepared anew
            with guards.around_outputs():
                out, lse = planned_attention(q, k, v, schedule, backend=backend, return_lse=True, **more)
            assert out.isfinite().all()
            assert lse.isfinite().all()
        guards.check()
        check_against_oracle(out, q, k, v, schedule, lse=lse if dtype != torch.float64 else None, **more)
