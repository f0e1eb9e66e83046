"""Tiny Wan transformers whose blocks have the linear layers of quantisation libraries."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from support import wan

LIBRARIES = {
    "nf4": "bitsandbytes", "int8": "bitsandbytes", "gguf": "gguf", "quanto": "optimum.quanto", "torchao": "torchao",
}  # fmt: skip
"""Kinds of quantised linear layers and the library of each."""
KINDS = tuple(LIBRARIES)


def require(kind: str) -> None:
    """Skips a test where the library of a kind is not installed; what it warns of on import is its own affair."""
    library = LIBRARIES[kind]
    try:
        found = importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip(f"needs {library}, which is not among the project's dependencies")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(library)


def model(kind: str | None) -> Any:
    """`support.wan.transformer` with quantised blocks; not quantised without a kind."""
    made = wan.transformer(1, wide=True).requires_grad_(False)
    if kind is not None:
        quantise(made, kind)
    return made


def quantise(model: Any, kind: str) -> None:
    """Quantises the blocks of a transformer."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.blocks, Int8WeightOnlyConfig())
    elif kind == "quanto":
        from optimum.quanto import freeze, qint8, quantize

        quantize(model.blocks, weights=qint8)
        freeze(model.blocks)
    else:
        _replace(model.blocks, {"nf4": _nf4, "int8": _int8, "gguf": _gguf}[kind])
    model.to("cpu")


def plain(quantised: nn.Module) -> Any:
    """The same function with plain weights: what each quantised linear layer does to the identity."""
    found = model(None)
    for name, layer in quantised.blocks.named_modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            with torch.no_grad():
                weight = (layer(torch.eye(layer.in_features)) - layer(torch.zeros(1, layer.in_features))).T
            found.blocks.get_submodule(name).weight = nn.Parameter(weight.clone(), requires_grad=False)
    return found


def _replace(blocks: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, old in [each for each in blocks.named_modules() if isinstance(each[1], nn.Linear)]:
        parent, _, last = name.rpartition(".")
        new = make(old)
        new.bias = old.bias
        setattr(blocks.get_submodule(parent), last, new)


def _nf4(old: nn.Linear) -> nn.Module:
    import bitsandbytes

    new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, quant_type="nf4")
    new.weight = bitsandbytes.nn.Params4bit(old.weight.clone(), requires_grad=False, quant_type="nf4")
    return new


def _int8(old: nn.Linear) -> nn.Module:
    import bitsandbytes

    new = bitsandbytes.nn.Linear8bitLt(old.in_features, old.out_features, has_fp16_weights=False)
    new.weight = bitsandbytes.nn.Int8Params(old.weight.clone(), requires_grad=False, has_fp16_weights=False)
    return new


def _gguf(old: nn.Linear) -> nn.Module:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    new = GGUFLinear(old.in_features, old.out_features, compute_dtype=torch.float32)
    new.weight = GGUFParameter(torch.from_numpy(gguf.quantize(old.weight.numpy(), kind).copy()), quant_type=kind)
    return new
