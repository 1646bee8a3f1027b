"""Tests the records for MLflow's UI on a real store: people find what they look for, and nothing useless."""

import getpass
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from heliostat.checkpoint.layout import INDEX, encode, folder
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.recipes.protocol import Serving
from heliostat.storage.locations import Location
from heliostat.storage.run_folder import MLFLOW_RUN as RECORD
from heliostat.tracking import card, checkpoint_models, mlflow_client, models, run_table, tags
from heliostat.tracking.checkpoint_models import KIND, Checkpoints
from heliostat.tracking.logger import RunOwner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from tests.integration.test_mlflow_outage import ended, steps
from tests.unit.build_index import index
from tests.unit.build_job import job
from tests.unit.test_dataset import make_dataset


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    return make_dataset(tmp_path / "data", 1)


def a_job(tmp_path: Path, tracking: str, experiment: str, **changes: Any) -> Job:
    settings = {
        "mlflow.uri": tracking,
        "mlflow.experiment": experiment,
        "evaluate": None,
        "card": {"summary": "Writes *Python*."},
    }
    return job(storage=str(tmp_path / "runs"), **{**settings, **changes})


def finished(mine: Job, data: Manifest) -> Any:
    owner = RunOwner(mine, [data], {tags.SOURCE_NAME: "jobs/mine.yaml"})
    owner.post(steps(1, 11))
    owner.finish("FINISHED", "", ended(1, 10))
    return MlflowClient(tracking_uri=mine.mlflow.uri).get_run(owner.run_id)


def test_a_run_says_what_it_is_who_made_it_from_what_and_nothing_that_has_no_value(tmp_path, tracking, data, monkeypatch):
    monkeypatch.delenv("HELIOSTAT_CLUSTER", raising=False)
    run = finished(a_job(tmp_path, tracking, "described"), data)
    told = run.data.tags
    assert (told[tags.SOURCE_NAME], told[tags.SOURCE_TYPE], told[tags.USER]) == ("jobs/mine.yaml", "LOCAL", getpass.getuser())
    assert len(told[tags.COMMIT]) == 40
    assert told[tags.NOTE].startswith("Writes *Python*.\n\n`heliostat.recipes:") and "**a**" not in told[tags.NOTE]
    name = data.meta.get("name", data.location.name)
    assert f"- data: **{name}**, {data.tokens:,} tokens" in told[tags.NOTE] and "report.html" in told[tags.NOTE]
    shown = {k: v for k, v in told.items() if not k.startswith("mlflow.")}  # as the UI does
    assert not any("token" in key or key.endswith((".written", ".logged", ".made_of")) for key in shown)
    assert tags.TOKEN in told and tags.FOLDER in shown
    assert run.data.params and not {"None", ""} & set(run.data.params.values())
    assert "mlflow.register" not in run.data.params and run.data.params["train.seed"]
    client = MlflowClient(tracking_uri=tracking)
    artifact = Path(client.download_artifacts(run.info.run_id, "job.json", str(tmp_path))).read_text()
    assert json.loads(artifact)["mlflow"]["register"] is None  # the record is whole


def test_on_a_cluster_the_source_is_the_submission_and_the_user_who_submitted(tmp_path, tracking, data, monkeypatch):
    monkeypatch.setenv("HELIOSTAT_CLUSTER", "http://head:8265")
    monkeypatch.setenv("HELIOSTAT_USER", "somebody")
    mine = a_job(tmp_path, tracking, "described")
    owner = RunOwner(mine, [data])
    owner.finish("FINISHED", "", ended(1, 10))
    told = MlflowClient(tracking_uri=tracking).get_run(owner.run_id).data.tags
    assert told[tags.SOURCE_NAME] == f"heliostat submit {mine.name}" and told[tags.SOURCE_TYPE] == "JOB"
    assert told[tags.USER] == "somebody"


def test_a_run_that_goes_on_to_more_steps_is_listed_with_those(tmp_path, tracking, data):
    """MLflow can't change a param."""
    run = finished(a_job(tmp_path, tracking, "longer", **{"train.steps": 10}), data)
    assert run_table.row(run, "longer")["steps"] == 10
    again = finished(a_job(tmp_path, tracking, "longer", **{"train.steps": 20}), data)
    assert again.info.run_id == run.info.run_id and again.data.params["train.steps"] == "10"
    assert run_table.row(again, "longer")["steps"] == 20


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, tags.TRAINING),
        ("no_inferred_type", tags.TRAINING),
        ("genai_development_inferred", tags.TRAINING),  # MLflow's UI notes its guesses
        ("genai_development", "genai_development"),  # somebody has chosen it
        ("finetuning", "finetuning"),
    ],
)
def test_an_experiment_is_one_of_model_training_unless_somebody_has_chosen(tracking, before, after):
    client, name = MlflowClient(tracking_uri=tracking), f"kind-{before}"
    if before:
        client.set_experiment_tag(client.create_experiment(name), tags.KIND, before)
    made = mlflow_client.experiment(client, tracking, name)
    assert client.get_experiment(made).tags[tags.KIND] == after and mlflow_client.experiment(client, tracking, name) == made


@pytest.mark.parametrize("name", [tags.TOKEN, tags.FORMERLY[tags.TOKEN]])
def test_a_run_whose_id_was_never_written_down_is_found_by_its_token_of_today_and_of_before(tmp_path, tracking, data, name):
    mine = a_job(tmp_path, tracking, "lost")
    client = MlflowClient(tracking_uri=tracking)
    run_id = client.create_run(mlflow_client.experiment(client, tracking, "lost"), tags={name: f"t-{name}"}).info.run_id
    told = {"token": f"t-{name}", "uri": tracking, "name": mine.name}
    mine.run_folder.join(RECORD).write(json.dumps(told).encode())
    owner = RunOwner(mine, [data])
    owner.finish("FINISHED", "", ended(1, 10))
    assert owner.run_id == run_id


SERVER = """
import os
from pathlib import Path
import mlflow
from mlflow.types.type_hints import TypeFromExample

class Server(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        Path(os.environ["LOADED"]).touch()

    def predict(self, context, model_input: TypeFromExample):
        return [text.upper() for text in model_input]

mlflow.models.set_model(Server())
"""


def test_a_model_is_logged_without_being_loaded(tmp_path, tracking, monkeypatch):
    """It may be larger than the driver's memory. MLflow would load it, and run it on its example."""
    monkeypatch.setenv("LOADED", str(tmp_path / "loaded"))
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / card.FILE).write_text("of nothing")
    mine, client = a_job(tmp_path, tracking, "served"), MlflowClient(tracking_uri=tracking)
    run_id = client.create_run(mlflow_client.experiment(client, tracking, "served")).info.run_id
    serving = Serving(tmp_path / "server.py", ["def "], infer_signature(["def "], ["DEF "]), ("mlflow",))
    recipe: Any = SimpleNamespace(serving=lambda: serving)
    last: Any = SimpleNamespace(step=10, index=SimpleNamespace(written=1.0))
    uri = models.log_model(mine, run_id, last, tmp_path / "model", recipe, {"loss": 1.0})
    assert not (tmp_path / "loaded").exists()
    assert mlflow.pyfunc.load_model(uri).predict(["def "]) == ["DEF "] and (tmp_path / "loaded").exists()


@pytest.fixture(autouse=True)
def default(tracking: str) -> None:
    """Restores the store of MLflow's module functions, which the whole process shares."""
    mlflow.set_tracking_uri(tracking)


def save(run: Location, step: int, written: float = 1.0) -> None:
    facts = index(
        step, written=written, metrics={"train_loss": 2.0, "loss": 1.0 / step}, receipt={"steps": step, "chain": f"{step:04d}"}
    )
    folder(run, step).join(INDEX).write(encode(facts))


def opened(tmp_path: Path, tracking: str, name: str, told: dict[str, str] | None = None) -> tuple[Any, Location, str, str]:
    """Returns (client, folder, experiment, run id) of a new run."""
    client = MlflowClient(tracking_uri=tracking)
    experiment = mlflow_client.experiment(client, tracking, name)
    return client, Location(str(tmp_path / "run")), experiment, client.create_run(experiment, tags=told).info.run_id


def shown(client: Any, experiment: str, run_id: str) -> list[str]:
    """Returns the names of the logged models that the UI lists."""
    found = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    return sorted(m.name for m in found if m.model_type == KIND)


def test_a_checkpoint_that_retention_removed_is_not_listed_any_more_and_still_known(tmp_path, tracking):
    client, run, experiment, run_id = opened(tmp_path, tracking, "pruned", {tags.SOURCE_NAME: "jobs/mine.yaml"})
    one = Checkpoints(run_id, experiment, run)
    for step in (10, 20, 30):
        save(run, step)
    one.sync(client)
    one.sync(client)  # once each, however often
    assert shown(client, experiment, run_id) == [f"checkpoint-000000{s}" for s in (10, 20, 30)]
    assert {m.tags[tags.SOURCE_NAME] for m in checkpoint_models.logged(client, client.get_run(run_id))} == {"jobs/mine.yaml"}
    first = next(c for c in checkpoint_models.history(client, client.get_run(run_id)) if c["step"] == 10)
    folder(run, 10).delete()
    folder(run, 20).delete()
    Checkpoints(run_id, experiment, run).sync(client)  # another command
    assert shown(client, experiment, run_id) == ["checkpoint-00000030"]
    known = checkpoint_models.history(client, client.get_run(run_id))
    assert [(c["step"], c["deleted"]) for c in known] == [(10, True), (20, True), (30, False)]
    assert known[0] == {**first, "deleted": True} and first["scores"] == {"train_loss": 2.0, "loss": 0.1}
    assert first["receipt"] == "0010" and first["uri"].endswith("step-00000010")
    with pytest.raises(MlflowException):
        client.get_logged_model(first["model_id"])
    assert len(client.get_run(run_id).outputs.model_outputs) == 3  # that it was made stays


def test_where_nobody_may_delete_a_gone_checkpoint_is_marked_once_and_the_run_goes_on(tmp_path, tracking, caplog):
    """For example, on a server with logins, in another user's experiment."""
    client, run, experiment, run_id = opened(tmp_path, tracking, "denied")
    asked = []

    def refused(model_id: str) -> None:
        asked.append(model_id)
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    client.delete_logged_model = refused
    one = Checkpoints(run_id, experiment, run)
    for step in (10, 20):
        save(run, step)
    one.sync(client)
    folder(run, 10).delete()
    for checkpoints_ in (one, one, Checkpoints(run_id, experiment, run)):
        checkpoints_.sync(client)
    assert len(asked) == 1 and "checkpoint-00000010" in caplog.text
    (gone,) = [m for m in checkpoint_models.logged(client, client.get_run(run_id)) if m.tags.get(tags.DELETED) == "true"]
    assert gone.model_id == asked[0]
    known = checkpoint_models.history(client, client.get_run(run_id))
    assert [(c["step"], c["deleted"]) for c in known] == [(10, True), (20, False)]


def test_a_checkpoint_that_was_made_again_is_another_one_and_takes_the_first_ones_place(tmp_path, tracking):
    client, run, experiment, run_id = opened(tmp_path, tracking, "again")
    one = Checkpoints(run_id, experiment, run)
    save(run, 10)
    one.sync(client)
    one.back(0)
    save(run, 10, written=2.0)
    one.sync(client)
    assert shown(client, experiment, run_id) == ["checkpoint-00000010"]
    known = checkpoint_models.history(client, client.get_run(run_id))
    assert [(c["step"], c["deleted"]) for c in known] == [(10, True), (10, False)]


def test_checkpoints_of_a_run_that_an_earlier_version_recorded_are_read_and_tidied(tmp_path, tracking):
    """It marked deleted checkpoints with a tag, and had other names for other tags and for the scores."""
    client, run, experiment, run_id = opened(tmp_path, tracking, "older")
    save(run, 20)
    for step, deleted in ((10, "true"), (20, "false")):
        told = {"step": str(step), "uri": str(folder(run, step)), "written": "1.0", "deleted": deleted, "logged": "true",
                "data_digest": "", "receipt": "c", "workers": "2", "zero_stage": "1"}  # fmt: skip
        model = mlflow.create_external_model(
            name=f"checkpoint-{step:08d}", source_run_id=run_id, tags={f"heliostat.{k}": v for k, v in told.items()},
            model_type=KIND, experiment_id=experiment,
        )  # fmt: skip
        client.log_batch(run_id, metrics=[mlflow.entities.Metric("checkpoint/loss", 0.5, 1, step, model_id=model.model_id)])
    known = checkpoint_models.history(client, client.get_run(run_id))
    assert [(c["step"], c["deleted"], c["scores"]) for c in known] == [(10, True, {"loss": 0.5}), (20, False, {"loss": 0.5})]
    Checkpoints(run_id, experiment, run).sync(client)
    assert shown(client, experiment, run_id) == ["checkpoint-00000020"]  # taken as it is, not logged again
    assert checkpoint_models.history(client, client.get_run(run_id)) == known
