"""Tests that the page about the Python API is true: its code runs from top to bottom, in a workspace of `heliostat init`."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import heliostat
import pytest
import yaml
from heliostat.cli.workspace_template import create
from heliostat.errors import CheckpointError, ConfigError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python-api.md").read_text()


def workspace(folder: Path) -> None:
    """Creates the workspace, and reduces its quickstart to seconds: a few packages, and a small model."""
    create(folder)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "http", "email", "asyncio"):
        shutil.copytree(stdlib / package, folder / "raw" / package, ignore=shutil.ignore_patterns("__pycache__"))
    smaller(folder / "pipelines" / "quickstart.yaml", input=str(folder / "raw"), tokenizer={"vocab_size": 512})
    model = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    }
    smaller(folder / "jobs" / "quickstart.yaml", model=model, evaluate={"samples": 24})


def smaller(path: Path, **changes: Any) -> None:
    written = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        assert key in written, "the quickstart has changed"
        written[key] = {**written[key], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(written))


@pytest.mark.ci
@pytest.mark.usefixtures("ray_session")
def test_the_pages_code_runs(tmp_path, monkeypatch):
    """A run's attributes equal the output of its commands: curves, checkpoints, receipts, and an export that loads."""
    workspace(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").mkdir()  # the README's tour has filled it
    (tmp_path / "my-model" / "config.json").write_text("{}")
    names: dict[str, Any] = {"heliostat": heliostat}
    for _ in range(2):  # a page may be run again
        for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
            exec(compile(code, "docs/python-api.md", "exec"), names)
    run, losses = names["run"], names["run"].losses()
    assert run.name == "from-python" and run.folder == str(tmp_path / ".heliostat/runs/from-python")
    assert heliostat.Run(run.run_id).folder == run.folder and run.job.train.steps == 24
    assert run.result["train_loss"] == losses[24] < losses[1] and run.metrics()["eval/loss"][24] == run.result["eval"]["loss"]
    assert run.receipts()[-1].end == 24 and len(run.samples(1)) == run.job.train.global_batch_size == 16
    assert run.goodput()["total_s"] > 0
    again = heliostat.generate("from-python-model", "class ", seed=8, max_tokens=16)
    assert names["both"][0].prompt == "def " and again == names["both"][1]
    with pytest.raises(ConfigError, match="from-python-model: not empty"):
        run.export("from-python-model")
    with pytest.raises(CheckpointError):
        run.export("other", step=11)
    with pytest.raises(ConfigError, match="already has checkpoints up to step 24"):
        heliostat.train(names["job"])
    stream = heliostat.datasets(names["job"], folder="same")
    assert stream.plan == names["checked"].plan and stream.plan.sequence_length == 128
