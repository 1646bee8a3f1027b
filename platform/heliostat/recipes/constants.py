"""Keeps constant tensors of recipes on the devices that compute with these tensors."""

from __future__ import annotations

import torch

from heliostat.data.device_streams import Arrival


class Constant:
    """Keeps a CPU tensor that never changes, and one copy of this tensor per device.

    Copying the tensor in every micro-batch would make the host wait for the device, because the CPU tensor's memory isn't pinned.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._copies: dict[torch.device, tuple[torch.Tensor, Arrival]] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """Returns the constant tensor on a device. Every call returns the same tensor, which any CUDA stream may use."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.values.to(device), Arrival(device)
        copy, arrival = self._copies[device]
        arrival.awaited()
        return copy
