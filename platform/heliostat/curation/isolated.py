"""Runs a function over one item after another in a process of its own, within a limit of processor time and memory for each.

Parsers written in C cannot be interrupted, and may crash: what they do to their process then happens to one that is replaced,
and the item is named. The limit is of processor time, so that a busy machine drops nothing else than an idle one; `WALL` times
as much may pass on the clock. Requests and answers are framed bytes over a socket; nothing of the function's result is
executed.

    with Isolated("heliostat.curation.html:extractor", {"with": "resiliparse"}, seconds=10, megabytes=2048) as extract:
        about, text = extract({"content_type": None}, page)
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

from heliostat.curation import cpu_time

_HEAD = struct.Struct(">IQ")  # lengths of the JSON and of the bytes
START_SECONDS = 60.0  # that a process may take until it is ready
WALL = 20  # times the limit of processor time, on the clock
MOST_REPLY = 1 << 31
TAKEN = "processor_seconds"  # that an answer took


class IsolatedError(Exception):
    """Reports why there is no answer: `reason` is `timeout`, `crashed`, or what the function raised."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Isolated:
    """Calls `module:function`, made with `keys`, in a process that is started when it is needed and replaced when it fails."""

    def __init__(self, function: str, keys: dict[str, Any], seconds: float, megabytes: int) -> None:
        self._function, self._keys, self._seconds, self._megabytes = function, keys, seconds, megabytes
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def __call__(self, about: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """Returns the function's answer; IsolatedError if there is none in time."""
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
        ]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
        self._socket = ours
        try:
            _receive(ours, time.monotonic() + START_SECONDS)
        except OSError:
            raise RuntimeError(f"{self._function}: its process did not start (exit code {self.close()})") from None

    def close(self) -> int | None:
        """Ends the process, if there is one; returns its exit code."""
        process, self._process = self._process, None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if process is None:
            return None
        try:
            code = process.wait(0.2)  # the code of one that has ended by itself
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait(10)
        return code

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None:
            process.kill()
            process.wait()


def _send(sock: socket.socket, about: dict[str, Any], data: bytes, deadline: float | None) -> None:
    head = json.dumps(about).encode()
    view = memoryview(_HEAD.pack(len(head), len(data)) + head + data)
    while view:
        sock.settimeout(_left(deadline))
        view = view[sock.send(view) :]


def _receive(sock: socket.socket, deadline: float | None) -> tuple[dict[str, Any], bytes]:
    head, size = _HEAD.unpack(_exactly(sock, _HEAD.size, deadline))
    if head + size > MOST_REPLY:
        raise ConnectionError("the answer is too large")
    about = json.loads(_exactly(sock, head, deadline))
    return about, _exactly(sock, size, deadline)


def _exactly(sock: socket.socket, size: int, deadline: float | None) -> bytes:
    out = bytearray()
    while len(out) < size:
        sock.settimeout(_left(deadline))
        piece = sock.recv(min(size - len(out), 1 << 20))
        if not piece:
            raise ConnectionError("the other side has ended")
        out += piece
    return bytes(out)


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _serve(function: str, keys: dict[str, Any], seconds: float, megabytes: int) -> None:
    """Answers requests on standard input, a socket, until the other side has ended."""
    sock = socket.socket(fileno=os.dup(0))
    module, _, name = function.partition(":")
    work = getattr(importlib.import_module(module), name)(keys)
    limit = megabytes << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process, whatever it is in
    _send(sock, {}, b"", None)
    while True:
        try:
            about, data = _receive(sock, None)
        except ConnectionError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        start = time.process_time()
        try:
            answer, out = work(about, data)
        except MemoryError:
            answer, out = {"error": "memory", "detail": f"more than {megabytes:,} MiB"}, b""
        except Exception as e:  # noqa: BLE001 - whatever a parser raises is the item's fault, and told with it
            answer, out = {"error": "failed", "detail": f"{type(e).__name__}: {str(e)[:200]}"}, b""
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sock, {**answer, TAKEN: time.process_time() - start}, out, None)


if __name__ == "__main__":
    _serve(sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
