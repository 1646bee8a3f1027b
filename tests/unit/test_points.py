"""Tests that each metric and tag has one name in one place, and that records with former names are found."""

import re
from pathlib import Path

import heliostat
import pytest
from heliostat.runs.events import Evaluation, Goodput, LossSpike, NodeSample, Saved, Steps
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.tracking import metrics, outbox, tags, ui
from heliostat.tracking.metrics import METRICS, RESERVED, Metric, Point, latest, metric_of, points, renamed

SOURCE = Path(heliostat.__file__).parent


def test_the_columns_of_mlflows_table_of_runs_are_metrics():
    assert all(metric_of(name) for name in ui.COLUMNS)


@pytest.mark.parametrize(
    ("former", "name"),
    [
        ("goodput/fraction", "train/time/goodput"),
        ("goodput/worker_hours", "train/time/worker_hours"),
        ("goodput/computing_s", "train/time/computing_s"),
        ("data/corpus.1/tokens", "train/data/corpus.1/tokens"),
        ("train/data_wait", "train/data/wait"),
        ("train/bad_samples", "train/data/bad_samples"),
        ("checkpoint/blocked_s", "train/checkpoint/blocked_s"),
        ("checkpoint/bits_per_byte", "train/checkpoint/bits_per_byte"),
        ("train/loss", "train/loss"),
        ("eval/loss", "eval/loss"),
        ("somebody's", "somebody's"),
    ],
)
def test_metrics_of_recorded_runs_are_found_by_their_names_of_today(former, name):
    assert renamed(former) == name and renamed(name) == name
    assert latest({former: 1.0}) == {name: 1.0} and latest({former: 1.0, name: 2.0}) == {name: 2.0}
    assert former == name or latest({name: 2.0, former: 1.0}) == {name: 2.0}


def test_a_name_has_one_declaration_and_what_mlflow_shows_first_is_what_people_look_at():
    """MLflow's UI sorts the sections of charts, which are the names up to the last slash, and puts system metrics last."""
    event = Steps(first=0, loss=[1.0], lr=[1.0], grad_norm=[1.0], seconds=1.0, at=1.0, mfu=0.5, tokens_per_second=1.0,
                  data_wait=0.0, bad_samples=0, added={"router_loss": [1.0]}, loss_scale=2.0, skipped_steps=0,
                  sources={"corpus": {"tokens": 1.0, "samples": 1.0, "epochs": 1.0}})  # fmt: skip
    report = {"goodput": 0.5, "worker_hours": 1.0, "parts": {"idle": 1.0}}
    others = [Evaluation(step=1, scores={"loss": 1.0, "perplexity": 2.0}), Goodput(report=report, step=1),
              Saved(step=1, blocked_s=1.0), LossSpike(step=1, loss=9.0, limit=2.0),
              NodeSample(node="10.0.0.1", values={"cpu_utilization_percentage": 5.0})]  # fmt: skip
    logged = [p.key for e in (event, *others) for p in points(e)]
    assert len(logged) == len(set(logged)) and all(metric_of(key) for key in logged)
    sections = sorted({key.rpartition("/")[0] for key in logged} - {"system"})
    assert sections == ["eval", "train", "train/checkpoint", "train/data", "train/data/corpus", "train/time"]
    assert sorted(k for k in logged if k.startswith("train/") and k.count("/") == 1)[:2] == ["train/grad_norm", "train/loss"]
    assert "system/cpu_utilization_percentage 10.0.0.1" in logged
    assert all(metric.chart or not metric.unit for metric in METRICS)


def test_a_steps_loss_comes_after_the_rest_of_the_step():
    """The loss shows how far MLflow's curves go, so a step with a loss must have all of its values."""
    event = Steps(first=4, loss=[3.0, 2.0], lr=[0.1, 0.2], grad_norm=[1.0, 1.5], seconds=4.0, at=10.0, tokens_per_second=7.0)
    assert points(event) == [
        Point("train/tokens_per_second", 7.0, 10.0, 6),
        Point("train/grad_norm", 1.0, 8.0, 5), Point("train/lr", 0.1, 8.0, 5), Point("train/loss", 3.0, 8.0, 5),
        Point("train/grad_norm", 1.5, 10.0, 6), Point("train/lr", 0.2, 10.0, 6), Point("train/loss", 2.0, 10.0, 6),
    ]  # fmt: skip


def test_a_runs_first_points_come_in_the_order_in_which_metrics_are_declared():
    """MLflow's UI lists metrics in this order, and compares runs by the first one."""
    event = Steps(first=0, loss=[3.0, 2.0], lr=[0.1, 0.2], grad_norm=[1.0, 1.5], seconds=4.0, at=10.0, tokens_per_second=7.0)
    keys = [p.key for p in points(event)]
    assert keys == ["train/loss", "train/lr", "train/grad_norm"] * 2 + ["train/tokens_per_second"]


def test_a_value_of_each_step_needs_one_declaration(monkeypatch):
    """A step's measurement travels with the recipe's parts. One line in METRICS draws it, and it isn't logged twice."""
    weight = Metric("train/weight_norm", Steps, lambda e: e.added.get("weight_norm"), "Weight norm", section="Optimizer")
    monkeypatch.setattr(metrics, "METRICS", (weight, *METRICS))
    added = {"router_loss": [3.0, 4.0], "weight_norm": [1.0, 2.0]}
    event = Steps(first=4, loss=[3.0, 2.0], lr=[0.1, 0.2], grad_norm=[1.0, 1.5], seconds=4.0, at=10.0, added=added)
    assert [p.value for p in points(event) if p.key == "train/weight_norm"] == [1.0, 2.0]
    assert [p.value for p in points(event) if p.key == "train/router_loss"] == [3.0, 4.0]
    assert metric_of("train/weight_norm") is weight


def test_the_names_of_all_metrics_of_a_step_are_reserved():
    """Otherwise a part of a recipe's loss could have the name of a metric, also of one in recorded runs, and be lost."""
    names = {name for metric in METRICS for name in (metric.name, metric.formerly)}
    of_steps = {name.removeprefix("train/") for name in names if re.fullmatch(r"train/\w+", name)}
    assert set(RESERVED) == of_steps and {"loss", "grad_norm", "spike_limit", "data_wait", "bad_samples"} <= of_steps


def test_what_an_earlier_version_could_not_log_is_logged_under_the_names_of_today(tmp_path):
    place = Location(str(tmp_path))
    place.join(run_folder.UNLOGGED).write(b'["train/loss", 2.0, 1.0, 3]\n["goodput/fraction", 0.5, 1.0, 3]\n')
    sent: list[Point] = []
    outbox.Outbox(place, sent.extend, dict).flush()
    assert [p.key for p in sent] == ["train/loss", "train/time/goodput"]


def test_tags_of_recorded_runs_are_found_by_their_former_names():
    assert tags.value({"heliostat.token": "t"}, tags.TOKEN) == "t" == tags.value({tags.TOKEN: "t"}, tags.TOKEN)
    assert tags.value({"heliostat.name": "n"}, tags.NAME) == "n" and tags.value({}, tags.TOKEN) is None
    assert all(name.startswith("mlflow.heliostat.") for name in tags.FORMERLY)  # which MLflow's UI does not show


def test_tags_are_named_as_in_runs_that_are_recorded():
    """A renamed tag hides every earlier run, model, and version: they then have no folder. To rename one on purpose, add the
    former name to FORMERLY."""
    named = {tags.NAME: "name", tags.FOLDER: "run_folder", tags.RECIPE: "recipe", tags.DIRTY: "dirty", tags.VERSION: "version.",
             tags.REASON: "reason", tags.MODEL_URI: "model_uri", tags.SPIKES: "spikes", tags.CORRUPTION: "corruption",
             tags.BAD_NODES: "bad_nodes", tags.PARENT_RUNS: "parent_runs", tags.REPRODUCES: "reproduces", tags.SWEEP: "sweep",
             tags.SWEEP_FOLDER: "sweep_folder", tags.SWEEP_RUN: "sweep_run", tags.TRIAL: "trial", tags.STATUS: "status",
             tags.PRUNED: "pruned", tags.CLONES: "clones", tags.BEST_TRIAL: "best_trial", tags.BEST_RUN: "best_run",
             tags.STEP: "step", tags.PLACE: "uri", tags.DATA_DIGEST: "data_digest", tags.RECEIPT: "receipt",
             tags.DELETED: "deleted", tags.WORKERS: "workers", tags.ZERO_STAGE: "zero_stage", tags.SCORE: "score.",
             tags.HISTORY: "history"}  # fmt: skip
    assert {name: f"heliostat.{plain}" for name, plain in named.items()} == {name: name for name in named}
    hidden = {tags.TOKEN: "token", tags.STEPS: "steps", tags.WRITTEN: "written", tags.LOGGED: "logged", tags.MADE_OF: "made_of"}
    assert {name: f"mlflow.heliostat.{plain}" for name, plain in hidden.items()} == {name: name for name in hidden}
    known = {v for k, v in vars(tags).items() if k.isupper() and isinstance(v, str) and "heliostat." in v}
    assert known == {*named, *hidden}


def test_no_module_spells_a_tag_by_itself():
    known = {v for k, v in vars(tags).items() if k.isupper() and isinstance(v, str) and v.startswith(("heliostat.", "mlflow."))}
    known |= set(tags.FORMERLY.values())
    spelled = re.compile("|".join(rf"[\"']{re.escape(name)}" + ("" if name.endswith(".") else r"[\"']") for name in known))
    found = [f"{path.relative_to(SOURCE)}: {hit}" for path in SOURCE.rglob("*.py") if path != Path(tags.__file__)
             for hit in spelled.findall(path.read_text())]  # fmt: skip
    assert found == []
