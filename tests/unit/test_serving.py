"""Tests the endpoint's pure parts: what a stream holds back, the form of answers, and what a route needs."""

import asyncio
import base64
import json
import pickle
import struct

import pytest
from heliostat.apps.play.app import Local
from heliostat.apps.serve import front, requests, writing
from heliostat.apps.serve.asks import TEXT, Holds
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.route import Route
from heliostat.apps.serve.routes import ROUTES
from heliostat.apps.serve.routes.chat import ChatRoute, of_chat
from heliostat.apps.serve.routes.completions import CompletionsRoute
from heliostat.apps.serve.routes.embeddings import Embeddings, EmbeddingsRoute
from heliostat.apps.serve.row import Stopping
from heliostat.apps.serve.run import ServeEndpoint
from heliostat.apps.serve.served import NoModel, Options, ServedModels
from heliostat.web.refusals import Refusal
from starlette.requests import Request


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_no_part_of_a_stop_string_is_sent_however_the_text_comes(size):
    text, stops = "abc\nab\n\nENDx\n\nENT\n\nEND tail", ["\n\nEND ", "never"]
    follow, sent = Stopping(stops), ""
    for end in range(size, len(text) + size, size):
        sent += follow.feed(text[len(sent) : end], last=end >= len(text))
        assert "\n\nEND ".startswith(sent[-1:]) or text.startswith(sent)
        if follow.stopped:
            break
    assert follow.stopped and sent == "abc\nab\n\nENDx\n\nENT"


def test_the_first_of_several_stop_strings_ends_the_text_and_half_a_character_waits():
    follow = Stopping(["bc", "c"])
    assert (follow.feed("ab"), follow.feed("bc"), follow.stopped) == ("a", "", True)
    follow = Stopping()
    assert [follow.feed("a\ufffd"), follow.feed("\ufffd\ufffd"), follow.feed("é"), follow.feed("\ufffd", last=True)] == [
        "a", "", "é", "\ufffd",
    ]  # fmt: skip


def test_an_event_is_one_line_whatever_the_text_holds():
    framed = writing.event({"text": "a\n\ndata: b\u2028\r"})
    assert framed.startswith(b"data: {") and framed.endswith(b"}\n\n") and framed.count(b"\n") == 2
    assert json.loads(framed[6:]) == {"text": "a\n\ndata: b\u2028\r"}


def test_embeddings_are_written_as_numbers_and_as_base64():
    item, settings = (
        {"answers": [{"embedding": [0.5, -1.0], "tokens": 3}]},
        FrontSettings("m", None, None, 0, None, 1, 1, 0, 0, 1.0),
    )
    plain, coded = (
        EmbeddingsRoute().shape(settings, Embeddings(model="m", input=["a"], encoding_format=form), "v", item)
        for form in ("float", "base64")
    )
    assert plain["data"][0]["embedding"] == [0.5, -1.0]
    assert struct.unpack("<2f", base64.b64decode(coded["data"][0]["embedding"])) == (0.5, -1.0)
    assert coded["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_logprobs_of_a_chat_are_by_token_and_only_whole_characters_have_bytes():
    columns = {"tokens": ["é", "\ufffd"], "token_logprobs": [-0.5, -1.0], "text_offset": [0, 1],
               "top_logprobs": [{"b": -2.0, "é": -0.5}, {"\ufffd": -1.0}]}  # fmt: skip
    piece = {"text": "é", "logprobs": columns, "finish": "stop"}
    made = ChatRoute().text(piece, streamed=False)["logprobs"]
    first, second = made["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("é", -0.5, [195, 169])
    assert [(one["token"], one["bytes"]) for one in first["top_logprobs"]] == [("é", [195, 169]), ("b", [98])]
    assert second["bytes"] is None and made["refusal"] is None
    assert of_chat({**columns, "top_logprobs": None})["content"][0]["top_logprobs"] == []
    assert of_chat(None) is None
    assert CompletionsRoute().text(piece, streamed=False)["logprobs"] == columns


class Echo(requests.Body):
    text: str


class EchoRoute(Route[Echo, str]):
    path, body = "/v1/echo", Echo

    def request(self, settings, body):
        return body.text

    async def answer(self, replica, request):
        if request == "no":
            raise Refusal(400, "text: no", "text")
        return {"echo": f"{replica.writer} {request}"}

    def shape(self, settings, body, version, item):
        return {"version": version, **item, "usage": {"prompt_tokens": 2}}


def test_a_route_and_its_line_in_the_table_are_all_that_a_path_needs(monkeypatch):
    monkeypatch.setitem(ROUTES, "/v1/echo", EchoRoute())
    monkeypatch.setitem(front.PATHS, "/v1/echo", "POST")
    replica = Replica(Holds(None))
    one = front.Front(FrontSettings(None, None, None, 0, None, 99, 1, 0, 0, 9.0), Local(replica), ())

    async def post(body: dict) -> tuple[int, dict]:
        async def receive() -> dict:
            return {"type": "http.request", "body": json.dumps(body).encode()}

        scope = {"type": "http", "method": "POST", "path": "/v1/echo", "headers": [], "query_string": b"", "server": ("here", 1)}
        await one.use("v-1")
        response = await one(Request(scope, receive))
        return response.status_code, json.loads(response.body)

    wanted = {"version": "v-1", "echo": "None hello", "usage": {"prompt_tokens": 2}}
    assert asyncio.run(post({"text": "hello"})) == (200, wanted)
    assert asyncio.run(post({"text": "no"}))[1]["error"]["message"] == "text: no"
    assert asyncio.run(post({"texts": "a"}))[1]["error"]["code"] == "unknown_parameter"
    assert b'tokens_total{key="anybody",kind="prompt"} 2.0' in one.measures.text({}, 0)


@pytest.mark.parametrize("route", ROUTES.values(), ids=lambda route: route.path)
def test_what_a_route_does_in_a_replica_reaches_another_process(route):
    for work in (route.answer, getattr(route, "pieces", route.answer)):
        sent = pickle.loads(pickle.dumps(work))  # noqa: S301 (our own)
        assert sent.__func__ is work.__func__ and type(sent.__self__) is type(route)


def test_rays_notices_of_an_actor_that_ends_on_purpose_are_not_printed(capsys):
    """Other messages are printed."""
    from heliostat.cluster import ray_internals
    from ray._private import worker

    with ray_internals.without_notices("ServeController"):
        for line in ("Task ServeController.listen_for_change failed", "a node died"):
            worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    printed = capsys.readouterr().out
    assert "a node died" in printed and "ServeController" not in printed


def test_a_check_of_the_engine_logs_nothing(tmp_path, caplog):
    """It runs before Ray starts. The engine is logged when its version loads."""
    endpoint = ServeEndpoint(ServedModels(NoModel("docs"), None), TEXT, Options(engine="transformers"))
    caplog.set_level("INFO")
    assert endpoint.engine(tmp_path)[0] == "transformers" and caplog.messages == []
