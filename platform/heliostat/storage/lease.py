"""Leases the folder of a run, sweep, index, or batch inference to one driver at a time. Only this driver may write there.

    with take(run) as held:
        ...
        held.fence.check()  # before writing a file that others build on, and before removing anything

`lease/00000007.json` is the seventh lease of the folder. The lease with the highest number is valid. A driver takes a lease by
creating its file, which fails if the number is taken. So if several drivers start together, only one gets the lease. The holder
rewrites the file every RENEW_S, and marks the lease as released at the end. A driver may take the next number if the lease is
released, or its holder is dead. A holder is dead if its process is gone. A holder on another machine is dead if it didn't
rewrite the file for SILENCE_S seconds. Clocks of two machines are never compared.

The number is the fencing token. If another driver wrongly considered a live holder dead, this holder finds a higher number, and
stops without writing. It checks for a higher number before it writes each `checkpoint.json`, and before it prunes anything.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import psutil

from heliostat.errors import ConfigError, HeliostatError, LeaseError
from heliostat.storage.locations import Location
from heliostat.storage.run_folder import LEASE

log = logging.getLogger(__name__)

RENEW_S = 5.0
SILENCE_S = 3 * RENEW_S  # silence after which a holder on another machine is taken for dead
LOOK_S = 1.0
TRIES = 10  # attempts to take a number while other drivers are faster
END_S = 10.0  # seconds to wait for a renewal in progress


@dataclass(frozen=True)
class Holder:
    """Describes the holder of a lease. The process id `pid` is meaningful only on the machine `machine` (`_machine`)."""

    id: str
    host: str
    machine: str
    pid: int
    started: float  # start of the process, by its own machine's clock
    beat: int = 0
    released: bool = False

    @staticmethod
    def me() -> Holder:
        process = psutil.Process()
        return Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), process.pid, process.create_time())

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def alive(self) -> bool:
        """Returns whether the holder's process still runs. Detects a process id that another process now uses. Call this
        function only for a holder on this machine."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True)
class Fence:
    """Holds the fencing token. The lease's holder passes the token to all processes that write for this holder."""

    folder: Location
    number: int

    def check(self) -> None:
        """Checks that this lease is still the newest lease of the folder.

        Raises LeaseError if another driver has taken a newer lease.
        """
        newest = newest_number(self.folder)
        if newest != self.number:
            by = _read(self.folder, newest) if newest else None
            who = f"process {by.pid} on {by.host} has taken over the lease" if by else "the lease of this driver is missing"
            raise LeaseError(f"{self.folder}: {who}. This driver stops, and writes nothing more")


class Lease:
    """Holds a lease from `take` to `release`. A thread renews the lease every RENEW_S seconds."""

    def __init__(self, folder: Location, number: int, holder: Holder) -> None:
        self.fence = Fence(folder, number)
        self.lost: LeaseError | None = None  # set once the lease is known to be lost
        self._holder, self._place = holder, _place(folder, number)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        self._ended.set()
        self._thread.join(END_S)
        try:
            if not self.lost:
                self.fence.check()
                self._place.write(replace(self._holder, released=True).dump())
        except (HeliostatError, OSError) as e:  # the next command then waits until this process is gone
            log.warning("can't release the lease of %s, so the next driver may have to wait: %s", self.fence.folder, e)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.fence.check()
                self._holder = replace(self._holder, beat=self._holder.beat + 1)
                self._place.write(self._holder.dump())
            except LeaseError as e:
                self.lost = e
                return
            except (HeliostatError, OSError) as e:
                log.warning("can't renew the lease of %s. heliostat tries again soon: %s", self.fence.folder, e)


def take(
    folder: Location,
    doing: str = "trained",
    instead: str = "Wait for that process, stop it, or use another name",
    field: str = "name",
) -> Lease:
    """Takes the folder's lease. Raises ConfigError if another driver has this lease.

    For a driver on another machine, waits up to SILENCE_S seconds to find out whether the driver is alive. The other arguments
    are for the error. `doing`: the driver's action on the folder; `instead`: advice for the user; `field`: the field that chose
    the folder.
    """
    for _ in range(TRIES):
        number = newest_number(folder)
        if number and (other := holder(folder, number)):
            raise ConfigError(f"{field}: {folder} is being {doing} by process {other.pid} on {other.host}. {instead}")
        mine = Holder.me()
        place = _place(folder, number + 1)
        if not place.create(mine.dump()):
            newer = _read(folder, number + 1)
            if newer is None or newer.id != mine.id:  # otherwise this lease is ours, and the answer was lost
                continue
        if newest_number(folder) == number + 1:
            return Lease(folder, number + 1, mine)
    raise ConfigError(
        f"{field}: {folder} is being {doing} by other commands. heliostat tried {TRIES} times to take the lease. {instead}"
    )


def holder(folder: Location, number: int) -> Holder | None:
    """Returns the holder of a lease; None if the lease was released, or its holder is dead."""
    own = _read(folder, number)
    if own is None or own.released:
        return None
    if own.machine == _machine():
        return own if own.alive else None
    log.info(
        "waiting up to %.0f s to see whether process %d on %s, which has the lease of %s, is alive",
        SILENCE_S,
        own.pid,
        own.host,
        folder,
    )
    deadline, before = time.monotonic() + SILENCE_S, own
    while time.monotonic() < deadline:
        time.sleep(LOOK_S)
        own = _read(folder, number)
        if own != before:
            return own if own and not own.released else None
    return None


def clear(folder: Location) -> None:
    """Deletes everything in the folder except the leases. The leases stay, so that lease numbers continue to increase."""
    for name in folder.folders():
        if name != LEASE:
            folder.join(name).delete()
    for name, _ in folder.files():
        if not name.startswith(f"{LEASE}/"):
            folder.join(name).delete()


def newest_number(folder: Location) -> int:
    """Returns the number of the folder's newest lease; 0 if the folder never had a lease."""
    names = (name.removesuffix(".json") for name, _ in folder.join(LEASE).files())
    return max((int(name) for name in names if name.isdigit()), default=0)


def _place(folder: Location, number: int) -> Location:
    return folder.join(LEASE, f"{number:08d}.json")


def _read(folder: Location, number: int) -> Holder | None:
    """Reads the holder of a lease; None if the file is missing or damaged, because then the holder's process isn't known."""
    for wait in (0.1, 1.0, 0.0):  # without hard links, a new file is empty for a moment
        try:
            return Holder(**json.loads(_place(folder, number).read()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            time.sleep(wait)
    log.warning("%s: the file is damaged, so heliostat treats this lease as free", _place(folder, number))
    return None


def _machine() -> str:
    """Identifies this boot of this host, this process namespace, and this user.

    Process ids are meaningful only within this combination.

    The user counts because some users can't see the processes of others.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').readlink()}/{os.getuid()}"
    except OSError:  # not Linux
        return f"{socket.gethostname()}/{uuid.getnode():x}/{os.getuid()}"
