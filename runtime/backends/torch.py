"""The torch backend: gathers the keys and values that a tile keeps and hands them to scaled_dot_product_attention.

Any device, any dtype. Tiles that keep equally many keys form batches, whatever their heads. Outputs pile up in the
order of the work; one last gather puts every one in its place and copies anchors to their groups. What is no video is
not in the schedule: its keys are put before those that a tile keeps, and its queries are dense.

On a CPU, Python threads share the work, and the operators of each run on one core: a tile's keys and values stay in
that core's cache, and no core waits for another until the end. Operators that use every core meet at a barrier after
every few tiles, which was measured slower, and many times slower while another process was using one of the cores.

Heads of 8 bits are computed in fp32 (fp64 for fp64 input) on what `runtime.quantise` rounds, apart from the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from calibatt.plans.precision import BF16, INT8, INT8_FP8
from calibatt.plans.schedule import DENSE, LayerSchedule
from calibatt.runtime.device_schedule import DeviceSchedule
from calibatt.runtime.quantise import EightBit, eight_bit, rounded_weights
from calibatt.runtime.schedule import Outline

PRECISIONS = {BF16, INT8, INT8_FP8}
CPU_GATHER_BYTES = 1 << 20
"""Keys and values gathered at a time on a CPU, at least one tile's: what the cache of one core holds."""
DEVICE_GATHER_BYTES = 1 << 28
"""The same on other devices: enough tiles to fill them."""
CPU_DENSE_QUERIES = 768
"""Queries of a dense head that one core takes at a time; from here on torch's kernel cuts them its widest way."""
LSE_SCORES = 1 << 24
"""Scores held at a time where they are held (for the log of the sum of exponentials, for probabilities that are
rounded): 64 MiB in fp32, for each thread.
"""


@dataclass(frozen=True, eq=False)
class _Batch:
    """Tiles that keep equally many keys.

    Args:
        first_row: The first of the ``tiles * block_q`` computed rows.
        heads: int64 ``(tiles,)``.
        blocks: int64 ``(tiles, kept)``; key blocks, numbered through all heads: ``head * k_blocks + block``.
        keys: Keys of each tile; fewer than ``kept * block_k`` where the last block is partial.
    """

    first_row: int
    heads: torch.Tensor
    blocks: torch.Tensor
    keys: int


@dataclass(frozen=True, eq=False)
class _Work:
    """The heads of one precision in the order of their execution: the tiles of the batches, then the dense heads.

    Args:
        chosen: Which heads of the schedule; None: all.
        precision: What they multiply in.
        core: The schedule of these heads; all numbers of heads below are its.
        batches: The batches, most keys first.
        dense: Head, first computed row and end of its rows, of each dense head.
        queries: int64; the query ``head * V + token`` of each computed row. A partial tile repeats its last query.
        position: int64 ``(H * V,)``; the computed row that is the output of query ``head * V + token``.
    """

    chosen: list[int] | None
    precision: int
    core: LayerSchedule
    batches: list[_Batch]
    dense: list[tuple[int, int, int]]
    queries: torch.Tensor
    position: torch.Tensor


def supports(outline: Outline, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    """This backend executes every schedule on every device."""
    return []


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bound: DeviceSchedule,
    scale: float,
    return_lse: bool,
    video_start: int = 0,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `runtime.backends`."""
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)) if return_lse else None
    works = bound.derived(_plans)
    ends = [q.shape[2]] * len(q) if lengths is None else lengths.tolist()

    def run_batch(threads: int) -> None:
        for batch, end in enumerate(ends):
            one = q[batch], k[batch, :, :end], v[batch, :, :end], out[batch]
            for work in works:
                some_lse = lse[batch] if lse is not None else None
                if work.chosen is None:
                    _run_one(*one, some_lse, work, scale, threads, video_start)
                    continue
                some_q, some_k, some_v, some_out = (x[work.chosen] for x in one)
                some_lse = some_lse[work.chosen] if some_lse is not None else None
                _run_one(some_q, some_k, some_v, some_out, some_lse, work, scale, threads, video_start)
                out[batch, work.chosen] = some_out
                if lse is not None and some_lse is not None:
                    lse[batch, work.chosen] = some_lse

    # Autocast is a thread's own: the calling thread alone would compute its tiles in another precision.
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type != "cpu":
            run_batch(1)
            return out, lse
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of those that start from now on
        try:
            run_batch(threads)
        finally:
            torch.set_num_threads(threads)
    return out, lse


def _run_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    work: _Work,
    scale: float,
    threads: int,
    video_start: int,
) -> None:
    """`run` for one element of the batch, by so many threads; writes out ``(H, N, D)`` and lse ``(H, N)``.

    Of k and v ``(H, n, D)`` there are only the keys that count.
    """
    heads, _, head_dim = q.shape
    core = work.core
    block_q, block_k, tokens = core.blocks.block_q, core.blocks.block_k, core.grid.tokens
    on_cpu = q.device.type == "cpu"
    video = slice(video_start, video_start + tokens)
    prefix, suffix = slice(video.start), slice(video.stop, None)
    video_q, keys, values = q[:, video], k, v
    rounded: EightBit | None = None
    if work.precision != BF16:
        rounded = eight_bit(q[:, video], k, v, core, range(heads), work.precision, scale, video_start)
        video_q, keys, values = rounded.q, rounded.k, rounded.v
    rows = video_q.reshape(heads * tokens, head_dim).index_select(0, work.queries)
    k_blocks, v_blocks = (_as_blocks(x[:, video], block_k) for x in (keys, values))
    others = [torch.cat([x[:, prefix], x[:, suffix]], 1) for x in (keys, values)]
    row_out = torch.empty_like(rows)
    row_lse = lse.new_empty(len(rows)) if lse is not None else None

    def attend(first: int, stop: int, k: torch.Tensor, v: torch.Tensor) -> None:
        queries = rows[first:stop].view(len(k), 1, -1, head_dim)
        if rounded is not None and rounded.rounds:
            found = _attention_rounded(queries, k, v, scale)
        else:
            found = F.scaled_dot_product_attention(queries, k, v, scale=scale)
        row_out[first:stop] = found.reshape(-1, head_dim)
        if row_lse is not None:
            row_lse[first:stop] = _lse(queries, k, scale).reshape(-1)

    def attend_tiles(batch: _Batch, some: slice) -> None:
        blocks, first = batch.blocks[some], batch.first_row + some.start * block_q
        kept = [
            x.index_select(0, blocks.view(-1)).view(len(blocks), 1, -1, head_dim)[:, :, : batch.keys]
            for x in (k_blocks, v_blocks)
        ]
        if others[0].shape[1]:
            kept = [torch.cat([x[batch.heads[some], None], y], 2) for x, y in zip(others, kept, strict=True)]
        attend(first, first + len(blocks) * block_q, *kept)

    def attend_others(head: int, part: slice) -> None:
        queries, keys = q[None, None, head, part], k[None, None, head]
        found = F.scaled_dot_product_attention(queries, keys, v[None, None, head], scale=scale)
        out[head, part] = found[0, 0]
        if lse is not None:
            lse[head, part] = _lse(queries, keys, scale)[0, 0]

    tasks: list[Callable[[], None]] = [
        partial(attend_others, head, part)
        for part in (prefix, suffix)
        for head in range(heads if q[:, part].shape[1] else 0)
    ]
    for head, first, stop in work.dense:
        step = CPU_DENSE_QUERIES if on_cpu else stop - first
        for start in range(first, stop, step):
            ends = start, min(start + step, stop)
            tasks.append(partial(attend, *ends, keys[None, None, head], values[None, None, head]))
    gather_bytes = CPU_GATHER_BYTES if on_cpu else DEVICE_GATHER_BYTES
    for batch in work.batches:
        tile_bytes = 2 * batch.blocks.shape[1] * block_k * head_dim * keys.element_size()
        step = max(1, gather_bytes // tile_bytes)
        for start in range(0, len(batch.blocks), step):
            tasks.append(partial(attend_tiles, batch, slice(start, start + step)))
    _run_all(tasks, threads)
    if rounded is not None:
        row_out += rounded.out_shift[work.queries // tokens, 0]
        if row_lse is not None:
            row_lse += rounded.lse_shift.reshape(-1)[work.queries]
    out[:, video] = row_out.index_select(0, work.position).view(heads, tokens, head_dim)
    if lse is not None and row_lse is not None:
        lse[:, video] = row_lse.index_select(0, work.position).view(heads, tokens)


def _as_blocks(x: torch.Tensor, block_k: int) -> torch.Tensor:
    """``(H, N, D)`` -> ``(H * k_blocks, block_k * D)``; what fills up a partial block is never attended to."""
    heads, tokens, head_dim = x.shape
    k_blocks = -(-tokens // block_k)
    if not (x.is_contiguous() and tokens == k_blocks * block_k):
        padded = x.new_empty(heads, k_blocks * block_k, head_dim)
        padded[:, :tokens] = x
        x = padded
    return x.view(heads * k_blocks, block_k * head_dim)


def _run_all(tasks: list[Callable[[], None]], threads: int) -> None:
    """Calls every task, in order; each goes to the thread that asks next, and the calling thread is one of them."""
    waiting = iter(tasks)
    inference = torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            for task in waiting:
                task()

    if threads == 1:
        work()
        return

    with ThreadPoolExecutor(threads - 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


def _lse(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Log of the sum of exponentials of the scaled scores: ``(B, 1, M, D)``, ``(B, 1, L, D)`` -> ``(B, 1, M)``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.to(dtype).transpose(-1, -2)
    step = max(1, LSE_SCORES // (len(q) * k.shape[-1]))
    return torch.cat([(part.to(dtype) @ k * scale).logsumexp(-1) for part in q.split(step, dim=2)], dim=2)


def _attention_rounded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`scaled_dot_product_attention` with probabilities in e4m3: ``(B, 1, M, D)``, ``(B, 1, L, D)``."""
    step = max(1, LSE_SCORES // (len(q) * k.shape[2]))
    parts = [rounded_weights(part @ k.mT * scale, True) @ v for part in q.split(step, dim=2)]
    return torch.cat(parts, dim=2)


def _plans(bound: DeviceSchedule) -> list[_Work]:
    """The work of each precision."""
    core, found = bound.core, []
    for precision in np.unique(core.head_precision).tolist():
        chosen = np.flatnonzero(core.head_precision == precision).tolist()
        if len(chosen) == core.heads:
            return [_plan(core, None, precision, bound.device)]
        found.append(_plan(core.select(chosen), chosen, precision, bound.device))
    return found


def _plan(core: LayerSchedule, chosen: list[int] | None, precision: int, device: torch.device) -> _Work:
    tokens, block_q, block_k, k_blocks = core.grid.tokens, core.blocks.block_q, core.blocks.block_k, core.k_blocks
    missing = k_blocks * block_k - tokens
    packed = [head * tokens + core.packed_queries(head) for head in range(core.heads)]
    by_keys: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for head in range(core.heads):
        for tile in range(core.tiles(head) if core.head_list[head] != DENSE else 0):
            columns = core.columns(head, tile)
            by_keys[len(columns) * block_k - missing * bool(columns[-1] == k_blocks - 1)].append((head, tile))

    batches, dense, queries, rows = [], [], [], 0
    for keys, tiles in sorted(by_keys.items(), reverse=True):
        blocks = np.stack([head * k_blocks + core.columns(head, tile).astype(np.int64) for head, tile in tiles])
        heads = torch.tensor([head for head, _ in tiles], device="cpu").to(device)
        batches.append(_Batch(rows, heads, torch.from_numpy(blocks).to(device), keys))
        rows += len(tiles) * block_q
        for head, tile in tiles:
            row = np.minimum(np.arange(tile * block_q, (tile + 1) * block_q), len(packed[head]) - 1)
            queries.append(packed[head][row])
    for head in np.flatnonzero(core.head_list == DENSE):
        dense.append((int(head), rows, rows + len(packed[head])))
        rows += len(packed[head])
        queries.append(packed[head])
    computed = np.concatenate(queries)
    row_of_query = np.empty(core.heads * tokens, dtype=np.int64)
    row_of_query[computed] = np.arange(len(computed))
    position = row_of_query[np.concatenate([head * tokens + core.token_source(head) for head in range(core.heads)])]
    queries_of, rows_of = (torch.from_numpy(each).to(device) for each in (computed, position))
    return _Work(chosen, precision, core, batches, dense, queries_of, rows_of)
