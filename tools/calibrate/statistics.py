"""The statistics of one self-attention call: what the compiler must know of it, measured without an N x N matrix.

Scores are recomputed for a few query blocks at a time (PyTorch) or a tile at a time (Triton, on a GPU), and all errors
are measured behind the output projection: with G_h = W_h^T W_h = A_h A_h^T, the change of the residual stream that a
change dO of head h's output makes has the squared size ||dO A_h||^2, so values are multiplied by A_h once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from calibatt.compiler.stats import STEPS_PER_OCTAVE, ZERO_CODE, Manifest, UnitStatistics, window_keep
from calibatt.plans import Blocks, TokenGrid

MENU_QUERY_BLOCKS = 8
"""Query blocks on which the output error of the menu's masks is measured exactly."""
SCORES_AT_ONCE = 1 << 23
"""Scores that the PyTorch path holds at a time, over all heads (32 MiB in float32)."""
DIAGONAL_SHARE = 1e-10
"""Of the mean of a diagonal, added to all of it."""
VALUES_AT_ONCE = 1 << 26
"""Numbers of all tokens' values that are behind the projection at a time, in whole heads (256 MiB in float32)."""


def unit_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    manifest: Manifest,
    projection: Tensor,
    residual_square: float,
    seed: int,
) -> UnitStatistics:
    """Measures one sample's self-attention call.

    Args:
        q: ``(H, N, D)`` queries as attention receives them, any float dtype; N is that of the manifest's grid, less the
            padding of the text at its end.
        k: ``(H, N, D)`` keys.
        v: ``(H, N, D)`` values.
        out: ``(H, N, D)`` the call's output.
        manifest: What to measure: grid, blocks, thresholds, windows, radii, query stride.
        projection: ``(dim, H * D)`` the output projection with the gate folded into its rows.
        residual_square: Mean over tokens of the squared norm of the residual stream that the projection adds to.
        seed: Chooses the query blocks on which the menu is measured.

    Returns:
        The arrays of section 9 of docs/design.md. Blocks of padding only have no mass, so planes leave them out as
        keys; as queries they keep everything.
    """
    grid, blocks = manifest.grid, manifest.blocks
    heads, tokens, head_dim = q.shape
    factor = projection_factor(projection, heads, head_dim)
    stride = manifest.query_stride
    if q.is_cuda:
        from calibatt.tools.calibrate.kernels import block_statistics as measure
    else:
        measure = block_statistics
    # The kernel multiplies in q's dtype, and would make a copy of any other.
    values = projected_values(v, factor, q.dtype if q.is_cuda else torch.float32)
    mass, error = measure(q, k, values, blocks, stride)
    there = (..., slice(blocks.q_blocks(tokens)), slice(blocks.k_blocks(tokens)))
    mass, error = (_with_padding(x, manifest.q_blocks, manifest.k_blocks) for x in (mass, error / residual_square))
    planes = keep_planes(mass, manifest.thresholds)
    windows = _windows(manifest, q.device)[:, None].expand(-1, heads, -1, -1)
    menu = torch.cat([planes[there], windows[there]])
    menu_error, menu_residual = menu_errors(q, k, v, menu, factor, blocks, stride, seed)
    rows, frames, size = copy_errors(out, factor, grid, manifest.row_radius, manifest.frame_radius)
    return UnitStatistics(
        planes=pack(planes).cpu().numpy(),
        block_mass=log_codes(mass.clamp(max=1), mass.new_ones(())).cpu().numpy() if manifest.has_mass else None,
        **_block_error(error, manifest),
        menu_error=menu_error.cpu().numpy(),
        menu_residual_error=(menu_residual / residual_square).cpu().numpy(),
        output_size=(size / residual_square).cpu().numpy(),
        **_copy_error("row", *rows, residual_square),
        **(_copy_error("frame", *frames, residual_square) if manifest.frame_radius else {}),
    )


@lru_cache(maxsize=1)
def _windows(manifest: Manifest, device: torch.device) -> Tensor:
    """The manifest's windows, bool ``(W, Q, K)``."""
    keeps = [window_keep(window, manifest.grid, manifest.blocks) for window in manifest.windows]
    shape = (len(keeps), manifest.q_blocks, manifest.k_blocks)
    return torch.from_numpy(np.array(keeps, np.bool_).reshape(shape)).to(device)


def pack(planes: Tensor) -> Tensor:
    """bool ``(..., K)`` as bits, uint8 ``(..., ceil(K / 8))``, little-endian, where the planes are."""
    bits = torch.nn.functional.pad(planes.to(torch.uint8), (0, -planes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=planes.device)
    return (bits * places).sum(-1, dtype=torch.uint8)


def log_codes(values: Tensor, peak: Tensor) -> Tensor:
    """`calibatt.compiler.stats.quantise` where the values are: uint8 codes, at most one off where rounding decides.

    Args:
        values: float32, 0 <= values <= peak.
        peak: What code 0 stands for; broadcasts.
    """
    code = torch.round(STEPS_PER_OCTAVE * (peak.log2() - values.log2()))  # of 0 infinite, of 0 under 0 NaN
    return code.nan_to_num(ZERO_CODE, ZERO_CODE).clamp(0, ZERO_CODE).to(torch.uint8)


def _with_padding(x: Tensor, q_blocks: int, k_blocks: int) -> Tensor:
    """``(H, Q', K')`` as ``(H, Q, K)``, zero where there is padding only."""
    return torch.nn.functional.pad(x, (0, k_blocks - x.shape[2], 0, q_blocks - x.shape[1]))


def _block_error(error: Tensor, manifest: Manifest) -> dict[str, np.ndarray]:
    if not manifest.has_block_error:
        return {}
    peak = error.amax((1, 2))
    codes = log_codes(error, peak[:, None, None])
    return {"block_error": codes.cpu().numpy(), "block_error_peak": peak.cpu().numpy()}


def _copy_error(axis: str, relative: Tensor, projected: Tensor, residual_square: float) -> dict[str, np.ndarray]:
    residual = projected / residual_square
    return {f"{axis}_error": relative.cpu().numpy(), f"{axis}_residual_error": residual.cpu().numpy()}


def projection_factor(projection: Tensor, heads: int, head_dim: int) -> Tensor:
    """A_h ``(H, D, D)`` float32 with ||o A_h|| = ||W_h o|| for each head's slice W_h of ``(dim, H * D)``.

    A_h is the Cholesky factor of W_h^T W_h; what is added to its diagonal, so that it exists for any W_h, is far below
    the rounding of float32.
    """
    slices = projection.double().view(-1, heads, head_dim).transpose(0, 1)
    square = slices.mT @ slices
    diagonal = square.diagonal(dim1=1, dim2=2)
    diagonal += diagonal.mean(1, keepdim=True) * DIAGONAL_SHARE + torch.finfo(torch.float32).tiny
    return torch.linalg.cholesky(square).float()


def projected_values(v: Tensor, factor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values behind the projection, ``(H, N, D)``.

    They are centred: o_J - O does not change when all values are shifted, and differences of small numbers are exact.
    """
    found = torch.empty(v.shape, dtype=dtype, device=v.device)
    for some in _heads_at_once(v):
        behind = v[some].float() @ factor[some]
        found[some] = behind.sub_(behind.mean(1, keepdim=True))
    return found


def _heads_at_once(x: Tensor, numbers: int = VALUES_AT_ONCE) -> Iterator[slice]:
    """Slices of the heads of ``(H, N, D)``, about so many numbers each."""
    step = max(1, numbers // (x.shape[1] * x.shape[2]))
    return (slice(first, min(first + step, len(x))) for first in range(0, len(x), step))


def _padded(x: Tensor, tokens: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[1])) if tokens > x.shape[1] else x


def by_key_block(q: Tensor, k: Tensor, v: Tensor, block_k: int) -> tuple[Tensor, Tensor]:
    """Attention of queries ``(H, C, D)`` split by key block: masses ``(H, C, K)`` and sums ``(H, K, C, D)``."""
    (heads, queries, head_dim), tokens = q.shape, k.shape[1]
    k_blocks = -(-tokens // block_k)
    scores = q.float() @ _padded(k.float(), k_blocks * block_k).mT
    scores.mul_(head_dim**-0.5)
    scores[..., tokens:] = -torch.inf
    parts = torch.softmax(scores, -1).view(heads, queries, k_blocks, block_k)
    values = _padded(v.float(), k_blocks * block_k).view(heads, k_blocks, block_k, -1)
    return parts.sum(-1), parts.transpose(1, 2) @ values


def _query_chunks(tokens: int, block_q: int, stride: int, at_once: int) -> Iterator[tuple[int, int, Tensor]]:
    """Runs of equally full query blocks: first block, number of blocks, sampled tokens (blocks * samples)."""
    full, rest = divmod(tokens, block_q)
    samples = -(-block_q // stride)
    step = max(1, at_once // samples)
    offsets = torch.arange(0, block_q, stride)
    for first in range(0, full, step):
        count = min(step, full - first)
        yield first, count, (torch.arange(first, first + count)[:, None] * block_q + offsets).reshape(-1)
    if rest:
        yield full, 1, torch.arange(full * block_q, tokens, stride)


def block_statistics(q: Tensor, k: Tensor, values: Tensor, blocks: Blocks, stride: int) -> tuple[Tensor, Tensor]:
    """Block mass and block error by PyTorch.

    Args:
        q: ``(H, N, D)``.
        k: ``(H, N, D)``.
        values: ``(H, N, D)`` values behind the projection, float32.
        blocks: Block sizes.
        stride: Every `stride`-th query of a block is measured.

    Returns:
        Float32 ``(H, Q, K)`` each: the mean over measured queries of a block's mass p_J, and of
        ||p_J (o_J - O)||^2, where o_J is the mean value that block J selects and O the output.
    """
    heads, tokens, _ = q.shape
    shape = (heads, blocks.q_blocks(tokens), blocks.k_blocks(tokens))
    mass, error = q.new_zeros(shape, dtype=torch.float32), q.new_zeros(shape, dtype=torch.float32)
    at_once = SCORES_AT_ONCE // (heads * tokens)
    for first, count, picked in _query_chunks(tokens, blocks.block_q, stride, at_once):
        p, sums = by_key_block(q[:, picked.to(q.device)], k, values, blocks.block_k)
        output = sums.sum(1, keepdim=True)
        own = torch.linalg.vecdot(sums, sums).mT
        cross = torch.linalg.vecdot(sums, output).mT
        whole = output.square().sum(-1).mT
        squared = (own - 2 * p * cross + p * p * whole).clamp_(min=0)
        here = slice(first, first + count)
        mass[:, here] = p.view(heads, count, -1, shape[2]).mean(2)
        error[:, here] = squared.view(heads, count, -1, shape[2]).mean(2)
    return mass, error


def keep_planes(mass: Tensor, thresholds: tuple[float, ...]) -> Tensor:
    """For each threshold the smallest set of key blocks, by falling mass, that holds it.

    Args:
        mass: ``(H, Q, K)``; sums to 1 over K.
        thresholds: Shares of the mass, ascending.

    Returns:
        bool ``(T, H, Q, K)``, nested; of equal masses the lower block comes first.
    """
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    planes = [torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, before < t) for t in thresholds]
    return torch.stack(planes)


def menu_errors(
    q: Tensor, k: Tensor, v: Tensor, menu: Tensor, factor: Tensor, blocks: Blocks, stride: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Exact output error of masked attention on a seeded sample of query blocks.

    Args:
        q: ``(H, N, D)``.
        k: ``(H, N, D)``.
        v: ``(H, N, D)``.
        menu: bool ``(M, H, Q, K)`` candidate masks.
        factor: ``(H, D, D)`` of `projection_factor`.
        blocks: Block sizes.
        stride: Every `stride`-th query of a chosen block is measured.
        seed: Seed of the choice.

    Returns:
        Float32 ``(M, H)`` each: ||O_kept - O||^2 / ||O||^2, and the mean over queries of ||(O_kept - O) W_h||^2.
    """
    heads, tokens, _ = q.shape
    q_blocks = blocks.q_blocks(tokens)
    chosen = torch.randperm(q_blocks, generator=torch.Generator().manual_seed(seed))[:MENU_QUERY_BLOCKS]
    lost = q.new_zeros(len(menu), heads, dtype=torch.float32)
    projected, size, queries = lost.clone(), lost[0].clone(), 0
    for block in sorted(chosen.tolist()):
        here = slice(block * blocks.block_q, min(tokens, (block + 1) * blocks.block_q), stride)
        queries += len(range(tokens)[here])
        at_once = max(1, SCORES_AT_ONCE // (tokens * len(range(tokens)[here])))
        for some in torch.arange(heads).split(at_once):
            some = slice(int(some[0]), int(some[-1]) + 1)
            p, sums = by_key_block(q[some, here], k[some], v[some], blocks.block_k)
            keep = menu[:, some, block].transpose(0, 1).float()
            share = keep @ p.mT
            output = sums.sum(1)
            kept = (keep @ sums.flatten(2)).unflatten(2, output.shape[1:])
            change = kept / share.clamp(min=1e-30)[..., None] - output[:, None]
            lost[:, some] += change.square().sum((2, 3)).T
            projected[:, some] += (change @ factor[some, None]).square().sum((2, 3)).T
            size[some] += output.square().sum((1, 2))
    return lost / size.clamp(min=1e-30), projected / queries


Errors = tuple[Tensor, Tensor]
"""Relative to the head's output, and behind the projection."""


def copy_errors(
    out: Tensor, factor: Tensor, grid: TokenGrid, row_radius: int, frame_radius: int
) -> tuple[Errors, Errors, Tensor]:
    """How well the output of a row, or of a frame, stands for its neighbours, and how large the output is.

    Args:
        out: ``(H, N, D)`` attention output.
        factor: ``(H, D, D)`` of `projection_factor`.
        grid: The token sequence.
        row_radius: Largest offset, in rows of a frame.
        frame_radius: Largest offset, in frames.

    Returns:
        Of rows, then of frames, float32 ``(H, members, 2 * radius)`` twice, offsets -radius..-1, 1..radius, NaN where
        there is no such member: sum ||O[r] - O[r + d]||^2 / sum ||O[r]||^2 over the member's tokens (of a row in all
        frames), and mean ||(O[r] - O[r + d]) W_h||^2. And float32 ``(H,)``: mean ||O W_h||^2 over all tokens.
    """
    parts: list[list[Tensor]] = [[] for _ in range(5)]
    video = slice(grid.text_before, grid.text_before + grid.video_tokens)
    for some in _heads_at_once(out, VALUES_AT_ONCE // 2):  # which several arrays hold
        plain = out[some].float()
        behind = plain @ factor[some]
        size = behind.square().sum((1, 2)) / out.shape[1]
        plain, behind = (x[:, video].unflatten(1, (grid.frames, grid.height, grid.width)) for x in (plain, behind))
        rows = _between(plain.transpose(1, 2), behind.transpose(1, 2), row_radius)
        for part, found in zip(parts, (*rows, *_between(plain, behind, frame_radius), size), strict=True):
            part.append(found)
    row, row_behind, frame, frame_behind, size = map(torch.cat, parts)
    return (row, row_behind), (frame, frame_behind), size


def _between(plain: Tensor, behind: Tensor, radius: int) -> Errors:
    """Errors between the members of ``(H, members, parts, ., D)``."""
    members = plain.shape[1]
    own = plain.square().sum((2, 3, 4)).clamp(min=1e-30)
    change, moved = _distances(plain), _distances(behind) / (behind.shape[2] * behind.shape[3])
    relative = plain.new_full((len(plain), members, 2 * radius), torch.nan)
    projected = relative.clone()
    for offset in range(1, min(radius, members - 1) + 1):
        up, down = radius + offset - 1, radius - offset
        apart = change.diagonal(offset, 1, 2)
        relative[:, :-offset, up], relative[:, offset:, down] = apart / own[:, :-offset], apart / own[:, offset:]
        apart = moved.diagonal(offset, 1, 2)
        projected[:, :-offset, up], projected[:, offset:, down] = apart, apart
    return relative, projected


def _distances(x: Tensor) -> Tensor:
    """Squared distances ``(H, M, M)`` between the members of ``(H, M, parts, ., D)``, from their inner products.

    What all have in common is taken off first: the difference of large sums would lose small distances. Inner products
    are summed over parts, since one of members this long would keep a GPU's other processors idle.
    """
    apart = (x - x.mean(1, keepdim=True)).flatten(3).transpose(1, 2)
    inner = (apart @ apart.mT).sum(1)
    size = inner.diagonal(dim1=1, dim2=2)
    return (size[:, :, None] + size[:, None] - 2 * inner).clamp_(min=0)
