"""Tests whole runs on real Ray, DeepSpeed, MLflow, and storage: the losses are right for any sharding, storage, and restarts."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import torch
from heliostat.checkpoint import saver
from heliostat.data import manifest
from heliostat.data.dataset import DataPlan, open_dataset
from heliostat.errors import ConfigError, NonFiniteError
from heliostat.evaluation.losses import evaluate
from heliostat.storage.locations import Location
from heliostat.tracking import registry
from heliostat.tracking.models import models_of, resolve
from heliostat.training.run import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import stores
from tests.integration import late
from tests.integration.answers import ask
from tests.integration.conftest import curve, tiny_job
from tests.integration.paced import SET_PLAIN
from tests.integration.reference import plain_losses


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, tracking):
    """Returns a run of 20 steps with checkpoints at 10 and 20, its job file, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    job = tiny_job(corpus, tracking, folder)
    job["mlflow"]["register"] = "whole-lm"
    path = folder / "whole.yaml"
    path.write_text(json.dumps({**job, "name": "whole"}))
    return folder, path, train(path)


def test_a_whole_run_gives_the_plain_loops_losses(finished, tracking) -> None:
    """Two workers at stage 2, with evaluations and checkpoints between the steps."""
    losses = curve(tracking, finished[2]["run_id"])
    assert losses == pytest.approx(plain_losses(finished[1], []), abs=1e-4)
    assert finished[2]["train_loss"] == losses[-1]


def _stopped_at_10(finished, folder: Path) -> list[str]:
    """Copies the finished run, as it was after step 10, to another storage; returns the settings that continue it."""
    later = shutil.ignore_patterns("*00000020*", "result.json")
    shutil.copytree(finished[0] / "runs" / "whole", folder / "runs" / "whole", ignore=later)
    (folder / "runs" / "whole" / "run.json").unlink()  # another MLflow run, so that the two curves can be compared
    return [f"storage={folder / 'runs'}"]


def _run_cli(arguments: list[str], **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from heliostat.cli.main import main; main()", *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=300, check=False)


def _continued(tracking: str, run_id: str) -> list[float]:
    history = mlflow.MlflowClient(tracking_uri=tracking).get_metric_history(run_id, "train/loss")
    points = sorted((m.step, m.value) for m in history)
    assert [step for step, _ in points] == list(range(1, 21))  # those before it was stopped lay beside the checkpoint
    return [value for _, value in points[10:]]


@pytest.mark.ci
def test_a_fresh_process_resumes_bitwise_even_without_a_compiler(finished, tracking, tmp_path, capsys) -> None:
    """With the same worker count in fp32, without a C++ compiler on PATH, and with nothing compiled before."""
    settings = _stopped_at_10(finished, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "sh", "git", "which"):
        if shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    path = f"{Path(sys.executable).parent}:{tmp_path / 'bin'}"
    began = time.time()
    done = _run_cli(
        ["train", str(finished[1]), "--set", settings[0], "--resume", "--json"],
        PATH=path, CXX="none", CC="none", TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    whole = curve(tracking, finished[2]["run_id"])
    assert _continued(tracking, result["run_id"]) == whole[10:]
    assert result["eval"] == finished[2]["eval"]
    run = mlflow.MlflowClient(tracking_uri=tracking).get_run(result["run_id"])
    assert run.data.metrics["train/time/lost_s"] > 0
    _every_second_is_told(capsys, tmp_path / "runs" / "whole", run.info.end_time / 1000 - began)
    chains = [json.loads(Location(s).join("receipts", "step-00000020.json").read())["chain"]
              for s in (f"{finished[0]}/runs/whole", f"{tmp_path}/runs/whole")]  # fmt: skip
    assert chains[0] == chains[1]


@pytest.mark.ci
def test_what_follows_the_last_step_is_done_once_wherever_drivers_die_in_it(finished, tracking, tmp_path) -> None:
    """From the last checkpoint alone: the same scores and weights, one model, one version, and an MLflow run that is FINISHED."""
    shutil.copytree(finished[0] / "runs" / "whole", tmp_path / "runs" / "whole")
    for name in ("run.json", "result.json", "summary.json"):
        (tmp_path / "runs" / "whole" / name).unlink()
    job = json.loads(finished[1].read_text()) | {"storage": str(tmp_path / "runs")}
    job["mlflow"] |= {"register": "late-lm", "alias": "candidate"}
    path = tmp_path / "late.json"
    path.write_text(json.dumps(job))
    assert len(late.writes(path, tmp_path)) == 12  # each moment of `late`
    result, whole = json.loads((tmp_path / "runs" / "whole" / "result.json").read_text()), finished[2]
    assert {k: result[k] for k in ("steps", "eval", "train_loss")} == {k: whole[k] for k in ("steps", "eval", "train_loss")}
    assert result["tokens_per_second"] > 0 and 0 < result["seconds_to_first_step"] < 300
    client = mlflow.MlflowClient(tracking_uri=tracking)
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    (version,) = client.search_model_versions("name = 'late-lm'")
    assert result["model_uri"] == f"models:/late-lm/{version.version}" and version.run_id == result["run_id"]
    assert [entry["event"] for entry in registry.history(version)] == ["registered"]
    assert client.get_model_version_by_alias("late-lm", "candidate").version == version.version
    (model,) = models_of(client, run)
    assert model.status.value == "READY"
    samples = Path(client.download_artifacts(result["run_id"], "samples.json", str(tmp_path)))
    assert len(json.loads(samples.read_text())["data"]) == len(result["samples"])
    made, known = (resolve(uri, tracking) / "model.safetensors" for uri in (result["model_uri"], whole["model_uri"]))
    assert made.read_bytes() == known.read_bytes()


def test_a_result_of_an_earlier_end_is_not_taken_for_that_of_a_longer_training(finished, tracking, tmp_path) -> None:
    """The run ended at 10 steps and continued to 20, and its driver died after them. Its result is that of step 20."""
    folder = tmp_path / "runs" / "whole"
    shutil.copytree(finished[0] / "runs" / "whole", folder)
    for name in ("result.json", "summary.json"):
        earlier = json.loads((folder / name).read_text()) | {"steps": 10}
        (folder / name).write_text(json.dumps(earlier))
    settings = [f"storage={tmp_path / 'runs'}", "mlflow.register=null"]
    result = train(finished[1], settings, resume=True)
    assert result["steps"] == 20 and result["checkpoint"].endswith("step-00000020")
    assert train(finished[1], settings, resume=True) == json.loads((folder / "result.json").read_text())


def _every_second_is_told(capsys: pytest.CaptureFixture[str], run: Path, wall_s: float) -> None:
    """The run's second attempt took `wall_s`, and resumed at step 10, after the first had reached 20."""
    told = ask(capsys, "run", "goodput", str(run))
    first, second = told["attempts"]
    assert told["attributed"] >= 0.99
    assert sum(told["parts"].values()) == pytest.approx(told["total_s"], rel=0.01)
    assert second["seconds"] == pytest.approx(wall_s, abs=2)  # Linux tells a process's start to a second
    assert sum(second["parts"].values()) == pytest.approx(second["seconds"], rel=0.01)
    assert all(second["parts"][p] > 0 for p in ("starting", "data", "computing", "communicating", "checkpoint", "evaluating"))
    assert second["parts"]["lost"] == 0 and first["parts"]["lost"] > 0
    assert (first["outcome"], first["reached"], second["start_step"], second["reached"]) == ("finished", 20, 10, 20)


@pytest.mark.ci
@pytest.mark.parametrize(("stage", "workers"), [(3, 4), (1, 1), (0, 2)])
def test_a_checkpoint_continues_at_any_stage_and_worker_count(stage, workers, finished, tracking, tmp_path) -> None:
    settings = _stopped_at_10(finished, tmp_path)
    result = train(finished[1], [*settings, *SET_PLAIN, f"train.zero.stage={stage}", f"workers.count={workers}"], resume=True)
    whole = curve(tracking, finished[2]["run_id"])
    assert _continued(tracking, result["run_id"]) == pytest.approx(whole[10:], abs=1e-5)


def test_plain_transformers_gets_the_recorded_evaluation_loss(finished, tracking) -> None:
    folder = resolve(finished[2]["model_uri"], tracking)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("def f():")["input_ids"]) == "def f():"
    found = saver.latest(Location(f"{finished[0]}/runs/whole"))
    assert found is not None
    dataset = open_dataset(DataPlan.parse(found.index.data))
    tokens = torch.from_numpy(dataset.read(dataset.order.held_out(24))).long()
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    assert loss == pytest.approx(finished[2]["eval"]["loss"], abs=1e-3)
    scores = evaluate(folder, str(dataset.sources[0].location), 24, None, 0.05)
    assert scores == pytest.approx(finished[2]["eval"], rel=1e-4)


def test_mlflow_holds_the_run_its_data_and_a_model_that_serves(finished, tracking) -> None:
    client = mlflow.MlflowClient(tracking_uri=tracking)
    run = client.get_run(finished[2]["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.optimizer.lr"] == "0.003"
    digest = manifest.read(Location(json.loads(finished[1].read_text())["data"]["sources"][0]["path"])).digest
    (given,) = run.inputs.dataset_inputs
    assert {t.key: t.value for t in given.tags}["digest"] == digest
    goodput = {k.removeprefix("train/time/"): v for k, v in run.data.metrics.items() if k.startswith("train/time/")}
    assert sum(v for k, v in goodput.items() if k.endswith("_s")) > goodput["computing_s"] > 0 < goodput["goodput"] < 1
    assert {"goodput.json", "goodput.png"} <= {f.path for f in client.list_artifacts(run.info.run_id)}
    assert run.data.metrics["eval/loss"] == pytest.approx(finished[2]["eval"]["loss"])

    mlflow.set_tracking_uri(tracking)
    model = mlflow.pyfunc.load_model(finished[2]["model_uri"])
    assert model.metadata.signature is not None
    assert model.metadata.saved_input_example_info is not None
    first, again = (model.predict(["def "], params={"max_tokens": 8, "seed": 3}) for _ in range(2))
    assert first == again
    assert isinstance(first[0], str)


def test_the_same_name_is_not_overwritten_and_a_finished_run_is_not_repeated(finished, corpus, tmp_path) -> None:
    with pytest.raises(ConfigError, match="--resume to continue"):
        train(finished[1])
    assert train(finished[1], resume=True) == finished[2]
    with pytest.raises(ConfigError, match=r"data.seed: 5 -> 6"):
        train(finished[1], ["data.seed=6", "train.steps=30"], resume=True)


def test_an_optimizer_that_the_checkpoints_do_not_fit_is_refused_on_resume(finished) -> None:
    """One line names the state in the checkpoints."""
    kept = r"'sgd' keeps momentum_buffer per parameter, but the run's checkpoints"
    fault = rf"^train\.optimizer: {kept} \('adamw'\) contain exp_avg, exp_avg_sq\. Set train\.optimizer\.name to 'adamw'"
    with pytest.raises(ConfigError, match=fault):
        train(finished[1], ["train.optimizer={name: sgd, lr: 0.1}", "train.steps=30"], resume=True)


def test_a_non_finite_loss_stops_the_run_and_names_the_step_and_samples(job_file, tracking, tmp_path) -> None:
    settings = ["train.optimizer.lr=1e30", "train.grad_clip=0", "train.schedule.warmup_steps=2"]
    settings += ["checkpoint.every=1", "evaluate=null"]
    with pytest.raises(NonFiniteError, match=r"step [2-6]: (gradient norm|loss) \S+\. Training stopped .*0:\d+:\d+"):
        train(job_file(), settings)
    found = saver.latest(Location(str(tmp_path / "runs" / "tiny")))
    assert found is not None
    assert all(torch.isfinite(found.read(f"master.{n}")).all() for n in found.names("master"))
    run_id = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())["run_id"]
    assert mlflow.MlflowClient(tracking_uri=tracking).get_run(run_id).info.status == "FAILED"


@pytest.mark.ci
def test_dataset_and_storage_on_s3_give_the_same_run(finished, s3_server, corpus, tracking, tmp_path) -> None:
    query = f"?{stores.bucket(s3_server, 'heliostat')}"
    bucket = Location(f"s3://heliostat{query}")
    source = Location(corpus)
    for name, _ in source.files():
        bucket.join("data", name).upload(Path(source.path) / name)
    settings = [f"data.sources.0.path=s3://heliostat/data{query}", f"storage=s3://heliostat/runs{query}", "mlflow.register=null"]
    result = train(finished[1], settings)
    assert curve(tracking, result["run_id"]) == curve(tracking, finished[2]["run_id"])
    assert saver.steps(bucket.join("runs", "whole")) == [10, 20]

    # and resumes from there: byte ranges of the shards, on another number of workers
    for name in ("checkpoints/step-00000020/checkpoint.json", "result.json", "run.json"):
        bucket.join("runs", "whole", name).delete()
    again = train(finished[1], [*settings, *SET_PLAIN, "workers.count=1", "train.zero.stage=3"], resume=True)
    assert _continued(tracking, again["run_id"]) == pytest.approx(curve(tracking, finished[2]["run_id"])[10:], abs=1e-5)


def test_a_torn_checkpoint_is_passed_over(finished, tmp_path) -> None:
    _stopped_at_10(finished, tmp_path)
    run = Location(str(tmp_path / "runs" / "whole"))
    shutil.copytree(finished[0] / "runs/whole/checkpoints/step-00000020", tmp_path / "runs/whole/checkpoints/step-00000020")
    shard = next((tmp_path / "runs/whole/checkpoints/step-00000020").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    newest = saver.latest(run)
    assert newest is not None
    assert newest.step == 10
