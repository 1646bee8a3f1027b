"""Tests that threads of a worker's process use the worker's GPU, and not the node's first one, where CUDA starts them."""

from __future__ import annotations

import ast
import threading
from pathlib import Path
from types import SimpleNamespace

import heliostat
import pytest
import torch
from heliostat.checkpoint.saver import Saver
from heliostat.config import spec
from heliostat.data import device_threads
from heliostat.engine import process_group
from heliostat.storage.locations import Location
from heliostat.training.worker import memory_copies, node_metrics

HOUSE = Path(heliostat.__file__).parent
ROOMS = ("training/worker", "engine", "parallel", "checkpoint", "recipes", "optim", "data")  # what runs in a worker's process
STARTERS = {"Thread", "Timer", "ThreadPoolExecutor", "ThreadPool", "start_new_thread"}


def _started(path: Path) -> list[str]:
    """Returns the places in a file that create a thread."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [(call.lineno, getattr(call.func, "attr", getattr(call.func, "id", ""))) for call in calls]
    return [f"{path.relative_to(HOUSE)}:{line}: {name}" for line, name in names if name in STARTERS]


def test_every_thread_of_a_workers_process_starts_on_its_own_gpu() -> None:
    ours = Path(device_threads.__file__)
    assert len(_started(ours)) == 2  # so the search does find them
    assert all((HOUSE / room).is_dir() for room in ROOMS)
    files = [path for room in ROOMS for path in sorted((HOUSE / room).rglob("*.py")) if path != ours]
    assert len(files) > 100 and [place for path in files for place in _started(path)] == []


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Returns the threads that chose a GPU, and the GPU, during an attempt with local rank 3."""
    found: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: found.append((threading.current_thread().name, gpu)))
    monkeypatch.setattr(device_threads, "_gpu", None)
    device_threads.use(3)
    return found


def test_an_attempt_chooses_its_gpu_for_all_threads(chosen: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *given, **named: None)
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=1, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    monkeypatch.setattr(process_group, "bind_near", lambda *place: None)
    monkeypatch.setattr(process_group.os, "environ", {})
    process_group.join(process_group.WorkerPlace(5, 8, 1, 4, "file:///nowhere", "nccl", ("a", "b", "c", "d")))
    device_threads.thread(lambda: None, "later").join()
    assert chosen[-2:] == [(threading.current_thread().name, 1), ("later", 1)]


def test_saves_and_copies_choose_the_gpu_before_they_touch_it(chosen: list[tuple[str, int]], tmp_path: Path) -> None:
    """For the threads that copy from the GPU, and those that read a checkpoint to it."""
    saver = Saver(Location(str(tmp_path)), spec.Checkpoint(every=1), SimpleNamespace())
    copies = memory_copies.MemoryCopies(SimpleNamespace(), 0, 0, 1, print)  # type: ignore[arg-type]
    for thread, name in ((saver._thread, "checkpoint_0"), (copies._thread, "memory_0")):
        assert thread.submit(lambda: chosen[-1]).result() == (name, 3)
        thread.shutdown()


def test_without_a_gpu_no_thread_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_threads, "_gpu", None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: pytest.fail("there is no GPU"))
    with device_threads.pool(1) as pool:
        assert pool.submit(lambda: 7).result() == 7


def test_measuring_a_node_without_nvml_makes_no_context_on_other_workers_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mem_get_info` creates a context on the requested GPU. AMD's GPUs have no NVML."""
    asked: list[int] = []
    monkeypatch.setattr(node_metrics, "_nvml", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (asked.append(gpu), (60_000_000, 80_000_000))[1])
    values, faults = node_metrics.gpus()
    assert values == {"gpu_2_memory_usage_megabytes": 20, "gpu_2_memory_usage_percentage": 25}
    assert asked == [2] and not faults

    def broken(gpu: int) -> tuple[int, int]:
        raise RuntimeError("HIP error: the device is gone")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert node_metrics.gpus() == ({}, {2: "HIP error: the device is gone"})
