"""Tests profiles of a running job: the table from a trace, and the path of a request from the run's folder to one worker and
back."""

import gzip
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from heliostat.data import device_ranges
from heliostat.errors import ConfigError, DataError, HeliostatError, PeerLostError
from heliostat.runs import profile, profile_table
from heliostat.runs.goodput import RecordedAttempt
from heliostat.runs.profile import ProfileRequest
from heliostat.storage.locations import Location
from heliostat.training.driver import attempt
from heliostat.training.driver.profiles import ProfileRequests
from heliostat.training.worker import profiler
from heliostat.training.worker.context import Due
from heliostat.training.worker.profiler import StepProfiler

from tests import stores

DUE = Due(False, False, False, False, False, False)


def event(name, begin, dur, cat="cpu_op", tid=1):
    return {"ph": "X", "name": name, "cat": cat, "pid": 7, "tid": tid, "ts": begin, "dur": dur}


STEPS = [event("heliostat step 4", 0, 100, "user_annotation"), event("heliostat step 5", 120, 80, "user_annotation")]


def summary(*events):
    return profile_table.summarize(profile_table.spans([{"ph": "M", "name": "process_name"}, *STEPS, *events]))


def by_name(result):
    return {o["name"]: (o["calls"], round(o["total_s"] * 1e6), round(o["self_s"] * 1e6)) for o in result["operations"]}


def test_the_time_of_a_call_counts_once_for_the_innermost_operation():
    """Cases: a linear layer that calls a product twice, and one that calls itself."""
    result = summary(event("linear", 10, 50), event("mm", 20, 10), event("mm", 35, 15), event("f", 130, 40), event("f", 140, 20))
    assert by_name(result) == {"linear": (1, 50, 25), "mm": (2, 25, 25), "f": (2, 40, 40)}
    assert result["operations"][0]["name"] == "f" and result["device"] == "cpu"


def test_operations_of_other_threads_and_outside_of_the_steps():
    """Threads nest separately. Operations before the first step and after the last one are left out, and aren't busy time."""
    result = summary(event("a", 10, 50), event("b", 20, 10, tid=2), event("late", 300, 10))
    assert by_name(result) == {"a": (1, 50, 50), "b": (1, 10, 10)}
    assert result["busy"] == pytest.approx(50 / 200)


def test_gaps_are_the_times_without_an_operation_and_add_up():
    result = summary(event("a", 10, 50), event("b", 40, 30), event("c", 150, 40))
    gaps = [(round(g["begin_s"] * 1e6), round(g["seconds"] * 1e6), g["after"], g["before"]) for g in result["gaps"]]
    assert gaps == [(70, 80, "b", "c"), (0, 10, "the begin", "a"), (190, 10, "c", "the end")]
    assert result["busy"] == pytest.approx(0.5) and result["seconds"] == pytest.approx(200e-6)


def test_on_a_gpu_its_kernels_show_whether_it_waits():
    """Although the CPU has an operation all the time."""
    result = summary(event("launch", 0, 200), event("gemm", 50, 100, "kernel", 9), event("copy", 100, 60, "gpu_memcpy", 10))
    assert result["device"] == "gpu" and result["busy"] == pytest.approx(110 / 200)
    assert {o["name"]: o["device"] for o in result["operations"]} == {"launch": "cpu", "gemm": "gpu", "copy": "gpu"}
    assert len(profile_table.operation_rows(result)) == 4 and len(profile_table.gap_rows(result)) == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no gzip",
        *(gzip.compress(t, mtime=0) for t in (b"{}", b'{"traceEvents": []}', b'{"traceEvents": [{"ph": "X", "dur": "x"}]}')),
    ],
    ids=["empty", "no gzip", "no events", "no event", "no number"],
)
def test_what_is_no_trace_is_rejected_in_one_line(tmp_path, data):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(DataError, match="isn't a trace") as e:
        profile_table.read(Location(str(tmp_path / "t")))
    assert "\n" not in str(e.value)


@pytest.fixture
def run(tmp_path):
    """Returns the folder of a run with two workers, whose driver is this process."""
    now = time.time()
    attempt = RecordedAttempt("a1", now, now, now, 0, 2, host=socket.gethostname(), pid=os.getpid())
    folder = Location(str(tmp_path / "run"))
    folder.join("ledger", attempt.name).write(attempt.dump())
    return folder


def write_request(run, rank=0, steps=2):
    run.join("profiles/request.json").write(json.dumps({"id": "0123456789ab", "rank": rank, "steps": steps}).encode())


def test_a_run_that_is_not_running_and_an_unknown_rank_are_rejected(run, tmp_path):
    with pytest.raises(ConfigError, match="no run in this folder"):
        profile.take(Location(str(tmp_path / "other")), 0, 1)
    with pytest.raises(ConfigError, match=r"--rank: the run has 2 workers, and none has rank 2\. Pass"):
        profile.take(run, 2, 1)
    assert not run.join("profiles/request.json").exists()


def test_a_second_profile_waits_until_the_first_has_its_answer(run):
    """A request without an answer is in progress. A request with an answer comes from a killed command."""
    write_request(run)
    with pytest.raises(ConfigError, match="another profile isn't complete yet"):
        profile.take(run, 0, 1)
    first = profile.requested(run)
    assert first
    profile.answer(run, first, problem="none")

    def respond(_: float) -> None:
        second = profile.requested(run)
        assert second and second.id != first.id
        profile.answer(run, second, 3, 1, ["t"])

    _, answer = profile.take(run, 1, 1, respond)
    assert (answer["first"], answer["files"]) == (3, ["t"])
    assert not run.join("profiles/request.json").exists()


def test_the_command_ends_when_the_worker_could_not_be_profiled(run):
    def respond(_: float) -> None:
        request = profile.requested(run)
        assert request
        profile.answer(run, request, problem="no room")

    with pytest.raises(HeliostatError, match="worker 1 wasn't profiled \\(no room\\)"):
        profile.take(run, 1, 1, respond)


def test_the_driver_orders_each_request_once_and_answers_for_workers_that_it_does_not_have(run):
    ordered: list[ProfileRequest] = []
    requests = ProfileRequests(run, 1, ordered.append)
    requests.look()
    write_request(run)
    requests.look()
    requests.look()
    assert [r.rank for r in ordered] == [0]
    write_request(run, rank=1)
    ProfileRequests(run, 1, ordered.append).look()
    answer = profile.answered(run, ProfileRequest("0123456789ab", 1, 2))
    assert len(ordered) == 1 and answer and "1 workers" in answer["problem"]


@pytest.mark.parametrize(
    "content", ["{}", '{"id": "../x", "rank": 0, "steps": 1}', '{"id": "0123456789", "rank": 0, "steps": 101}']
)
def test_a_request_that_is_none_is_deleted(run, content):
    """For example, a request for too many steps, or for files in another place."""
    run.join("profiles/request.json").write(content.encode())
    ordered: list[ProfileRequest] = []
    ProfileRequests(run, 1, ordered.append).look()
    assert not ordered and not run.join("profiles/request.json").exists()


def test_the_stacks_of_the_driver_are_in_the_profile(run, tmp_path, monkeypatch):
    """They are written before the worker receives the request, and its answer lists the file."""
    program = tmp_path / "py-spy"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    write_request(run)
    seen: list[bool] = []
    ProfileRequests(run, 1, lambda r: seen.append(profile.place(run, r).join(profile.DRIVER).exists())).look()
    assert seen == [True] and str(os.getpid()) in run.join("profiles/0123456789ab", profile.DRIVER).read().decode()


@pytest.mark.parametrize(
    ("program", "problem"), [("", "isn't installed"), ("echo Permission Denied >&2; exit 1", "failed (Perm")]
)
def test_without_the_stacks_of_the_driver_the_worker_is_profiled(program, problem, run, tmp_path, monkeypatch, caplog):
    if program:
        (tmp_path / "py-spy").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "py-spy").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    write_request(run)
    ordered: list[ProfileRequest] = []
    ProfileRequests(run, 1, ordered.append).look()
    assert len(ordered) == 1 and problem in caplog.text and len(caplog.records) == 1


@pytest.mark.ci  # the profiler imports torch's compiler, which takes seconds; workers have it already
def test_a_worker_profiles_the_steps_and_leaves_a_trace(run):
    """Profiles two steps of real operations, the fifth and the sixth. Before them there is no file, and its temporary folder is
    empty afterwards."""
    posted = []
    heartbeat = SimpleNamespace(profiles=deque[ProfileRequest]())
    hook = StepProfiler(run, heartbeat, SimpleNamespace(post_of_any=posted.append))  # type: ignore[arg-type]
    request = ProfileRequest("0123456789ab", 0, 2)
    for step in range(7):
        if step == 4:
            heartbeat.profiles.append(request)
        hook.before_step(step)
        with device_ranges.named("forward"):
            torch.ones(64, 64) @ torch.ones(64, 64)
        hook.after_step(step + 1, DUE)
    hook.wait()
    hook.end()
    answer = profile.answered(run, request)
    trace = json.loads(gzip.decompress(profile.place(run, request).join("rank-00000.trace.json.gz").read()))
    assert sum(e.get("cat") == "user_annotation" and e["name"] == "forward" for e in trace["traceEvents"]) == 2
    assert device_ranges.named("forward") is device_ranges.named("save"), "a context that does nothing"
    assert answer == {"problem": "", "first": 5, "steps": 2, "files": ["rank-00000.trace.json.gz"]}
    result = profile_table.read(profile.place(run, request).join(answer["files"][0]))
    assert next(o for o in result["operations"] if o["name"] == "aten::mm")["calls"] == 2
    assert [e.id for e in posted] == [request.id]


def test_a_profiler_that_fails_does_not_end_the_run(run, monkeypatch):
    def broken(**_):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    request = ProfileRequest("0123456789ab", 0, 2)
    hook = StepProfiler(run, SimpleNamespace(profiles=deque([request])), None)  # type: ignore[arg-type]
    hook.before_step(0)
    hook.after_step(1, DUE)
    hook.end()
    answer = profile.answered(run, request)
    assert answer and answer["problem"] == "RuntimeError: no CUPTI"


class Gpu:
    """Replaces `torch.cuda` and the profiler: records what is on, and fails in a chosen call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.fails, self.on, self.waits = fails, set[str](), 0
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.call("synchronize"))
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", self.history)
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: self.call("snapshot", Path(path).write_bytes(b"m")))
        calls = {name: lambda name=name: self.call(name) for name in ("start", "stop")}
        trace = {"export_chrome_trace": lambda path: Path(path).write_bytes(b"t")}
        monkeypatch.setattr(torch.profiler, "profile", lambda activities: SimpleNamespace(**calls, **trace))

    def call(self, name: str, _: object = None) -> None:
        self.waits += name == "synchronize"
        self.on -= {"trace"} if name == "stop" else set()
        if name == self.fails:
            raise RuntimeError(f"no {name}")
        self.on |= {"trace"} if name == "start" else set()

    def history(self, enabled: str | None = "all", max_entries: int = 0) -> None:
        if enabled:
            self.call("history")
        self.on = self.on | {"history"} if enabled else self.on - {"history"}


def steps(hook: StepProfiler, number: int, due: Due = DUE) -> None:
    for step in range(number):
        hook.before_step(step)
        hook.after_step(step + 1, due)


@pytest.mark.parametrize("fails", ["start", "history", "snapshot", "stop", ""])
def test_nothing_of_a_profiler_stays_on(fails, run, monkeypatch):
    """For any failure: a memory history or a trace that stays on would slow down all later steps."""
    gpu, posted, request = Gpu(monkeypatch, fails), list[object](), ProfileRequest("0123456789ab", 0, 2)
    hook = StepProfiler(run, SimpleNamespace(profiles=deque([request])), SimpleNamespace(post_of_any=posted.append))  # type: ignore[arg-type]
    steps(hook, 3)
    hook.wait()
    answer = profile.answered(run, request)
    assert gpu.on == set() and device_ranges.named("save") is device_ranges.named("batch")
    assert answer and answer["problem"] == (f"RuntimeError: no {fails}" if fails else "")
    if not fails:
        assert answer["files"] == ["rank-00000.memory.pickle", "rank-00000.trace.json.gz"] and len(posted) == 1
        assert gpu.waits == 2, "before the first step and after the last: only then all its kernels count"


def aborted() -> None:
    raise PeerLostError


def test_a_store_that_hangs_holds_no_step_up(run, monkeypatch):
    """The next profile waits for a later step. An ending worker waits for less time than the driver waits for it."""
    Gpu(monkeypatch)
    monkeypatch.setattr(profiler, "PULSE_S", 0.01)
    stored, stuck = threading.Event(), Location.upload

    def upload(self: Location, *given: object) -> None:
        stored.wait()
        stuck(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Location, "upload", upload)
    requests = [ProfileRequest(f"0123456789a{n}", 0, 1) for n in range(2)]
    heartbeat = SimpleNamespace(profiles=deque(requests))
    hook = StepProfiler(run, heartbeat, SimpleNamespace(post_of_any=lambda event: None))  # type: ignore[arg-type]
    steps(hook, 3)
    assert list(heartbeat.profiles) == requests[1:] and profile.answered(run, requests[0]) is None
    assert profiler.END_S < attempt.SETTLE_S
    with pytest.raises(PeerLostError):  # which ends a worker that waits after its last step, and counts as progress until then
        hook.wait(progressed=aborted)
    stored.set()
    hook.wait()
    steps(hook, 1)
    hook.wait()
    assert all(profile.answered(run, request) for request in requests)


def test_a_run_of_another_machine_is_profiled_through_its_folder_in_s3(s3, monkeypatch):
    """The command, the driver, and the worker share only the folder."""
    for name, value in stores.AWS.items():
        monkeypatch.setenv(name, value)
    Gpu(monkeypatch)
    run, now = Location(f"s3://profiles/run?{stores.bucket(s3, 'profiles')}"), time.time()
    attempted = RecordedAttempt("a1", now, now, now, 0, 2, host="elsewhere", pid=1)
    run.join("ledger", attempted.name).write(attempted.dump())
    heartbeat = SimpleNamespace(profiles=deque[ProfileRequest]())
    driver = ProfileRequests(run, 2, heartbeat.profiles.append)
    hook = StepProfiler(run, heartbeat, SimpleNamespace(post_of_any=lambda event: None))  # type: ignore[arg-type]

    def elsewhere(_: float) -> None:
        driver.look()
        steps(hook, 2)
        hook.wait()

    request, answer = profile.take(run, 1, 2, elsewhere)
    assert answer["steps"] == 2 and {f"rank-00001{profile.TRACE}", f"rank-00001{profile.MEMORY}"} <= set(answer["files"])
    assert all(profile.place(run, request).join(name).exists() for name in answer["files"])
    assert not run.join("profiles/request.json").exists()
