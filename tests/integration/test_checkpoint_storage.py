"""Tests checkpoints on storage that damages them, or is full: the fault is found before their use, and the checkpoint before
stays valid.

Uses process groups without Ray or DeepSpeed, in which each rank has its slices of a few tensors.
"""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from heliostat.chaos.proxy import FaultProxy, ProxyFault
from heliostat.checkpoint import saver as checkpoint
from heliostat.checkpoint.flat_shard import FlatShard
from heliostat.config import spec
from heliostat.errors import CheckpointError, ConfigError, CorruptCheckpointError, HeliostatError, StorageError
from heliostat.storage import locations as storage
from heliostat.storage.locations import Location
from heliostat.training.stops import FAILED, RUN
from heliostat.training.worker.heartbeat import StopConsensus
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from tests import stores
from tests.integration import ranks
from tests.unit import build_index
from tests.unit.build_checkpoint import age

SIZES = {"master.large": 3_000_001, "exp_avg.large": 3_000_001, "master.small": 7, "exp_avg.one": 1}
FACTS: dict[str, Any] = build_index.facts(metrics={"loss": 1.0})


def _whole(seed: int, scale: int = 1) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {name: torch.randn(-(-size // scale), generator=made) for name, size in SIZES.items()}


def _state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns this rank's slices, in their own memory, and a buffer that all ranks have."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        per = -(-len(tensor) // dist.get_world_size())
        start = min(per * dist.get_rank(), len(tensor))
        out[name] = FlatShard(tensor[start : start + per].clone(), start, len(tensor))
    return {**out, "buffer.table": torch.arange(6).reshape(2, 3)}


def _equal(state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> bool:
    expected = _state(tensors)
    return all(torch.equal(getattr(t, "local", t), getattr(expected[n], "local", expected[n])) for n, t in state.items())


def _blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = _state(tensors)
    for tensor in state.values():
        getattr(tensor, "local", tensor).fill_(0)
    return state


def _error(run: Location, step: int, group: Any, scale: int = 1) -> dict[str, Any]:
    """Returns the error of loading that step, or whether the loaded state is right."""
    state = _blank(_whole(step, scale))
    try:
        read = checkpoint.load(checkpoint.open_checkpoint(run, step), state, group)
    except HeliostatError as e:
        return {"error": type(e).__name__, "step": getattr(e, "step", None), "text": str(e)}
    return {"right": _equal(state, _whole(step, scale)), "read": read}


def three_save_two_load(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    run = Location(folder)
    if dist.get_world_size() == 3:
        saver = checkpoint.Saver(run, spec.Checkpoint(every=10, keep=5), group)
        if dist.get_rank() == 0:  # what a dead save of four workers left
            checkpoint.folder(run, 20).join("shard-00003.safetensors").write(b"old")
        for step in (10, 20):
            saver.save(step, _state(_whole(step)), FACTS)  # the second waits for the first
        saver.wait()
    everyone.wait()
    if dist.get_world_size() == 2:
        yield {"case": "sound", **_error(run, 20, group)}
        ((number, at),) = checkpoint.open_checkpoint(run, 20).slices("exp_avg.large", 0, torch.empty(5_000))
        shard = Path(folder) / "checkpoints/step-00000020" / f"shard-{number:05d}.safetensors"
        dist.barrier()  # the other has opened it
        if dist.get_rank() == 0:  # among the elements that only rank 0 needs
            data = bytearray(shard.read_bytes())
            data[at.offset + 5_000] ^= 16
            shard.write_bytes(data)
        dist.barrier()
        yield {"case": "damaged", **_error(run, 20, group)}
        yield {"case": "before", **_error(run, 10, group)}
        if dist.get_rank() == 0:
            try:
                checkpoint.open_checkpoint(run, 20).read("exp_avg.large")
            except CorruptCheckpointError as e:
                yield {"case": "exported", "text": str(e)}
            for found in (checkpoint.open_checkpoint(run, 10), checkpoint.open_checkpoint(run, 20)):
                right = torch.equal(found.read("master.large"), _whole(found.step)["master.large"])
                parts = torch.cat(list(found.stream("master.large")))
                yield {"case": "whole", "right": right and torch.equal(parts, _whole(found.step)["master.large"])}
            path = str(Path(folder) / "checkpoints/step-00000010")
            plain = {n: torch.zeros_like(t) for n, t in _whole(10).items()} | {
                "buffer.table": torch.zeros(2, 3, dtype=torch.int64)
            }
            dcp.load(plain, storage_reader=HuggingFaceStorageReader(path), no_dist=True)
            yield {"case": "torch", "right": all(torch.equal(plain[n], t) for n, t in _whole(10).items())}
            age(Path(path), 3)
        dist.barrier()
        yield {"case": "old", **_error(run, 10, group)}


def test_a_flipped_bit_is_found_by_all_ranks_before_anything_is_used(tmp_path: Path) -> None:
    """Only one rank reads the byte, and both raise the error with file and step.

    Undamaged parts still load, with few extra bytes per rank, also in the old format, and torch's own reader of the shards
    agrees.
    """
    told = ranks.run(f"{__name__}:three_save_two_load", (2, 3), str(tmp_path))
    files = sorted(p.name for p in (tmp_path / "checkpoints/step-00000020").iterdir())
    assert files == ["checkpoint.json", *(f"shard-0000{r}.{kind}" for r in range(3) for kind in ("json", "safetensors"))]
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in told:
        by_case.setdefault(row["case"], []).append(row)
    total = 4 * sum(SIZES.values())
    for case in ("sound", "before", "old"):
        assert [row["right"] for row in by_case[case]] == [True, True]
        assert total < sum(row["read"] for row in by_case[case]) < total + 5 * 2 * 2**20 + 200
    damaged = by_case["damaged"]
    assert [(row["error"], row["step"]) for row in damaged] == [("CorruptCheckpointError", 20)] * 2
    assert all("step-00000020/shard-00000.safetensors: bytes" in row["text"] for row in damaged)
    assert "have changed since they were written (CRC-32)" in by_case["exported"][0]["text"]
    assert [row["right"] for row in by_case["whole"] + by_case["torch"]] == [True] * 3


def disk_full(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    run, scale = Location(folder), 100
    saver = checkpoint.Saver(run, spec.Checkpoint(every=10, keep=2), group)
    for step in (10, 20):
        saver.save(step, _state(_whole(step, scale)), FACTS)
        saver.wait()
    saver.save(30, _state(_whole(30, scale)), FACTS)
    try:
        saver.wait()
    except StorageError as e:
        yield {"case": "full", "text": str(e)}
    found = checkpoint.latest(run)
    yield {"case": "latest", "step": found and found.step, **_error(run, 20, group, scale)}
    dist.barrier()
    if dist.get_rank() == 0:
        checkpoint.folder(run, 10).delete()
    saver.save(30, _state(_whole(30, scale)), FACTS)  # there is room now
    saver.wait()
    yield {"case": "again", **_error(run, 30, group, scale)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mounts a disk with room for two checkpoints of `disk_full`."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_a_storage_error_on_all_ranks_and_the_checkpoint_before_stays(small_disk: Path) -> None:
    """The error has the file, and the incomplete save doesn't count. After space was freed, the same saver saves again."""
    told = ranks.run(f"{__name__}:disk_full", (2,), str(small_disk))
    full = [row for row in told if row["case"] == "full"]
    assert len(full) == 2 and full[0]["text"] == full[1]["text"]
    assert "step-00000030/shard-0000" in full[0]["text"] and "no space left on device" in full[0]["text"]
    assert [(row["step"], row["right"]) for row in told if row["case"] == "latest"] == [(20, True)] * 2
    assert [row["right"] for row in told if row["case"] == "again"] == [True] * 2


def refusals(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    run = Location(folder)
    saver = checkpoint.Saver(run, spec.Checkpoint.model_validate({"every": 1, "best": {"metric": "accuracy"}}), group)
    with pytest.raises(ConfigError, match=r"^checkpoint.best.metric: 'accuracy' isn't a score of the recipe\. Use one of: loss$"):
        saver.save(1, _state(_whole(1, 1000)), FACTS)
    saver = checkpoint.Saver(run, spec.Checkpoint(every=1), group)
    saver.save(1, _state(_whole(1, 1000)), FACTS)
    saver.wait()
    found = checkpoint.open_checkpoint(run, 1)
    for other, message in [
        ({"master.new": torch.zeros(3)}, "has no tensor 'master.new'"),
        ({"master.small": torch.zeros(30)}, "has tensor 'master.small' in another shape than the model"),
    ]:
        with pytest.raises(CheckpointError, match=rf"{message}\. Another model made this checkpoint"):
            checkpoint.load(found, other, group)
    yield {"done": True}


def test_a_score_that_is_not_there_and_another_models_checkpoint_are_refused(tmp_path: Path) -> None:
    assert ranks.run(f"{__name__}:refusals", (1,), str(tmp_path)) == [{"rank": 0, "workers": 1, "done": True}]


MOST_STEPS = 10_000  # of 20 ms and more


def heard(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Runs a loop like the training's: steps with a vote, and no wait for the save."""
    votes = StopConsensus(dist.new_group(backend="gloo"))

    def steps(saver: checkpoint.Saver) -> dict[str, Any]:
        for step in range(MOST_STEPS):
            votes.ask(FAILED if saver.failed else RUN)
            time.sleep(0.02)
            if votes.result() == FAILED:
                try:
                    saver.wait()
                except HeliostatError as e:
                    return {"steps": step, "error": type(e).__name__, "text": str(e)}
                return {"steps": step, "error": None}
        return {"steps": MOST_STEPS}

    saver = checkpoint.Saver(Location(folder), spec.Checkpoint(every=10), group)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # its disk takes no more
    saver.save(10, _state(_whole(10)), FACTS)
    yield {"case": "disk", **steps(saver)}
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state = _state(_whole(20))
    if dist.get_rank() == 1:  # cannot be copied to the host
        state["master.small"] = FlatShard(torch.empty(3, device="meta"), 3, 7)
    saver.save(20, state, FACTS)
    yield {"case": "copy", **steps(saver)}
    saver.save(30, _state(_whole(30)), FACTS)
    saver.wait()
    yield {"case": "after", "steps": 0, "latest": checkpoint.latest(Location(folder)).step}  # type: ignore[union-attr]


def test_a_save_that_fails_on_one_worker_is_heard_of_by_all_at_a_next_step(tmp_path: Path) -> None:
    """All workers leave after the same step with that worker's error, none waits forever, and no checkpoint exists. The next save
    of the same workers is valid."""
    told: dict[str, list[dict[str, Any]]] = {}
    for row in ranks.run(f"{__name__}:heard", (3,), str(tmp_path)):
        told.setdefault(row["case"], []).append(row)
    for case, error, text in [("disk", "StorageError", "shard-00001.safetensors: can't write this file (file too large)"),
                              ("copy", "WorkerError", "worker 1: NotImplementedError")]:  # fmt: skip
        rows = told[case]
        assert len(rows) == 3 and {(row["steps"], row["error"]) for row in rows} == {(rows[0]["steps"], error)}
        assert rows[0]["steps"] < MOST_STEPS and all(text in row["text"] for row in rows)
    assert [row["latest"] for row in told["after"]] == [30] * 3


def slow(group: Any, everyone: Any, uri: str) -> Iterator[dict[str, Any]]:
    storage.UPLOAD_WINDOW = 10 << 20  # a part of an upload
    checkpoint.PULSE_S = 0.05
    pulses: list[float] = []
    run = Location(uri)
    saver = checkpoint.Saver(run, spec.Checkpoint(every=10), group, progressed=lambda: pulses.append(time.monotonic()))
    saver.save(10, _state({"master.large": torch.zeros(11_000_000)}), FACTS)
    saver._until_copied()
    started = time.monotonic()
    saver.wait()
    inside = [at - started for at in pulses if at > started]
    loading: list[float] = []
    state = _state({"master.large": torch.ones(11_000_000)})
    checkpoint.load(checkpoint.open_checkpoint(run, 10), state, group, lambda: loading.append(time.monotonic()))
    yield {"pulses": inside, "waited": time.monotonic() - started, "loading": len(loading)}


def test_a_slow_upload_that_gets_on_is_no_stall(s3_server: str, tmp_path: Path) -> None:
    """Every part that reaches the store is a pulse while the save is waited for, so the longest silence is that of one part. A
    load gives a pulse for each request."""
    stores.bucket(s3_server, "slow")
    with FaultProxy(s3_server, [ProxyFault("delay", seconds=1.0, key="/slow/*shard*")]) as proxy:
        uri = f"s3://slow/run?endpoint_override={proxy.endpoint}&scheme=http"
        (row,) = ranks.run(f"{__name__}:slow", (1,), uri)
    assert row["waited"] > 4  # four parts of 10 MiB
    later = [at for at in row["pulses"] if at > 1]
    assert len(later) >= 3, row["pulses"]
    assert row["loading"] >= 5
