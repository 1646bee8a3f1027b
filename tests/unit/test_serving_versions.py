"""Tests the endpoint's replicas and versions: requests outlive a replica, and a new version replaces the old one."""

import asyncio

import pytest
from heliostat.apps.serve.backend import TRIES, Backend
from heliostat.apps.serve.run import Versions
from heliostat.apps.serve.served import replica_range
from heliostat.errors import ConfigError, HeliostatError
from heliostat.web.refusals import Refusal


def test_replicas_are_a_number_or_a_range():
    assert (replica_range("2"), replica_range("1..4")) == ((2, 2), (1, 4))
    for text in ("0", "4..1", "x", "1..", "-1"):
        with pytest.raises(ConfigError, match="--replicas"):
            replica_range(text)


class LostError(Exception):
    """Ends a call whose replica died."""


def test_a_request_whose_replica_died_is_asked_again_and_not_without_end():
    async def run() -> None:
        backend, asked = Backend((LostError,), 30.0), []
        backend.use("m-1")

        async def call(version: str) -> dict:
            asked.append(version)
            if len(asked) < 3:
                backend.use("m-2")  # the alias moves meanwhile
                raise LostError
            return {"answers": []}

        assert await backend.ask(call) == ("m-2", {"answers": []})
        assert (asked, backend.retried) == (["m-1", "m-2", "m-2"], 2) and not any(backend.open.values())

        async def never(version: str) -> dict:
            raise LostError

        with pytest.raises(Refusal, match=f"{TRIES} replicas died"):
            await backend.ask(never)

    asyncio.run(run())


def test_a_stream_is_begun_again_only_before_its_first_piece():
    async def run() -> None:
        backend, starts = Backend((LostError,), 30.0), []
        backend.use("m-1")

        async def pieces(version: str):
            starts.append(version)
            if len(starts) == 1:
                raise LostError
            yield {"index": 0, "piece": {"text": "a"}}
            assert backend.open["m-1"] == 1
            raise LostError

        got = []
        with pytest.raises(Refusal, match="replica that generated this answer died") as found:
            async for _, item in backend.stream(pieces):
                got.append(item["piece"]["text"])
        assert (got, len(starts), found.value.status) == (["a"], 2, 503) and not any(backend.open.values())

    asyncio.run(run())


def test_what_is_not_answered_in_time_and_what_waits_for_a_version():
    async def run() -> None:
        backend = Backend((LostError,), 0.05)
        with pytest.raises(Refusal, match=r"no answer within 0\.05 s") as found:
            await backend.ask(lambda version: asyncio.sleep(0))  # no version is there
        assert found.value.status == 504
        backend.use("m")

        async def slow(version: str):
            yield {"index": 0, "piece": {}}
            await asyncio.sleep(9)

        with pytest.raises(Refusal, match="no answer"):
            [item async for item in backend.stream(slow)]
        assert not any(backend.open.values())

    asyncio.run(run())


def test_a_version_loads_beside_takes_over_and_the_old_one_drains():
    told, open_, now = [], {}, [0.0]
    broken = {"m-3"}

    def load(version: str) -> None:
        told.append(f"load {version}")
        if version in broken:
            raise HeliostatError("no weights")

    def use(version: str) -> dict[str, int]:
        told.append(f"use {version}")
        return open_

    versions = Versions(load, use, lambda v: told.append(f"end {v}"), drain_s=60, clock=lambda: now[0])
    versions.tick("m-1")
    open_["m-1"] = 2
    versions.tick("m-2")
    versions.tick("m-2")
    assert told == ["load m-1", "use m-1", "load m-2", "use m-2", "use m-2"]
    open_["m-1"] = 0
    versions.tick("m-2")
    assert told[-1] == "end m-1"
    told.clear()
    versions.tick("m-3")  # does not load: what is served goes on, and it is not tried again before the alias moves
    versions.tick("m-3")
    assert told == ["load m-3", "use m-2", "use m-2"] and versions.current == "m-2"
    open_["m-2"] = 1
    versions.tick("m-4")
    told.clear()
    versions.tick("m-2")  # the alias goes back while the old one is there
    assert told == ["use m-2", "end m-4"]
    versions.tick("m-5")
    now[0] = 61.0
    told.clear()
    versions.tick("m-5")
    assert told == ["use m-5", "end m-2"]


def test_a_first_version_that_does_not_load_ends_the_command():
    def load(version: str) -> None:
        raise HeliostatError("no weights")

    with pytest.raises(HeliostatError, match="no weights"):
        Versions(load, lambda v: {}, lambda v: None, 60).tick("m-1")
