"""Runs a sampler dense, or with other self-attention, and measures what a plan does to every head."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from calibatt.plans import PlanFile
from calibatt.runtime import LayerSchedule, Plan
from calibatt.runtime.adapters import adapter_for
from calibatt.runtime.intercept import InterceptedSite, Interception
from calibatt.tools.calibrate.listen import Call, listening
from calibatt.tools.calibrate.sampler import Sampler
from calibatt.tools.calibrate.statistics import projection_factor

Attention = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""``attention(q, k, v, layer, time) -> out``, all ``(B, H, N, D)``; time is the denoising time, 1 is noise."""
Floats = npt.NDArray[np.float64]

CHUNK_SCORES = 1 << 24
"""Scores held at a time where attention is written out: 64 MiB in fp32."""


FIRST_SEED = 5000
"""Of the first held-out video; one more for each."""


def typed(command: str) -> str:
    """The command with the arguments of this process; of absolute paths just the names, since folders are private."""
    return " ".join([command, *(Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:])])


def about(command: str, sampler: Sampler) -> dict[str, str]:
    """Command, device, versions and date of a measurement."""
    on_gpu = next(sampler.transformer.parameters()).is_cuda
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return {
        "command": typed(command),
        "device": device,
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

    interception = Interception(model, adapter, attend, begin=lambda arguments: float(adapter.time(arguments)))
    try:
        with torch.no_grad():
            yield
    finally:
        interception.detach()


def written_out(q: Tensor, k: Tensor, v: Tensor, layer: int, time: float) -> Tensor:
    """Dense attention written out in float32, some queries of a head at a time: a second exact kernel, whose sums are
    in another order than those of the model's own."""
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


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """What a plan does to each head on the dense trajectory of one sample; float64 ``(steps, layers, heads)``, NaN
    where a head was not measured.

    Args:
        relative: ||O' - O||^2 / ||O||^2 of the head's output, over the sampled queries.
        residual: Mean over queries of ||(O' - O) W_h||^2 / mean ||x||^2, as calibration states it.
        recall: Mean share of attention mass in the blocks that are computed; of a copied row, its anchor's.
    """

    relative: Floats
    residual: Floats
    recall: Floats


def head_errors(
    sampler: Sampler, plan: Plan, prompt: str, seed: int, *, queries: int, heads: int | None = None
) -> HeadErrors:
    """Measures a plan's masks on one dense generation, whatever kernel executes them.

    Args:
        sampler: The sampler.
        plan: The plan.
        prompt: What to sample.
        seed: Of the noise and of what is measured.
        queries: Tokens whose output is measured, drawn at random once.
        heads: Heads of each layer and step to measure, drawn at random; all if absent.
    """
    tokens, signature = plan.grid.tokens, plan.signature
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(tokens, generator=generator)[:queries].sort().values
    found = np.full((3, len(sampler.times), signature.layers, signature.heads), np.nan)
    step = -1

    def on_forward(now: float) -> bool:
        nonlocal step
        step = min(range(len(sampler.times)), key=lambda index: abs(sampler.times[index] - now))
        return True

    def on_call(call: Call) -> None:
        schedule = plan.schedule(sampler.times[step], call.layer)
        factor = projection_factor(call.projection, signature.heads, signature.head_dim)
        some = torch.randperm(signature.heads, generator=generator)[:heads].tolist()
        for head in sorted(some):
            values = _head(call, schedule, head, picked, factor[head])
            found[:, step, call.layer, head] = values

    with listening(sampler.transformer, sampler.grid, on_forward, on_call, batches=True):
        sampler.run(prompt, seed)
    return HeadErrors(*found)


def _head(
    call: Call, schedule: LayerSchedule, head: int, queries: Tensor, factor: Tensor
) -> tuple[float, float, float]:
    """Relative error, residual error and recall of one head."""
    device = call.q.device
    source, keep = schedule.dense(head)
    keys, values = call.k[head].float(), call.v[head].float()
    block_of_key = torch.arange(len(keys)) // schedule.blocks.block_k
    queries = queries[queries < len(keys)]  # the rest is padding of this prompt's text
    lost = projected = size = kept = 0.0
    for some in queries.split(max(1, CHUNK_SCORES // len(keys))):
        dropped = ~keep[some][:, block_of_key].to(device)
        scores = call.q[head, source[some].to(device)].float() @ keys.T * keys.shape[-1] ** -0.5
        kept += float(scores.softmax(-1).masked_fill_(dropped, 0).sum())
        dense = call.out[head, some.to(device)].float()
        change = scores.masked_fill_(dropped, -torch.inf).softmax(-1) @ values - dense
        lost, size = lost + float(change.square().sum()), size + float(dense.square().sum())
        projected += float((change @ factor).square().sum())
    return lost / max(size, 1e-30), projected / len(queries) / call.residual_square, kept / len(queries)


def promised(plan: PlanFile, times: Sequence[float], key: str) -> Floats | None:
    """What calibration promised at each step, from the plan's header: ``head_error`` ``(steps, layers, heads)`` or
    ``error_weight`` ``(steps, layers, 1 or heads)``; None for a plan that does not say."""
    values: Any = plan.predicted.get(key)
    if values is None:
        return None
    found = np.array(values, dtype=np.float64)
    found = found[[plan.segment_index(now) for now in times]]
    return found if found.ndim == 3 else found[..., None]
