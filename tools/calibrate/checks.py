"""Models that cannot be calibrated are refused before any work."""

from __future__ import annotations

from torch import nn

from calibatt.runtime.adapters import Adapter


class CheckError(ValueError):
    """A model that cannot be calibrated; the message says what to change."""


def check_model(model: nn.Module) -> None:
    """Refuses models whose forwards cannot be differentiated."""


def check_gradients(model: nn.Module, adapter: Adapter) -> None:
    """Refuses models with layers that give no gradient."""
