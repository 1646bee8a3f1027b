"""Tests that a run has one driver at a time.

Of several drivers that start together, one trains the run. A dead driver never blocks others, and a driver that was declared dead
writes nothing more.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from heliostat.errors import ConfigError, LeaseError, StorageError
from heliostat.storage import lease, run_folder
from heliostat.storage.lease import Fence, Holder
from heliostat.storage.locations import Location

from tests import stores
from tests.waiting import until

TOGETHER_S = 0.010
DIES = """
import os, signal, sys
from heliostat.storage.locations import Location
from heliostat.storage import lease
lease.take(Location(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def rounds(folder: str) -> int:
    return 20 if "://" in folder else 50


def race(folder: str, gate: object, told: object) -> None:
    """Simulates a command that starts: it takes the lease when the gate opens, and keeps it until all have tried."""
    os.environ.update(stores.AWS)
    for number in range(rounds(folder)):
        run = Location(folder.replace("/run", f"/run-{number}"))
        gate.wait(60)
        at = time.monotonic()
        try:
            held = lease.take(run)
        except ConfigError as e:
            told.put((number, at, os.getpid(), 0, str(e)))
            gate.wait(60)
        else:
            told.put((number, at, os.getpid(), held.fence.number, ""))
            gate.wait(60)
            held.release()


@pytest.mark.parametrize("before", ["nobody", "a dead driver"])
def test_of_two_commands_that_start_together_one_trains_the_run(place, before):
    """50 times on a disk and 20 on a store, from two processes within 10 ms. The other command's error names the driver."""
    times = rounds(str(place))
    if before == "a dead driver":
        left = replace(Holder.me(), pid=2**22 - 1)
        for number in range(times):
            Location(str(place).replace("/run", f"/run-{number}")).join(run_folder.LEASE, "00000001.json").write(left.dump())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([race.__module__])  # imported once for all racers
    gate, told = context.Barrier(2), context.Queue()
    racers = [context.Process(target=race, args=(str(place), gate, told), daemon=True) for _ in range(2)]
    for racer in racers:
        racer.start()
    tried = dict[int, list[tuple[float, int, int, str]]]()
    for _ in range(2 * times):
        number, *rest = told.get(timeout=120)
        tried.setdefault(number, []).append(tuple(rest))
    for racer in racers:
        racer.join(60)
    won = 2 if before == "a dead driver" else 1
    for tries in tried.values():
        (_, loser, none, refusal), (_, winner, token, _) = sorted(tries, key=lambda t: t[2])
        assert (none, token) == (0, won) and f"is being trained by process {winner} on" in refusal and loser != winner
    apart = sorted(abs(a[0] - b[0]) for a, b in tried.values())
    assert apart[len(apart) // 2] < TOGETHER_S  # half of them at least; a busy machine may hold a process up


def test_a_lease_that_was_given_back_or_whose_process_is_gone_is_free_at_once(place):
    for number in (1, 2):
        with lease.take(place) as held:
            assert held.fence.number == number
            with pytest.raises(
                ConfigError, match=rf"is being trained by process {os.getpid()} on .*\. Wait for that process, stop it, or"
            ):
                lease.take(place)
    gone = subprocess.run([sys.executable, "-c", DIES, str(place)], check=False)
    assert gone.returncode == -signal.SIGKILL
    began = time.monotonic()
    with lease.take(place) as held:
        assert held.fence.number == 4 and time.monotonic() - began < lease.SILENCE_S / 2


def test_a_process_that_was_given_a_dead_drivers_number_is_not_it(tmp_path):
    run = Location(str(tmp_path))
    run.join(run_folder.LEASE, "00000001.json").write(replace(Holder.me(), started=1.0).dump())
    lease.take(run).release()


@pytest.mark.parametrize("lives", [True, False])
def test_a_driver_on_another_machine_counts_as_long_as_it_renews_its_lease(tmp_path, monkeypatch, lives):
    """The clocks of the machines don't matter: only a change of the lease counts."""
    monkeypatch.setattr(lease, "SILENCE_S", 120.0 if lives else 0.3)
    monkeypatch.setattr(lease, "LOOK_S", 0.1)
    run, file = Location(str(tmp_path)), Location(str(tmp_path)).join(run_folder.LEASE, "00000001.json")
    there = replace(Holder.me(), host="elsewhere", machine="elsewhere/boot/pid:[1]", pid=7)
    file.write(there.dump())
    if not lives:
        lease.take(run).release()
        return
    sign = threading.Timer(0.3, lambda: file.write(replace(there, beat=1).dump()))
    sign.start()
    with pytest.raises(ConfigError, match="is being trained by process 7 on elsewhere"):
        lease.take(run)
    sign.join()


def test_a_lease_is_renewed_and_its_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    run = Location(str(tmp_path))
    held = lease.take(run)
    file = run.join(run_folder.LEASE, "00000001.json")
    until(lambda: json.loads(file.read())["beat"] >= 3, "third beat")
    assert held.lost is None
    run.join(run_folder.LEASE, "00000002.json").write(replace(Holder.me(), pid=7, host="elsewhere").dump())
    until(lambda: held.lost, "loss")
    assert "process 7 on elsewhere has taken over the lease" in str(held.lost)
    held.release()
    assert not json.loads(file.read())["released"]


def test_who_was_taken_for_dead_prunes_nothing(tmp_path):
    from heliostat.checkpoint import layout
    from heliostat.checkpoint.retention import Pruner
    from heliostat.config.spec import Checkpoint  # not imported above, because every racer imports this module

    run = Location(str(tmp_path))
    for step in (10, 20, 30):
        layout.folder(run, step).join(layout.INDEX).write(b"{}")
    fence = lease.take(run).fence
    run.join(run_folder.LEASE, "00000002.json").write(replace(Holder.me(), pid=7).dump())
    with pytest.raises(LeaseError, match=r"has taken over the lease\. This driver stops, and writes nothing more"):
        Pruner(run, Checkpoint(every=10, keep=1), fence).prune(30)
    assert layout.steps(run) == [10, 20, 30]
    Pruner(run, Checkpoint(every=10, keep=1), Fence(run, 2)).prune(30)
    assert layout.steps(run) == [30]


def test_a_run_that_is_started_anew_keeps_its_leases(tmp_path):
    """Otherwise a driver that was declared dead would find its own number again."""
    run = Location(str(tmp_path))
    with lease.take(run) as held:
        run.join("checkpoints", "step-00000010", "checkpoint.json").write(b"{}")
        run.join("run.json").write(b"{}")
        lease.clear(run)
        assert [name for name, _ in run.files()] == ["lease/00000001.json"]
        held.fence.check()


def test_a_put_where_something_is_changes_nothing(place):
    assert place.create(b"first") and not place.create(b"second") and place.read() == b"first"


def test_a_put_where_links_are_unknown_is_exclusive_too(tmp_path, monkeypatch):
    def link(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", link)
    place = Location(str(tmp_path / "x"))
    assert place.create(b"first") and not place.create(b"second") and place.read() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_bucket_that_is_not_there_is_one_clear_error(place):
    if not place.is_s3:
        pytest.skip("disks have no buckets")
    with pytest.raises(StorageError, match=r"no bucket 'other.*'\. Create it, or check the name"):
        Location(str(place).replace("s3://bucket", "s3://other")).create(b"x")


def test_who_was_taken_for_dead_makes_no_checkpoint_valid(tmp_path):
    """Its shards may exist, but without `checkpoint.json` there is no checkpoint. It doesn't remove an existing one either."""
    from heliostat.checkpoint import layout, writing

    from tests.unit.build_index import facts

    run = Location(str(tmp_path))
    with lease.take(run) as held:
        writing.finish(layout.folder(run, 10), 10, facts(), None, held.fence)
        assert layout.open_checkpoint(run, 10).step == 10
        run.join(run_folder.LEASE, "00000002.json").write(replace(Holder.me(), pid=7).dump())
        late, before = layout.folder(run, 20), layout.folder(run, 10)
        for act in (lambda: writing.finish(late, 20, {}, None, held.fence), lambda: writing.clear(before, held.fence)):
            with pytest.raises(LeaseError, match="has taken over the lease"):
                act()
    assert layout.open_checkpoint(run, 10).step == 10 and not layout.folder(run, 20).join(layout.INDEX).exists()


def test_a_command_takes_the_lease_before_it_looks_at_what_there_is(tmp_path):
    """The second of two commands is rejected before it reads a checkpoint or a dataset. A command that fails releases the
    lease."""
    from heliostat.errors import HeliostatError
    from heliostat.training.run import train

    from tests.unit.build_job import write

    path = write(tmp_path, storage=str(tmp_path / "runs"), **{"mlflow.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    run = Location(str(tmp_path / "runs" / "small"))
    with lease.take(run), pytest.raises(ConfigError, match=f"is being trained by process {os.getpid()}"):
        train(path)
    with pytest.raises(HeliostatError, match="data/a"):  # there is no such dataset
        train(path)
    assert json.loads(run.join(run_folder.LEASE, "00000002.json").read())["released"]
