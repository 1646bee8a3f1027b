"""Tests the requests of the endpoint: how they are read, and which ones are rejected, with the parameter's name."""

import json

import pytest
from heliostat.apps.serve.gateway import FrontSettings
from heliostat.apps.serve.requests import read
from heliostat.apps.serve.routes.chat import ChatRequest, ChatRoute
from heliostat.apps.serve.routes.completions import Completion
from heliostat.apps.serve.routes.embeddings import Embeddings
from heliostat.apps.serve.routes.images import Images
from heliostat.apps.serve.routes.search import SearchRequest
from heliostat.web.refusals import Refusal


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
