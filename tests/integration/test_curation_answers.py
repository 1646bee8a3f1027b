"""Tests that a curated dataset of real text answers for a document: its provenance, the steps that it trained, and a dataset
without it.

Sources of the standard library with planted duplicates are curated, and a model is trained on them. One document is traced to the
samples with it, and then forgotten. A job for another model uses the rest.
"""

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from heliostat.cli.main import app
from heliostat.curation import reasons
from heliostat.curation.prepare import prepare
from heliostat.curation.text import tokens
from heliostat.data import documents, manifest
from heliostat.errors import ConfigError
from heliostat.runs.samples import samples
from heliostat.storage.locations import Location
from heliostat.tracking.models import find_run
from heliostat.training.run import train
from heliostat.validation.check import check, load_job
from mlflow import MlflowClient

from tests.integration.answers import ask
from tests.integration.conftest import tiny_job
from tests.integration.paced import PLAIN
from tests.integration.pipelines import write_pipeline

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]
STEPS, LENGTH = 24, 64


def texts() -> list[str]:
    """Returns some modules of the standard library, with an exact duplicate and a near-duplicate of each fourth."""
    stdlib, out = Path(sysconfig.get_paths()["stdlib"]), list[str]()
    for number, path in enumerate(sorted(p for name in ("json", "http", "email") for p in (stdlib / name).glob("*.py"))):
        text = path.read_text(encoding="utf-8")
        out += [text] + ([text, text + "\n# and one line more\n"] if number % 4 == 1 else [])
    return out


@pytest.fixture(scope="module")
def story(tracking: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("answers")
    (folder / "in").mkdir()
    rows = [{"text": t, "url": f"https://example.org/{i}", "date": f"{2015 + i % 5}-01-01"} for i, t in enumerate(texts())]
    rows += [rows[0] | {"text": rows[0]["text"].replace("def ", "async def ") + rows[3]["text"]}]  # an url twice
    (folder / "in" / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [{"stage": "length", "min_words": 300}, {"stage": "minhash", "keep": "first"}]
    prepare(write_pipeline(folder, output=str(folder / "data"), tokenizer={"vocab_size": 512}, chunk_tokens=8192,
                           shard_bytes=100_000, columns=["url", "date"], stages=stages), [])  # fmt: skip
    made = manifest.read(Location(str(folder / "data")))
    ends = [row for table in reasons.ends(made) for row in table.to_pylist()]
    return {"folder": folder, "data": str(folder / "data"), "made": made, "ends": ends, "rows": rows, "tracking": tracking}


@pytest.fixture(scope="module")
def run(story: dict[str, Any]) -> str:
    job = tiny_job(story["data"], story["tracking"], story["folder"])
    job["data"] |= {"shuffle_window": 64}
    path = story["folder"] / "job.yaml"
    path.write_text(yaml.safe_dump(job | {"name": "first"} | PLAIN))
    return train(path, [f"train.steps={STEPS}", f"checkpoint.every={STEPS}"])["run_id"]


def ended(story: dict[str, Any], reason: str) -> list[dict[str, Any]]:
    return [row for row in story["ends"] if row["reason"] == reason]


@pytest.fixture(scope="module")
def seen(story: dict[str, Any], run: str) -> tuple[str, set[tuple[int, int, int]]]:
    """Returns the document that was trained on most, and its places, found in every sample of every step: (step, virtual rank,
    place)."""
    owners = dict[tuple[str, int, int], set[str]]()
    for path in set(story["made"].paths):
        file = pq.ParquetFile(Path(story["data"], path))
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            names = np.repeat(table["document"].to_numpy(), [len(t) for t in table["tokens"]])
            whole = names[: len(names) // LENGTH * LENGTH].reshape(-1, LENGTH)
            owners |= {(path, group, row): set(found) for row, found in enumerate(whole)}
    folder, places = find_run(run, story["tracking"]), dict[str, set[tuple[int, int, int]]]()
    for step in range(1, STEPS + 1):
        for s in samples(folder, step):
            for id in owners[s["shard"], s["row_group"], s["row"]]:
                places.setdefault(id, set()).add((step, s["lane"], s["place"]))
    return max(places.items(), key=lambda kv: (len(kv[1]), kv[0]))


def test_a_duplicate_leads_to_who_stayed_and_every_stage_tells_its_figures(story, capsys):
    near, exact = ended(story, "near_duplicate"), ended(story, "duplicate")
    assert len(near) + len(exact) >= 6
    url = json.loads(near[0]["columns"])["url"]
    told = next(d for d in ask(capsys, "data", "trace", story["data"], "--url", url)["documents"] if d["id"] == near[0]["id"])
    number = int(near[0]["id"].partition("#")[2])
    assert told["read"] == {"file": "code.jsonl", "line": number} and told["columns"]["date"]
    assert [s["did"] for s in told["stages"]] == ["kept", "kept", "dropped"] and told["notes"] == []
    words = len(story["rows"][number - 1]["text"].split())
    assert told["stages"][1]["measures"]["words"] == words and told["stages"][1]["thresholds"]["words"] == [300]
    assert told["instead"][0]["cluster"] >= 2 and told["kept"] in {row["id"] for row in ended(story, "kept")}
    text = story["rows"][number - 1]["text"].removesuffix("\n# and one line more\n")
    kept = story["rows"][int(told["kept"].partition("#")[2]) - 1]["text"]
    assert text in (kept, kept.removesuffix("\n# and one line more\n"))
    file = story["folder"] / "text.txt"
    file.write_text(kept)
    assert ask(capsys, "data", "trace", story["data"], "--text", str(file))["documents"][0]["kept"] == told["kept"]


def test_a_document_leads_to_the_samples_that_hold_it(story, run, seen, capsys):
    (id, expected), where = seen, ["--run", run, "--mlflow", story["tracking"]]
    (row,) = ask(capsys, "data", "trace", story["data"], "--id", id, *where)["documents"][0]["runs"]
    assert len(expected) > 1 and row["run_id"] == run
    assert {(s["step"], s["lane"], s["place"]) for s in row["samples"]} == expected
    assert row["steps"] == sorted({step for step, *_ in expected})
    client = MlflowClient(tracking_uri=story["tracking"])
    assert [f.path for f in client.list_artifacts(run, "data")] == [f"data/data-{story['made'].digest[:8]}.html"]


def test_a_forgotten_document_is_in_no_part_of_the_new_dataset(story, run, seen, capsys, tmp_path):
    (id, _), made = seen, story["made"]
    where = ["--mlflow", story["tracking"]]
    told = ask(capsys, "data", "forget", story["data"], "--id", id, "--out", str(tmp_path / "less"), *where)
    again = ask(capsys, "data", "forget", story["data"], "--id", id, "--out", str(tmp_path / "again"), *where)
    assert told["digest"] == again["digest"] != made.digest and [r["run_id"] for r in told["runs"]] == [run]
    less = manifest.read(Location(str(tmp_path / "less")))
    assert less.meta["forgotten"] == [{"digest": made.digest, "ids": [id]}]
    assert contents(less) == {name: t for name, t in contents(made).items() if name != id}
    assert less.meta["documents"] == made.meta["documents"] - 1
    text = story["rows"][int(id.partition("#")[2]) - 1]
    assert made.meta["bytes"] - less.meta["bytes"] == len(text["text"].encode())
    assert not reasons.with_column(less, "url", text["url"]) and reasons.with_column(made, "url", text["url"])
    (end,) = reasons.end_of(less, id)
    assert (end["reason"], end["detail"], end["columns"], end["hash"]) == ("forgotten", made.digest[:12], {}, None)
    others = {row["id"] for row in ended(story, "kept")} - {id}
    for other in others:
        path = documents.current(less, reasons.end_of(less, other)[0]["detail"])
        assert path in less.paths and documents.pieces(less, path, other)
    after = ask(capsys, "data", "trace", str(tmp_path / "less"), "--id", id, *where)["documents"][0]
    assert after["shard"] is None and [r["run_id"] for r in after["runs"]] == [run], "the earlier dataset's runs saw it"
    job = tiny_job(str(tmp_path / "less"), story["tracking"], tmp_path)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job | {"name": "second"} | PLAIN))
    checked = check(load_job(tmp_path / "job.yaml"))
    assert [source.digest for source in checked.manifests] == [less.digest], "it can be trained on"


def test_a_document_that_was_dropped_goes_from_the_record(story, capsys, tmp_path):
    """This includes its text in examples: no file of the new dataset has its text."""

    def shown(folder: Path) -> int:
        return sum(json.dumps(text[:60])[1:-1] + json.dumps(text[60:1000])[1:-1] in p.read_text()
                   for p in folder.glob("files/funnel-*.json"))  # fmt: skip

    found = reasons.funnel(story["made"])["0 length"]["examples"]["dropped short"]
    texts = [text[:60] for _, _, text, *_ in found]
    _, id, text, *_ = next(e for e in found if texts.count(e[2][:60]) == 1)  # a duplicate's text stays with the duplicate
    told = ask(
        capsys, "data", "forget", story["data"], "--id", id, "--out", str(tmp_path / "less"), "--mlflow", story["tracking"]
    )
    assert told["shard"] is None and told["runs"] == [] and told["forgotten"] == [id]
    assert shown(Path(story["data"])) == 1 and shown(tmp_path / "less") == 0
    less = manifest.read(Location(str(tmp_path / "less")))
    assert less.digest != story["made"].digest and contents(less) == contents(story["made"])
    assert reasons.end_of(less, id)[0]["measures"] == {}
    one, two = (
        ask(capsys, "data", "trace", str(d), "--id", id, "--mlflow", story["tracking"])
        for d in (story["data"], tmp_path / "less")
    )
    assert one["documents"][0]["stages"][-1]["reason"] == "short" and two["documents"][0]["end"]["reason"] == "forgotten"


def contents(made: manifest.Manifest) -> dict[str, list[int]]:
    """Returns the tokens of every document."""
    found = dict[str, list[int]]()
    for path, group in zip(*(made.chunks[name].to_pylist() for name in ("path", "row_group")), strict=True):
        table = pq.ParquetFile(Path(made.location.path, path)).read_row_group(group, columns=tokens.SCHEMA.names)
        for name, part in zip(table["document"].to_pylist(), table["tokens"].to_pylist(), strict=True):
            found.setdefault(name, []).extend(part)
    return found


def test_what_cannot_be_forgotten_is_refused(story, tmp_path):
    twice = story["rows"][0]["url"]
    with pytest.raises(
        ConfigError, match=r"--url: 2 documents match: code.jsonl#1 \(.*, code.jsonl#\d+ \(.*Choose one with --id"
    ):
        app(["data", "forget", story["data"], "--url", twice, "--out", str(tmp_path / "x")], standalone_mode=False)
    with pytest.raises(ConfigError, match="overlap"):
        app(["data", "forget", story["data"], "--id", "code.jsonl#1", "--out", story["data"] + "/x"], standalone_mode=False)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out: .*: the folder isn't empty \(it contains 'mine.txt'\)"):
        app(["data", "forget", story["data"], "--id", "code.jsonl#1", "--out", str(tmp_path)], standalone_mode=False)
    with pytest.raises(ConfigError, match="no document has this id"):
        app(["data", "trace", story["data"], "--id", "code.jsonl#9999"], standalone_mode=False)
    with pytest.raises(ConfigError, match="Pass exactly one of --url URL, --id ID, --text FILE"):
        app(["data", "trace", story["data"]], standalone_mode=False)
    assert not (tmp_path / "x").exists()
