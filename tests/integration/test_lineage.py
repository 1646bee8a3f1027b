"""Tests that lineage, reports, promotion, and reproduction show the real history of a run, down to the sample.

A model is trained on a dataset of several shards. A worker is killed, then the driver. The run resumes on fewer workers, and
registers its model. Another model is fine-tuned from it, and then trained again from its record.
"""

import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from heliostat.chaos.process import workers
from heliostat.checkpoint import layout
from heliostat.cluster.processes import end_tree
from heliostat.curation.prepare import prepare
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset
from heliostat.errors import ConfigError
from heliostat.runs import goodput
from heliostat.runs.segments import read as read_segments
from heliostat.storage.locations import Location
from heliostat.tracking.models import resolve
from heliostat.tracking.registry import GateError
from heliostat.training.run import train
from mlflow import MlflowClient

from tests.integration import commands
from tests.integration.answers import ask
from tests.integration.conftest import curve, tiny_job
from tests.integration.paced import PACED
from tests.integration.strikes import saved

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(1800)]

STEPS, TUNED = 30, 10
WINDOW = 64  # samples: a run of few steps then trains on some shards, and not on others


@dataclass
class Story:
    folder: Path
    tracking: str
    data: str
    run: str
    head: str  # the commit when it began
    killed: dict[str, Any]  # the row of `heliostat run list` after the driver's death
    base: dict[str, Any]
    tuned: dict[str, Any]


def write(folder: Path, tracking: str, data: str, name: str, **changes: Any) -> Path:
    job = tiny_job(data, tracking, folder)
    job["data"] |= {"shuffle_window": WINDOW}
    job["mlflow"] |= {"experiment": "lineage", "register": "lineage-lm"}
    job |= {"name": name, "card": {"license": "Apache-2.0", "limitations": "Knows only Python."}, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture(scope="module")
def shards(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Makes the session's corpus again, in several shards."""
    folder = tmp_path_factory.mktemp("shards")
    pipeline = yaml.safe_load((Path(corpus).parent / "pipeline.yaml").read_text())
    pipeline |= {"name": "shards", "output": str(folder / "data"), "shard_bytes": 150_000}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    prepare(folder / "pipeline.yaml", [])
    return str(folder / "data")


@pytest.fixture(scope="module")
def story(shards: str, corpus: str, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    path = write(folder, tracking, shards, "base", **PACED)
    settings = [f"train.steps={STEPS}", "checkpoint.every=5", "evaluate.every=15", "train.log_every=1", "retries.backoff=0.1"]
    run = Location(str(folder / "runs" / "base"))
    words = [word for s in settings for word in ("--set", s)]
    often = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}
    driver = commands.start("train", str(path), *words, log=folder / "base.log", **often)
    try:
        driver.until(lambda: saved(run) >= 5, "checkpoint")
        workers(driver.pid)[-1].send_signal(signal.SIGKILL)
        driver.until(lambda: len(goodput.read(run)) == 2 and saved(run) >= 15, "checkpoint after the worker's death")
    finally:
        end_tree(driver)
        driver.wait(120)
    from heliostat.tracking import mlflow_client, run_table

    (killed,) = [r for r in run_table.rows(mlflow_client.connect(tracking), "lineage") if r["name"] == "base"]
    base = train(path, [*settings, "workers.count=1", "mlflow.alias=candidate"], resume=True)
    model = {"pretrained": str(resolve("models:/lineage-lm@candidate", tracking))}
    small = write(folder, tracking, corpus, "tuned", model=model, workers={"count": 1})
    tuned = train(small, [f"train.steps={TUNED}", "mlflow.alias=candidate"])
    return Story(folder, tracking, shards, str(run), head, killed, base, tuned)


@pytest.fixture
def node(story: Story, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Returns the base model's run, as `heliostat run lineage` shows it."""
    return ask(capsys, "run", "lineage", "lineage-lm/1", "--mlflow", story.tracking)["run"]


def test_a_run_whose_driver_was_killed_is_settled_by_the_next_command_and_goes_on_as_the_same_run(story, capsys):
    assert story.killed["status"] == "FAILED" and "died without an error" in story.killed["reason"]
    found = ask(capsys, "run", "list", "--experiment", "lineage", "--mlflow", story.tracking)["runs"]
    rows = {r["name"]: r for r in found if r["name"] in ("base", "tuned")}
    assert rows["base"]["run_id"] == story.killed["run_id"] == story.base["run_id"] and len(rows) == 2
    for row, result, steps in ((rows["base"], story.base, STEPS), (rows["tuned"], story.tuned, TUNED)):
        assert (row["status"], row["reason"] or None, row["step"], row["steps"]) == ("FINISHED", None, steps, steps)
        assert row["train_loss"] == result["train_loss"] and row["eval_loss"] == pytest.approx(result["eval"]["loss"])
        attempts = goodput.read(Location(str(story.folder / "runs" / row["name"])))
        told = MlflowClient(tracking_uri=story.tracking).get_metric_history(row["run_id"], "train/time/worker_hours")
        at = max(m.timestamp for m in told) / 1000  # MLflow's own end of the run comes behind its last metric
        spent = sum(a.workers * (min(a.seen, at) - a.started) for a in attempts) / 3600
        assert row["worker_hours"] == pytest.approx(spent, rel=0.02)
    assert len(curve(story.tracking, story.base["run_id"])) == STEPS  # every step once
    with pytest.raises(ConfigError, match=r"--experiment: 'nothing' isn't an experiment\. Experiments: .*lineage"):
        ask(capsys, "run", "list", "--experiment", "nothing", "--mlflow", story.tracking)


def test_lineage_tells_every_attempt_with_its_workers_steps_and_end(story, node):
    ledger = sorted(goodput.read(Location(story.run)), key=lambda a: a.started)
    told = node["attempts"]
    assert [a["outcome"] for a in told] == ["failed", None, "finished"] and [a["workers"] for a in told] == [2, 2, 1]
    assert [a["restart"] for a in told] == [False, True, False] and "the workers failed" in told[0]["reason"]
    assert [(a["start_step"], a["reached"]) for a in told] == [(a.start_step, a.reached) for a in ledger]
    resumed = told[2]["start_step"]
    assert resumed >= 15 and resumed % 5 == 0 and told[2]["reached"] == STEPS
    (change,) = node["changes"]
    assert change.pop("start_step") == resumed and change["workers.count"] == ["2", "1"]
    assert change["mlflow.alias"] == ["None", "candidate"] and len(change) == 2
    assert (node["name"], node["status"], node["sweep"], node["parents"]) == ("base", "FINISHED", None, [])


def test_lineage_tells_the_code_the_packages_and_the_machines(story, node):
    assert node["code"][0]["commit"] == story.head
    client = MlflowClient(tracking_uri=story.tracking)
    files = {f.path for f in client.list_artifacts(story.base["run_id"], "code")}
    assert {f"code/environment-{digest}.json" for digest in node["environments"]} <= files
    assert {f"code/{c['diff']}.diff" for c in node["code"] if c["diff"]} <= files
    assert len(node["nodes"]) >= 1 and all(n["host"] and n["cpus"] >= 2 for n in node["nodes"])
    system = [
        k.removeprefix("system/").split() for k in client.get_run(story.base["run_id"]).data.metrics if k.startswith("system/")
    ]
    assert {address for _, address in system} == {n["address"] for n in node["nodes"]}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "network_receive_megabytes"} <= {k[0] for k in system}


def test_lineage_tells_the_data_to_the_sample_and_every_shard_that_was_not_seen(story, node, capsys):
    (plan,) = read_segments(Location(story.run))
    data = open_dataset(plan)
    samples = data.order.locate(np.concatenate([data.order.step(s).ravel() for s in range(STEPS)]))
    paths = data.sources[0].chunks["path"].to_pylist()
    expected = Counter(paths[chunk] for chunk in samples.chunk)
    assert 1 < len(expected) < len(set(paths))  # some were seen, some were not
    (segment,) = node["data"]["segments"]
    (source,) = segment["sources"]
    assert (segment["first"], segment["end"], source["samples"]) == (0, STEPS, 8 * STEPS)
    assert (source["digest"], source["shards"]) == (plan.digests[0], {"seen": len(expected), "total": len(set(paths))})
    assert node["tokenizers"] == [data.sources[0].meta["tokenizer"]]
    for path in sorted(set(paths)):
        told = ask(capsys, "run", "lineage", "--shard", f"{story.data}/{path}", "--mlflow", story.tracking)["runs"]
        assert {r["name"]: r["samples"] for r in told if r["samples"]} == ({"base": expected[path]} if expected[path] else {})
        inherited = [r["inherited"] for r in told if r["name"] == "tuned"]
        assert inherited == ([[story.base["run_id"]]] if expected[path] else [])


def test_a_dataset_is_traced_to_every_model_that_saw_it_itself_or_through_its_parent(story, corpus, capsys):
    for data, samples in ((story.data, {"base": 8 * STEPS, "tuned": 0}), (corpus, {"tuned": 8 * TUNED})):
        digest = manifest.read(Location(data)).digest[:10]
        told = ask(capsys, "run", "lineage", "--dataset", digest, "--mlflow", story.tracking)["runs"]
        mine = {r["name"]: r for r in told if r["run_id"] in (story.base["run_id"], story.tuned["run_id"])}
        assert {name: r["samples"] for name, r in mine.items()} == samples
        assert all(len(r["models"]) == 1 and r["models"][0].startswith("models:/lineage-lm/") for r in mine.values())
    assert ask(capsys, "run", "lineage", "--dataset", "0" * 12, "--mlflow", story.tracking)["runs"] == []


def test_checkpoints_are_logged_models_by_reference_and_removed_ones_are_marked(story, node):
    there = layout.steps(Location(story.run))
    assert sorted(c["step"] for c in node["checkpoints"] if not c["deleted"]) == there == [STEPS - 5, STEPS]
    assert any(c["deleted"] for c in node["checkpoints"]) or len(node["checkpoints"]) == 2
    for told in node["checkpoints"]:
        if not told["deleted"]:
            found = layout.open_checkpoint(Location(story.run), told["step"])
            assert (told["uri"], told["receipt"]) == (str(found.location), found.index.receipt.chain)
            assert told["scores"] == {k: v for k, v in found.index.metrics.items() if v is not None}
            assert told["workers"] == 1
    client = MlflowClient(tracking_uri=story.tracking)
    outputs = {o.model_id: o.step for o in client.get_run(story.base["run_id"]).outputs.model_outputs}
    assert {c["model_id"]: c["step"] for c in node["checkpoints"]}.items() <= outputs.items()
    assert len(outputs) == len(node["checkpoints"]) + 1  # and the model itself


def test_a_fine_tuned_model_knows_its_parent_model_and_inherits_its_license(story, capsys):
    told = ask(capsys, "run", "lineage", "models:/lineage-lm@candidate", "--mlflow", story.tracking)
    assert (told["model"]["version"], told["model"]["aliases"], told["model"]["license"]) == ("2", ["candidate"], "Apache-2.0")
    (parent,) = told["run"]["parents"]
    assert (parent["key"], parent["name"], parent["step"]) == ("model.pretrained", "base", STEPS)
    assert parent["run_id"] == parent["run"]["run_id"] == story.base["run_id"]
    assert [a["workers"] for a in parent["run"]["attempts"]] == [2, 2, 1]
    card = (resolve("models:/lineage-lm/2", story.tracking) / "README.md").read_text()
    assert 'license: "apache-2.0"' in card and "Knows only Python." in card and story.base["run_id"] in card


def test_a_worse_or_incomparable_model_does_not_become_champion_and_the_history_is_kept(story, capsys):
    better, uri = story.base["eval"]["loss"], ["--mlflow", story.tracking]
    with pytest.raises(GateError, match=r"eval/loss is .*, expected <"):
        ask(capsys, "model", "promote", "lineage-lm/1", "champion", "--require", f"eval/loss<{better}", *uri)
    done = ask(capsys, "model", "promote", "lineage-lm/1", "champion", "--require", f"eval/loss<={better}", *uri)
    assert (done["version"], done["replaced"], done["overruled"]) == ("1", None, [])
    with pytest.raises(GateError, match="was scored on other held-out samples than version 1"):
        ask(capsys, "model", "promote", "lineage-lm@candidate", "champion", *uri)
    done = ask(capsys, "model", "promote", "lineage-lm@candidate", "champion", "--force", *uri)
    assert (done["version"], done["replaced"], len(done["overruled"])) == ("2", "1", 1)
    first, second = (ask(capsys, "run", "lineage", f"lineage-lm/{v}", *uri)["model"] for v in (1, 2))
    assert [(e["event"], e["alias"]) for e in first["history"]] == [
        ("registered", "candidate"), ("promoted", "champion"), ("replaced", "champion"),
    ]  # fmt: skip
    assert first["history"][2]["replaced_by"] == "2" and second["aliases"] == ["candidate", "champion"]
    with pytest.raises(ConfigError, match="lineage-lm@nobody: no such version"):
        ask(capsys, "model", "promote", "lineage-lm@nobody", "champion", *uri)


def test_a_model_serves_where_there_is_only_mlflow_and_its_own_libraries(story):
    """heliostat, its jobs, Ray, and DeepSpeed can't be imported there."""
    code = f"""
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in ("heliostat", "jobs", "ray", "deepspeed", "pipelines")
        return None if absent else super().find_spec(name, path, target)
sys.meta_path = [Without if f is PathFinder else f for f in sys.meta_path if "editable" not in str(f)]
import mlflow
mlflow.set_tracking_uri({story.tracking!r})
model = mlflow.pyfunc.load_model("models:/lineage-lm/2")
assert "heliostat" not in sys.modules and "ray" not in sys.modules
print(len(model.predict(["def "], params={{"max_tokens": 4}})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=story.folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "1", done.stderr[-3000:]


def test_a_recorded_run_is_reproduced_to_the_last_bit_and_its_reproduction_says_so(story, capsys):
    done = ask(capsys, "debug", "reproduce", story.tuned["run_id"], "--steps", "6", "--mlflow", story.tracking)
    assert (done["steps"], done["bitwise"], done["largest_difference"]) == (6, True, 0.0)
    assert not [note for note in done["notes"] if note.startswith("environment")]
    assert curve(story.tracking, done["again"]) == curve(story.tracking, story.tuned["run_id"])[:6]
    assert (
        MlflowClient(tracking_uri=story.tracking).get_run(done["again"]).data.tags["heliostat.reproduces"]
        == story.tuned["run_id"]
    )
    with pytest.raises(ConfigError, match=f"--steps 99: the run's record ends at step {TUNED}"):
        ask(capsys, "debug", "reproduce", story.tuned["run_id"], "--steps", "99", "--mlflow", story.tracking)


def test_the_report_is_one_page_that_needs_nothing_else_and_is_logged_with_the_run(story, capsys, tmp_path):
    to = tmp_path / "mine.html"
    ask(capsys, "run", "report", story.run, "--out", str(to), "--mlflow", story.tracking)
    page = to.read_text()
    assert page.count('class="chart"') >= 6 and "http://" not in page and "https://" not in page and " src='http" not in page
    for text in ("base", "starts of the workers", "3: steps", "on 1 workers", "the workers failed", story.base["run_id"]):
        assert text in page, text
    client = MlflowClient(tracking_uri=story.tracking)
    names = {f.path for f in client.list_artifacts(story.base["run_id"])}
    logged = Path(client.download_artifacts(story.base["run_id"], "report.html", str(tmp_path))).read_text()
    assert "FINISHED" in logged and "RUNNING" not in logged
    assert {"report.html", "job.json", "data.json", "attempts.json", "parents.json", "goodput.json", "samples.json"} <= names
