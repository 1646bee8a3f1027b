"""Tests training with DPO on ranks without Ray: it trains like a plain loop over single sequences in fp64, with the dataset's
reference and with the adapter off, and resumes on other numbers of workers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from heliostat.config.spec import Job
from heliostat.curation.prepare import prepare
from heliostat.errors import ConfigError
from heliostat.evaluation.losses import evaluate
from heliostat.numerics import play
from heliostat.recipes.folder_digests import weights_digest
from heliostat.tracking.models import resolve
from heliostat.training.run import train
from heliostat.training.worker.step_reports import StepReports, TrainedTokens
from mlflow import MlflowClient

from tests.integration import layouts, ranks
from tests.integration.conftest import curve, tiny_job
from tests.integration.pipelines import write_pipeline
from tests.unit import build_conversations
from tests.unit.build_conversations import WORDS
from tests.unit.test_dpo import plain_logprob, plain_losses, referenced, write_base


@dataclass(frozen=True)
class Case:
    stage: int
    workers: int
    micro: int = 1
    adapter: bool = False  # and the reference is the base
    loss: str = "sigmoid"
    thrifty: bool = False  # tiled loss, and checkpointed activations

    def __str__(self) -> str:
        more = "-adapter" * self.adapter + f"-{self.loss}" * (self.loss != "sigmoid") + "-thrifty" * self.thrifty
        return f"zero{self.stage}-{self.workers}-{self.micro}{more}"


SAVED, RESUMED = Case(2, 2, 2), [Case(3, 1), Case(1, 4)]
CASES = [Case(0, 1, loss="ipo"), SAVED, Case(3, 2, adapter=True, thrifty=True, loss="ipo")]


def _job(case: Case, folder: Path) -> Job:
    settings = {"loss": case.loss, "beta": 0.2, "label_smoothing": 0.0 if case.loss == "ipo" else 0.1}
    model: dict[str, Any] = {"pretrained": str(folder / "model"), "dpo": settings, "samples": None}
    changes = {"recipe": "heliostat.recipes:DPO", "data.sequence_length": None, "workers.count": case.workers}
    changes |= {"train.zero.stage": case.stage, "train.deepspeed": layouts.SMALL_STAYS_DIVIDED}
    changes |= {"data.sources": [{"path": str(folder / ("preferences" if case.adapter else "referenced"))}]}
    if case.adapter:
        changes |= {"model": {**model, "adapter": {"rank": 2}}}
    else:
        changes |= {"model": model}
    if case.thrifty:
        changes |= {"train.tiled_loss": True, "train.activation_checkpointing": True}
    return layouts.described(case, folder, **{**changes, "train.micro_batch_size": case.micro})


GRID = layouts.Grid(CASES, _job, {}, lambda case: case)


def gradients(group: Any, everyone: Any, place: str) -> Iterator[dict[str, Any]]:
    """Yields the differences of each case's losses and gradients in two steps from those of a plain loop in fp64, and the error
    of the report of these steps. Then yields the losses of two more steps of SAVED, and of the cases that resume from it."""
    folder, workers = Path(place), torch.distributed.get_world_size()
    for case in (case for case in CASES if case.workers == workers):
        made = _job(case, folder)
        with layouts._alone(GRID, case, folder) as one:
            computed = list[dict[str, torch.Tensor]]()
            play.watch(one.engine, computed.append)
            for step in range(2):
                weights = play.masters(one.engine)
                (loss,) = one.losses(step, step + 1)
                content = one.dataset.read(one.dataset.order.locate(one.dataset.order.step(step).ravel()))
                if one.rank == 0:
                    yield {"case": str(case), "step": step, **_compared(made, one.recipe, content, weights, loss, computed[step])}
            if case is SAVED:
                one.save(2)
                yield {"resumed": str(case), "losses": one.losses(2, 4)}
            yield {"reported": str(case), "error": _reported(one)}
    everyone.wait()
    for case in (case for case in RESUMED if case.workers == workers):
        with layouts._alone(GRID, case, folder) as one:
            one.load(_job(SAVED, folder).run_folder, 2)
            yield {"resumed": str(case), "losses": one.losses(2, 4)}


def _reported(one: play.Player) -> str:
    """Reports the steps as a worker does. Returns the error."""
    reports = StepReports(one.state.context, one.engine, one.recipe, one.unsealed, [], one.stepper.report,
                          TrainedTokens(one.recipe, one.dataset.order, one.sharing.counts))  # fmt: skip
    try:
        reports.report(len(one.stepper.losses))
    except ConfigError as e:
        return str(e)
    return ""


def _compared(
    made: Job, recipe: Any, content: Any, weights: dict[str, torch.Tensor], loss: float, mine: dict[str, torch.Tensor]
) -> dict[str, Any]:
    model = recipe.build().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name].view(parameter.shape))
    rows = content.to_pylist()
    if recipe.from_dataset:
        references = np.array([[row["reference_chosen"], row["reference_rejected"]] for row in rows])
    else:  # a new adapter changes nothing
        base = recipe.build().double()
        references = np.array([[_logprob(base, row, side) for side in ("chosen", "rejected")] for row in rows])
    settings = recipe.settings
    right = plain_losses(model, rows, references, settings.loss, settings.beta, settings.label_smoothing) / len(rows)
    right.backward()
    differences = [
        float((mine[name] - p.grad).abs().max() / p.grad.abs().max().clamp(min=1e-9))
        for name, p in model.named_parameters() if p.grad is not None
    ]  # fmt: skip
    return {"loss": abs(loss - float(right)) / float(right), "worst": max(differences), "compared": len(differences)}


@torch.no_grad()
def _logprob(model: torch.nn.Module, row: dict[str, Any], side: str) -> float:
    return float(plain_logprob(model, row["prompt"], row[side]))


@pytest.mark.ci
def test_losses_and_gradients_equal_those_of_a_plain_loop_over_single_sequences(tmp_path: Path) -> None:
    """In two steps, in fp64. `test_fine_tuning` compares DPO in more configurations, with a plain loop in fp32.

    A run that resumes on one or four workers, at another stage, has the losses of the uninterrupted run. All workers report that
    the made-up log-probabilities aren't those of the model, and that a new adapter's model is its own reference.
    """
    write_base(tmp_path)
    data = build_conversations.preferences(tmp_path / "preferences", 48)
    referenced(data, tmp_path / "referenced", weights_digest(tmp_path / "model"))
    rows = ranks.run(f"{__name__}:gradients", (1, 2, 4), str(tmp_path), deadline_s=480)
    compared = [row for row in rows if "case" in row]
    assert len(compared) == 2 * len(CASES)
    assert [row for row in compared if not (row["loss"] < 1e-5 and row["worst"] < 1e-5 and row["compared"])] == []
    resumed = [row for row in rows if "resumed" in row]
    assert len(resumed) == sum(case.workers for case in (SAVED, *RESUMED))
    unbroken = next(row["losses"] for row in resumed if row["resumed"] == str(SAVED))
    assert [row for row in resumed if row["losses"] != pytest.approx(unbroken, rel=1e-5)] == []
    reported = [row for row in rows if "reported" in row]
    assert len(reported) == sum(case.workers for case in CASES)
    for row in reported:
        assert ("at step 1, the model isn't its reference" in row["error"]) == ("adapter" not in row["reported"])


# a run ----------------------------------------------------------------------------------------------------------------


def write_records(folder: Path, number: int) -> None:
    """Writes pairs of answers, of which the better one is in the first half of WORDS."""
    drawn, lines = np.random.default_rng(7), []
    for _ in range(number):
        words = [str(word) for word in drawn.permutation(WORDS)[:3]]
        question = {"role": "user", "content": " ".join(words)}
        sides = {"chosen": str(drawn.choice(WORDS[:6])), "rejected": str(drawn.choice(WORDS[6:]))}
        lines.append({name: [question, {"role": "assistant", "content": word}] for name, word in sides.items()})
    folder.mkdir()
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.ci
def test_a_model_learns_preferences_from_files(ray_session: None, tracking: str, tmp_path: Path) -> None:
    """From JSON lines to an evaluated export. The reference comes from a pipeline, and a run with another model is rejected.
    `test_chain` resumes such a run on another number of workers."""
    model, other = write_base(tmp_path), write_base(tmp_path / "another", seed=1)
    write_records(tmp_path / "in", 160)
    keys = {"model": str(model), "sequence_length": 64}
    pairs = prepare(write_pipeline(tmp_path, "PreferencePipeline", "pairs", output=str(tmp_path / "pairs"), **keys), [])
    keys = {"input": str(tmp_path / "pairs"), "model": str(model)}
    yaml_file = write_pipeline(tmp_path, "ReferencePipeline", "references", **keys)
    made = prepare(yaml_file, [])
    assert made["documents"] == pairs["documents"] > 100 and prepare(yaml_file, [])["up_to_date"]

    job = tiny_job(made["dataset"], tracking, tmp_path)
    del job["data"]["sequence_length"]
    job["train"]["steps"], job["evaluate"]["every"], job["checkpoint"]["every"], job["workers"]["count"] = 12, 12, 6, 1
    job |= {"name": "preferred", "recipe": "heliostat.recipes:DPO", "model": {"pretrained": str(model), "dpo": {"beta": 0.5}}}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    with pytest.raises(ConfigError, match="log-probabilities of another reference"):
        train(path, [f"model.pretrained={other}"])
    result = train(path, ["train.zero.stage=3"])
    losses = curve(tracking, result["run_id"])
    assert losses[0] == pytest.approx(np.log(2), rel=1e-5) and len(losses) == 12 and losses[-1] < losses[0] / 2
    scores = result["eval"]
    assert scores["accuracy"] > 0.8 and scores["margin"] > 0.5
    logged = MlflowClient(tracking_uri=tracking).get_run(result["run_id"]).data.metrics
    assert {f"train/{name}" for name in ("margin", "accuracy", "chosen_reward", "rejected_reward")} <= logged.keys()
    exported = evaluate(Path(resolve(result["model_uri"], tracking)), made["dataset"], 24, None, 0.05)
    assert exported["loss"] == pytest.approx(scores["loss"], rel=1e-3)
