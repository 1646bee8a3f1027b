"""Jobs on clusters, the parts that need none: exit codes, progress, the queue's order, what may travel to a machine elsewhere."""

import errno
import json
import logging
import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
from heliostat.cluster import dashboard
from heliostat.cluster.endpoint import Endpoint
from heliostat.config.spec import Retries
from heliostat.errors import ClusterError, ConfigError, StorageError
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location
from heliostat.submit import jobs, logs, progress, submission
from heliostat.submit.entrypoint import Again, Driver, before

from tests.unit import supervisor
from tests.unit.build_job import write
from tests.unit.build_peer import peer
from tests.waiting import until

THERE, HERE = Endpoint("http://x", None, here=False), Endpoint("http://x", None, here=True)


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("FAILED", None, 1), ("FAILED", 137, 1), ("STOPPED", None, 130)],
)
def test_exit_codes_tell_how_a_job_ended(status, code, wanted):
    assert jobs.exit_code({"status": status, "exit_code": code}) == wanted


def test_progress_and_time_to_go_are_read_from_the_runs_ledger(tmp_path):
    """The newest attempt counts; its start-up is not taken for steps."""
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
    """By start time, then by name; finished jobs, other queues and jobs without one do not count."""

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


@pytest.mark.parametrize("steps", [100, 101])
def test_a_job_that_an_earlier_version_submitted_is_found_again(tmp_path, monkeypatch, steps):
    """That version knew fewer keys, so it computed another digest; other settings are still another job. Twice, as people do."""
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
    """Two of its modules set their own level when they are imported."""
    with pytest.raises(ClusterError, match="127"):
        jobs.Jobs(Endpoint("http://127.0.0.1:9", None, here=True))
    assert all(
        logging.getLogger(f"ray.dashboard.modules.{name}").level == logging.WARNING for name in ("dashboard_sdk", "job.sdk")
    )


def test_paths_of_this_machine_do_not_travel_elsewhere(tmp_path, monkeypatch):
    """Relative paths and SQLite files mean this machine; a cluster on it takes them, made absolute."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    with pytest.raises(ConfigError, match=r"mlflow\.uri: sqlite:///mlflow\.db is a file of one machine"):
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


TRAIN = """
import signal, sys, time
def stop(*_):
    print("saving a checkpoint", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("training", flush=True)
time.sleep(600)
"""


def _driver(tmp_path, seconds, storage=None, jobs_url="http://127.0.0.1:1"):
    """The driver around a program that takes its time to stop; SIGTERM goes to both, as Ray sends it."""
    job = {"storage": storage} if storage else {}
    process = supervisor.start(tmp_path, TRAIN, str(seconds), jobs_url=jobs_url, **job)
    until(lambda: (tmp_path / "err.out").exists() and process.out == "training\n", "training")
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
        one.send_signal(signal.SIGTERM)
    return process


def test_a_stopped_driver_waits_for_the_checkpoint_and_its_log_is_in_storage(tmp_path):
    process = _driver(tmp_path, 0.5)
    assert process.wait(120) == 143 and process.out == "training\nsaving a checkpoint\nsaved\n"
    stored = logs.stored(Location(str(tmp_path / "runs" / "r")))
    assert stored == "training\nsaving a checkpoint\nsaved\n"


class Mailbox(BaseHTTPRequestHandler):
    """A cluster's list of jobs: one of them is a note, from when it is `noted` on."""

    noted, asked = threading.Event(), 0

    def do_GET(self):
        Mailbox.asked += 1
        mine = [{"submission_id": "r", "metadata": {"attempt": "attempt-1"}}]
        note = [{"submission_id": "stop", "metadata": {"ends": "attempt-1"}}] if self.noted.is_set() else []
        answer = json.dumps([*mine, *note]).encode()
        self.send_response(200 if self.path == "/api/jobs/" else 404)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("storage", [None, "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"])
def test_a_driver_that_must_stop_now_does_not_wait_for_a_checkpoint_nor_for_a_store_that_is_dead(tmp_path, storage):
    """The note that it is to end is on the cluster, not in the store."""
    Mailbox.noted.clear()
    Mailbox.asked = 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Mailbox) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        process = _driver(tmp_path, 600, storage, f"http://127.0.0.1:{server.server_port}")
        process.until(lambda: Mailbox.asked > 1, "questions for a note")
        assert process.poll() is None  # without the note it waits
        Mailbox.noted.set()
        assert process.wait(120) == 128 + signal.SIGKILL
        server.shutdown()
        thread.join()
    if storage is None:
        assert logs.stored(Location(str(tmp_path / "runs" / "r"))).endswith("saving a checkpoint\n")


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
    """30 MB, brought up to date 100 times: not 1.5 GB written; and it reads as one, with those of earlier versions."""
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
    """Half of a line fits, then nothing, then all again: the copy has what fitted, and says what is missing."""
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


def test_a_driver_outlives_a_standard_output_that_takes_nothing(tmp_path):
    """/dev/full is a disk without room. The child must not die of a broken pipe, and its log must be in storage."""
    program = "for n in range(2000): print('step', n, flush=True)\nprint('saved', flush=True)"
    process = supervisor.start(tmp_path, program, out="/dev/full")
    assert process.wait(120) == 0 and process.err.count("standard output takes no more") == 1, process.err
    stored = logs.stored(Location(str(tmp_path / "runs" / "r")))
    assert stored.startswith("step 0\n") and stored.endswith("step 1999\nsaved\n")


class Tailed:
    """Ray's client of a job whose log comes in pieces, and whose connection breaks once behind the third."""

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
    """The whole log is read once a connection, not once a second; nothing comes twice or not at all."""
    monkeypatch.setattr(jobs, "FOLLOW_S", 0.01)
    cluster = jobs.Jobs.__new__(jobs.Jobs)
    cluster.client = Tailed()
    states = iter(["RUNNING"] * 1 + ["SUCCEEDED"] * 9)
    monkeypatch.setattr(cluster, "get", lambda _: {"status": next(states), "metadata": {"attempt": "two"}, "exit_code": 0})
    assert list(cluster.follow("r")) == ["step", " 1\n", "step 2\n", "step 3\n"]
    assert cluster.client.connections == 2


DIES = """
import json, os, signal, socket, sys, time
from pathlib import Path
run, how, flags = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
with (run / "starts").open("a") as starts:
    starts.write(json.dumps(flags) + "\\n")
number = len((run / "starts").read_text().splitlines()) - 1
what = how[min(number, len(how) - 1)]
outcome = {"fails": "failed", "ends": "finished"}.get(what)
attempt = {"id": f"a{number}", "started": time.time(), "known": time.time(), "seen": time.time(), "start_step": 0, "workers": 1,
           "host": socket.gethostname(), "pid": os.getpid(), "outcome": outcome, "marks": []}
if what not in ("early", "away"):
    (run / "ledger").mkdir(exist_ok=True)
    (run / "ledger" / f"attempt-{number}.json").write_text(json.dumps(attempt))
if what == "saves":
    saved = run / "checkpoints" / f"step-{10 * (number + 1):08d}"
    saved.mkdir(parents=True)
    (saved / "checkpoint.json").write_text("{}")
print("start", number, what, flush=True)
if what == "ends":
    sys.exit(0)
if what in ("fails", "exits", "away"):
    sys.exit(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def _supervised(folder, *how, retries=2, flags=("--overwrite",)):
    """(exit code, the flags of each start, the log) of a driver whose child ends in these ways, one after another."""
    run = folder / "runs" / "r"
    run.mkdir(parents=True)
    process = supervisor.start(folder, DIES, str(run), json.dumps(how), flags=flags, retries={"max": retries, "backoff": 0.01})
    code = process.wait(240)
    starts = [json.loads(line) for line in (run / "starts").read_text().splitlines()]
    assert logs.stored(Location(str(run))) == process.out
    return code, starts, process.out


def test_a_dead_driver_is_started_again_and_goes_on_where_it_was(tmp_path):
    """Killed, or ended by a library without a word; what it has begun is not overwritten, what was there before it is."""
    code, starts, log = _supervised(tmp_path, "early", "killed", "exits", "ends", retries=3)
    assert code == 0 and starts == [["--overwrite"], ["--overwrite"], ["--resume"], ["--resume"]]
    assert "the driver died without a word, killed by SIGKILL: starting it again in 0 s (retry 1 of 3)" in log
    assert "with exit code 1: starting it again" in log


def test_a_driver_that_ends_with_an_error_of_its_own_is_not_started_again(tmp_path):
    code, starts, _ = _supervised(tmp_path, "fails", "ends")
    assert code == 1 and len(starts) == 1


def test_a_successor_that_cannot_begin_is_tried_again_and_a_first_driver_is_not(tmp_path):
    """A store that went away again ends it before it has an attempt in the ledger; a first driver's error is the person's."""
    code, starts, log = _supervised(tmp_path / "later", "killed", "away", "away", "ends", retries=3)
    assert code == 0 and starts == [["--overwrite"], *[["--resume"]] * 3]
    assert "with exit code 1 before it had begun: starting it again" in log
    code, starts, _ = _supervised(tmp_path / "first", "away", "ends", retries=3)
    assert code == 1 and len(starts) == 1


def _away(monkeypatch, times):
    """A store that does not answer to so many probes."""
    left, waits = [None] * times, []

    def probe(self):
        if left:
            left.pop()
            raise StorageError(f"{self.uri}: storage failed for 3 s")

    monkeypatch.setattr(Location, "probe", probe)
    return waits


def test_a_store_that_is_away_when_the_driver_dies_is_waited_for_and_nothing_is_overwritten(tmp_path, monkeypatch, caplog):
    """Only the run's ledger shows that the dead driver had begun: without it --overwrite would delete what it has trained."""
    run, waits = Location(str(tmp_path)), _away(monkeypatch, 3)
    begun = RecordedAttempt("a", time.time(), time.time(), time.time(), 0, 1, host=socket.gethostname(), pid=7)
    run.join("ledger", begun.name).write(begun.dump())
    again = Again(run, Retries(), pause=waits.append)
    assert again.died(7, -9) == "killed by SIGKILL"
    assert again.flags(["--overwrite"], 7) == ["--resume"]
    assert [round(w, 1) <= 5 for w in waits] == [True] * 3 and caplog.text.count("waiting for the store, up to") == 3
    _away(monkeypatch, 10**6)
    monkeypatch.setattr("heliostat.storage.locations.AWAY_S", 0.5)
    with pytest.raises(StorageError, match=r"storage failed for 3 s; waited \d s for the store"):
        again.flags(["--overwrite"], 7)


def test_a_job_that_is_stopped_while_its_supervisor_waits_for_the_store_is_not_started_again(tmp_path, monkeypatch):
    _away(monkeypatch, 10**6)
    (tmp_path / "job.json").write_text(json.dumps({"name": "r", "storage": str(tmp_path)}))
    driver = Driver(tmp_path / "job.json", None, "attempt-1", [])
    driver.stopping.set()
    assert not driver._starts_again(7, "killed by SIGKILL")


def test_a_driver_that_dies_again_and_again_without_progress_is_given_up(tmp_path):
    code, starts, log = _supervised(tmp_path, "killed", retries=2)
    assert code == 128 + signal.SIGKILL and len(starts) == 3
    assert "killed by SIGKILL; given up after 2 retries without a new checkpoint" in log


def test_progress_between_a_drivers_deaths_begins_a_new_budget(tmp_path):
    code, starts, _ = _supervised(tmp_path, *["saves"] * 4, "ends", retries=1)
    assert code == 0 and len(starts) == 5


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


def test_a_job_file_that_the_supervisor_cannot_read_is_one_clear_line(tmp_path):
    """In a RayJob it is given the file as a person wrote it."""
    for text, words in (("name: x\n", "storage: None is none"), ("name: x\nstorage: y\nretries: {mx: 1}\n", "mx")):
        (tmp_path / "job.yaml").write_text(text)
        done = supervisor.command(str(tmp_path / "job.yaml"))
        assert done.code == 2 and words in done.err and "Traceback" not in done.err
