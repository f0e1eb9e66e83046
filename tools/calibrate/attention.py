"""Exact attention that has a backward on every device: what calibration computes and differentiates.

A user's own attention may have no gradient (quantised or sparse kernels), and PyTorch's choice may be slow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 8
"""Kernels of a GPU take a multiple of so many channels of a head; other heads are padded with zeros."""
CUDNN_CHANNELS = 128
"""Most channels of a head for which cuDNN has a backward."""


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with the scale ``D ** -0.5``, differentiable.

    Args:
        q: ``(B, H, N, D)``.
        k: The same.
        v: The same.

    Returns:
        The output ``(B, H, N, D)``, and on a GPU the natural logarithm of each query's sum of exponentials, float32
        ``(B, H, N)``.
    """
    scale, channels, queries = q.shape[-1] ** -0.5, q.shape[-1], q.shape[2]
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, scale=scale), None
    if channels % ALIGNMENT:
        q, k, v = (F.pad(x, (0, -channels % ALIGNMENT)) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if kernel_name(q) == "cuDNN":
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    else:
        result = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    out, total = result[0], result[1]
    return out[..., :channels], total.detach().reshape(*q.shape[:2], -1)[..., :queries]


def kernel_name(q: Tensor) -> str:
    """Name of the library whose kernels `attention` uses for such queries."""
    if not q.is_cuda:
        return "PyTorch on the CPU"
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "cuDNN" if half and q.shape[-1] <= CUDNN_CHANNELS else "memory-efficient"
