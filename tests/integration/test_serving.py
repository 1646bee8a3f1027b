"""Tests the endpoint on real Ray Serve with OpenAI's own client: answers, rejections, a killed replica, and a moved alias."""

import collections
import math
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
import requests

from tests.integration.endpoint import KEY, NAME, OTHER, Endpoint, serving
from tests.unit import command_line

ASKED = {"model": NAME, "prompt": "a b", "max_tokens": 12, "seed": 3, "temperature": 0.9}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    limits = ("--max-tokens", "450", "--max-body", "20000", "--concurrent", "12")
    with serving(tmp_path_factory.mktemp("serving"), "--replicas", "2", *limits) as made:
        yield made


def client(endpoint: Endpoint, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key=key, max_retries=0, timeout=120)


def test_completions_alone_in_a_list_and_as_a_stream_are_the_same(endpoint):
    ask = client(endpoint)
    assert [model.id for model in ask.models.list()] == [NAME] and ask.models.retrieve(NAME).id == NAME
    alone = ask.completions.create(**ASKED, logprobs=2)
    assert alone.system_fingerprint == f"{NAME}-1" and alone.usage.completion_tokens <= 12
    choice = alone.choices[0]
    assert choice.text and len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) > 0
    listed = ask.completions.create(**{**ASKED, "prompt": ["a b", "c d e f", "a b"]})
    assert [c.index for c in listed.choices] == [0, 1, 2]
    assert listed.choices[0].text == choice.text != listed.choices[2].text  # the third has another seed
    assert ask.completions.create(**{**ASKED, "seed": 5}).choices[0].text == listed.choices[2].text
    chunks = list(ask.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == choice.text and len(chunks) > 3
    assert chunks[-1].usage == alone.usage and chunks[-2].choices[0].finish_reason == choice.finish_reason
    stopped = ask.completions.create(**ASKED, stop=[choice.text[3:5]])
    assert stopped.choices[0].text == choice.text[: choice.text.index(choice.text[3:5])]


def test_chat_and_embeddings(endpoint):
    ask = client(endpoint)
    message = {"role": "user", "content": "a"}
    chat = ask.chat.completions.create(model=NAME, messages=[message], max_tokens=9, seed=1)
    pieces = ask.chat.completions.create(model=NAME, messages=[message], max_tokens=9, seed=1, stream=True)
    assert chat.choices[0].message.content == "".join(piece.choices[0].delta.content for piece in pieces) != ""
    assert chat.usage.prompt_tokens > ask.completions.create(model=NAME, prompt="a", max_tokens=1).usage.prompt_tokens
    found = ask.embeddings.create(model=NAME, input=["a b", "c"])  # the client asks for base64
    plain = ask.embeddings.create(model=NAME, input="c", encoding_format="float")
    assert found.data[1].embedding == pytest.approx(plain.data[0].embedding, abs=1e-5)
    assert math.isclose(sum(x * x for x in found.data[0].embedding), 1, abs_tol=1e-4)


def test_what_is_wrong_has_its_status_and_names_the_parameter(endpoint):
    ask = client(endpoint)
    with pytest.raises(openai.AuthenticationError) as denied:
        client(endpoint, "sk-a-key-of-nobody-here").completions.create(**ASKED)
    assert denied.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as absent:
        ask.completions.create(**{**ASKED, "model": "gpt"})
    assert absent.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client(endpoint).with_options(base_url=f"{endpoint.url}/v2").completions.create(**ASKED)
    long = {"prompt": "w " * 500}
    for more, param in (({"n": 2}, "n"), ({"echo": True}, "echo"), ({"max_tokens": 451}, "max_tokens"), (long, "prompt")):
        with pytest.raises(openai.BadRequestError) as refused:
            ask.completions.create(**{**ASKED, **more})
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError, match="the text has more than 512 tokens, the model's maximum"):
        ask.embeddings.create(model=NAME, input="w " * 900)
    with pytest.raises(openai.APIStatusError) as large:
        ask.completions.create(**{**ASKED, "prompt": "w" * 20_001})
    assert large.value.status_code == 413


def test_what_a_key_asks_beyond_its_limit_is_refused_and_the_rest_is_answered(endpoint):
    """Thirty concurrent requests with a limit of twelve, half of them streams. Afterwards the places are free again."""
    headers = {"Authorization": f"Bearer {OTHER}"}

    def one(number: int) -> requests.Response:
        asked = {**ASKED, "max_tokens": 200, "stream": bool(number % 2)}
        return requests.post(f"{endpoint.url}/v1/completions", json=asked, headers=headers, timeout=120)

    with ThreadPoolExecutor(30) as pool:
        found = list(pool.map(one, range(30)))
    refused = [answer for answer in found if answer.status_code == 429]
    assert {answer.status_code for answer in found} == {200, 429} and 30 - len(refused) >= 12
    assert all(
        int(answer.headers["Retry-After"]) >= 1 and answer.json()["error"]["code"] == "rate_limit_exceeded" for answer in refused
    )
    with ThreadPoolExecutor(12) as pool:
        assert {answer.status_code for answer in pool.map(one, range(12))} == {200}


def test_health_measures_and_what_listens(endpoint):
    assert requests.get(f"{endpoint.url}/health").json() == {"status": "ok"}
    assert requests.get(f"{endpoint.url}/metrics").status_code == 401
    for path in ("/-/routes", "/-/healthz", "/-"):  # the proxy's own
        for headers in ({}, {"Authorization": f"Bearer {KEY}"}):
            answer = requests.get(f"{endpoint.url}{path}", headers=headers)
            assert (answer.status_code, answer.text) == (404, "")
    told = requests.get(f"{endpoint.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert 'heliostat_tokens_total{key="alice",kind="completion"}' in told and KEY not in told
    listening, shown = [], []
    for process in endpoint.processes():
        shown += process.cmdline()
        listening += [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(listening) > 5 and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert KEY not in " ".join(shown) and KEY not in endpoint.log.read_text()


def test_the_proxy_closes_a_connection_whose_request_does_not_come(endpoint):
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) as half_open:
        half_open.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert half_open.recv(1) == b""


def test_a_stream_whose_replicas_die_ends_in_an_error_and_the_next_request_is_answered(endpoint):
    """A stream ends in the error, unless it was complete before its replica died; then the test requests another answer."""
    ask = client(endpoint)
    for seed in range(11, 16):  # how long an answer is, or how soon it is there, is the machine's affair
        victims = endpoint.until(lambda: len(found := endpoint.replicas(1)) == 2 and found)
        chunks: list = []
        try:
            for chunk in ask.completions.create(**{**ASKED, "max_tokens": 450, "seed": seed}, stream=True):
                chunks.append(chunk)
                if len(chunks) == 1:
                    for process in victims:
                        process.kill()
        except openai.APIError as e:
            assert "the replica that generated this answer died" in str(e)
            break
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        psutil.wait_procs(victims, timeout=120)
    else:
        pytest.fail("five streams were whole before their replicas were killed")
    assert ask.completions.create(**ASKED).choices[0].text  # waits for a new replica


@pytest.mark.ci
def test_no_request_is_lost_while_a_replica_is_killed_and_the_alias_moves(endpoint):
    """Eight clients send requests without a pause. Each answer is complete, from version 1 and then from version 2, and version 1
    ends."""
    endpoint.until(lambda: len(endpoint.replicas(1)) == 2)
    over, answered, lost = threading.Event(), collections.Counter(), []

    def work(number: int) -> None:
        ask, texts = client(endpoint), {}
        while not over.is_set():
            try:
                made = ask.completions.create(**{**ASKED, "seed": number})
            except openai.APIError as e:
                lost.append(repr(e))
                continue
            answered[made.system_fingerprint] += 1
            text = made.choices[0].text
            if texts.setdefault(made.system_fingerprint, text) != text:
                lost.append(f"another text of {made.system_fingerprint}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        endpoint.until(lambda: answered[f"{NAME}-1"] > 20)
        endpoint.replicas(1)[0].kill()
        endpoint.move(2)
        endpoint.until(lambda: answered[f"{NAME}-2"] > 20)
        endpoint.until(lambda: not endpoint.replicas(1))
    finally:
        over.set()
        for thread in threads:
            thread.join(120)
    assert not lost and set(answered) == {f"{NAME}-1", f"{NAME}-2"}


def test_the_command_ends_with_all_its_processes(endpoint):
    """This is the last test, because it stops the endpoint."""
    assert endpoint.stop() == 130


def test_the_command_says_in_a_line_what_is_wrong(tmp_path, endpoint, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def said(*more: str) -> str:
        code, _, error = command_line.run(monkeypatch, capsys, "model", "serve", *more)
        assert code == 2 and len(error.strip().splitlines()) == 1, error
        return error

    model = str(endpoint.folder / "model")
    assert "--replicas: expected a number or a range, got '3..1'. Write 2 or 1..4" in said(model, "--replicas", "3..1")
    assert "no such folder, and not a run id" in said("nothing")
    assert not (tmp_path / ".heliostat").exists()  # no keys are made for what is not served
    (tmp_path / "keys").write_text("short")
    (tmp_path / "keys").chmod(0o600)
    assert "shorter than 16" in said(model, "--keys", "keys")
    assert "no such version" in said(f"models:/{NAME}@none", "--mlflow", endpoint.store)
