"""Refuses models that cannot be calibrated, before any work."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibatt.runtime.adapters import Adapter, unwrap
from calibatt.tools.calibrate.gradients import at_hand

ROWS, DIRECTIONS = 16, 3
"""How many random inputs a layer is tried on, and in how many directions."""
STEP = 0.25
"""Length of a difference relative to its input: far above the rounding of quantised inputs, so that it averages out."""
TOLERANCE = 0.1


class CheckError(ValueError):
    """A model that cannot be calibrated; the message says what to change."""


def check_model(model: nn.Module) -> None:
    """Refuses models whose forwards cannot be differentiated.

    Raises:
        CheckError: The model or a part of it is compiled, has a plan attached or a step cache, would drop out values at
            random, or has weights made under `torch.inference_mode`; says what to do.
    """
    name = type(unwrap(model)).__name__
    modules = dict(model.named_modules())
    if compiled := [key for key, module in modules.items() if _is_compiled(module)]:
        raise CheckError(
            f"{name} must not be compiled while it is calibrated, got {_listed(compiled, name)} compiled; calibrate it "
            "first, or load it again without torch.compile"
        )
    attached = [key for key, module in modules.items() if hasattr(getattr(module, "processor", None), "beneath")]
    if attached:
        raise CheckError(
            f"{name} must be calibrated without a plan, got one attached to {_listed(attached, name)}; detach it"
        )
    caches = [type(model._cache_config).__name__] if getattr(model, "is_cache_enabled", False) is True else []
    if caches := caches or _stateful_hooks(modules):
        raise CheckError(
            f"{name} must compute every step by itself, got the step cache {caches[0]}; call disable_cache()"
        )
    dropping = [
        key for key, module in modules.items() if isinstance(module, nn.modules.dropout._DropoutNd) and _drops(module)
    ]
    if dropping:
        raise CheckError(f"{name} must not drop out values, got {_listed(dropping, name)} in training; call eval()")
    frozen = [key for key, weight in (*model.named_parameters(), *model.named_buffers()) if weight.is_inference()]
    if frozen:
        raise CheckError(
            f"weights of {name} must be made outside of torch.inference_mode, got {_listed(frozen, name)} made under "
            "it; load the model again, under torch.no_grad if need be"
        )


def check_gradients(model: nn.Module, adapter: Adapter) -> None:
    """Refuses models with linear layers whose backward gives no gradient, or not that of what they compute.

    One layer of every kind in the blocks is tried, except PyTorch's own with ordinary weights: a vector-Jacobian
    product is compared with differences of the layer's outputs.

    Raises:
        CheckError: A layer fails; names it, its class and both numbers.
    """
    seen = set()
    for block in {id(site.block): site.block for site in adapter.sites(model)}.values():
        for layer in block.modules():
            if not _is_special(layer) or (kind := _kind(layer)) in seen:
                continue
            seen.add(kind)
            name = next(key for key, module in model.named_modules() if module is layer)
            with at_hand(block):
                _check_layer(f"{name} ({_described(layer)})", layer, _dtype_of(model))


def _check_layer(name: str, layer: nn.Module, dtype: torch.dtype) -> None:
    """Compares gradients of one layer with differences.

    With the difference of its outputs as the vector w, <w, J d> is the squared size of the difference.
    """
    weight = layer.weight if isinstance(getattr(layer, "weight", None), Tensor) else next(layer.parameters(), None)
    device = torch.device("cpu") if weight is None or weight.device.type == "meta" else weight.device
    drawn = torch.Generator().manual_seed(0)
    for _ in range(DIRECTIONS):
        x, d = (torch.randn(ROWS, layer.in_features, generator=drawn) for _ in range(2))
        x, d = x.to(device, dtype), (STEP * d).to(device, dtype)
        try:
            with torch.no_grad():
                change = (layer(x + d).float() - layer(x - d).float()) / 2
            truth = float(change.double().square().sum())
            product = _product(layer, x, change, d)
        except Exception as error:
            raise CheckError(
                f"{name} must compute and be differentiated by itself, got {type(error).__name__}: {error}"
            ) from error
        if not abs(product - truth) <= TOLERANCE * truth:
            raise CheckError(
                f"{name} must have the gradient of what it computes, got <w, J d> = {product:.4g} by its backward and "
                f"{truth:.4g} by differences of its outputs; calibrate the model with layers that are differentiable"
            )


def _product(layer: nn.Module, x: Tensor, change: Tensor, d: Tensor) -> float:
    """<change, J d> by the layer's backward; 0 where it has none."""
    x = x.requires_grad_()
    with torch.enable_grad():
        out = layer(x)
    if not out.requires_grad:
        return 0.0
    (grad,) = torch.autograd.grad(out, x, change.to(out.dtype), allow_unused=True)
    return 0.0 if grad is None else float((grad.double() * d.double()).sum())


def _is_special(layer: nn.Module) -> bool:
    """A linear layer that is not PyTorch's own with ordinary floating-point weights."""
    if not hasattr(layer, "in_features") or not hasattr(layer, "out_features"):
        return False
    weight = getattr(layer, "weight", None)
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.element_size() > 1
    return not (plain and type(layer).__module__.startswith("torch.nn."))


def _kind(layer: nn.Module) -> tuple[object, ...]:
    weight = getattr(layer, "weight", None)
    return type(layer), type(weight), getattr(weight, "dtype", None)


def _described(layer: nn.Module) -> str:
    """Class of a layer and of its weight."""
    weight = getattr(layer, "weight", None)
    dtype = str(getattr(weight, "dtype", "")).removeprefix("torch.")
    return " ".join(filter(None, (f"{type(layer).__name__},", dtype, type(weight).__name__)))


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype in which the model computes."""
    dtype = getattr(unwrap(model), "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    return next((x.dtype for x in model.parameters() if x.is_floating_point() and x.element_size() > 1), torch.float32)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _stateful_hooks(modules: dict[str, nn.Module]) -> list[str]:
    """Hooks of diffusers that reuse something from one step in the next."""
    hooks = [getattr(getattr(module, "_diffusers_hook", None), "hooks", {}) for module in modules.values()]
    return [type(hook).__name__ for some in hooks for hook in some.values() if getattr(hook, "_is_stateful", False)]


def _drops(module: nn.Module) -> bool:
    return module.training and module.p > 0


def _listed(names: list[str], model: str) -> str:
    """The first few of some modules or weights."""
    shown = ", ".join(name or model for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
