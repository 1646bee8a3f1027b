"""Tests the parts of cluster jobs that need no cluster: exit codes, progress, the queue's order, and the paths that another
machine can use."""

import errno
import logging
import os

import pytest
from heliostat.cluster import dashboard
from heliostat.cluster.endpoint import Endpoint
from heliostat.errors import ClusterError, ConfigError
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location
from heliostat.submit import jobs, logs, progress, submission
from heliostat.submit.entrypoint import before

from tests.unit.build_job import write
from tests.unit.build_peer import peer

THERE, HERE = Endpoint("http://x", None, here=False), Endpoint("http://x", None, here=True)


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", 137, 1), ("STOPPED", None, 130)],
)
def test_exit_codes_tell_how_a_job_ended(status, code, wanted):
    assert jobs.exit_code({"status": status, "exit_code": code}) == wanted


def test_progress_and_time_to_go_are_read_from_the_runs_ledger(tmp_path):
    """The newest attempt counts, and its start-up doesn't count as steps."""
    run = Location(str(tmp_path))
    assert progress.of_run(run, 100) == {"step": 0, "steps": 100, "fraction": 0.0, "eta_s": None}
    old = RecordedAttempt("a", 1000.0, 1100.0, 1100.0, 0, 1, parts={"computing": 50.0}, marks=[(30, 50.0)])
    new = RecordedAttempt("b", 2000.0, 2100.0, 2100.0, 20, 1, marks=[(60, 70.0)],
                  parts={"starting": 500.0, "computing": 70.0, "data": 6.0, "checkpoint": 4.0})  # fmt: skip
    for attempt in (old, new):
        run.join("ledger", attempt.name).write(attempt.dump())
    found = progress.of_run(run, 100)
    assert (found["step"], found["fraction"]) == (60, 0.6)
    assert found["eta_s"] == pytest.approx(40 * 80 / 40)


def test_a_damaged_ledger_is_a_note_not_a_failure(tmp_path):
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "attempt-x.json").write_text("{")
    assert progress.of_run(Location(str(tmp_path)), 10)["step"] is None


def test_a_queue_is_worked_off_in_the_order_of_submission():
    """By start time, then by name. Finished jobs, other queues, and jobs without a queue don't count."""

    def one(name, start, status="RUNNING", queue="q"):
        return {"submission_id": name, "start_time": start, "status": status, "metadata": {"queue": queue} if queue else None}

    all_ = [
        one("a", 1),
        one("b", 2),
        one("c", 2),
        one("old", 0, "SUCCEEDED"),
        one("other", 0, queue="p"),
        one("none", 0, queue=None),
    ]
    assert before("a", "q", all_) == []
    assert before("c", "q", all_) == ["a", "b"]
    assert before("missing", "q", all_) is None


def test_epochs_of_a_run_that_resumes_count_the_samples_that_it_trains_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submission.check, "training_samples", lambda job, resume=False: 640 if resume else 6400)
    path = write(tmp_path)
    steps = [submission.load(path, ["train.epochs=8"], HERE, resume).train.steps for resume in (False, True)]
    assert steps[0] == 10 * steps[1]


@pytest.mark.parametrize("steps", [100, 101])
def test_a_job_that_an_earlier_version_submitted_is_found_again(tmp_path, monkeypatch, steps):
    """That version knew fewer keys, so it computed another digest. Other settings still mean another job. Users submit twice."""
    monkeypatch.chdir(tmp_path)
    earlier = submission.SubmissionRecord.of(submission.load(write(tmp_path), [], HERE), None, None)
    del earlier.job["train"]["ema"]
    earlier.write()
    there = {"status": "RUNNING", "metadata": {"digest": earlier.digest}}
    known = jobs.Jobs.__new__(jobs.Jobs)
    monkeypatch.setattr(known, "find", lambda _: there)
    wanted = submission.load(write(tmp_path), [f"train.steps={steps}"], HERE)
    for _ in range(2):
        record = submission.SubmissionRecord.of(wanted, None, None)
        if steps == earlier.steps:
            assert record.digest != earlier.digest and known.submit(record) == record.id
        else:
            with pytest.raises(ConfigError, match="a job with other settings"):
                known.submit(record)


def test_rays_client_logs_no_notices_between_heliostats_lines():
    """Two of its modules set their own log level at import."""
    with pytest.raises(ClusterError, match="127"):
        jobs.Jobs(Endpoint("http://127.0.0.1:9", None, here=True))
    assert all(
        logging.getLogger(f"ray.dashboard.modules.{name}").level == logging.WARNING for name in ("dashboard_sdk", "job.sdk")
    )


def test_paths_of_this_machine_do_not_travel_elsewhere(tmp_path, monkeypatch):
    """Relative paths and SQLite files refer to this machine. A cluster on this machine accepts them, as absolute paths."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    with pytest.raises(ConfigError, match=r"mlflow\.uri: sqlite:///mlflow\.db is a file on one machine"):
        submission.load(path, [], THERE)
    server = ["mlflow.uri=http://mlflow:5000"]
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.path: 'data/a' is a path of this workspace"):
        submission.load(path, server, THERE)
    with pytest.raises(ConfigError, match=r"storage: 'runs' is a path of this workspace"):
        submission.load(path, [*server, "data.sources.0.path=s3://b/a"], THERE)
    assert (
        submission.load(path, [*server, "data.sources.0.path=s3://b/a", "storage=/shared/runs"], THERE).storage == "/shared/runs"
    )
    assert submission.load(path, [], HERE).storage == str(tmp_path / "runs")


def test_a_model_of_the_hub_is_no_path_of_this_machine(tmp_path, monkeypatch):
    """The cluster downloads the model itself, unless this machine has a folder of this name."""
    monkeypatch.chdir(tmp_path)
    model = {"pretrained": "org/parent"}
    elsewhere = {"mlflow.uri": "http://mlflow:5000", "data.sources.0.path": "s3://b/a", "storage": "s3://b/runs"}
    path = write(tmp_path, **elsewhere, model=model)
    assert submission.load(path, [], THERE).model == model
    (tmp_path / "org/parent").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model\.pretrained: 'org/parent' is a path of this workspace"):
        submission.load(path, [], THERE)


class Store:
    """Counts the bytes that are written to a folder."""

    def __init__(self, folder):
        self.folder, self.bytes = folder, 0

    def join(self, name):
        store = self

        class Object:
            def write(self, data):
                store.bytes += len(data)
                Location(str(store.folder)).join(name).write(data)

        return Object()


def test_what_is_new_in_a_log_is_all_that_its_copy_in_storage_costs(tmp_path):
    """30 MB of log, updated 100 times, don't cost 1.5 GB of writes. The copy reads as one log, also with parts of earlier
    versions."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "20250101T000000Z-aaaaaa.log").write_text("of an earlier version\n")
    store, whole = Store(tmp_path / "logs"), b""
    copy = logs.LogCopy(store, "20260101T000000Z-bbbbbb")
    for number in range(100):
        line = (f"{number} ä ".encode() * 50000)[:400_000]
        copy.add(line)
        whole += line
        copy.send()
    copy.send()
    assert store.bytes < len(whole) + 100 * logs.PART  # what is new, and the part that it goes on
    assert logs.stored(Location(str(tmp_path))) == "of an earlier version\n" + whole.decode(errors="replace")


def test_a_full_disk_costs_a_stretch_of_the_logs_copy_and_nothing_else(tmp_path, monkeypatch):
    """First half of a line fits, then nothing, then everything. The copy has the part that fitted, and reports the missing
    part."""
    (tmp_path / "logs").mkdir()
    copy, room, write = logs.LogCopy(Location(str(tmp_path / "logs")), "a"), [10**9], os.pwrite

    def pwrite(file, data, at):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = bytes(data[: room[0]])
        room[0] -= len(taken)
        return write(file, taken, at)

    monkeypatch.setattr(logs.os, "pwrite", pwrite)
    copy.add(b"before\n")
    copy.send()
    room[0] = 4
    copy.add(b"lost half way\n")
    copy.add(b"lost\n")
    copy.send()
    room[0] = 10**9
    copy.add(b"after\n")
    copy.send()
    told = "before\n\n[19 bytes of the log are missing: No space left on device]\nafter\n"
    assert logs.stored(Location(str(tmp_path))) == told


class Tailed:
    """Simulates Ray's client of a job: the log arrives in pieces, and the connection breaks once after the third piece."""

    pieces = ("--attempt one\nold\n", "python --attempt two\nstep", " 1\n", "step 2\n", "step 3\n")

    def __init__(self):
        self.connections = 0

    async def tail_job_logs(self, job_id):
        self.connections += 1
        for number, piece in enumerate(self.pieces):
            if self.connections == 1 and number == 3:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield piece


def test_a_followed_log_is_streamed_and_goes_on_behind_a_broken_connection(monkeypatch):
    """The whole log is read once per connection, not once per second. Nothing appears twice, and nothing is missing."""
    monkeypatch.setattr(jobs, "FOLLOW_S", 0.01)
    cluster = jobs.Jobs.__new__(jobs.Jobs)
    cluster.client = Tailed()
    states = iter(["RUNNING"] * 1 + ["SUCCEEDED"] * 9)
    monkeypatch.setattr(cluster, "get", lambda _: {"status": next(states), "metadata": {"attempt": "two"}, "exit_code": 0})
    assert list(cluster.follow("r")) == ["step", " 1\n", "step 2\n", "step 3\n"]
    assert cluster.client.connections == 2


def test_transient_faults_are_retried_and_refusals_are_not(monkeypatch):
    from heliostat.errors import ClusterError

    monkeypatch.setattr(jobs, "RETRY_S", 2.0)
    tries = []

    def act(error):
        def action():
            tries.append(1)
            if len(tries) < 3:
                raise error
            return "done"

        return action

    client = jobs.Jobs.__new__(jobs.Jobs)
    assert client._retry(act(RuntimeError("Request failed with status code 503: busy.")), "trying") == "done" and len(tries) == 3
    tries.clear()
    with pytest.raises(ClusterError, match="trying: Request failed with status code 400"):
        client._retry(act(RuntimeError("Request failed with status code 400: bad.")), "trying")
    assert len(tries) == 1
    tries.clear()
    assert client._retry(act(ConnectionError("reset")), "trying") == "done"


def test_a_followed_log_begins_with_the_submission_and_not_with_earlier_ones_of_its_id():
    log = "python -m heliostat.submit.entrypoint --attempt one\nstep 1\n"
    assert jobs._beginning(log, "two", over=False) is None  # it has not come to its entrypoint
    assert jobs._beginning(log + "python --attempt two", "two", over=False) is None
    both = log + "python --attempt two\nstep 31\n"
    at = jobs._beginning(both, "two", over=False)
    assert at is not None and both[at:] == "step 31\n"
    assert jobs._beginning(log, "two", over=True) == 0  # and never will: all there is


def test_a_port_that_speaks_no_http_does_not_answer():
    with peer(b"\x00\x00\x12\x04\x00\x00\n") as url:
        assert dashboard.probe(url) == 0
