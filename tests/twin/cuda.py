"""Provides `torch.cuda`'s functions on the simulated device, because a build of torch without CUDA lacks them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

NAME, MEMORY = "NVIDIA H100 80GB HBM3", 80 << 30
contexts: set[int] = set()  # devices whose memory was asked for: CUDA makes a context there, some 500 MB


class Stream(torch.Stream):
    """Represents a stream of the simulated device."""

    def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Stream:
        """Creates a stream, or wraps the stream of `ids`."""
        if ids:
            return super().__new__(cls, **ids)
        return super().__new__(cls, torch.device("cuda", _index(device)), priority=priority)

    def record_event(self, event: Any = None) -> Any:
        """Records an event, a new one by default, and returns it."""
        event = event or Event()
        event.record(self)
        return event

    @property
    def cuda_stream(self) -> int:
        """Returns the stream's number."""
        return int(self.stream_id)


class Event(torch.Event):
    """Represents an event of the simulated device."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        """Creates an event."""
        return super().__new__(cls, device="cuda", enable_timing=True)


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index if device is not None else None
    return torch._C._accelerator_getDeviceIndex() if index is None else index


def current_stream(device: Any = None) -> Stream:
    """Returns the stream that this thread uses on the device."""
    now = torch.accelerator.current_stream(torch.device("cuda", _index(device)))
    return Stream(stream_id=now.stream_id, device_index=now.device_index, device_type=now.device_type)


def default_stream(device: Any = None) -> Stream:
    """Returns the device's default stream."""
    return Stream(stream_id=0, device_index=_index(device), device_type=1)


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Uses a stream in this thread."""
    if chosen is None:
        yield
        return
    before = current_stream(chosen.device)
    torch.accelerator.set_stream(chosen)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def _asked(device: Any) -> int:
    """Returns the device's number, and creates its context."""
    index = _index(device)
    contexts.add(index)
    return index


def install(native: ModuleType) -> None:
    """Makes `torch.cuda` use the simulated device for the rest of this process."""
    generators = tuple(native.generator(index) for index in range(2))
    properties = SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        total_memory=MEMORY,
        multi_processor_count=132,
        pci_domain_id=0,
        pci_bus_id=0,
        pci_device_id=0,
    )
    functions: dict[str, Any] = {
        "Stream": Stream, "Event": Event, "current_stream": current_stream, "default_stream": default_stream, "stream": stream,
        "set_stream": torch.accelerator.set_stream, "is_available": lambda: True, "device_count": lambda: 2,
        "current_device": native.device, "set_device": lambda device: native.set_device(_index(device)) and None,
        "_exchange_device": native.set_device,
        "_maybe_exchange_device": lambda i: native.set_device(native.device() if i < 0 else i),
        "_lazy_init": lambda: None, "is_initialized": lambda: True, "_initialized": True, "_is_in_bad_fork": lambda: False,
        "_lazy_call": lambda call, **_: call(), "synchronize": lambda device=None: native.synchronize(),
        "empty_cache": lambda: None, "ipc_collect": lambda: None, "default_generators": generators,
        "get_device_properties": lambda device=None: properties, "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0), "memory_allocated": lambda device=None: native.memory()[0],
        "memory_reserved": lambda device=None: native.memory()[0], "max_memory_allocated": lambda device=None: native.memory()[1],
        "max_memory_reserved": lambda device=None: native.memory()[1],
        "reset_peak_memory_stats": lambda device=None: native.reset_peak(),
        "mem_get_info": lambda device=None: _asked(device) >= 0 and (MEMORY - native.memory()[0], MEMORY),
        "memory_stats": lambda device=None: {"allocated_bytes.all.current": native.memory()[0]},
        "is_bf16_supported": lambda *given, **named: True, "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    for name, value in functions.items():
        setattr(torch.cuda, name, value)
    for name in ("random", "memory", "streams"):  # which hold some of them under a second name
        module = getattr(torch.cuda, name)
        for own in functions.keys() & vars(module).keys():
            setattr(module, own, functions[own])
    torch.cuda.nvtx = SimpleNamespace(range_push=lambda name: 0, range_pop=lambda: 0, range=contextlib.nullcontext)
    torch.version.cuda = "12.8"
