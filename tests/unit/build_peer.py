"""Runs a peer on a TCP port that answers one connection with given bytes."""

import contextlib
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def peer(answer: bytes) -> Iterator[str]:
    """Yields the peer's URL."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            client, _ = server.accept()
            with client:
                client.recv(65536)
                client.sendall(answer)

        thread = threading.Thread(target=speak)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()
