"""Defines functions with the worst behavior that an isolated process must survive."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

REACHES = {  # what a parser that was taken over would try
    "environment": lambda about: sorted(os.environ),
    "file": lambda about: Path(about["path"]).read_text(),
    "write": lambda about: Path(about["path"]).write_text("changed"),
    "parent": lambda about: Path(f"/proc/{os.getppid()}/environ").read_text(),
    "socket": lambda about: socket.create_connection(("127.0.0.1", about["port"]), 5).recv(1).decode(),
    "unix socket": lambda about: socket.socket(socket.AF_UNIX).fileno(),
    "exec": lambda about: os.execv("/bin/true", ["true"]),
    "run": lambda about: subprocess.run(["/bin/true"], check=True).returncode,
    "fork": lambda about: os.fork() or os._exit(0),
    "signal": lambda about: os.kill(os.getppid(), signal.SIGUSR1),
    "import": lambda about: __import__("colorsys").__name__,  # from Python's library, which stays
}


def worst(keys):
    def work(about, data):
        what = about["do"]
        if what == "crash":
            os.abort()
        if what == "exit":
            os._exit(3)
        if what == "hang":
            while True:
                pass
        if what == "compute":
            end = time.process_time() + 0.2
            while time.process_time() < end:
                pass
        if what == "compute briefly":
            sum(range(50_000))  # reads no clock, because that updates the process's time
        if what == "sleep":
            time.sleep(60)
        if what == "memory":
            bytearray(4 << 30)
        if what == "answer twice":
            os.write(0, (b"\0\0\0\2" + bytes(8) + b"{}") * 2)
        if what == "raise":
            raise ValueError("no")
        if what in REACHES:
            return {"seen": REACHES[what](about)}, b""
        return {"seen": len(data)}, keys["mark"].encode()

    return work
