"""The page about the Python API is true: its code runs from top to bottom, in a workspace that `heliostat init` has made."""

from __future__ import annotations

import re
from pathlib import Path

import heliostat
import pytest
from heliostat.errors import CheckpointError, ConfigError
from heliostat.workspace_template import create

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python-api.md").read_text()


@pytest.mark.usefixtures("ray_session")
def test_the_pages_code_runs(tmp_path, monkeypatch):
    """And what a run tells is what its commands tell: curves, checkpoints, receipts, an export that reads."""
    create(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(code, "docs/python-api.md", "exec"), names := {"heliostat": heliostat, **locals().get("names", {})})
    run, losses = names["run"], names["run"].losses()
    assert run.name == "from-python" and run.folder == str(tmp_path / ".heliostat/runs/from-python")
    assert heliostat.Run(run.run_id).folder == run.folder and run.job.train.steps == 24
    assert run.result["train_loss"] == losses[24] < losses[1] and run.metrics()["eval/loss"][24] == run.result["eval"]["loss"]
    assert run.receipts()[-1].end == 24 and len(run.samples(1)) == 8 and run.goodput()["total_s"] > 0
    assert (
        names["both"][0].prompt == "def " and heliostat.generate("my-model", "class ", seed=8, max_tokens=16) == names["both"][1]
    )
    with pytest.raises(ConfigError, match="my-model: is not empty"):
        run.export("my-model")
    with pytest.raises(CheckpointError):
        run.export("other", step=11)
    with pytest.raises(ConfigError, match="already has checkpoints up to step 24"):
        heliostat.train(names["job"])
    stream = heliostat.datasets(names["job"], folder="same")
    assert stream.plan == names["checked"].plan and stream.plan.sequence_length == 256
