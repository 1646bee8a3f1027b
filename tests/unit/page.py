"""Runs an endpoint like `heliostat model play` in a thread of this process: the HTTP server, a replica, and the page."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import uvicorn
from heliostat.apps.play.app import Server, application
from heliostat.apps.serve.served import Options, served
from heliostat.cluster.processes import free_port
from heliostat.web import keys

KEY = "sk-a-key-of-the-tests"


@contextlib.contextmanager
def opened(model: Path | None, index: Path | None = None, adapters: Sequence[str] = (), **options) -> Iterator[str]:
    """Yields the endpoint's URL."""
    named = served(None if model is None else str(model), "sqlite:///x", None, None if index is None else str(index), None)
    made = application(
        named.with_adapters(adapters), lambda: {"tests": keys.digest(KEY)}, Options(**{"batch": 4, "max_tokens": 64, **options})
    )
    port, ready = free_port(), threading.Event()
    server = Server(uvicorn.Config(made, port=port, log_config=None, lifespan="off"), ready.set)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        assert ready.wait(120)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def client(url: str, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)
