"""Shows the rules of the simulated device, each in a few lines. They run in a separate process."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from heliostat.checkpoint import flat_copy
from heliostat.checkpoint.flat_copy import HostCopy
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.checkpoint.saver import Saver
from heliostat.config import spec
from heliostat.data import device_threads
from heliostat.parallel import document_attention
from heliostat.recipes import contrastive
from heliostat.storage.locations import Location
from heliostat.training.memory_keeper import CopyFacts, MemoryPlan
from heliostat.training.worker import memory_copies, node_metrics
from heliostat.training.worker.memory_copies import MemoryCopies
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.twin import cuda, device, traffic

RULES: dict[str, Callable[[], None]] = {}


def rule(check: Callable[[], None]) -> Callable[[], None]:
    """Adds a rule by its name."""
    RULES[check.__name__] = check
    return check


def raises(what: str, work: Callable[[], Any]) -> None:
    """Requires an error with this text."""
    try:
        work()
    except RuntimeError as e:
        assert what in str(e), e
    else:
        raise AssertionError(f"nothing raised {what!r}")


def ones(*size: int) -> torch.Tensor:
    """Returns ones on the device."""
    return torch.ones(*size, device="cuda")


@rule
def views_share_memory_and_copies_do_not() -> None:
    base = ones(3, 4)
    base.view(4, 3)[0, 0], base[1:, 2] = 5, 7
    base.narrow(0, 0, 1).mul_(2).t()[1].fill_(3)
    assert base.tolist() == [[10, 3, 2, 2], [1, 1, 7, 1], [1, 1, 7, 1]]
    layer, flat = nn.Linear(2, 2, bias=False, device="cuda"), torch.zeros(4, device="cuda")
    layer.weight.data = flat.view(2, 2)
    flat.fill_(2)
    assert layer.weight.sum().item() == 8 and layer.weight.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    other = torch.empty(0, device="cuda").set_(flat.untyped_storage(), 1, (2,), (1,))
    other.zero_()
    assert flat.tolist() == [2, 0, 0, 2]
    copy = flat.to("cpu")
    assert copy.zero_().sum() == 0 and flat.sum().item() == 4 and flat.to("cuda") is flat


@rule
def mixing_devices_raises() -> None:
    raises("two devices", lambda: ones(3) + torch.ones(3))
    raises("mixed devices", lambda: torch.cat([ones(2), torch.ones(2)]))
    raises("devices", lambda: ones(2) + torch.ones(2, device="cuda:1"))
    assert (ones(3) + torch.tensor(1.0)).sum().item() == 6  # one number is no memory


@rule
def fresh_memory_is_nan() -> None:
    assert torch.empty(5, device="cuda").isnan().all().item()


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(), "float": lambda x: float(x[0]), "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(), "nonzero": lambda x: x.nonzero(), "masked_select": lambda x: x.masked_select(x > 0),
    "boolean index": lambda x: x[x > 0], "equal": lambda x: torch.equal(x, x), "unique": lambda x: x.unique(), "print": repr,
    "where": lambda x: torch.where(x > 0), "allclose": lambda x: torch.allclose(x, x), "in": lambda x: 1.0 in x,
    "repeat": lambda x: x.repeat_interleave(x.long()),
}  # fmt: skip
NO_READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(0), "index": lambda x: x[x.long()], "mask": lambda x: x.masked_fill(x > 0, 0),
    "put": lambda x: x.__setitem__(x > 0, 0.0), "where": lambda x: torch.where(x > 0, x, 0), "sort": lambda x: x.sort(),
    "repeat": lambda x: x.repeat_interleave(x.long(), output_size=4), "factory": lambda x: torch.zeros_like(x), "shape": len,
}  # fmt: skip


@rule
def host_reads_are_recorded_with_their_line() -> None:
    for name, work in READS.items():
        with traffic.recorded() as seen:
            work(ones(4))
        assert seen.count("read") and "at tests/twin/rules.py:" in seen.places("read"), name
    for name, work in NO_READS.items():
        with traffic.recorded() as seen:
            work(ones(4))
        assert not seen.count("read", "synchronization"), (name, seen.places("read"))


@rule
def uploads_are_recorded_by_where_they_come_from() -> None:
    kinds = ("upload", "blocking upload", "unpinned upload")
    pinned = torch.ones(4).pin_memory()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not torch.ones(4).is_pinned() and not ones(4).is_pinned()
    for source, non_blocking, right in ((pinned, True, 0), (pinned, False, 1), (torch.ones(4), True, 2)):
        with traffic.recorded() as seen:
            source.to("cuda", non_blocking=non_blocking)
        assert [seen.count(kind) for kind in kinds] == [int(place == right) for place in range(3)]


@rule
def another_stream_sees_work_that_it_has_waited_for() -> None:
    stream, values = torch.cuda.Stream(), ones(4) * 2

    def elsewhere() -> torch.Tensor:
        with torch.cuda.stream(stream):
            return values + 1

    raises("unordered", elsewhere)
    stream.wait_stream(torch.cuda.current_stream())
    made = elsewhere()
    raises("unordered", lambda: made + 1)
    raises("unordered", lambda: values.add_(1))  # which the other stream may be reading
    torch.cuda.current_stream().wait_event(stream.record_event())
    assert (made + 1).tolist() == [4] * 4
    values.add_(1)


@rule
def a_copy_to_pinned_memory_arrives_when_the_host_waits() -> None:
    host, values = torch.zeros(4).pin_memory(), ones(4)
    host.copy_(values, non_blocking=True)
    values.zero_()
    assert host.isnan().all()
    again = host.to("cuda", non_blocking=True)  # in the device's order it has arrived
    torch.cuda.synchronize()
    assert host.tolist() == again.tolist() == [1] * 4


@rule
def the_source_of_an_upload_must_stay() -> None:
    host = torch.zeros(4).pin_memory()
    try:
        with traffic.recorded():
            kept = host.to("cuda", non_blocking=True)
            host.fill_(1)
            torch.cuda.synchronize()
    except AssertionError as e:
        assert "changed before its upload" in str(e) and kept is not None
    else:
        raise AssertionError("nobody has noticed")


@rule
def a_copy_to_the_source_of_an_upload_comes_after_it() -> None:
    host = torch.zeros(4).pin_memory()
    with traffic.recorded():
        uploaded = host.to("cuda", non_blocking=True)
        host.copy_(ones(4), non_blocking=True)
        torch.cuda.synchronize()
    assert host.tolist() == [1] * 4 and uploaded.tolist() == [0] * 4


@rule
def memory_that_another_stream_uses_must_be_recorded() -> None:
    for recorded in (False, True):
        stream = torch.cuda.Stream()
        with traffic.recorded() as seen:
            with torch.cuda.stream(stream):
                values = torch.zeros(1000, device="cuda")
            torch.cuda.current_stream().wait_stream(stream)
            kept = values + 1
            if recorded:
                values.record_stream(torch.cuda.current_stream())
            del values
            with torch.cuda.stream(stream):
                torch.zeros(1000, device="cuda")
            faults, seen.crossings = seen.count("fault"), type(seen.crossings)()
        assert bool(faults) is not recorded and kept is not None


@rule
def random_numbers_are_the_hosts() -> None:
    for draw in (torch.randn, torch.rand):
        torch.manual_seed(3)
        right = draw(100)
        torch.manual_seed(3)
        assert torch.equal(draw(100, device="cuda").cpu(), right)
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    one = ones(50).bernoulli_(0.5)
    torch.cuda.set_rng_state(state)
    assert torch.equal(one, ones(50).bernoulli_(0.5))
    own = torch.Generator("cuda").manual_seed(5)
    assert torch.equal(
        torch.randn(9, generator=own, device="cuda").cpu(), torch.randn(9, generator=torch.Generator().manual_seed(5))
    )


@rule
def checkpointing_draws_the_same_dropout_again() -> None:
    layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).cuda()
    grads = []
    for how in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(1)
        layer.zero_grad()
        how(ones(4, 8)).square().sum().backward()
        grads.append(layer[0].weight.grad.clone())
    assert torch.equal(*grads) and grads[0].any().item()


@rule
def autocast_computes_matrices_in_bf16() -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (ones(3, 3) @ ones(3, 3)).dtype == torch.bfloat16 and ones(3).softmax(0).dtype == torch.float32


@rule
def a_new_thread_starts_on_the_first_device() -> None:
    seen: list[int] = []
    torch.cuda.set_device(1)
    try:
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        assert torch.empty(1, device="cuda").device.index == 1
        device_threads.use(1)
        device_threads.thread(lambda: seen.append(torch.empty(1, device="cuda").device.index), "ours").join()
        with device_threads.pool(1, "pool") as pool:
            seen.append(pool.submit(torch.cuda.current_device).result())
    finally:
        torch.cuda.set_device(0)
        device_threads._gpu = None
    assert seen == [0, 1, 1]


@rule
def threads_that_save_use_the_workers_own_gpu() -> None:
    device_threads.use(1)
    try:
        saver = Saver(Location("unused"), spec.Checkpoint(every=1), SimpleNamespace())  # type: ignore[arg-type]
        copies = MemoryCopies(SimpleNamespace(), 0, 0, 1, print)  # type: ignore[arg-type]
        for pool in (saver._thread, copies._thread):
            assert pool.submit(lambda: torch.empty(1, device="cuda").device.index).result() == 1
            pool.shutdown()
    finally:
        torch.cuda.set_device(0)
        device_threads._gpu = None


@rule
def measuring_a_node_without_nvml_makes_a_context_on_the_workers_own_gpu_alone() -> None:
    nvml, node_metrics._nvml = node_metrics._nvml, lambda: None
    cuda.contexts.clear()
    torch.cuda.set_device(1)
    try:
        values, faults = node_metrics.gpus()
    finally:
        torch.cuda.set_device(0)
        node_metrics._nvml = nvml
    assert cuda.contexts == {1} and "gpu_1_memory_usage_megabytes" in values and not faults


def peak(work: Callable[[], object]) -> int:
    """Returns the peak of the bytes on the device that a function allocated."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


@rule
def attention_of_documents_in_a_long_sample_holds_no_square_of_its_length() -> None:
    length, rows = 2048, document_attention.ROWS
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True, training=True)
    given = [torch.randn(1, 1, length, 4, device="cuda", requires_grad=True) for _ in range(3)]
    documents = document_attention.numbers((torch.arange(length, device="cuda") % 500)[None])

    def attended() -> None:
        made, _ = document_attention.in_blocks(sdpa_attention_forward)(module, *given, documents)
        made.sum().backward()

    document_attention.ROWS = 32
    try:
        attended()  # which makes the gradients
        assert peak(attended) < 4 * length**2 / 4
    finally:
        document_attention.ROWS = rows


@rule
def the_contrastive_loss_of_some_pairs_holds_no_square_of_all_pairs() -> None:
    pairs, width = 2048, 4
    query, text = (torch.randn(pairs, width, device="cuda", requires_grad=True) for _ in range(2))
    names = torch.arange(2 * pairs, device="cuda").view(pairs, 2)

    def contrasted() -> None:
        contrastive.contrast(query, text, names, 0.1, slice(64, 128)).loss.backward()

    contrasted()
    assert peak(contrasted) < 4 * pairs**2 / 4


@rule
def a_save_copies_the_marked_moment_though_training_continues() -> None:
    host, shards = HostCopy(), {"master.w": FlatShard(ones(1000), 0, 1000)}
    host.mark(shards)
    copies = host.copy(shards, lambda: None)
    host.hold_back()
    shards["master.w"].local.fill_(2)  # raises on the twin if nothing makes it wait for the copy
    host.wait()
    assert copies["master.w"].local.is_pinned() and torch.equal(copies["master.w"].local, torch.ones(1000))


@rule
def a_save_that_nothing_holds_back_is_found() -> None:
    host, shards = HostCopy(), {"master.w": FlatShard(ones(1000), 0, 1000)}
    host.mark(shards)
    host.copy(shards, lambda: None)
    raises("unordered", lambda: shards["master.w"].local.fill_(2))


class Keeping(MemoryCopies):
    """Simulates the copies of a worker, without other workers and keepers. The thread waits for the device when it `may`."""

    def __init__(self) -> None:
        super().__init__(MemoryPlan("", [[]]), 1 << 30, 0, 1, lambda text: None)
        self.may, waits = threading.Event(), self._stream.wait
        self._stream.wait = lambda: self.may.wait(60) and waits()  # type: ignore[method-assign]

    def _agree_off(self, group: Any) -> bool:
        return False

    def _begin(self, size: int, state: Any, group: Any) -> bool:
        self._buffer = flat_copy.as_buffer(size, True)
        return True

    def _answers(self, calls: Any) -> None:
        """Sends nothing."""


@rule
def a_copy_in_memory_is_of_its_step_and_on_a_stream_of_its_own() -> None:
    for waits in (True, False):
        copies, shards = Keeping(), {"master.w": FlatShard(ones(1000), 0, 1000)}
        used: list[int] = []
        with mock.patch.object(memory_copies, "ray"), mock.patch.object(flat_copy, "pack", _noting(used)):
            copies.keep(CopyFacts(1, 1, "", {}), None, shards, None)  # type: ignore[arg-type]
            if waits:
                copies.before_change()  # the host waits until the copy is queued, and the device until it is made
                shards["master.w"].local.fill_(2)
            else:
                assert copies._copied.wait(60)
                raises("unordered", lambda shards=shards: shards["master.w"].local.fill_(2))
            copies.may.set()
            copies.wait()
        assert not copies._failed and copies._kept == 1 and used != [torch.cuda.current_stream().stream_id]
        assert copies._buffer is not None and copies._buffer.is_pinned()
        assert torch.equal(copies._buffer[:4000].view(torch.float32), torch.ones(1000))
        copies.end()


def _noting(streams: list[int]) -> Callable[..., None]:
    """Packs, and records the stream that does."""
    pack = flat_copy.pack

    def noted(*given: Any) -> None:
        streams.append(torch.cuda.current_stream().stream_id)
        pack(*given)

    return noted


def main(arguments: list[str]) -> int:
    """Prints the problem of each rule, as JSON."""
    device.start()
    faults = {}
    for name in RULES:
        try:
            RULES[name]()
            faults[name] = ""
        except BaseException:  # noqa: BLE001
            faults[name] = traceback.format_exc()
        torch.cuda.synchronize()
    sys.stdout.write(json.dumps(faults))
    return 0
