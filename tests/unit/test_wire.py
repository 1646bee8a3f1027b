"""Tests the messages between a run's processes: plain values are restored, and no bytes from a peer make code run."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pyarrow as pa
import pytest
import torch
from heliostat import errors
from heliostat.checkpoint import index, placement
from heliostat.checkpoint.agreement import RankOutcome
from heliostat.checkpoint.columns import Columns
from heliostat.checkpoint.index import TensorIndex
from heliostat.checkpoint.layout import SavedCheckpoint
from heliostat.checkpoint.placement import ListedChunk, SealedIndex, Shard, Tensor
from heliostat.data.dataset import Bad
from heliostat.data.stream import StepSamples
from heliostat.runs.events import Evaluation, LossSpike
from heliostat.storage import wire
from heliostat.storage.locations import Location
from heliostat.training.worker import context  # noqa: F401 (it registers events)
from heliostat.training.worker.unsealed import SealedSteps, UnsealedPart

from tests.unit import build_index

PACKAGE = Path(errors.__file__).parent


@pytest.mark.parametrize(
    "value",
    [
        None, True, 7, -(2**63), 2**64 - 1, 2**70, -(2**70), 1.5, float("inf"), "ä", b"\0x", [1, [2, None]], (1, ("a", [()])),
        range(3, 9, 2), "a\udcff",
        {"a": 1, 2: (3,), ("shard", 0): {"x": []}}, Location("s3://b/k?region=r"), Bad(1, 2, 3, 4, "torn", (5, 6, 7)),
        placement.WrittenPart([Shard("x", 9, SealedIndex(2, 7))], {"w": Tensor("F32", [5], [[0, 1, 0, 5]], Columns(1, 5))}),
        UnsealedPart(7, "c", ["d"], 2, [], [(6, Bad(1, 2, 3, 4, "torn", (5, 6, 7)))], 1, SealedSteps("e", 1)),
        Evaluation(step=7, scores={"loss": 1.5}, images={"a.png": b"\x89"}, at=1.0),
        LossSpike(step=7, loss=9.0, limit=2.0, usual=1.0),
        SavedCheckpoint(Location("/x"), index.build(build_index.index(5), 5)), ListedChunk(0, 5, 9, [1], 2),
        SavedCheckpoint(Location("/f"), TensorIndex(4, [], {}), places={0: {("w", 0): 1}}), RankOutcome(value=[1]),
    ],
)  # fmt: skip
def test_a_value_comes_back_as_it_was(value):
    again = wire.unpack(wire.pack(value))
    assert again == value and type(again) is type(value)


def test_arrays_tensors_and_tables_come_back_to_the_bit():
    for array in (np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2], np.zeros((0, 4)), np.array(5), np.array(["a"])):
        again = wire.unpack(wire.pack(array))
        assert again.dtype == array.dtype and again.shape == array.shape and (again == array).all() and again.flags.writeable
    assert wire.unpack(wire.pack(np.float32(0.1))) == np.float32(0.1) and wire.unpack(wire.pack(np.float64(0.1))) == 0.1
    for tensor in (torch.randn(2, 3), torch.randn(3).bfloat16(), torch.empty(0, 2, dtype=torch.int64), torch.tensor(True)):
        again = wire.unpack(wire.pack(tensor))
        assert again.dtype == tensor.dtype and torch.equal(again, tensor)
    table = pa.table({"a": [1, None], "b": ["x", "y"]})
    assert wire.unpack(wire.pack(table)).equals(table)
    samples = wire.unpack(wire.pack(StepSamples(np.ones((2, 4), np.int32), range(0, 4, 2), [2**63, 1], [])))
    assert (samples.content == 1).all() and (samples.lanes, samples.digests, samples.bad) == (range(0, 4, 2), [2**63, 1], [])
    assert wire.unpack(wire.pack(Counter("aab"))) == {"a": 2, "b": 1}


class Own(errors.DataError):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


@pytest.mark.parametrize(
    ("error", "kind", "args"),
    [
        (errors.ConfigError("a: 1"), errors.ConfigError, ("a: 1",)),
        (errors.CorruptCheckpointError("torn", 5), errors.CorruptCheckpointError, ("torn", 5)),
        (errors.CorruptionError("bits", ["n"], 4), errors.CorruptionError, ("bits", ["n"], 4)),
        (errors.AccessError("no", "s3://b", "n"), errors.AccessError, ("no", "s3://b", "n")),
        (Own(1, 2), errors.DataError, ("1 and 2",)),
        (errors.DataError(object()), errors.DataError, None),
    ],
)
def test_errors_come_back_as_the_class_that_the_driver_decides_by(error, kind, args):
    again = wire.unpack(wire.pack(error))
    assert type(again) is kind and str(again) == str(error) and args in (None, again.args)


def test_the_rank_whose_error_it_is_arrives_at_the_other_ranks():
    """Otherwise each rank names itself, and one broken device is taken for many."""
    error = errors.WorkerError("worker 3: CUDA error: an illegal memory access was encountered")
    error.rank = 3
    again = wire.unpack(wire.pack(RankOutcome(error=error, rank=3))).error
    assert (type(again), str(again), again.rank) == (errors.WorkerError, str(error), 3)


class Local(NamedTuple):
    a: int


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), lambda: 1, [Path("/")]])
def test_what_is_not_plain_is_refused_where_it_is_sent(value: Any):
    with pytest.raises(TypeError, match="can't be sent between processes"):
        wire.pack(value)


def test_bytes_of_a_peer_make_no_code_run(tmp_path):
    """A pickle isn't decoded. A type is created only if it is registered, and an error only if it is one of heliostat's."""

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    hostile = [
        pickle.dumps(Bomb()),
        msgpack.packb(msgpack.ExtType(wire.RECORD, wire.pack(["subprocess.Popen", [["touch", str(tmp_path / "ran")]]]))),
        msgpack.packb(msgpack.ExtType(wire.ERROR, wire.pack(["Iterator", [], ""]))),
        msgpack.packb(msgpack.ExtType(wire.TENSOR, wire.pack(["load", [], b"x"]))),
        msgpack.packb(msgpack.ExtType(99, b"")),
        wire.pack([1, 2])[:-1],
    ]
    array = np.lib.format.magic(1, 0) + b"v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(120) + b"\n"
    hostile.append(msgpack.packb(msgpack.ExtType(wire.ARRAY, array + pickle.dumps([Bomb()]))))
    for data in hostile:
        with pytest.raises(ValueError):
            wire.unpack(data)
    assert wire.unpack(wire.pack(Local(1))) == (1,)  # not registered: a plain tuple
    assert not (tmp_path / "ran").exists()


def test_a_message_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(wire, "MOST", 100)
    with pytest.raises(ValueError, match="more than the maximum of 100"):
        wire.pack(b"x" * 100)


def test_no_module_unpickles_what_peers_or_stores_have_written():
    """torch's collectives of objects use pickle, too. The only exception reads bytes of its own process."""
    calls = re.compile(
        r"pickle\.loads?\b|from pickle|Unpickler|(gather|broadcast|scatter|send|recv)_object|allow_pickle=True|weights_only=False"
    )
    found = {
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if calls.search(line)
    }
    allowed = "training/worker/process.py: pickle.loads(pickle.dumps(error))"
    assert not {line for line in found if not line.startswith(allowed)}
