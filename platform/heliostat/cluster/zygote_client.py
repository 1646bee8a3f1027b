"""Asks a zygote to run a command in a fork of it, or becomes Python itself: `zygote_client.py SOCKET PYTHON ARGUMENTS`.

Imports next to nothing, because Ray runs it for every worker. `zygote` has the other end.
"""

import json
import os
import socket
import sys


def send(connection: socket.socket, arguments: list[str], streams: list[int]) -> None:
    """Sends the request for a process with this one's environment and folder, and these standard streams."""
    request = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109 (pathlib takes 10 ms)
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], streams)


def main() -> None:
    place, python, *arguments = sys.argv[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(place)
            send(connection, arguments, [0, 1, 2])
            if connection.recv(32):
                return
    except OSError:
        pass
    os.execv(python, [python, *arguments])


if __name__ == "__main__":
    main()
