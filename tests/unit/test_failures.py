"""Tests the diagnosis of failed workers: the cause is found among its consequences, and the faulty node is named."""

import pickle
import random
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from heliostat.errors import (
    CorruptionError,
    DeviceError,
    HeliostatError,
    NonFiniteError,
    PeerLostError,
    StorageError,
    TrainingError,
    WorkerError,
)
from heliostat.training import faults
from heliostat.training.driver import attempt, suspects
from heliostat.training.driver.attempt import Attempt
from heliostat.training.driver.failures import Failure, explain, survived
from heliostat.training.driver.orders import WorkerWatch
from heliostat.training.driver.recovery import classify
from heliostat.training.driver.suspects import Suspicions
from heliostat.training.driver.watchdog import frozen

ADVICE = """
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
ECC = f"CUDA error: uncorrectable ECC error encountered{ADVICE}"
ILLEGAL = f"CUDA error: an illegal memory access was encountered{ADVICE}"
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a network error, "
    "NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
)
LATE = PeerLostError(
    "this worker ended because another worker failed: ValueError: Default process group has not been initialized"
)


def raised(error: Exception) -> Exception:
    """Returns the error as Ray raises it in the driver."""
    return ray.exceptions.RayTaskError("run", f"Traceback ...\n{error}", error).as_instanceof_cause()


def died(text: str = "The actor died unexpectedly before finishing this task.") -> Exception:
    return ray.exceptions.RayActorError("0" * 32, text, False, False)


def failure(rank: int, error: Exception | None, told: HeliostatError | None = None) -> Failure:
    """Returns the failure of four workers with a GPU each, on two nodes."""
    return Failure(rank, f"node{rank // 2}", f"10.0.0.{rank // 2}", (str(rank % 2),), error, told)


def test_an_error_after_the_abort_is_a_lost_peer_never_the_cause_and_its_worker_is_used_again():
    """Survivors raise "Default process group has not been initialized". This holds for any error, in any order of arrival."""
    late = failure(0, raised(LATE))
    for cause, kind in [
        (failure(2, raised(KeyError("x"))), WorkerError),
        (failure(2, died()), TrainingError),
        (failure(2, raised(RuntimeError(NCCL))), TrainingError),
        (failure(2, raised(StorageError("the store is away"))), StorageError),
    ]:
        found = explain([late, cause, failure(1, raised(LATE))])
        assert type(found) is kind and "Default process group" not in str(found)
    assert survived(late)
    assert survived(failure(2, raised(RuntimeError(NCCL)))) and not survived(failure(2, raised(KeyError("x"))))
    assert type(explain([late, late])) is TrainingError, "a network's fault is tried again, however often the text is the same"


@pytest.mark.parametrize("seed", range(10))
def test_whatever_fails_in_whatever_order_the_cause_is_what_a_worker_raised_before_the_abort(seed):
    """An error after the order to abort, a consequence of another failure, and the driver's own actions are never the cause."""
    draw = random.Random(seed)
    causes = [raised(KeyError("x")), raised(StorageError("the store is away")), raised(RuntimeError(ECC)), died()]
    effects = [raised(LATE), raised(LATE), raised(RuntimeError(NCCL)), None]
    for _ in range(20):
        true = draw.choice(causes)
        errors = [true, *draw.choices(effects, k=3)]
        draw.shuffle(errors)
        found = explain([failure(rank, error) for rank, error in enumerate(errors)])
        words = {0: "KeyError", 1: "the store is away", 2: "uncorrectable ECC", 3: "died unexpectedly"}[causes.index(true)]
        assert words in str(found), str(found)
        assert not any(word in str(found) for word in ("Default process group", "didn't end", "ncclRemoteError"))


def test_the_end_of_the_data_stream_that_follows_a_failure_is_not_its_cause():
    """The driver ends the stream at the first failure. A reading worker notices this before it receives the abort."""
    stream, network = failure(0, raised(died())), failure(2, raised(RuntimeError(NCCL)))
    assert type(explain([network, stream])) is TrainingError and "ncclRemoteError" in str(explain([network, stream]))
    assert type(explain([stream, failure(2, raised(KeyError("x")))])) is WorkerError
    assert survived(stream) and type(explain([stream])) is TrainingError


def test_numbers_and_types_of_errors_travel():
    error = WorkerError("worker 3: x")
    error.rank = 3
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (again.rank, str(again)) == (3, "worker 3: x")
    assert type(pickle.loads(pickle.dumps(LATE))) is PeerLostError  # noqa: S301


def test_a_broken_device_is_the_cause_with_its_rank_node_and_gpu_whatever_else_is_heard_of():
    """The ECC error is in the middle of torch's text. Peers report losses, and their results aren't finite."""
    broken = failure(3, raised(RuntimeError(ECC)))
    found = explain([failure(0, raised(RuntimeError(NCCL))), failure(1, raised(NonFiniteError("loss nan"))), broken])
    assert type(found) is DeviceError and found.suspects == ("node1",) and classify(found) == "failure"
    assert str(found) == (
        "worker 3 on 10.0.0.1 (node node1, GPU 1): RuntimeError: CUDA error: uncorrectable ECC error encountered"
    )
    assert not survived(broken)


@pytest.mark.parametrize("end", [None, died()])
def test_what_a_worker_told_before_it_hung_or_died_is_the_cause(end):
    """With a broken device, a process can neither clean up nor end. The driver has ended it, and knows why it failed."""
    told = WorkerError(f"the workers failed: {faults.describe(RuntimeError(ECC))}")
    found = explain([failure(0, raised(LATE)), failure(3, end, told)])
    assert type(found) is DeviceError and "ECC" in str(found) and "didn't end" not in str(found)
    found = explain([failure(0, raised(LATE)), failure(3, end, NonFiniteError("step 3: loss nan"))])
    assert type(found) is NonFiniteError, "a final error stays final if its worker does not end"


def test_a_worker_that_did_not_end_is_named_only_where_there_is_no_error():
    hung = failure(3, None)
    assert "didn't end" not in str(explain([failure(0, raised(KeyError("x"))), hung]))
    found = explain([failure(0, raised(LATE)), hung])
    assert type(found) is TrainingError and found.suspects == ("node1",)
    assert str(found).startswith("the workers failed: worker 3 on 10.0.0.1 (node node1, GPU 1): didn't end")
    found = explain([failure(0, raised(RuntimeError(NCCL))), hung])
    assert "ncclRemoteError" in str(found) and "worker 3 on" in str(found)
    assert isinstance(found, TrainingError) and found.suspects == ("node1",)


def test_an_agreed_error_of_a_device_names_the_worker_whose_device_it_is():
    """A failed copy to the host is raised on all workers (`checkpoint.agreement`)."""
    error = WorkerError(f"worker 3: AcceleratorError: {ECC}")
    error.rank = 3
    found = explain([failure(rank, raised(error)) for rank in (0, 1, 2, 3)])
    assert (
        isinstance(found, DeviceError)
        and str(found).startswith("worker 3 on")
        and "\n" not in str(found)
        and found.suspects == ("node1",)
    )


def test_a_death_that_is_heard_of_late_does_not_hide_the_error_before_it():
    found = explain([failure(0, raised(KeyError("x"))), failure(3, died())])
    assert type(found) is TrainingError and "KeyError" in str(found) and "worker 3 on" in str(found)
    found = explain([failure(0, raised(RuntimeError("Connection closed by peer"))), failure(3, died())])
    assert isinstance(found, TrainingError) and "RayActorError" in str(found) and found.suspects == ("node1",)
    lost = explain(
        [
            failure(
                3,
                died(
                    "The actor died because its node has died. Node Id: 1\n\tthe actor's node was terminated: missed heartbeats"
                ),
            )
        ]
    )
    assert isinstance(lost, TrainingError) and not lost.suspects, "a lost node explains itself"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (ECC, "device"),
        ("CUDA error: uncorrectable NVLink error detected during the execution", "device"),
        ("CUDA error: invalid device ordinal", "device"),
        ("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.", "device"),
        ("NCCL error in: x, unhandled cuda error\nLast error:\nCuda failure 'uncorrectable ECC error encountered'", "device"),
        (ILLEGAL, "unclear"),
        ("CUDA error: unspecified launch failure", "unclear"),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", "unclear"),
        ("NCCL error in: x, unhandled cuda error (run with NCCL_DEBUG=INFO for details)", "unclear"),
        (f"CUDA error: device-side assert triggered{ADVICE}", "other"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "other"),
        ("CUDA error: no kernel image is available for execution on the device", "other"),
        (NCCL, "peer"),
        ("ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.", "peer"),
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:36417", "peer"),
        ("'int' object is not callable", "other"),
    ],
)
def test_faults_of_devices_programs_and_peers_are_told_apart(text, fault):
    """A device-side assert is an error of the program. An illegal access may be an error of either."""
    assert faults.classify(f"RuntimeError: {text}") == fault


def test_an_error_that_may_be_a_devices_is_the_programs_where_several_devices_have_it():
    one = explain([failure(3, raised(RuntimeError(ILLEGAL))), failure(0, raised(LATE))])
    assert type(one) is TrainingError and one.suspects == ("node1",) and "worker 3 on" in str(one)
    both = explain([failure(3, raised(RuntimeError(ILLEGAL))), failure(0, raised(RuntimeError(ILLEGAL)))])
    assert type(both) is WorkerError and not both.suspects
    asserted = explain([failure(3, raised(RuntimeError(f"CUDA error: device-side assert triggered{ADVICE}")))])
    assert type(asserted) is WorkerError and str(asserted).endswith("CUDA error: device-side assert triggered")


def suspecting(kind: type[TrainingError], *nodes: str) -> TrainingError:
    error = kind("x")
    error.suspects = nodes
    return error


def test_a_node_is_excluded_after_two_faults_of_its_devices_or_two_failures_without_an_explanation():
    """A checkpoint between the two shows that the node works, but not that its devices are healthy."""
    suspicions = Suspicions()
    assert suspicions.note(suspecting(TrainingError, "a"), 0) == []
    assert suspicions.note(suspecting(TrainingError, "b"), 0) == []
    assert suspicions.note(suspecting(TrainingError, "a"), 0) == ["a"]
    assert suspicions.note(suspecting(TrainingError, "b"), 10) == []
    assert suspicions.note(suspecting(DeviceError, "c"), 20) == []
    assert suspicions.note(TrainingError("nobody's"), 20) == [] and suspicions.note(StorageError("away"), 20) == []
    assert suspicions.note(suspecting(DeviceError, "c"), 90) == ["c"]
    assert suspicions.note(CorruptionError("worker 1 differs", ["d"], 5), 90) == ["d"]


def test_a_node_with_a_frozen_worker_is_suspected():
    """Its reporting thread is silent, while the other workers only wait for it."""
    beats = {0: {"node": "a", "at": 99.0}, 1: {"node": "b", "at": 38.0}, 2: {"node": "b", "at": 98.5}}
    assert frozen(beats, now=100.0, limit=60.0) == ("b",)
    assert frozen({0: beats[0]}, now=100.0, limit=60.0) == ()
    assert frozen(beats | {3: {"node": "c", "at": 30.0}}, now=100.0, limit=60.0) == ()


@pytest.mark.parametrize(
    ("room", "said"), [(2, "Excluded until this command ends: node a"), (1, "No other nodes have room for 2 workers")]
)
def test_a_bad_node_is_excluded_where_others_have_room_and_named_where_they_have_none(monkeypatch, caplog, room, said):
    avoided: list[Any] = []
    pool = SimpleNamespace(
        avoided=set, held=lambda: {"a": 2, "b": 1}, avoid=lambda bad, for_good: avoided.append((list(bad), for_good))
    )
    monkeypatch.setattr("heliostat.cluster.nodes.room_now", lambda job, held, avoid: room if held == {"b": 1} else 0)
    told = suspects.exclude(["a"], None, 2, pool)  # type: ignore[arg-type]
    assert said in told and said in caplog.text
    assert avoided == ([(["a"], True)] if room == 2 else [])


def test_an_attempt_that_ends_while_its_streams_are_opened_does_not_wait_for_them():
    running: Any = object.__new__(Attempt)
    ended = threading.Event()
    running._heartbeats, running._streams = {}, SimpleNamespace(end=ended.set)
    running.pool = SimpleNamespace(close=lambda: None, reopen=lambda: None)
    opening = threading.Thread(target=lambda: ended.wait(20.0), daemon=True)
    opening.start()
    running._end_workers(opening)
    assert ended.is_set()


def test_a_reported_error_ends_the_attempt_though_no_worker_ever_ends(monkeypatch):
    """With a broken device, the process can neither clean up nor close its connections, so the others would wait for the
    watchdog."""
    ordered: list[str] = []
    monkeypatch.setattr(attempt, "POLL_S", 0.01)
    monkeypatch.setattr(attempt.ray, "wait", lambda waiting, timeout: time.sleep(timeout) or ([], waiting))
    running: Any = object.__new__(Attempt)
    running._reported, running._streams = {}, SimpleNamespace(end=lambda: ordered.append("end of the stream"))
    running._watch, running._deciding = WorkerWatch(grace=60.0, settle=0.1, hear=0.0, phase="stepped"), threading.Lock()
    running._mailbox = SimpleNamespace(order=ordered.extend)
    members = {f"result {rank}": SimpleNamespace(node="n", address="a", gpus=(str(rank),)) for rank in (0, 1)}
    threading.Timer(0.2, lambda: running._reported.update({1: WorkerError(ECC)})).start()
    began = time.monotonic()
    ended = running._gather(members)
    assert time.monotonic() - began > 0.2, "a worker that has reported nothing is waited for"
    assert ordered == ["abort", "end of the stream"] and ended.summary is None
    found = explain([replace(failure, reported=running._reported.get(failure.rank)) for failure in ended.failures])
    assert type(found) is DeviceError and str(found).startswith("worker 1 on a (node n, GPU 1): CUDA error: uncorrectable ECC")
