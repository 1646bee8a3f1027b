"""The log of a job is followed as it grows, each byte once, until the job is over."""

import asyncio
import contextlib
import socket
import threading

import aiohttp.web
import pytest
from heliostat.cluster.endpoint import Endpoint
from heliostat.errors import ClusterError
from heliostat.submit import jobs, log_stream

LOG = "--attempt one\nold\npython --attempt two\nstep 1 \u2713\nstep 2\nstep 3\n"


@contextlib.contextmanager
def streaming(pieces):
    """Serves a log as Ray's dashboard does, a connection for each list of pieces; all but the last break behind them."""
    asked = []

    async def stream(request):
        number = len(asked)
        asked.append(dict(request.query))
        answer = aiohttp.web.StreamResponse()
        await answer.prepare(request)
        for piece in pieces[number]:
            await answer.write(piece)
            await asyncio.sleep(0.02)
        if number + 1 < len(pieces):
            request.transport.abort()
        else:
            await asyncio.sleep(60)  # the file may always grow

    def serve():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(aiohttp.web.SockSite(runner, listener).start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    app = aiohttp.web.Application()
    app.router.add_get("/api/v0/logs/stream", stream)
    loop, listener = asyncio.new_event_loop(), socket.create_server(("127.0.0.1", 0))
    runner = aiohttp.web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_a_followed_log_is_streamed_and_goes_on_behind_a_broken_connection(monkeypatch):
    """Nothing comes twice or not at all, wherever the bytes are cut, and it ends when the job has."""
    monkeypatch.setattr(log_stream, "QUIET_S", 0.1)
    monkeypatch.setattr(log_stream, "AGAIN_S", 0.01)
    whole, cut = LOG.encode(), LOG.encode().index("\u2713".encode()) + 1
    with streaming([[whole[:30], whole[30:cut]], [whole[: cut + 5], whole[cut + 5 :]]]) as (url, asked):
        cluster = jobs.Jobs.__new__(jobs.Jobs)
        cluster.there = Endpoint(url, None, here=True)
        states = iter([log_stream.State(None, False)] + [log_stream.State("n0", False)] * 2 + [log_stream.State("n0", True)] * 9)
        monkeypatch.setattr(cluster, "_state", lambda _: next(states))
        monkeypatch.setattr(cluster, "get", lambda _: {"status": "SUCCEEDED", "metadata": {"attempt": "two"}, "exit_code": 0})
        assert "".join(cluster.follow("r")) == "step 1 \u2713\nstep 2\nstep 3\n"
    assert [one["filename"] for one in asked] == ["job-driver-r.log"] * 2 and asked[0]["node_id"] == "n0"


def test_a_job_that_ended_before_it_had_a_log_is_not_waited_for(monkeypatch):
    told = log_stream.follow("http://127.0.0.1:1", {}, "r", lambda: log_stream.State(None, True), 60.0)
    assert list(told) == []


def test_a_log_that_cannot_be_read_is_an_error_when_its_time_is_over(monkeypatch):
    monkeypatch.setattr(log_stream, "AGAIN_S", 0.01)
    with pytest.raises(ClusterError, match=r"following the log: .*127\.0\.0\.1"):
        list(log_stream.follow("http://127.0.0.1:1", {}, "r", lambda: log_stream.State("n0", False), 0.1))
