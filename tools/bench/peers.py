"""What a user has instead: dense kernels, and other block-sparse ones on the same masks and tensors.

`dense_peer` and `sparse_peer` give a function to time, or the reason why a kernel is not available here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibatt.runtime.schedule import AttentionSchedule

DENSE_PEERS = ("sdpa-flash", "sdpa-cudnn", "flash-attention-4")
FLASH_4_BLOCK = 128
"""Queries and keys of the blocks that FlashAttention-4 takes on sm90."""
SPARSE_PEERS = ("flash-attention-4 sparse", "flex-attention")

Timed = Callable[[], Tensor]
"""Gives the output ``(B, H, N, D)``."""


def dense_peer(name: str, q: Tensor, k: Tensor, v: Tensor) -> Timed | str:
    """A dense kernel.

    Args:
        name: One of `DENSE_PEERS`.
        q: ``(B, H, N, D)``, as k and v.
    """
    if name == "flash-attention-4":
        return _flash_attention_4(q, k, v, None)
    if name == "sdpa-cudnn" and not q.is_cuda:
        return "cuDNN needs a CUDA device"
    kernel = {"sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION}[name]

    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def sparse_peer(name: str, q: Tensor, k: Tensor, v: Tensor, schedule: AttentionSchedule) -> Timed | str:
    """Another block-sparse kernel on a schedule's block lists; anchor rows are ours alone.

    Args:
        name: One of `SPARSE_PEERS`.
        q: ``(B, H, N, D)``, as k and v.
        schedule: Without anchor rows.
    """
    counts, indices = block_lists(schedule, q.device)
    if name == "flex-attention":
        return _flex_attention(q, k, v, schedule, counts, indices)
    if (schedule.blocks.block_q, schedule.blocks.block_k) != (FLASH_4_BLOCK, FLASH_4_BLOCK):
        return f"blocks must be {FLASH_4_BLOCK} x {FLASH_4_BLOCK}, got {schedule.blocks}"
    return _flash_attention_4(q, k, v, (counts, indices))


def block_lists(schedule: AttentionSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept key blocks as the peers want them: counts int32 ``(1, H, Q)`` and indices int32 ``(1, H, Q, K)``."""
    core = schedule.core
    keep = torch.from_numpy(np.stack([core.tile_keep(head) for head in range(core.heads)])).to(device)
    indices = keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
    return keep.sum(-1, dtype=torch.int32)[None], indices[None].contiguous()


def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, Tensor] | None) -> Timed | str:
    try:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import flash_attn_func
    except Exception as error:  # it fails in many ways where its compiler is not complete
        return f"cannot be imported: {type(error).__name__}: {error}"
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def run(**options: object) -> Tensor:
        found = flash_attn_func(q, k, v, **options)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    if lists is None:
        return run
    counts, indices = lists
    sparse = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(FLASH_4_BLOCK, FLASH_4_BLOCK),
    )
    return partial(run, block_sparse_tensors=sparse)


def _flex_attention(
    q: Tensor, k: Tensor, v: Tensor, schedule: AttentionSchedule, counts: Tensor, indices: Tensor
) -> Timed | str:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    blocks, tokens = schedule.blocks, schedule.grid.tokens
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=(blocks.block_q, blocks.block_k),
        seq_lengths=(tokens, tokens),
    )
    # Without fullgraph it would fall back to eager attention, silently, where it cannot be compiled.
    return partial(torch.compile(flex_attention, dynamic=False, fullgraph=True), q, k, v, block_mask=mask)
