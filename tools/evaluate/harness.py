"""Runs a sampler dense, or with other self-attention."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calibatt.runtime import Plan
from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import InterceptedSite, Interception
from calibatt.tools.calibrate.sampler import Sampler

Attention = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""``attention(q, k, v, layer, time) -> out``, all ``(B, H, N, D)``; time is the denoising time, 1 is noise."""
Floats = npt.NDArray[np.float64]

CHUNK_SCORES = 1 << 24
"""How many scores are held at a time where attention is computed in full: 64 MiB in fp32."""


def typed(command: str) -> str:
    """The command with the arguments of this process; absolute paths are cut to names, since folders are private."""
    return " ".join([command, *map(_without_folders, sys.argv[1:])])


def _without_folders(word: str) -> str:
    """A word of a command without the folders of an absolute path, also of one after ``NAME=``."""
    name, equals, path = word.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if Path(path).is_absolute() else word


def about(command: str, sampler: Sampler | nn.Module) -> dict[str, str]:
    """Command, device, versions and date of a measurement of what has a `transformer`."""
    where = next(sampler.transformer.parameters()).device
    on_gpu = where.type == "cuda"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return {
        "command": typed(command),
        "device": torch.cuda.get_device_name(where) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


@contextmanager
def attending(model: nn.Module, attention: Attention) -> Iterator[None]:
    """Sends every self-attention call of a model through `attention` while the context lasts."""
    adapter = adapter_for(model)

    def attend(q: Tensor, k: Tensor, v: Tensor, site: InterceptedSite, now: float) -> Tensor:
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), site.layer, now)
        return out.transpose(1, 2).to(v.dtype)

    with Interception(model, adapter, attend, begin=lambda arguments: float(adapter.time(arguments))), torch.no_grad():
        yield


def written_out(q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
    """Dense attention in float32, some queries of a head at a time: a second exact kernel, which adds in another order
    than the model's own."""
    out = torch.empty_like(v)
    step = max(1, CHUNK_SCORES // k.shape[2])
    for sample in range(len(q)):
        for head in range(q.shape[1]):
            keys, values = k[sample, head].float(), v[sample, head].float()
            for start in range(0, q.shape[2], step):
                queries = q[sample, head, start : start + step].float()
                scores = queries @ keys.T * q.shape[-1] ** -0.5
                out[sample, head, start : start + step] = (torch.softmax(scores, -1) @ values).to(v.dtype)
    return out


def executed_density(plan: Plan, times: Sequence[float]) -> float:
    """Mean density over the sampler's times and all layers: what a generation executes."""
    layers = plan.signature.layers
    return sum(plan.schedule(now, layer).density for now in times for layer in range(layers)) / (len(times) * layers)
