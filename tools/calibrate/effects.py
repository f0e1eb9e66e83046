"""Measures what masks, copies and rounding of one self-attention call do to the final latent, from its gradient.

With g the gradient of <u, z> / ||z|| for the final latent z and a random vector u, <g, e> is the first-order effect of
an error e of the output; its square is, on average over u, the relative squared change of z. Effects are signed: those
of calls that act on one video are added before they are squared, and no query is left out of what is squared later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from calibatt.plans import EIGHT_BITS, INT8_FP8, Blocks, TokenGrid
from calibatt.runtime.quantise import SHIFT, as_e4m3
from calibatt.tools.calibrate.gradients import EVERY, LEAST_KEPT, LEAST_REST, AttentionCall
from calibatt.tools.calibrate.precision import input_changes

SCORES_AT_ONCE = 1 << 19
"""How many scores PyTorch holds at a time (2 MiB in float32, which stay in a core's cache)."""
NUMBERS_AT_ONCE = 1 << 26
"""How many numbers are held at a time where whole heads are processed (256 MiB in float32)."""
ERROR_STRIDE = 8
"""Block errors are sums of squares, for which every 8th query is enough."""
ROUNDED_STRIDE = 8
"""PyTorch measures the rounding of probabilities for every 8th run of queries. These errors are as good as
independent, so that the sum over all runs is that over the measured ones times the root of this number.
"""
DIAGONAL_SHARE = 1e-3
"""Share of a diagonal's mean that is added to it: where there is no gradient, rounding could make a metric negative."""
MOST_MASKS = 31
"""How many masks are measured together, one bit for each."""


def mask_words(masks: Tensor) -> Tensor:
    """Masks bool ``(M, ..., Q, K)`` as int32 ``(..., Q, K)`` with a bit for each of them, the first one lowest.

    Raises:
        ValueError: There are more than `MOST_MASKS`.
    """
    if len(masks) > MOST_MASKS:
        raise ValueError(f"masks measured together must be at most {MOST_MASKS}, got {len(masks)}")
    words = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)
    for bit, mask in enumerate(masks):
        words |= mask.to(torch.int32) << bit
    return words


def block_effects(call: AttentionCall, words: Tensor, masks: int, blocks: Blocks) -> tuple[Tensor, Tensor, Tensor]:
    """Signed effects of dropping single blocks, of whole masks, and of probabilities in e4m3.

    For query i and key block J, with P the attention, dP_ij = <g_i, v_j> and D_i = <g_i, o_i>, let
    a_iJ = sum over J of P_ij (dP_ij - D_i) and p_iJ = sum over J of P_ij. Dropping J alone has the effect
    -a_iJ / (1 - p_iJ), keeping just the blocks of a mask sum of a_iJ / sum of p_iJ. Blocks are of the video's tokens,
    queries and keys; keys of all other tokens are in both sums, whatever the mask. Where P' is P rounded to e4m3, which
    multiplies values less their mean m, the effect is the sum over all keys of (P'_ij - P_ij) (dP_ij - <g_i, m>).

    Args:
        call: The call, with V gradients.
        words: int32 ``(1 or H, Q, K)`` of `mask_words`.
        masks: How many masks there are.
        blocks: Block sizes.

    Returns:
        Float32 ``(V, H, Q, K)`` effects of blocks, all with the opposite sign; float64 ``(V, masks, H)`` effects of
        masks; and float64 ``(V, H)`` effects of rounding.
    """
    measure = kernels.block_effects if (kernels := _kernels(call.q, blocks)) else _block_effects
    words = words.expand(len(call.q), -1, -1)
    measured = [measure(call, grad, words, masks, blocks) for grad in call.grads]
    effect, kept, rounding = (torch.stack(each) / call.scale for each in zip(*measured, strict=True))
    return effect, kept, rounding


def _kernels(q: Tensor, blocks: Blocks) -> ModuleType | None:
    """The Triton kernels, on a GPU whose shared memory holds their tiles; PyTorch measures elsewhere."""
    if not q.is_cuda:
        return None
    from calibatt.tools.calibrate import kernels

    return kernels if kernels.fits(q, blocks) else None


def _block_effects(
    call: AttentionCall, grad: Tensor, words: Tensor, masks: int, blocks: Blocks
) -> tuple[Tensor, Tensor, Tensor]:
    """`block_effects` of one gradient by PyTorch, some queries of a head at a time."""
    heads, _, channels = call.q.shape
    tokens, size, k_blocks = grad[:, call.video].shape[1], blocks.block_q, words.shape[2]
    device = call.q.device
    effect = torch.zeros(words.shape, device=device)
    kept = torch.zeros(masks, heads, dtype=torch.float64, device=device)
    rounding = torch.zeros(heads, dtype=torch.float64, device=device)
    bits = torch.arange(masks, dtype=torch.int32, device=device)
    at_once = max(1, SCORES_AT_ONCE // (call.q.shape[1] * size))
    for head in range(heads):
        q, out, g = (x[head, call.video].float() for x in (call.q, call.out, grad))
        k, v = (_in_blocks(x[head, None], call.video, blocks.block_k)[0].float() for x in (call.k, call.v))
        mean = call.v[head].float().mean(0)
        runs = [*_runs(tokens, size, at_once)]
        weight = (len(runs) / len(runs[::ROUNDED_STRIDE])) ** 0.5
        for number, (first, count, length) in enumerate(runs):
            here = slice(first * size, first * size + length)
            scores = (q[here] * channels**-0.5) @ k.T
            scores[:, tokens : k_blocks * blocks.block_k] = -torch.inf
            p = torch.softmax(scores, -1)
            change = g[here] @ v.T
            if number % ROUNDED_STRIDE == 0:
                unit = p.amax(-1, keepdim=True) / 2**SHIFT
                rounded = as_e4m3(p / unit) * unit - p
                part = (rounded * (change - (g[here] @ mean)[:, None])).sum(-1).double().sum()
                rounding[head] += part * weight
            change *= p
            p, change = (_sums(x, k_blocks, blocks.block_k) for x in (p, change))
            change -= p * (g[here] * out[here]).sum(-1, keepdim=True)
            p, change = p.view(count, -1, k_blocks + 1), change.view(count, -1, k_blocks + 1)
            effect[head, first : first + count] = (change / (1 - p).clamp(min=LEAST_REST))[..., :-1].sum(1)
            keep = F.pad((words[head, first : first + count, :, None] >> bits & 1).float(), (0, 0, 0, 1), value=1.0)
            kept[:, head] += ((change @ keep) / (p @ keep).clamp(min=LEAST_KEPT)).double().sum((0, 1))
    return effect, kept, rounding


def precision_effects(call: AttentionCall, rounding: Tensor, blocks: Blocks) -> Tensor:
    """Signed effects of heads in 8 bits, to first order: <gradient of an input, what rounding changes in it>.

    With INT8 queries and keys are rounded, with INT8_FP8 values and probabilities as well. Gradients of keys and values
    include what queries of other tokens do with them, although these are computed in 16 bits: they are few.

    Args:
        call: The call, with V gradients.
        rounding: ``(V, H)`` of `block_effects`.
        blocks: Block sizes.

    Returns:
        float64 ``(V, len(EIGHT_BITS), H)``.
    """
    effects = rounding.new_zeros(len(call.grads), len(EIGHT_BITS), len(call.q))
    for some in _heads_at_once(call.q, copies=4):
        changes = input_changes(call.q[some], call.k[some], call.v[some], call.video, blocks.block_k)
        for vector, grads in enumerate(call.input_grads):
            for change, grad, precisions in zip(changes, grads, (EIGHT_BITS, EIGHT_BITS, (INT8_FP8,)), strict=True):
                if grad is not None:
                    effect = torch.linalg.vecdot(grad[some].float(), change).sum(1, dtype=torch.float64) / call.scale
                    for precision in precisions:
                        effects[vector, EIGHT_BITS.index(precision), some] += effect
    effects[:, EIGHT_BITS.index(INT8_FP8)] += rounding
    return effects


def _in_blocks(x: Tensor, video: slice, block_k: int) -> Tensor:
    """Keys or values ``(H, N, D)`` rearranged: the video's, zeros that fill up its last block, then all others."""
    start, stop, _ = video.indices(x.shape[1])
    filled = F.pad(x[:, start:stop], (0, 0, 0, (start - stop) % block_k))
    return torch.cat([filled, x[:, :start], x[:, stop:]], 1)


def _sums(x: Tensor, k_blocks: int, block_k: int) -> Tensor:
    """Sums ``(..., K + 1)`` over the keys of every block, then over all keys that are in none, of ``(..., n)``."""
    blocks, others = x.split([k_blocks * block_k, x.shape[-1] - k_blocks * block_k], -1)
    return torch.cat([blocks.unflatten(-1, (k_blocks, block_k)).sum(-1), others.sum(-1, keepdim=True)], -1)


def _runs(tokens: int, size: int, at_once: int) -> Iterator[tuple[int, int, int]]:
    """Runs of equally full blocks: first block, number of blocks, tokens."""
    full, rest = divmod(tokens, size)
    for first in range(0, full, at_once):
        count = min(at_once, full - first)
        yield first, count, count * size
    if rest:
        yield full, 1, rest


def block_errors(call: AttentionCall, blocks: Blocks, stride: int = ERROR_STRIDE) -> Tensor:
    """Sums of squared errors of single blocks in the gradient's own metric, float32 ``(H, Q, K)``.

    The error of dropping block J for query i is e = p_iJ (o_iJ - o_i), with o_iJ the mean value that J selects; its
    size is e^T G e, with G the mean of g g^T over the video's tokens and vectors. It has no sign, and less noise than
    effects.

    Args:
        call: The call.
        blocks: Block sizes.
        stride: Every `stride`-th query of a block is measured, and stands for the others.
    """
    mean = torch.zeros(len(call.q), *(call.q.shape[-1],) * 2, dtype=torch.float64, device=call.q.device)
    for some in _heads_at_once(call.q):
        for grad in call.grads:
            g = grad[some, call.video].float()
            mean[some] += (g.mT @ g).double()
    tokens = call.q[:, call.video].shape[1]
    mean /= tokens * len(call.grads) * call.scale**2
    factor, size = _root(mean)
    _, error = block_statistics(call.q, call.k, _behind(call.v, factor), blocks, stride, call.video)
    edges = (torch.arange(error.shape[1] + 1, device=error.device) * blocks.block_q).clamp(max=tokens)
    return error * edges.diff()[:, None] * size[:, None, None]


def _root(mean: Tensor) -> tuple[Tensor, Tensor]:
    """A ``(H, D, D)`` float32 with A A^T = G / size for matrices G float64 ``(H, D, D)``, and the sizes ``(H,)``."""
    size = mean.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(torch.float64).tiny)
    metric = mean / size[:, None, None]
    metric.diagonal(dim1=1, dim2=2).add_(DIAGONAL_SHARE)
    return torch.linalg.cholesky(metric).float(), size.float()


def _behind(v: Tensor, factor: Tensor) -> Tensor:
    """Values ``(H, N, D)`` times a matrix a head; less their mean, which no error sees."""
    centred = torch.empty(v.shape, dtype=v.dtype if v.is_cuda else torch.float32, device=v.device)
    for some in _heads_at_once(v):
        values = v[some].float() @ factor[some]
        centred[some] = values - values.mean(1, keepdim=True)
    return centred


def block_statistics(
    q: Tensor, k: Tensor, values: Tensor, blocks: Blocks, stride: int, video: slice = EVERY
) -> tuple[Tensor, Tensor]:
    """Mean mass of every block, and its mean squared error.

    Args:
        q: ``(H, N, D)``.
        k: ``(H, N, D)``.
        values: ``(H, N, D)``; on a GPU in the dtype of the queries.
        blocks: Block sizes.
        stride: Every `stride`-th query of a block is measured.
        video: The tokens that blocks are of; keys of others have mass too.

    Returns:
        Float32 ``(H, Q, K)`` each: the mean over measured queries of a block's mass p_J, and of
        ||p_J (o_J - O)||^2, where o_J is the mean value that block J selects and O the output.
    """
    if kernels := _kernels(q, blocks):
        return kernels.block_statistics(q, k, values, blocks, stride, video)
    keys, values = (_in_blocks(x.float(), video, blocks.block_k) for x in (k, values))
    q = q[:, video]
    heads, tokens, channels = q.shape
    size, k_blocks = blocks.block_q, blocks.k_blocks(tokens)
    mass = q.new_zeros(heads, blocks.q_blocks(tokens), k_blocks, dtype=torch.float32)
    error, filled = mass.clone(), k_blocks * blocks.block_k
    in_blocks, others = values[:, :filled].unflatten(1, (k_blocks, -1)), values[:, filled:]
    at_once = max(1, 4 * SCORES_AT_ONCE * stride // (heads * tokens * size))
    for first, count, length in _runs(tokens, size, at_once):
        rows = torch.arange(first * size, first * size + length).view(count, -1)[:, ::stride].reshape(-1)
        scores = q[:, rows].float() @ keys.mT * channels**-0.5
        scores[..., tokens:filled] = -torch.inf
        weights = torch.softmax(scores, -1)
        parts = weights[..., :filled].unflatten(2, (k_blocks, -1))
        sums, p = parts.transpose(1, 2) @ in_blocks, parts.sum(-1)
        output = sums.sum(1, keepdim=True) + (weights[..., filled:] @ others)[:, None]
        own, cross = torch.linalg.vecdot(sums, sums).mT, torch.linalg.vecdot(sums, output).mT
        squared = own - 2 * p * cross + p * p * output.square().sum(-1).mT
        here = slice(first, first + count)
        mass[:, here] = p.unflatten(1, (count, -1)).mean(2)
        error[:, here] = squared.clamp_(min=0).unflatten(1, (count, -1)).mean(2)
    return mass, error


def copy_effects(call: AttentionCall, grid: TokenGrid, row_radius: int, frame_radius: int) -> tuple[Tensor, Tensor]:
    """Signed effects of a row, or a whole frame, that takes the output of a neighbour.

    Args:
        call: The call.
        grid: The video tokens.
        row_radius: Largest offset, in rows of a frame.
        frame_radius: Largest offset, in frames.

    Returns:
        Of rows, then of frames, float64 ``(V, H, members, 2 * radius)``, offsets -radius..-1, 1..radius: the sum over
        the member's tokens (of a row in all frames) of <g, o[member + offset] - o[member]>; 0 where there is none.
    """
    heads, vectors = len(call.q), len(call.grads)
    rows = torch.zeros(vectors, heads, grid.height, 2 * row_radius, dtype=torch.float64, device=call.q.device)
    frames = torch.zeros(vectors, heads, grid.frames, 2 * frame_radius, dtype=torch.float64, device=call.q.device)
    for some in _heads_at_once(call.out):
        out, *grads = (
            x[some, call.video].float().unflatten(1, (grid.frames, grid.height, grid.width))
            for x in (call.out, *call.grads)
        )
        for effects, axis, radius in ((rows, 2, row_radius), (frames, 1, frame_radius)):
            if not radius:
                continue
            # <g[member], o[other]> of all pairs at once, summed over what a member spans in the other axis
            other = out.transpose(1, axis).flatten(3).permute(0, 2, 3, 1)
            own = [g.transpose(1, axis).flatten(3).transpose(1, 2) for g in grads]
            pairs = torch.stack([(g @ other).double().sum(1) for g in own]) / call.scale
            kept = pairs.diagonal(dim1=2, dim2=3)
            for column, offset in enumerate((*range(-radius, 0), *range(1, radius + 1))):
                first, last = max(0, -offset), min(out.shape[axis], out.shape[axis] - offset)
                if first < last:
                    effects[:, some, first:last, column] = pairs.diagonal(offset, 2, 3) - kept[..., first:last]
    return rows, frames


def row_differences(out: Tensor, grid: TokenGrid, radius: int) -> Tensor:
    """How far the output of a row is from its neighbours', which is what the paper's own method looks at.

    Args:
        out: ``(H, V, D)``, of the video.
        grid: The video tokens.
        radius: Largest offset, in rows of a frame.

    Returns:
        float32 ``(H, rows, 2 * radius)``: ||o[row] - o[row + offset]||^2 / ||o[row]||^2 over the row's tokens in all
        frames; NaN where there is no such row.
    """
    parts = []
    for some in _heads_at_once(out):
        x = out[some].float().unflatten(1, (grid.frames, grid.height, grid.width)).movedim(2, 1).flatten(2)
        size = x.square().sum(-1).clamp(min=1e-30)
        part = x.new_full((*x.shape[:2], 2 * radius), torch.nan)
        for column, offset in enumerate((*range(-radius, 0), *range(1, radius + 1))):
            those = torch.arange(max(0, -offset), min(x.shape[1], x.shape[1] - offset), device=x.device)
            part[:, those, column] = (x[:, those] - x[:, those + offset]).square().sum(-1) / size[:, those]
        parts.append(part)
    return torch.cat(parts)


def keep_planes(mass: Tensor, thresholds: Sequence[float], others: bool = False) -> Tensor:
    """For each threshold the smallest set of key blocks, by falling mass, that holds it.

    Args:
        mass: ``(H, Q, K)``; sums to 1 over K.
        thresholds: Shares of the mass, ascending.
        others: Whether the mass that is missing to 1 belongs to keys outside of all blocks, which count as kept.

    Returns:
        bool ``(T, H, Q, K)``, nested; of equal masses the lower block comes first.
    """
    ordered, index = mass.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    if others:
        before += (1 - mass.sum(-1, keepdim=True)).clamp(min=0)
    planes = [torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, index, before < t) for t in thresholds]
    return torch.stack(planes)


def ladder(order: Tensor, shares: Sequence[float]) -> Tensor:
    """Masks of fixed densities: the blocks that come first in `order`, and the first one of every row.

    Args:
        order: ``(H, Q, K)``; larger values come first.
        shares: Densities, ascending.

    Returns:
        bool ``(C, H, Q, K)``.
    """
    flat = order.flatten(1).sort(dim=1, descending=True).values
    top = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order.argmax(-1, keepdim=True), True)
    at = [min(flat.shape[1] - 1, round(share * flat.shape[1])) for share in shares]
    return torch.stack([(order > flat[:, index, None, None]) | top for index in at])


def _heads_at_once(x: Tensor, copies: int = 1) -> Iterator[slice]:
    """Slices of the heads of ``(H, N, D)``, such that so many copies of each hold about `NUMBERS_AT_ONCE` numbers."""
    step = max(1, NUMBERS_AT_ONCE // (copies * x.shape[1] * x.shape[2]))
    return (slice(first, min(first + step, len(x))) for first in range(0, len(x), step))
