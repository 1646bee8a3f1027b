"""Runs a function on one item after another in a separate process, with limits of CPU time and memory per item.

Parsers written in C can't be interrupted, and may crash. If a parser hangs or crashes, heliostat replaces the separate process,
and raises an error for the item. The limit is CPU time, so a busy machine drops the same items as an idle machine. The limit of
wall time is `WALL` times the limit of CPU time. Requests and answers are framed bytes on a socket, and heliostat never executes
an answer.

A malicious document may take over a parser. So the parser's process sees only the environment variables in `KEPT`, and only the
files of Python's libraries and fonts. It has no network, and can't start processes (`tasks.sandbox`). If the machine doesn't
allow namespaces, the process can read the user's files, and heliostat logs a warning about this once.

    extract = Isolated("heliostat.curation.html:extractor", {"library": "resiliparse"}, seconds=10, megabytes=2048)
    about, text = extract({"content_type": None}, page)
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import resource
import signal
import site
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import heliostat
from heliostat.tasks import cpu_time, sandbox

log = logging.getLogger(__name__)

_HEAD = struct.Struct(">IQ")  # lengths of the JSON and of the bytes
START_SECONDS = 60.0  # seconds for a process to become ready
WALL = 20  # wall time per CPU second of the limit
MOST_REPLY = 1 << 31
PIECE = 1 << 18  # bytes that are received at once
TAKEN = "processor_seconds"  # CPU seconds of an answer
KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE")
SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # system calls are filtered per thread
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/fonts", "/usr/share/X11/fonts", "/usr/local/share/fonts")
INSTALLED = ("site-packages", "dist-packages")
BOX_BYTES = 1 << 20  # maximum bytes in the folder that the process may write to
_logged = set[str]()  # messages that were logged on this machine


class IsolatedError(Exception):
    """Reports that the isolated function returned no result. `reason`: `timeout`, `crashed`, or a reason that the function
    returned."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Isolated:
    """Calls a function in a separate process, which starts at the first call, and is replaced after a failure. `function`: the
    factory, as `module:function`, which builds this function from `keys`."""

    def __init__(self, function: str, keys: dict[str, object], seconds: float, megabytes: int) -> None:
        self._function, self._keys, self._seconds, self._megabytes = function, keys, seconds, megabytes
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._root = tempfile.TemporaryDirectory(prefix="heliostat-parser-")  # mounts in it are visible only to the process

    def __call__(self, about: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Returns the function's result (facts, bytes). Raises IsolatedError if the process times out or crashes, or if the
        function reports an error."""
        if self._process is None:
            self._start()
        assert self._socket is not None
        try:
            deadline = time.monotonic() + WALL * self._seconds
            _send(self._socket, about, data, deadline)
            answer, out = _receive(self._socket, deadline)
        except TimeoutError:
            self.close()
            raise IsolatedError("timeout", f"more than {WALL * self._seconds:g} s on the clock") from None
        except OSError:
            code = self.close()
            if code == -signal.SIGPROF:
                cpu_time.add(self._seconds)
                raise IsolatedError("timeout", f"more than {self._seconds:g} s of processor time") from None
            raise IsolatedError(
                "crashed", f"its process ended ({code}); {self._megabytes:,} MiB of memory is its limit"
            ) from None
        cpu_time.add(answer.pop(TAKEN))
        if "error" in answer:
            raise IsolatedError(answer["error"], answer.get("detail", ""))
        return answer, out

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-m",
            __name__,
            self._function,
            json.dumps(self._keys),
            str(self._seconds),
            str(self._megabytes),
            self._root.name,
        ]
        environment = {name: os.environ[name] for name in KEPT if name in os.environ} | SINGLE
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
        self._socket = ours
        try:
            started, _ = _receive(ours, time.monotonic() + START_SECONDS)
        except OSError:
            raise RuntimeError(
                f"{self._function}: the parser's process didn't start (exit code {self.close()}). "
                "Import this module to see the error"
            ) from None
        for lack in set(started["lacks"]) - _logged:
            _logged.add(lack)
            log.warning(
                "can't fully isolate document parsers on this machine: %s. Process untrusted documents on another machine", lack
            )

    def close(self) -> int | None:
        """Ends the process, if there is one. Returns the process's exit code; None if there is no process."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is None:
            return None
        try:
            code = process.wait(0.2)  # the exit code of a process that has ended by itself
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(10)
        return code

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()
            process.wait()


def _send(sock: socket.socket, about: dict[str, object], data: bytes, deadline: float | None) -> None:
    head = json.dumps(about).encode()
    if deadline is not None:
        sock.settimeout(_left(deadline))
    sock.sendall(b"".join((_HEAD.pack(len(head), len(data)), head, data)))


def _receive(sock: socket.socket, deadline: float | None) -> tuple[dict[str, Any], bytes]:
    """Receives a message (JSON, bytes). Each process waits for the other one's message before it sends its next message, so
    nothing may follow the message."""
    message, end, middle = bytearray(), _HEAD.size, 0
    while len(message) < end:
        if deadline is not None:
            sock.settimeout(_left(deadline))
        piece = sock.recv(PIECE)
        if not piece:
            raise ConnectionError("the other process has ended")
        message += piece
        if not middle and len(message) >= end:
            head, size = _HEAD.unpack_from(message)
            middle = _HEAD.size + head
            end = middle + size
            if end > MOST_REPLY:
                raise ConnectionError("the other process sent an answer that is too large")
    if len(message) > end:
        raise ConnectionError("the other process sent more than an answer")
    return json.loads(message[_HEAD.size : middle]), bytes(memoryview(message)[middle:])


def _left(deadline: float) -> float:
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def places() -> list[str]:
    """Lists the folders that a loaded parser reads: Python's libraries, system libraries, fonts, and this package."""
    paths = sysconfig.get_paths()
    libraries = [str(Path(prefix) / "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    libraries += [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    libraries += [*site.getsitepackages(), str(Path(heliostat.__file__).parent)]
    libraries += [place for place in sys.path if Path(place).name in INSTALLED]  # of the user, or of a parent environment
    return [place for place in dict.fromkeys((*SYSTEM, *libraries)) if Path(place).is_dir()]


def _shut_in(root: Path) -> list[str]:
    """Isolates this process, with the modules that it has loaded; returns the protections that the machine doesn't support."""
    lacks = []
    if not sys.platform.startswith("linux") or platform.machine() not in sandbox.CALLS:
        return [f"isolation needs Linux on {', '.join(sandbox.CALLS)}"]
    try:
        sandbox.shut_in(root, places(), BOX_BYTES, {}, same_user=True)
    except OSError as e:
        lacks.append(f"namespaces aren't available ({e})")
    try:
        sandbox.forbid(alone=True)
    except OSError as e:
        lacks.append(f"a system call filter isn't available ({e})")
    return lacks


def _serve(function: str, keys: dict[str, object], seconds: float, megabytes: int, root: Path) -> None:
    """Runs the function on each request from standard input, which is a socket. Sends each result back, until the other process
    has ended."""
    sock = socket.socket(fileno=os.dup(0))
    module, _, name = function.partition(":")
    work = getattr(importlib.import_module(module), name)(keys)
    limit = megabytes << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))
    lacks = _shut_in(root)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process during any work
    _send(sock, {"lacks": lacks}, b"", None)
    while True:
        try:
            about, data = _receive(sock, None)
        except ConnectionError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        start = time.thread_time()  # while ITIMER_PROF runs, Linux updates the process's time only at each tick
        try:
            answer, out = work(about, data)
        except MemoryError:
            answer, out = {"error": "memory", "detail": f"more than {megabytes:,} MiB"}, b""
        except Exception as e:  # noqa: BLE001 - any error of a parser is the item's fault, and is reported with it
            answer, out = {"error": "failed", "detail": f"{type(e).__name__}: {str(e)[:200]}"}, b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sock, {**answer, TAKEN: time.thread_time() - start}, out, None)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
