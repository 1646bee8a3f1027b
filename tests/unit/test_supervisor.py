"""Tests the supervisor of a submitted job: it stops its driver, keeps its log, and restarts it after a death."""

import json
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
from heliostat.config.spec import Retries
from heliostat.errors import StorageError
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location
from heliostat.submit import logs
from heliostat.submit.entrypoint import Again, Driver

from tests.unit import supervisor
from tests.waiting import until

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
    """Runs the driver around a program that stops slowly. SIGTERM goes to both, as Ray sends it."""
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
    """Simulates a cluster's list of jobs, one of which is a note, once it is `noted`."""

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
    """The note to end it is on the cluster, not in the store."""
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


def test_a_driver_outlives_a_standard_output_that_takes_nothing(tmp_path):
    """/dev/full is a disk without space. The child must not die of a broken pipe, and its log must be in storage."""
    program = "for n in range(2000): print('step', n, flush=True)\nprint('saved', flush=True)"
    process = supervisor.start(tmp_path, program, out="/dev/full")
    assert process.wait(120) == 0 and process.err.count("can't write to standard output") == 1, process.err
    stored = logs.stored(Location(str(tmp_path / "runs" / "r")))
    assert stored.startswith("step 0\n") and stored.endswith("step 1999\nsaved\n")


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
    """Returns (exit code, the flags of each start, the log) of a driver whose child ends in these ways, one after another."""
    run = folder / "runs" / "r"
    run.mkdir(parents=True)
    process = supervisor.start(folder, DIES, str(run), json.dumps(how), flags=flags, retries={"max": retries, "backoff": 0.01})
    code = process.wait(240)
    starts = [json.loads(line) for line in (run / "starts").read_text().splitlines()]
    assert logs.stored(Location(str(run))) == process.out
    return code, starts, process.out


def test_a_dead_driver_is_started_again_and_goes_on_where_it_was(tmp_path):
    """The driver was killed, or a library ended it without a message. Its own files aren't overwritten, but earlier ones are."""
    code, starts, log = _supervised(tmp_path, "early", "killed", "exits", "ends", retries=3)
    assert code == 0 and starts == [["--overwrite"], ["--overwrite"], ["--resume"], ["--resume"]]
    assert "the driver died without an error, killed by SIGKILL. Starting the driver again in 0 s (retry 1 of 3)" in log
    assert "with exit code 1. Starting the driver again" in log


def test_a_driver_that_ends_with_an_error_of_its_own_is_not_started_again(tmp_path):
    code, starts, _ = _supervised(tmp_path, "fails", "ends")
    assert code == 1 and len(starts) == 1


def test_a_successor_that_cannot_begin_is_tried_again_and_a_first_driver_is_not(tmp_path):
    """A store that is unreachable again ends it before it has an attempt in the ledger. A first driver's error is for the person
    to fix."""
    code, starts, log = _supervised(tmp_path / "later", "killed", "away", "away", "ends", retries=3)
    assert code == 0 and starts == [["--overwrite"], *[["--resume"]] * 3]
    assert "with exit code 1 before it had begun. Starting the driver again" in log
    code, starts, _ = _supervised(tmp_path / "first", "away", "ends", retries=3)
    assert code == 1 and len(starts) == 1


def _away(monkeypatch, times):
    """Simulates a store that doesn't answer so many probes."""
    left, waits = [None] * times, []

    def probe(self):
        if left:
            left.pop()
            raise StorageError(f"{self.uri}: storage failed for 3 s")

    monkeypatch.setattr(Location, "probe", probe)
    return waits


def test_a_store_that_is_away_when_the_driver_dies_is_waited_for_and_nothing_is_overwritten(tmp_path, monkeypatch, caplog):
    """Only the run's ledger shows that the dead driver had begun. Without it, --overwrite would delete its training."""
    run, waits = Location(str(tmp_path)), _away(monkeypatch, 3)
    begun = RecordedAttempt("a", time.time(), time.time(), time.time(), 0, 1, host=socket.gethostname(), pid=7)
    run.join("ledger", begun.name).write(begun.dump())
    again = Again(run, Retries(), pause=waits.append)
    assert again.died(7, -9) == "killed by SIGKILL"
    assert again.flags(["--overwrite"], 7) == ["--resume"]
    assert [round(w, 1) <= 5 for w in waits] == [True] * 3 and caplog.text.count("Waiting for the store, up to") == 3
    _away(monkeypatch, 10**6)
    monkeypatch.setattr("heliostat.storage.waiting.AWAY_S", 0.5)
    with pytest.raises(StorageError, match=r"storage failed for 3 s\. Waited \d s for the store"):
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
    assert "killed by SIGKILL. Giving up after 2 retries without a new checkpoint" in log


def test_progress_between_a_drivers_deaths_begins_a_new_budget(tmp_path):
    code, starts, _ = _supervised(tmp_path, *["saves"] * 4, "ends", retries=1)
    assert code == 0 and len(starts) == 5


def test_a_job_file_that_the_supervisor_cannot_read_is_one_clear_line(tmp_path):
    """In a RayJob, the supervisor gets the file as a person wrote it."""
    for text, words in (
        ("name: x\n", "storage: required key missing. Write storage: TEXT"),
        ("name: x\nstorage: 3\n", "storage: expected text, got 3. Write storage: TEXT"),
        ("name: x\nstorage: y\nretries: {mx: 1}\n", "retries: mx: unknown key"),
    ):
        (tmp_path / "job.yaml").write_text(text)
        done = supervisor.command(str(tmp_path / "job.yaml"))
        assert done.code == 2 and words in done.err and "Traceback" not in done.err
