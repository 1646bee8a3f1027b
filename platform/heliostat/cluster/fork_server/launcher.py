"""Asks a fork server to run a command in a fork. If the fork server doesn't do this, runs the command with Python: `launcher.py
SOCKET PYTHON ARGUMENTS`.

This module imports very little, because Ray runs it for every worker.
"""

import json
import os
import socket
import sys


def main() -> None:
    address, python, *arguments = sys.argv[1:]
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109 (pathlib takes 10 ms)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
            if connection.recv(32):
                return
    except OSError:
        pass
    os.execv(python, [python, *arguments])


if __name__ == "__main__":
    main()
