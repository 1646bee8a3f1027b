"""Tests that the commands that a command suggests next work with its paths, its store, and its names."""

import json
import os
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest
from heliostat.cli import common, groups, next_steps
from heliostat.cli import train as training
from heliostat.errors import ConfigError

from tests.unit.build_job import write
from tests.unit.command_line import run


@pytest.mark.parametrize("registered", [True, False])
@pytest.mark.parametrize("prompt", ["It was", "don't 'quote' me", None])
@pytest.mark.parametrize("unit", ["tokens", "samples"])
def test_what_is_suggested_next_works_with_the_runs_own_paths(tmp_path, monkeypatch, registered, prompt, unit):
    """The suggestion has the model by a name that every command accepts, the run's folder, its store unless that is the default,
    and its own prompt."""
    from heliostat.validation.check import load_job

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = "models:/m/3" if registered else "models:/m-0123456789abcdef0123456789abcdef"
    made = {"samples": [{"prompt": prompt, "text": ""}] if prompt else [], "model_uri": uri, "run_id": "a" * 32, "unit": unit}
    elsewhere = load_job(write(tmp_path, **{"mlflow.uri": "sqlite:///else where.db", "storage": "my runs"}))
    lines = [shlex.split(line) for line in training.next_commands(made, elsewhere, common.store_uri(None))]
    store = ["--mlflow", f"sqlite:///{tmp_path}/else where.db"]
    assert ["heliostat", "run", "verify", str(tmp_path / "my runs" / "small")] in lines and [
        "heliostat",
        "run",
        "ui",
        *store,
    ] in lines
    name, drawn = ("models:/m/3" if registered else "a" * 32), (["--out", "sample.png"] if unit == "samples" else [])
    wanted = [["heliostat", "model", "generate", name, "--prompt", prompt, *drawn, *store]] if prompt else []
    assert [line for line in lines if "generate" in line] == wanted
    here = load_job(write(tmp_path, **{"mlflow.uri": "sqlite:///.heliostat/mlflow.db"}))
    assert not [line for line in training.next_commands(made, here, common.store_uri(None)) if "--mlflow" in line]


@pytest.mark.parametrize(("called", "found", "told"), [
    (".venv/bin/heliostat", None, ".venv/bin/heliostat"),
    (".venv/bin/heliostat", "/usr/bin/heliostat", "heliostat"),
    ("/x/heliostat/__main__.py", None, "heliostat"),
])  # fmt: skip
def test_what_is_suggested_begins_with_what_the_shell_finds(monkeypatch, called, found, told):
    """A clone's `.venv/bin` isn't on the PATH."""
    monkeypatch.setattr("sys.argv", [called, "train"])
    monkeypatch.setattr("shutil.which", lambda _: found)
    assert common.program() == told
    elsewhere = told if told == "heliostat" else str(Path(told).absolute())
    assert common.program(elsewhere=True) == elsewhere  # behind a `cd`, as `init` suggests


def test_the_usual_store_is_asked_for_before_mlflow_sets_it_to_the_jobs(tmp_path, monkeypatch, capsys):
    """`mlflow.set_tracking_uri` changes the default store, so the next command's store would be missing."""
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
    assert code == 0 and f"heliostat run ui --mlflow sqlite:///{tmp_path}/mlflow.db\n" in out


def test_a_run_that_another_store_knows_names_that_store(tmp_path):
    """The run's folder names its store. A run of the requested store has no such hint."""
    from heliostat.tracking import mlflow_client
    from mlflow.exceptions import MlflowException

    class Empty:
        def get_run(self, run_id: str) -> None:
            raise MlflowException(f"{run_id} is not here")

    made = {"run_id": "0" * 32, "token": "t", "uri": "sqlite:////other.db", "name": "x"}
    (tmp_path / "run.json").write_text(json.dumps(made))
    with pytest.raises(
        ConfigError,
        match=r"no such run in sqlite:////asked\.db\. The run is in another store: pass --mlflow sqlite:////other\.db$",
    ):
        mlflow_client.find(Empty(), str(tmp_path), "sqlite:////asked.db")
    with pytest.raises(ConfigError, match=r"no such run in sqlite:////other\.db\. List the runs: heliostat run list$"):
        mlflow_client.find(Empty(), str(tmp_path), "sqlite:////other.db")


def job(folder: Path, name: str = "quickstart", **changes: Any) -> None:
    """Writes a pipeline, and a job that trains on its dataset."""
    raw = {"name": name, "data": {"path": ".heliostat/data/d", "sequence_length": 16}, "train": {"steps": 300}, **changes}
    for path, content in (("jobs", raw), ("pipelines", {"name": "d", "pipeline": "x", "output": ".heliostat/data/d"})):
        (folder / path).mkdir(parents=True, exist_ok=True)
        (folder / path / f"{name}.yaml").write_text(json.dumps(content))


def trained(folder: Path, step: int, name: str = "quickstart", ended: bool = False, pid: int = 0, **result: Any) -> Path:
    """Writes the folder of a run with a checkpoint. `pid`: the driver that still trains, if there is one."""
    run = folder / ".heliostat/runs" / name
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (run / f"checkpoints/step-{step:08d}/checkpoint.json").write_text("{}")
    (run / "run.json").write_text("{}")
    (run / "lease").mkdir()
    holder = {"host": socket.gethostname(), "pid": pid, "released": not pid}
    (run / "lease/00000001.json").write_text(json.dumps(holder))
    if ended:
        ending = {"steps": step, "run_id": "a" * 32, "model_uri": "models:/lm/1", "unit": "tokens",
                  "samples": [{"prompt": "a", "text": "b"}], **result}  # fmt: skip
        (run / "result.json").write_text(json.dumps(ending))
    return run


def nothing(folder: Path) -> None:
    """Leaves the folder empty."""


def prepared(folder: Path) -> None:
    job(folder)
    (folder / ".heliostat/data/d").mkdir(parents=True)
    (folder / ".heliostat/data/d/manifest.parquet").touch()


def interrupted(folder: Path) -> None:
    prepared(folder)
    trained(folder, 100)


def running(folder: Path) -> None:
    prepared(folder)
    trained(folder, 100, pid=os.getpid())


def finished(folder: Path) -> None:
    prepared(folder)
    trained(folder, 300, ended=True)


def resumed_beyond(folder: Path) -> None:
    """Writes a run that ended once, then resumed with more steps, and was interrupted."""
    prepared(folder)
    run = trained(folder, 300, ended=True)
    (run / "checkpoints/step-00000400").mkdir()
    (run / "checkpoints/step-00000400/checkpoint.json").write_text("{}")


def unregistered(folder: Path) -> None:
    prepared(folder)
    trained(folder, 300, ended=True, model_uri="models:/m-0123")


def drawing(folder: Path) -> None:
    prepared(folder)
    trained(folder, 300, ended=True, unit="samples")


def classifying(folder: Path) -> None:
    prepared(folder)
    trained(folder, 300, ended=True, samples=[])


@pytest.mark.parametrize(("state", "commands"), [
    (nothing, ["init", "init my-workspace"]),
    (job, ["data prepare pipelines/quickstart.yaml", "train jobs/quickstart.yaml"]),
    (prepared, ["check jobs/quickstart.yaml", "train jobs/quickstart.yaml"]),
    (interrupted, ["train jobs/quickstart.yaml --resume"]),
    (resumed_beyond, ["train jobs/quickstart.yaml --resume"]),
    (running, ["run goodput .heliostat/runs/quickstart", "run ui"]),
    (finished, ["model generate models:/lm/1 --prompt Hello", "model play models:/lm/1", "run ui",
                "run verify .heliostat/runs/quickstart"]),
    (drawing, ["model generate models:/lm/1 --prompt Hello --out image.png", "model play models:/lm/1", "run ui",
               "run verify .heliostat/runs/quickstart"]),
    (classifying, ["run ui", "run verify .heliostat/runs/quickstart"]),
    (unregistered, [f"model generate {'a' * 32} --prompt Hello", f"model play {'a' * 32}", "run ui",
                    "run verify .heliostat/runs/quickstart"]),
])  # fmt: skip
def test_without_a_command_the_next_one_of_this_folder_is_shown(tmp_path, monkeypatch, capsys, state, commands):
    """At most 8 lines of 80 columns, the same in JSON, and each command exists."""
    state(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(monkeypatch, capsys)
    shown = [line.removeprefix("Next:").partition("  # ")[0].strip() for line in out.splitlines()]
    assert (code, err) == (0, "") and [line for line in shown if line.startswith("heliostat ")] == [
        f"heliostat {words}" for words in commands
    ]
    assert len(shown) <= 8 and max(map(len, out.splitlines())) <= 80
    report = json.loads(run(monkeypatch, capsys, "--json")[1])
    assert [one["command"] for one in report["next"]] == [f"heliostat {words}" for words in commands]
    for words in commands:
        assert run(monkeypatch, capsys, *words.split()[: 2 if words.split()[0] in groups.GROUPS else 1], "--help")[0] == 0


def test_the_run_that_was_active_last_is_shown(tmp_path):
    for name, at in (("a", 100), ("b", 300), ("c", 200)):
        job(tmp_path, name)
        folder = trained(tmp_path, 10, name)
        for path in (folder, folder / "lease"):
            os.utime(path, (at, at))
    (tmp_path / "jobs/broken.yaml").write_text("[")
    shown = next_steps.status(tmp_path)
    assert shown["run"] is not None and (shown["run"]["name"], shown["run"]["step"], shown["run"]["steps"]) == ("b", 10, 300)
    assert len(shown["jobs"]) == 3


@pytest.mark.parametrize("steps", ["1e3", [1], None])
def test_a_mistake_in_a_job_or_a_damaged_result_is_no_end_of_the_status(tmp_path, steps):
    """`check` explains the job, and the run is shown by its checkpoints."""
    job(tmp_path, train={"steps": steps})
    (trained(tmp_path, 100) / "result.json").write_text(json.dumps({"steps": steps}))
    assert "run quickstart: interrupted, step 100" in next_steps.lines(next_steps.status(tmp_path))


def test_a_run_without_a_number_of_steps_or_on_s3_is_shown_as_far_as_it_is_known(tmp_path):
    job(tmp_path, train={"epochs": 2})
    trained(tmp_path, 100)
    assert "run quickstart: interrupted, step 100" in next_steps.lines(next_steps.status(tmp_path))
    job(tmp_path, storage="s3://bucket/runs", data={"path": "s3://bucket/d"})
    assert next_steps.status(tmp_path)["run"] is None
