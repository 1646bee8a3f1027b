"""Tests a dataset and a model of the Hub, prepared and trained by the commands, while the Hub's `main` changes."""

import pytest
import yaml
from heliostat.checkpoint import layout
from heliostat.data import manifest
from heliostat.storage.locations import Location

from tests import hub_server
from tests.integration import commands
from tests.unit import build_job
from tests.unit.build_language_model import ARCHITECTURES, write_model
from tests.unit.test_hub import parquet

pytestmark = [pytest.mark.ci]

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(400)]


def test_a_dataset_and_a_model_of_the_hub_are_prepared_trained_and_resumed(tmp_path, monkeypatch):
    def run(*arguments):
        done = commands.run(*arguments, log=tmp_path / "log", cwd=tmp_path)
        assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]

    with hub_server.serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        tiny = write_model(tmp_path / "made", ARCHITECTURES["llama"], 64)
        (tiny / "heliostat.json").unlink(missing_ok=True)
        model = hub.push("org/tiny", tiny)
        data = hub.push("org/text", {"data/train-0.parquet": parquet(TEXTS), "data/test-0.parquet": parquet(["no"])}, "datasets")
        pipeline = {"pipeline": "heliostat.pipelines:TextPipeline", "name": "text", "input": "hf://datasets/org/text",
                    "output": "data", "tokenizer": {"path": "org/tiny", "end_of_document": "<|end|>"}}  # fmt: skip
        (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
        run("data", "prepare", "pipeline.yaml")
        named = {"input": f"hf://datasets/org/text@{data}", "tokenizer.path": f"org/tiny@{model}"}
        assert manifest.read(Location(str(tmp_path / "data"))).meta["hub"] == named

        changes = {"model": {"pretrained": "org/tiny"}, "data.sources.0.path": "data", "train.steps": 4, "train.stop_after": 2,
                   "train.precision": "fp32", "checkpoint.every": 2, "evaluate": None}  # fmt: skip
        build_job.write(tmp_path, **changes)
        run("train", "job.yaml")
        assert sum(path.endswith("model.safetensors") for path in hub.downloads()) == 1
        hub.push("org/tiny", {"config.json": b"{}"})  # `main` moves on
        run("train", "job.yaml", "--resume", "--set", "train.stop_after=null")
        last = layout.latest(Location(str(tmp_path / "runs" / "small")))
        assert last and last.step == 4 and last.index.job["model"]["pretrained"] == f"org/tiny@{model}"
        run("run", "lineage", "runs/small", "--mlflow", f"sqlite:///{tmp_path}/mlflow.db")
        said = (tmp_path / "log.out").read_text()
        assert f"org/tiny@{model}" in said and f"from hf://datasets/org/text@{data}" in said
