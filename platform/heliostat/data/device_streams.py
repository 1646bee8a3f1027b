"""Copies between host and device while the device computes. Everything that makes streams and events of CUDA for copies is here.

    for batch in on_device(batches, device, complete): ...        # the next one travels, and is completed, meanwhile
    norm = LateRead(tensor); ...; norm.values()         # read later, without a wait in between
    with HostTensors(): loss = model(x)                 # what autograd saves inside is on the host until it is needed
    copies.mark(state); with copies.queue(): ...        # state that another thread copies to the host (`CopyStream`)

On a CPU there is nothing to overlap: each of them makes the plain copy, or none. What is copied without a wait is in pinned
memory on the host's side: from any other memory CUDA copies with a wait.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks

Tensors = dict[str, torch.Tensor]


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of the CPU in memory from which a copy to the device needs no wait: itself, unless the device is a GPU."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the CPU to the device without a wait; on a CPU, returns it as it is."""
    return pinned(tensor, device).to(device, non_blocking=True)


def on_device(
    batches: Sequence[Tensors], device: torch.device, complete: Callable[[Tensors], Tensors] = lambda batch: batch
) -> Iterator[Tensors]:
    """Yields batches, which are on the CPU, on the device, and as `complete` returns them, which computes without gradients.

    A GPU gets and completes the next batch on a stream of its own, while it computes with the batch before.
    """
    if device.type != "cuda":
        for batch in batches:
            with torch.no_grad():
                completed = complete({name: values.to(device) for name, values in batch.items()})
            yield completed
        return
    copying = _stream(device, "upload")
    ahead = _uploaded(batches[0], device, complete, copying)
    for following in (*batches[1:], None):
        now, computing = ahead, torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for values in now.values():
            values.record_stream(computing)  # its memory is not given away before what computes with it is done
        if following is not None:
            ahead = _uploaded(following, device, complete, copying)
        yield now


def _uploaded(
    batch: Tensors, device: torch.device, complete: Callable[[Tensors], Tensors], copying: torch.cuda.Stream
) -> Tensors:
    with torch.cuda.stream(copying), torch.no_grad():
        return complete({name: upload(values, device) for name, values in batch.items()})


@functools.cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """Returns the device's stream for a purpose."""
    return torch.cuda.Stream(device)


class Arrival:
    """Marks what this thread has queued on its stream of the device, for other streams that use it. On a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        """Marks the present moment."""
        self._device = device
        self._moment = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def awaited(self) -> None:
        """Lets what is queued next wait for the marked moment; the calling thread doesn't wait."""
        if self._moment is not None:
            torch.cuda.current_stream(self._device).wait_event(self._moment)


class LateRead:
    """Copies a tensor to the host. The copy is queued, of the values as they are now; only `values` waits for it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Queues the copy."""
        tensor, self._arrived = tensor.detach(), None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._copy = tensor.clone()

    def values(self) -> torch.Tensor:
        """Waits for the copy, and for nothing that was queued after it; returns it, on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.cpu()


class HostTensors(saved_tensors_hooks):
    """Keeps what autograd saves inside in host memory, and brings it back one tensor ahead of its use.

    Copies run on streams of their own. Backward passes use tensors in the opposite order: with each tensor that is brought back,
    the copy of the one that was saved before it begins.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[_Saved] | None = None
        super().__init__(self._save, self._restore)

    def _save(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor, self._last)
        self._last = weakref.ref(saved)
        return saved

    def _restore(self, saved: _Saved) -> torch.Tensor:
        tensor = saved.restore()
        if saved.before and (before := saved.before()) and not before.restored:
            before.fetch()
        return tensor


class _Saved:
    """Holds a tensor in host memory. `before`: the one that was saved before it, as long as that is needed; `restored`: whether
    it was brought back, mostly for its only use."""

    def __init__(self, tensor: torch.Tensor, before: weakref.ref[_Saved] | None) -> None:
        self.device, self.before, self.restored = tensor.device, before, False
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._fetched: tuple[torch.Tensor, torch.cuda.Event] | None = None
        self._arrived: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host.copy_(tensor)
            return
        saving = _stream(self.device, "save")
        saving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(saving):
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = saving.record_event()
        tensor.record_stream(saving)  # its memory is not given away before it is copied

    def fetch(self) -> None:
        """Queues the copy back to the device, unless it is queued."""
        if self._arrived is None or self._fetched:
            return
        fetching = _stream(self.device, "fetch")
        with torch.cuda.stream(fetching):
            fetching.wait_event(self._arrived)
            self._fetched = self._host.to(self.device, non_blocking=True), fetching.record_event()

    def restore(self) -> torch.Tensor:
        """Returns the tensor on its device; what is queued there next waits for it."""
        self.fetch()
        self.restored = True
        if self._fetched is None:
            return self._host.to(self.device)
        (tensor, ready), self._fetched = self._fetched, None
        computing = torch.cuda.current_stream(self.device)
        computing.wait_event(ready)
        tensor.record_stream(computing)
        return tensor


class CopyStream:
    """Queues copies from a GPU on a stream of its own, after what another thread has queued for training; else does nothing."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._ready: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None

    def mark(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Marks the moment whose state is to be copied; called in the thread that trains, behind what it has queued on a GPU."""
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        if device is None:
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._ready = torch.cuda.current_stream(device).record_event()

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Queues the copies that are made inside, as of the last `mark`; `wait` waits for them."""
        if self._stream is None or self._ready is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            yield
            self._done = self._stream.record_event()

    def hold_back(self) -> None:
        """Lets what is queued next on the GPU wait until the queued copies are done; the calling thread does not wait."""
        if self._stream is not None and self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)

    def wait(self) -> None:
        """Waits until the queued copies are in host memory."""
        if self._done is not None:
            self._done.synchronize()
