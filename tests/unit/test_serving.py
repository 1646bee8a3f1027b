"""Tests the endpoint's pure parts: which requests are rejected and by which name, what a stream holds back, and whom a limit
stops."""

import asyncio
import base64
import json
import pickle
import struct

import pytest
from heliostat.apps.play.app import Local
from heliostat.apps.serve import front, requests, writing
from heliostat.apps.serve.asks import TEXT, Holds
from heliostat.apps.serve.backend import TRIES, Backend
from heliostat.apps.serve.gateway import FrontSettings, RequestLimits
from heliostat.apps.serve.replica import Replica
from heliostat.apps.serve.requests import read
from heliostat.apps.serve.route import Route
from heliostat.apps.serve.routes import ROUTES
from heliostat.apps.serve.routes.chat import ChatRequest, ChatRoute, of_chat
from heliostat.apps.serve.routes.completions import Completion, CompletionsRoute
from heliostat.apps.serve.routes.embeddings import Embeddings, EmbeddingsRoute
from heliostat.apps.serve.routes.images import Images
from heliostat.apps.serve.routes.search import SearchRequest
from heliostat.apps.serve.row import Stopping
from heliostat.apps.serve.run import ServeEndpoint, Versions
from heliostat.apps.serve.served import NoModel, Options, ServedModels, replica_range
from heliostat.errors import ConfigError, HeliostatError
from heliostat.web import keys
from heliostat.web.refusals import Refusal
from starlette.requests import Request


def refusal(kind, **body) -> Refusal:
    with pytest.raises(Refusal) as found:
        read(kind, json.dumps({"model": "m", **body}).encode())
    return found.value


def test_a_completion_is_read_with_openais_defaults():
    asked = read(Completion, b'{"model": "m", "prompt": "a", "n": 1, "echo": false, "logit_bias": null, "user": "u"}')
    assert (asked.prompt, asked.max_tokens, asked.temperature, asked.top_p, asked.stop) == (["a"], None, 1.0, 1.0, [])
    asked = read(Completion, b'{"model": "m", "prompt": ["a", "b"], "stop": "x", "temperature": 0, "seed": -1}')
    assert (asked.prompt, asked.stop, asked.temperature, asked.seed) == (["a", "b"], ["x"], 0.0, -1)
    for given, wanted in [([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]]), (["a", [5]], ["a", [5]]), ([3] * 200, [[3] * 200])]:
        assert read(Completion, json.dumps({"model": "m", "prompt": given}).encode()).prompt == wanted
    assert (asked.suffix, read(Completion, b'{"model": "m", "prompt": "a", "suffix": "b"}').suffix) == ("", "b")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"n": 2}, "n", "2 isn't supported. Remove this parameter, or set its value to 1"),
        ({"echo": True}, "echo", "true isn't supported"),
        ({"suffix": 3}, "suffix", "isn't text"),
        ({"prompt": "a \ud800"}, "prompt", "surrogates not allowed"),
        ({"suffix": "\ud800"}, "suffix", "surrogates not allowed"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "0.5 isn't supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "isn't supported"),
        ({"max_token": 3}, "max_token", "unknown parameter. Did you mean 'max_tokens'?"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "3"}, "max_tokens", '"3"'),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature", "NaN"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"prompt": [[1, "a"]]}, "prompt", "isn't a text, a list of tokens, or a list of texts or token lists"),
        ({"prompt": [1, -2]}, "prompt", "isn't a text, a list of tokens"),
        ({"prompt": [True]}, "prompt", "isn't a text, a list of tokens"),
        ({"prompt": [[]]}, "prompt", "isn't a text, a list of tokens"),
        ({"prompt": 3}, "prompt", "isn't a text, a list of tokens"),
        ({"prompt": [[1]] * 65}, "prompt", "at most 64"),
        ({"prompt": ["a"] * 65}, "prompt", "at most 64"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ],
)  # fmt: skip
def test_what_is_not_done_is_refused_by_name(body, param, said):
    found = refusal(Completion, **{"prompt": "a", **body})
    assert (found.status, found.param) == (400, param) and said in found.message
    assert found.body()["error"].keys() == {"message", "type", "param", "code"}


def test_a_chat_takes_text_only_and_refuses_tools():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = read(ChatRequest, json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode())
    assert asked.messages[0].plain() == {"role": "user", "content": "ab"}
    message = {"role": "user", "content": "a"}
    assert refusal(ChatRequest, messages=[message], tools=[{"type": "function"}]).param == "tools"
    assert refusal(ChatRequest, messages=[message], response_format={"type": "json_object"}).param == "response_format"
    for told, more in [
        (None, {}),
        (None, {"logprobs": False}),
        (0, {"logprobs": True}),
        (3, {"logprobs": True, "top_logprobs": 3}),
    ]:
        assert read(ChatRequest, json.dumps({"model": "m", "messages": [message], **more}).encode()).top_count == told
    for more, said in [({"top_logprobs": 3}, "needs logprobs: true"), ({"logprobs": 3}, "boolean"),
                       ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20")]:  # fmt: skip
        found = refusal(ChatRequest, messages=[message], **more)
        assert found.param == next(reversed(more)) and said in found.message and "Value error" not in found.message
    assert refusal(ChatRequest, messages=[{"role": "tool", "content": "a"}]).param == "messages"
    assert refusal(ChatRequest).code == "missing_required_parameter"


@pytest.mark.parametrize("text", ["\ud800", "a \udc00b", "x\ud800\ud800"])
def test_half_a_character_is_refused_wherever_a_text_is_read(text):
    """No tokenizer accepts a lone surrogate. A pair of them is a character."""
    kinds = {"prompt": Images, "query": SearchRequest, "input": Embeddings, "stop": Completion}
    for name, kind in kinds.items():
        found = refusal(kind, **({"prompt": "a"} if name == "stop" else {}), **{name: text})
        assert (found.status, found.param) == (400, name) and (
            "surrogates not allowed" in found.message or "unicode" in found.message
        )
    message = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    of_index = FrontSettings(None, None, "m", 0, None, 1, 1, 0, 0, 1.0)
    with pytest.raises(Refusal, match="surrogates not allowed") as found:
        ChatRoute().read(of_index, message)
    assert (found.value.status, found.value.param) == (400, "messages")
    assert read(Images, b'{"model": "m", "prompt": "\\ud83d\\ude00"}').prompt == "\N{GRINNING FACE}"


def test_embeddings_and_bodies_that_are_none():
    assert read(Embeddings, b'{"model": "m", "input": "a"}').input == ["a"]
    assert refusal(Embeddings, input="").param == "input"
    assert refusal(Embeddings, input="a", dimensions=3).code == "unsupported_parameter"
    for raw in (b"{", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(Refusal) as found:
            read(Completion, raw)
        assert (found.value.status, found.value.code) == (400, "invalid_json")


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


def test_limits_count_each_key_by_itself_and_say_when_to_come_again():
    now = [0.0]
    limits = RequestLimits(at_once=2, a_minute=3, clock=lambda: now[0])
    limits.enter("a")
    limits.enter("a")
    with pytest.raises(Refusal, match="this key has 2 open requests") as found:
        limits.enter("a")
    assert (found.value.status, found.value.headers()) == (429, {"Retry-After": "1"})
    limits.enter("b")
    now[0] = 10.5
    limits.leave("a")
    limits.enter("a")
    limits.leave("a")
    with pytest.raises(Refusal, match="within a minute") as found:
        limits.enter("a")
    assert found.value.retry_after == 50
    now[0] = 60.0
    limits.enter("a")


def test_keys_are_read_by_name_and_known_by_their_digest_alone(tmp_path):
    place = tmp_path / "kept" / "keys"
    assert keys.made(place) and not keys.made(place)
    assert place.stat().st_mode & 0o777 == 0o600
    key = place.read_text().strip()
    known = keys.read(place)
    assert key not in repr(known) and keys.owner(f"Bearer {key}", known) == "key-1"
    place.write_text(f"# ours\nalice {'a' * 20}\n\n{'b' * 20}\n")
    known = keys.read(place)
    assert [keys.owner(f"bearer {c * 20}", known) for c in "ab"] == ["alice", "key-4"]
    for header in (None, "", "Basic x", f"Bearer {'a' * 19}", f"Bearer {'a' * 21}", "Bearer é" + "a" * 20):
        with pytest.raises(Refusal) as found:
            keys.owner(header, known)
        assert found.value.status == 401 and "aaa" not in found.value.message


def test_a_key_may_have_a_sign_that_begins_comments(tmp_path):
    """Only the whole key is accepted, not its beginning. After white space, or at the start of a line, the sign begins a
    comment."""
    place, key = tmp_path / "keys", f"{'k' * 16}#{'s' * 8}"
    place.write_text(f"{key}\nbob {'b' * 20}#1\t# ours\n #{'c' * 20}\n{'d' * 20} #no\n")
    place.chmod(0o600)
    known = keys.read(place)
    given = [key, "b" * 20 + "#1", "d" * 20]
    assert [keys.owner(f"Bearer {one}", known) for one in given] == ["key-1", "bob", "key-4"] and len(known) == 3
    assert keys.first(place) == key
    for part in ("k" * 16, "b" * 20):
        with pytest.raises(Refusal):
            keys.owner(f"Bearer {part}", known)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "contains no key"),
        ("short", "shorter than 16"),
        (f"a b {'k' * 20}", "isn't a key"),
        (f"a {'k' * 20}\na {'l' * 20}", "twice"),
    ],
)
def test_a_key_file_that_is_wrong_is_named_without_its_keys(tmp_path, text, said):
    place = tmp_path / "keys"
    place.write_text(text)
    place.chmod(0o600)
    with pytest.raises(ConfigError, match=said) as found:
        keys.read(place)
    assert "kkk" not in str(found.value)
    place.chmod(0o644)
    with pytest.raises(ConfigError, match="other users"):
        keys.read(place)


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
