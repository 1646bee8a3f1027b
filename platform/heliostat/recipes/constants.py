"""Keeps constants of recipes on the devices that compute with them."""

from __future__ import annotations

import torch

from heliostat.data.device_streams import Arrival


class Constant:
    """Holds a CPU tensor that never changes, and one copy on each device that asks for it.

    A copy in every micro-batch would come from memory that is not pinned, so the host would wait for the device.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self._copies: dict[torch.device, tuple[torch.Tensor, Arrival]] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """Returns the values on a device: the same tensor at every call, on any stream."""
        if device not in self._copies:
            with torch.inference_mode(False):
                self._copies[device] = self.values.to(device), Arrival(device)
        copy, arrival = self._copies[device]
        arrival.awaited()
        return copy
