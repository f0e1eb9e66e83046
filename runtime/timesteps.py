"""Reads timesteps from a device without waiting for it if they were read before."""

from __future__ import annotations

import threading

import torch

MOST_BYTES = 1 << 16
"""Largest storage that is read as a whole; the timesteps of a sampling are some hundred bytes."""


class Timesteps(threading.local):
    """The values of timesteps, on the CPU; every thread has its own, as samplings side by side have.

    Reading a value from a device waits for all that was queued there: the forward before. But a scheduler keeps the
    timesteps of a sampling in one tensor, of which pipelines pass views: its memory is read once, and again when it is
    another one or has changed, which PyTorch counts. What is written behind PyTorch's back (``.data``, a CUDA graph of
    one's own) is not seen. Inference tensors have no count, and are read every time.
    """

    def __init__(self) -> None:
        self._storage: torch.UntypedStorage | None = None
        """A reference, so that nothing else is allocated at its address."""
        self._version = -1
        self._values = torch.empty(0, dtype=torch.uint8, device="cpu")

    def read(self, timestep: torch.Tensor) -> torch.Tensor:
        """The same values on the CPU, of the same shape and dtype."""
        if at_hand(timestep):
            return timestep
        storage = timestep.untyped_storage()
        if timestep.is_inference() or storage.nbytes() > MOST_BYTES:
            return timestep.cpu()
        if self._storage is None or (storage.data_ptr(), timestep._version) != (
            self._storage.data_ptr(),
            self._version,
        ):
            self._values = fetch(storage)
            self._storage, self._version = storage, timestep._version
        view = torch.empty(0, dtype=timestep.dtype, device="cpu")
        return view.set_(self._values.untyped_storage(), timestep.storage_offset(), timestep.shape, timestep.stride())


def at_hand(x: torch.Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return x.device.type == "cpu"


def fetch(storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a storage on the CPU, uint8; waits for its device."""
    content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return content.to("cpu", copy=True)
