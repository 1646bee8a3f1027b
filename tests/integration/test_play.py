"""Tests `heliostat model play` as a command, and the endpoint on real Ray Serve with a model that draws and an index."""

import openai
import psutil
import pytest
import requests
from heliostat.cluster.processes import free_port

from tests.integration.endpoint import family, started, stopped
from tests.unit import command_line
from tests.unit.build_job import BASE
from tests.unit.build_language_model import write_model
from tests.unit.test_play import documents, painter  # noqa: F401 (fixtures)


def test_the_command_opens_a_page_on_loopback_with_a_key_of_its_owner_alone(tmp_path, monkeypatch, capsys):
    model, port = write_model(tmp_path, BASE["model"], 64), free_port()
    process, log = started(tmp_path, "the page is at", "model", "play", str(model), "--port", str(port))
    try:
        keys = tmp_path / ".heliostat/play/keys"
        key = keys.read_text().strip()
        assert keys.stat().st_mode & 0o777 == 0o600 and key not in log.read_text()  # its output is a file
        assert f"http://127.0.0.1:{port}/; enter one of the keys in .heliostat/play/keys" in log.read_text()
        processes = family(process)
        listening = {c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"} and len(processes) == 1
        assert "<title>heliostat model play</title>" in requests.get(f"http://127.0.0.1:{port}/", timeout=60).text
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60)
        stream = client.completions.create(model="model", prompt="a", max_tokens=5, stream=True, temperature=0)
        assert "".join(piece.choices[0].text for piece in stream)
    finally:
        code = stopped(process)
    assert code == 130
    capsys.readouterr()
    code, _, error = command_line.run(monkeypatch, capsys, "model", "play", "--port", str(port))
    assert (code, error.strip()) == (2, "error: MODEL: required. Pass a model, an index with --index, or both")


@pytest.mark.slow
def test_the_endpoint_on_ray_draws_and_searches(painter, documents, tmp_path):  # noqa: F811
    port = free_port()
    command = ["model", "serve", str(painter), "--index", str(documents), "--port", str(port), "--no-keys", "--name", "digits"]
    process, log = started(tmp_path, "is served at", *command)
    try:
        assert "digits and code-index is served at" in log.read_text()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        assert [one.id for one in client.models.list()] == ["digits", "code-index"]
        asked = {"model": "digits", "prompt": "the digit two", "extra_body": {"seed": 3, "steps": 2}}
        one, both = client.images.generate(**asked), client.images.generate(**asked, n=2)
        assert [drawn.seed for drawn in both.data] == [3, 4] and one.data[0].b64_json[:30] == both.data[0].b64_json[:30]
        with pytest.raises(openai.BadRequestError, match="at most 4 times as many"):
            client.images.generate(**asked, size="800x8")
        found = requests.post(f"http://127.0.0.1:{port}/v1/search", json={"query": "long document"}, timeout=60).json()
        assert found["data"] and all("document" in passage["text"] for passage in found["data"][:1])
        told = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
        assert 'heliostat_images_total{key="anybody"} 3.0' in told
    finally:
        code = stopped(process)
    assert code == 130
