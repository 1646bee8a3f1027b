"""Copies tensors between host and device while the device computes. Only this module makes CUDA streams and events for copies.

    for batch in on_device(batches, device, complete): ...  # meanwhile, the next batch is copied and completed
    norm = LateRead(tensor); ...; norm.values()             # reads the values later, without a wait in between
    with HostTensors(): loss = model(x)                     # autograd's saved tensors stay on the host until their use
    copies.mark(state); with copies.queue(): ...            # another thread copies state to the host (`CopyStream`)

On a CPU, copies and computation can't overlap. So each of these functions makes a plain copy, or no copy. Copies without a wait
use pinned host memory, because CUDA waits for copies from pageable memory.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks

Tensors = dict[str, torch.Tensor]
HOST = "host_"  # names of tensors that stay on the host begin so: their values become Python numbers without a wait


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a CPU tensor in pinned memory if the device is a GPU, so that a copy needs no wait; else the tensor itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a CPU tensor to the device without a wait; if the device is a CPU, returns the tensor itself."""
    return pinned(tensor, device).to(device, non_blocking=True)


def uploaded(batch: Tensors, device: torch.device) -> Tensors:
    """Copies a CPU batch to the device without a wait. Tensors whose names begin with `HOST` stay on the host."""
    return {name: values if name.startswith(HOST) else upload(values, device) for name, values in batch.items()}


def on_device(
    batches: Sequence[Tensors], device: torch.device, complete: Callable[[Tensors], Tensors] = lambda batch: batch
) -> Iterator[Tensors]:
    """Copies CPU batches to the device (`uploaded`), completes them with `complete` (without gradients), and yields them.

    On a GPU, a separate stream copies and completes the next batch during the computation with the current one.
    """
    if device.type != "cuda":
        for batch in batches:
            with torch.no_grad():
                completed = complete(uploaded(batch, device))
            yield completed
        return
    copying = _stream(device, "upload")
    ahead = _uploaded(batches[0], device, complete, copying)
    for following in (*batches[1:], None):
        now, computing = ahead, torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        for values in now.values():
            if values.is_cuda:
                values.record_stream(computing)  # its memory must not be reused before the computation with it is done
        if following is not None:
            ahead = _uploaded(following, device, complete, copying)
        yield now


def _uploaded(
    batch: Tensors, device: torch.device, complete: Callable[[Tensors], Tensors], copying: torch.cuda.Stream
) -> Tensors:
    with torch.cuda.stream(copying), torch.no_grad():
        return complete(uploaded(batch, device))


@functools.cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """Returns the device's CUDA stream for a purpose, such as `save`. Calls with the same purpose return the same stream."""
    return torch.cuda.Stream(device)


class Arrival:
    """Marks the work that this thread has queued on its stream, so that other streams can wait for it; no-op on a CPU."""

    def __init__(self, device: torch.device) -> None:
        """Sets the mark after the work that is queued now."""
        self._device = device
        self._moment = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def awaited(self) -> None:
        """Makes work that is queued after this call wait for the mark. The calling thread doesn't wait."""
        if self._moment is not None:
            torch.cuda.current_stream(self._device).wait_event(self._moment)


class LateRead:
    """Copies a tensor's current values to the host. The constructor only queues the copy; `values` waits for the copy."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Queues the copy of the tensor to host memory."""
        tensor, self._arrived = tensor.detach(), None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._copy = tensor.clone()

    def values(self) -> torch.Tensor:
        """Waits for the copy, but not for work that was queued later; returns the copy on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.cpu()


class HostTensors(saved_tensors_hooks):
    """Keeps tensors that autograd saves within the context in host memory. Copies each tensor back to the device before its use.

    Copies run on separate streams. The backward pass uses tensors in the reverse of the order in which they were saved. So when
    the backward pass uses a tensor, this class starts to copy back the tensor that was saved just before.
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
    """Holds a tensor in host memory.

    `before`: a weak reference to the tensor that autograd saved before this one; `restored`: whether this tensor was already
    copied back to the device. Most tensors are needed once, and so are copied back once.
    """

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
        tensor.record_stream(saving)  # its memory must not be reused before the copy is done

    def fetch(self) -> None:
        """Queues the copy back to the device, unless it is queued already."""
        if self._arrived is None or self._fetched:
            return
        fetching = _stream(self.device, "fetch")
        with torch.cuda.stream(fetching):
            fetching.wait_event(self._arrived)
            self._fetched = self._host.to(self.device, non_blocking=True), fetching.record_event()

    def restore(self) -> torch.Tensor:
        """Returns the tensor on its device. Work that is queued on the device after this call waits for the copy."""
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
    """Queues copies from a GPU on a separate stream, after the work that the training thread has queued; no-op on a CPU."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._ready: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None

    def mark(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Marks the state to copy: the state after all work that is queued now. Call it in the training thread."""
        device = next((t.device for t in tensors.values() if t.is_cuda), None)
        if device is None:
            return
        self._stream = self._stream or torch.cuda.Stream(device)
        self._ready = torch.cuda.current_stream(device).record_event()

    @contextmanager
    def queue(self) -> Iterator[None]:
        """Queues the copies that are made within the context on a separate stream. These copies have the state at the last
        `mark`. `wait` waits for these copies."""
        if self._stream is None or self._ready is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._ready)
            yield
            self._done = self._stream.record_event()

    def hold_back(self) -> None:
        """Makes GPU work that is queued after this call wait until the queued copies are done. The calling thread doesn't
        wait."""
        if self._stream is not None and self._done is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._done)

    def wait(self) -> None:
        """Waits until the queued copies are in host memory."""
        if self._done is not None:
            self._done.synchronize()
