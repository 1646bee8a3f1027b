"""Tests that in-memory checkpoints keep up with the state of a large model: pieces are checked while they arrive.

If one worker's copy fails, all workers stop copying together, and report it once.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from heliostat.training import memory_keeper
from heliostat.training.driver import memory
from heliostat.training.driver.memory import Memory, whole
from heliostat.training.memory_keeper import CopyFacts, MemoryKeeper, MemoryPlan, Sum, summed
from heliostat.training.worker import memory_copies
from heliostat.training.worker.memory_copies import MemoryCopies

from tests.unit.build_job import job

SIZE = 1000  # numbers of a worker's state


class Remote:
    """Simulates a keeper behind Ray's handle, whose methods run at once. `before`: called with a method's name before it runs."""

    def __init__(self, before: Callable[[str], None] = lambda name: None) -> None:
        self.keeper, self._before = MemoryKeeper(), before

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            try:
                self._before(name)
                return SimpleNamespace(value=getattr(self.keeper, name)(*given), error=None)
            except Exception as e:  # noqa: BLE001
                return SimpleNamespace(value=None, error=e)

        return SimpleNamespace(remote=call)


def _get(asked: list[Any], timeout: float | None = None) -> list[Any]:
    for one in asked:
        if one.error:
            raise one.error
    return [one.value for one in asked]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(
        put=lambda data: data, wait=lambda asked, **_: (asked, []), get=_get, exceptions=memory_copies.ray.exceptions
    )
    monkeypatch.setattr(memory_copies, "ray", ray)
    monkeypatch.setattr(memory_copies, "PIECE", 512)
    monkeypatch.setattr(memory_copies, "POLL_S", 0.01)
    monkeypatch.setattr(memory_copies, "agreed", lambda group, work: work())


class Workers:
    """Simulates two workers, each with its own keeper, that keep copies after each step. `notices`: the terminal's lines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *keepers: Remote) -> None:
        self.keepers, self.notices = keepers, list[str]()
        plan = MemoryPlan(0, [[keeper] for keeper in keepers])
        self.all = [MemoryCopies(plan, 1 << 30, rank, len(keepers), self.notices.append) for rank in range(len(keepers))]
        monkeypatch.setattr(memory_copies, "together", self._together)

    def _together(self, group: Any, work: Callable[[], Any]) -> list[Any]:
        if isinstance(work(), str):  # why its copy has failed: each tells its own
            return [one._failed for one in self.all]
        return [work()]

    def step(self, step: int) -> None:
        for one in self.all:
            one.wait()
        for rank, one in enumerate(self.all):
            state = {"weights": torch.full((SIZE,), float(step + rank)), "buffer": torch.arange(10)}
            one.keep(CopyFacts(step, len(self.all), "plan", {}), b"", state, None)  # type: ignore[arg-type]

    def end(self) -> None:
        for one in self.all:
            one.wait()
            one.end()

    def held(self, rank: int) -> list[str]:
        return [id for id, _, _ in self.keepers[rank].keeper.held()]


def test_copies_arrive_in_pieces_and_are_intact(monkeypatch):
    workers = Workers(monkeypatch, Remote(), Remote())
    for step in (1, 2, 3):
        workers.step(step)
    workers.end()
    for rank in (0, 1):
        assert workers.held(rank) == ["0:2", "0:3"] and workers.keepers[rank].keeper.intact("0:3") == [rank]
        (found,) = [copy for (id, _), copy in workers.keepers[rank].keeper._copies.items() if id == "0:3"]
        assert len(found.arrived) > memory_copies.IN_FLIGHT and sum(one.size for one in found.arrived) == len(found.data)
    assert workers.notices == []


def test_a_keeper_checks_pieces_while_they_arrive_and_seals_at_once(monkeypatch):
    """It read the whole copy again after its last piece, one copy at a time: 96 GB per node, at 1.8 GB/s, in 60 s."""
    read, keeper = [], MemoryKeeper()
    summed = memory_keeper.summed
    monkeypatch.setattr(memory_keeper, "summed", lambda data, start: (read.append(len(data)), summed(data, start))[1])
    data = torch.arange(100, dtype=torch.uint8).numpy()
    keeper.open("0:1", 0, 100)
    for start in (50, 0):
        keeper.write("0:1", 0, start, data[start : start + 50])
    assert read == [50, 50]
    keeper.seal("0:1", 0, [summed(data[:50], 0), summed(data[50:], 50)], CopyFacts(1, 1, "plan", {}), [], b"")
    assert read == [50, 50] and keeper.intact("0:1") == [0]


def test_pieces_of_several_workers_are_taken_at_the_same_time(monkeypatch):
    """While one piece is checked, other threads of the keeper receive others."""
    keeper, both = MemoryKeeper(), threading.Barrier(2, timeout=120)
    monkeypatch.setattr(memory_keeper, "summed", lambda data, start: both.wait())
    data = torch.zeros(100, dtype=torch.uint8).numpy()
    threads = []
    for rank in (0, 1):
        keeper.open("0:1", rank, 100)
        threads.append(threading.Thread(target=keeper.write, args=("0:1", rank, 0, data)))
        threads[-1].start()
    for thread in threads:
        thread.join(10)
    assert not both.broken and memory_keeper.THREADS > 1


def test_all_workers_stop_together_when_a_copy_of_one_fails(monkeypatch):
    """The other workers' generations would lack its part. They continued to copy, and only the failed worker reported it."""
    lost = threading.Event()

    def losing(name: str) -> None:
        if lost.is_set() and name == "write":
            raise OSError("keeper lost")

    workers = Workers(monkeypatch, Remote(), Remote(losing))
    workers.step(1)
    workers.step(2)
    for one in workers.all:
        one.wait()
    lost.set()
    workers.step(3)
    workers.step(4)
    workers.step(5)
    workers.end()
    assert [one._off for one in workers.all] == [True, True]
    assert workers.held(0) == ["0:2", "0:3"] and workers.held(1) == ["0:2"]
    until = "until the workers start again. 3 copies were made before. Worker 1: keeper lost"
    assert workers.notices == [f"checkpoint.memory_every: in-memory checkpoints are off {until}"]


def test_copies_that_training_waits_too_long_for_are_switched_off(monkeypatch):
    """The deadline is for the whole copy, not for each answer."""
    monkeypatch.setattr(memory_copies, "WAIT_S", 0.05)
    slow, go = Remote(lambda name: go.wait(300) if name == "write" else None), threading.Event()
    workers = Workers(monkeypatch, Remote(), slow)
    workers.step(1)
    began = time.monotonic()
    workers.step(2)
    assert time.monotonic() - began < 120 and [one._off for one in workers.all] == [True, True]
    assert workers.notices[0].endswith("Worker 1: training waited 0 s for an in-memory checkpoint. Raise checkpoint.memory_every")
    go.set()
    workers.end()


def test_a_piece_that_is_damaged_on_its_way_is_found(monkeypatch):
    workers = Workers(monkeypatch, Remote(), Remote())
    monkeypatch.setattr(memory_copies.ray, "put", lambda data: data * 0 + 1)
    workers.step(1)
    workers.step(2)
    workers.end()
    assert workers.held(0) == workers.held(1) == [] and "arrived damaged" in workers.notices[0]
    assert "Worker 0 and 1 more: " in workers.notices[0]


# the keeper: copies count only if they are whole: all ranks, sealed, of one generation, and undamaged ------------------

DATA = np.arange(1000, dtype=np.uint8)


def facts(step: int, **other: Any) -> CopyFacts:
    return CopyFacts(step, world=2, data="plan", resume={"optimizer_steps": step, **other})


def sums() -> list[Sum]:
    return [summed(DATA[:600], 0), summed(DATA[600:], 600)]


def kept(keeper: MemoryKeeper, id: str, rank: int, step: int, seal: bool = True) -> None:
    keeper.open(id, rank, len(DATA))
    keeper.write(id, rank, 0, DATA[:600])
    keeper.write(id, rank, 600, DATA[600:])
    if seal:
        keeper.seal(id, rank, sums(), facts(step), [], b"")


def test_a_generation_is_whole_once_every_rank_has_sealed_its_copy_on_some_node():
    one, other = MemoryKeeper(), MemoryKeeper()
    kept(one, "0:10", 0, 10)
    kept(other, "0:10", 1, 10)
    kept(one, "0:20", 0, 20)
    kept(other, "0:20", 1, 20, seal=False)
    assert whole({"n": one.held(), "m": other.held()}, "plan") == [("0:10", 10, 2)]
    assert whole({"n": one.held()}, "plan") == [], "the copy of rank 1 is on the node that is gone"
    other.seal("0:20", 1, sums(), facts(20), [], b"")
    assert whole({"n": one.held(), "m": other.held()}, "plan") == [("0:20", 20, 2), ("0:10", 10, 2)]


def test_copies_that_do_not_agree_are_none():
    held = [("0:10", 0, facts(10, loss_scale={"cur_scale": 1.0})), ("0:10", 1, facts(10, loss_scale={"cur_scale": 2.0}))]
    assert whole({"n": held}, "plan") == []
    assert whole({"n": [("0:10", 0, facts(10)), ("1:10", 1, facts(10))]}, "plan") == [], "of two attempts"


def test_the_oldest_generation_makes_room_when_a_third_begins():
    keeper = MemoryKeeper()
    for step in (10, 20):
        for rank in (0, 1):
            kept(keeper, f"0:{step}", rank, step)
    kept(keeper, "0:30", 0, 30, seal=False)
    assert [g[0] for g in whole({"n": keeper.held()}, "plan")] == ["0:20"]
    assert keeper.read("0:20", 1, [(0, 2), (998, 1000)]).tolist() == [0, 1, 230, 231]
    keeper.begin(0, "0:20")
    assert {id for id, _, _ in keeper.held()} == {"0:20"}
    keeper.begin(0, None)
    assert keeper.held() == []


def test_copies_that_come_after_their_attempt_are_refused_and_counted():
    """They replaced the generation from which the next attempt starts, or wrote into it."""
    keeper = MemoryKeeper(1)
    for step in (10, 20):
        kept(keeper, f"1:{step}", 0, step)
    keeper.open("1:30", 0, len(DATA))
    keeper.admit(2)
    late: list[Callable[[], None]] = [
        lambda: keeper.open("1:40", 0, len(DATA)),
        lambda: keeper.write("1:20", 0, 0, DATA[500:]),
        lambda: keeper.seal("1:30", 0, [], facts(30), [], b""),
    ]
    for send in late:
        with pytest.raises(ValueError, match="checkpoint of attempt 1 in attempt 2"):
            send()
    assert [id for id, _, _ in keeper.held()] == ["1:20"] and keeper.intact("1:20") == [0]
    assert keeper.begin(2, "1:20") == 3 and keeper.begin(3, "1:20") == 0
    assert [id for id, _, _ in keeper.held()] == ["1:20"]


def test_a_keeper_that_dies_while_its_copies_are_checked_costs_the_newest_generation_alone(monkeypatch):
    """The search for older generations continues without it, and it is ended once."""
    one, other = Remote(), Remote(lambda name: _dead() if name == "intact" else None)
    for rank in (0, 1):
        kept(one.keeper, "0:10", rank, 10)
    kept(other.keeper, "0:10", 1, 10)
    kept(one.keeper, "0:20", 1, 20)
    kept(other.keeper, "0:20", 0, 20)
    ended = list[object]()
    ray = SimpleNamespace(
        wait=lambda calls, **_: (calls, []), get=lambda call, timeout: _get([call])[0], kill=ended.append,
        exceptions=memory.ray.exceptions,
    )  # fmt: skip
    monkeypatch.setattr(memory, "ray", ray)
    made = Memory(job(**{"checkpoint.memory_every": 1}))
    made._keepers = {"n": one, "m": other}  # type: ignore[dict-item]
    source = made.newest(0, 5, "plan")
    assert source and source.step == 10 and [node for node, _ in source.holders[1]] == ["n"] and ended == [other]


def _dead() -> None:
    raise memory.ray.exceptions.RayActorError


def test_damage_is_found_on_the_way_and_while_it_lies_there():
    keeper = MemoryKeeper()
    kept(keeper, "0:10", 0, 10)
    kept(keeper, "0:10", 1, 10)
    assert keeper.intact("0:10") == [0, 1]
    keeper.write("0:10", 0, 500, DATA[:1])
    assert keeper.intact("0:10") == [1]
    keeper.open("0:20", 0, len(DATA))
    with pytest.raises(ValueError, match="arrived damaged"):
        keeper.seal("0:20", 0, [sums()[0]], facts(20), [], b"")
    assert [id for id, _, _ in keeper.held()] == ["0:10", "0:10"]


def test_what_is_needed_is_two_generations_of_all_workers():
    keeper = MemoryKeeper()
    keeper.reserve(0, 1000)
    keeper.reserve(1, 500)
    keeper.reserve(1, 500)
    assert keeper.need() == 3000
    keeper.begin(0, None)
    assert keeper.need() == 0


# on a GPU ------------------------------------------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """Simulates a tensor on a GPU with one of this host. Records its operations, and their threads."""

    log: list[tuple[str, str]] = []

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "clone", "copy_"):
            how = f" {kwargs}" if kwargs else ""
            cls.log.append((f"{name}{how}", threading.current_thread().name))
        return super().__torch_function__(func, types, args, kwargs or {})


class Streams:
    """Replaces `torch.cuda`: records the queued work, the waits, and their threads."""

    device = "cuda:0"

    def __init__(self, name: str) -> None:
        self.name = name

    def note(self, what: str) -> None:
        OnGpu.log.append((what, threading.current_thread().name))

    def record_event(self) -> Any:
        self.note(f"event of {self.name}")
        return SimpleNamespace(name=self.name, synchronize=lambda: self.note(f"host waits for {self.name}"))

    def wait_event(self, event: Any) -> None:
        self.note(f"{self.name} waits for {event.name}")


def test_copies_of_a_gpu_go_by_a_stream_of_their_own_and_only_kernels_wait_for_them(monkeypatch):
    """They were packed on the training's stream with blocking copies, and the host waited in the optimizer's step."""
    OnGpu.log, training, pinned = [], Streams("training"), list[bool]()
    buffer = memory_copies.flat_copy.as_buffer
    monkeypatch.setattr(memory_copies.flat_copy, "as_buffer", lambda size, pin: (pinned.append(pin), buffer(size, False))[1])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Streams("copies"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    put = memory_copies.ray.put
    monkeypatch.setattr(memory_copies.ray, "put", lambda data: (training.note("read"), put(data))[1])
    workers = Workers(monkeypatch, Remote())
    (copies,) = workers.all
    state = {"weights": torch.arange(8.0).as_subclass(OnGpu), "host": torch.ones(4)}
    copies.keep(CopyFacts(1, 1, "plan", {}), b"", state, None)  # type: ignore[arg-type]
    copies.before_change()
    workers.end()
    here = threading.current_thread().name
    mine = [what for what, thread in OnGpu.log if thread == here]
    assert mine == ["clone", "event of training", "training waits for copies"]  # no copy to the host, and no wait of it
    theirs = [what for what, thread in OnGpu.log if thread != here]
    queued = ["copies waits for training", "copy_ {'non_blocking': True}", "event of copies", "host waits for copies", "read"]
    assert theirs[: len(queued)] == queued and set(theirs[len(queued) :]) <= {"read"}
    (found,) = workers.keepers[0].keeper._copies.values()
    assert pinned == [True] and found.data[64:96].view("float32").tolist() == list(range(8))
