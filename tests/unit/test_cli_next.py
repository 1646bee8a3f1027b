"""What a command suggests next works with the paths, the store and the names of what it has just made."""

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
from heliostat.cli import common
from heliostat.cli import train as training
from heliostat.errors import ConfigError

from tests.unit.build_job import write
from tests.unit.command_line import run


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("prompt", ["It was", "don't 'quote' me", None])
@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_what_is_suggested_next_works_with_the_runs_own_paths(tmp_path, monkeypatch, registered, prompt, unit):
    """The model by a name that every command takes, the run's folder, its store unless that is the default, its own prompt."""
    from heliostat.validation.check import load_job

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = "models:/m/3" if registered else "models:/m-0123456789abcdef0123456789abcdef"
    made = {"samples": [{"prompt": prompt, "text": ""}] if prompt else [], "model_uri": uri, "run_id": "a" * 32, "unit": unit}
    elsewhere = load_job(write(tmp_path, **{"mlflow.uri": "sqlite:///else where.db", "storage": "my runs"}))
    lines = [shlex.split(line) for line in training.next_commands(made, elsewhere, common.store_uri(None))]
    store = ["--mlflow", f"sqlite:///{tmp_path}/else where.db"]
    assert ["heliostat", "verify", str(tmp_path / "my runs" / "small")] in lines and ["heliostat", "ui", *store] in lines
    name, drawn = ("models:/m/3" if registered else "a" * 32), (["--out", "sample.png"] if unit == "samples" else [])
    wanted = [["heliostat", "generate", name, "--prompt", prompt, *drawn, *store]] if prompt else []
    assert [line for line in lines if "generate" in line] == wanted
    here = load_job(write(tmp_path, **{"mlflow.uri": "sqlite:///.heliostat/mlflow.db"}))
    assert not [line for line in training.next_commands(made, here, common.store_uri(None)) if "--mlflow" in line]


@pytest.mark.parametrize(("called", "found", "told"), [
    (".venv/bin/heliostat", None, ".venv/bin/heliostat"),
    (".venv/bin/heliostat", "/usr/bin/heliostat", "heliostat"),
    ("/x/heliostat/__main__.py", None, "heliostat"),
])  # fmt: skip
def test_what_is_suggested_begins_with_what_the_shell_finds(monkeypatch, called, found, told):
    """A clone's `.venv/bin` is on nobody's PATH."""
    monkeypatch.setattr("sys.argv", [called, "train"])
    monkeypatch.setattr("shutil.which", lambda _: found)
    assert common.program() == told
    elsewhere = told if told == "heliostat" else str(Path(told).absolute())
    assert common.program(elsewhere=True) == elsewhere  # behind a `cd`, as `init` suggests


def test_the_usual_store_is_asked_for_before_mlflow_sets_it_to_the_jobs(tmp_path, monkeypatch, capsys):
    """As `mlflow.set_tracking_uri` does: the store of the next command would not be named."""
    from heliostat.training import run as running

    def trained(job: Any, *_: Any, **__: Any) -> dict[str, Any]:
        os.environ["MLFLOW_TRACKING_URI"] = job.mlflow.uri
        return {"samples": [], "eval": {"loss": 1.0}, "reference": {}, "startup": {}, "tokens_per_second": 1.0, "unit": "tokens",
                "data_wait": 0.0, "seconds_to_first_step": 1.0, "model_uri": "models:/m/1", "run_id": "a" * 32,
                "checkpoint": "c"}  # fmt: skip

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////usual.db")
    monkeypatch.setattr(running, "train_job", trained)
    code, out, _ = run(monkeypatch, capsys, "train", str(write(tmp_path)))
    assert code == 0 and f"heliostat ui --mlflow sqlite:///{tmp_path}/mlflow.db\n" in out


def test_a_run_that_another_store_knows_names_that_store(tmp_path):
    """Its folder says where; a run of the store that was asked has no such hint."""
    from heliostat.tracking import mlflow_client
    from mlflow.exceptions import MlflowException

    class Empty:
        def get_run(self, run_id: str) -> None:
            raise MlflowException(f"{run_id} is not here")

    made = {"run_id": "0" * 32, "token": "t", "uri": "sqlite:////other.db", "name": "x"}
    (tmp_path / "run.json").write_text(json.dumps(made))
    with pytest.raises(
        ConfigError, match=r"no such run in sqlite:////asked\.db\. It is in another store: pass --mlflow sqlite:////other\.db$"
    ):
        mlflow_client.find(Empty(), str(tmp_path), "sqlite:////asked.db")
    with pytest.raises(ConfigError, match=r"no such run in sqlite:////other\.db$"):
        mlflow_client.find(Empty(), str(tmp_path), "sqlite:////other.db")
