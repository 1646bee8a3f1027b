"""Tests the user recipes in jobs/examples: they are trained, scored, exported, queried, and served like every shipped recipe."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
import transformers
import yaml
from heliostat.checkpoint import saver
from heliostat.cli.train import _print_result
from heliostat.curation.prepare import prepare
from heliostat.data.dataset import open_dataset, plan
from heliostat.data.manifest import Manifest, read
from heliostat.engine.sample_group import SampleGroup
from heliostat.errors import ConfigError
from heliostat.evaluation.losses import evaluate
from heliostat.inference.export import export
from heliostat.inference.generate import generate
from heliostat.recipes.protocol import Batch, Evaluates, Loss, Recipe
from heliostat.storage.locations import Location
from heliostat.tracking.models import resolve
from heliostat.training.run import train
from heliostat.training.worker.evaluation import HeldOut

from jobs.examples.classifier import Classifier
from tests.integration import ranks
from tests.integration.conftest import curve, tiny_job
from tests.unit import build_functions
from tests.unit.build_job import job

MODEL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128,
         "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def functions(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Makes the example's dataset from two packages, with its own pipeline."""
    folder = tmp_path_factory.mktemp("functions")
    pipeline = {"name": "functions", "pipeline": "jobs.examples.functions:Functions", "output": str(folder / "data"),
                "packages": ["asyncio", "email"], "vocab_size": 512, "chunk_rows": 64}  # fmt: skip
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    report = prepare(folder / "pipeline.yaml", [])
    assert report["kind"] == "rows" and report["documents"] > 500
    return str(folder / "data")


@pytest.fixture
def trained(tracking: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains an example on two workers for some seconds."""

    def run(name: str, recipe: str, dataset: str, length: int | None, steps: int) -> dict[str, Any]:
        made = {**tiny_job(dataset, tracking, tmp_path), "name": name, "recipe": recipe, "model": MODEL}
        made["data"] = {"sources": [{"path": dataset}], "seed": 5, **({"sequence_length": length} if length else {})}
        made["train"] = {
            **made["train"],
            "steps": steps,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "optimizer": {"lr": 5e-3},
        }
        made |= {"evaluate": {"every": steps, "samples": 64, "fraction": 0.1}, "checkpoint": {"every": steps}}
        made["mlflow"] = {**made["mlflow"], "register": name}
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(made))
        return train(tmp_path / "job.yaml")

    return run


def test_a_classifier_of_ones_own_trains_from_rows_to_a_served_model(trained, functions, tracking):
    """Rows have varying lengths, and parts of the loss are curves. Scores over all samples equal those of `heliostat model
    evaluate`.

    The model gives the same answers with plain transformers, `generate`, and MLflow.
    """
    result = trained("classifier", "jobs.examples.classifier:Classifier", functions, None, 40)
    losses = curve(tracking, result["run_id"])
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    padding, cut = (curve(tracking, result["run_id"], f"train/{name}") for name in ("padding", "cut"))
    assert all(0 < p < 1 for p in padding) and 0 < np.mean(cut) < 1
    assert set(result["eval"]) == {"loss", "accuracy", "macro_f1"} and result["eval"]["accuracy"] > 0.6
    folder = resolve(result["model_uri"], tracking)
    again = evaluate(folder, functions, 64, None, None)
    assert again == pytest.approx(result["eval"], rel=1e-4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert set(model.config.label2id) == {"asyncio", "email"}
    prompt = "async def wait(self): await self._loop.create_future()"
    answer = generate(folder, prompt, {}, 0, None)
    assert answer.facts["label"] in model.config.label2id and answer.shown == answer.facts["label"]
    assert mlflow.pyfunc.load_model(result["model_uri"]).predict([prompt]) == [answer.shown]
    assert [s["text"] for s in result["samples"]] == [f" -> {s['text'].removeprefix(' -> ')}" for s in result["samples"]]
    assert len(result["samples"]) == 2


@pytest.mark.ci
def test_a_masked_model_of_ones_own_trains_and_fills_in_words(trained, corpus, tracking):
    """It uses the tokens of a language model, with its own mask token in the export."""
    result = trained("masked-lm", "jobs.examples.masked_lm:MaskedLM", corpus, 64, 60)
    losses = curve(tracking, result["run_id"])
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    assert set(result["eval"]) == {"loss", "accuracy"} and 0 < result["eval"]["accuracy"] < 1
    folder = resolve(result["model_uri"], tracking)
    assert evaluate(folder, corpus, 64, None, None) == pytest.approx(result["eval"], rel=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.mask_token == "[MASK]" and len(tokenizer.encode("x [MASK]")) == 3
    answer = generate(folder, "import [MASK]\nfrom [MASK]", {}, 0, None)
    assert len(answer.facts["words"]) == 2
    assert mlflow.pyfunc.load_model(result["model_uri"]).predict(["import [MASK]\nfrom [MASK]"]) == [answer.shown]


class Bigrams(Recipe, Evaluates):
    """Implements only the required methods and scores: it isn't exported, queried, or served."""

    kind = "tokens"

    def bind(self, sources: list[Manifest]) -> None:
        self.size = sources[0].fact("vocab_size")

    def build(self) -> torch.nn.Module:
        return torch.nn.Embedding(self.size, self.size)

    def batch(self, content: np.ndarray, keys: np.ndarray) -> Batch:
        tokens = torch.from_numpy(np.ascontiguousarray(content)).long()
        return {"given": tokens[:, :-1], "labels": tokens[:, 1:]}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        return Loss(self.evaluate(model, batch)["loss"].sum())

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits, labels = model(batch["given"]).transpose(1, 2), batch["labels"]
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum(1)
        return {"loss": losses, "terms": torch.full_like(losses, labels.shape[1])}


def test_a_recipe_that_is_neither_exported_nor_served_trains_to_its_end(job_file, tracking, tmp_path, caplog, capsys):
    """It has scores, checkpoints, and a result that reports the missing model. An export is rejected with the reason."""
    made = yaml.safe_load(job_file("bigrams").read_text()) | {"recipe": f"{__name__}:Bigrams", "model": {}}
    made["train"]["optimizer"]["lr"] = 0.3
    (tmp_path / "bigrams.yaml").write_text(yaml.safe_dump(made))
    with caplog.at_level(logging.WARNING, logger="heliostat"):
        result = train(tmp_path / "bigrams.yaml")
    said = f"no model logged in MLflow: the recipe {__name__}:Bigrams doesn't support export. The run's checkpoints remain"
    assert said in caplog.text and result["model_uri"] is None and result["samples"] == []
    assert result["eval"]["loss"] < curve(tracking, result["run_id"])[0]
    assert train(tmp_path / "bigrams.yaml", resume=True) == result
    assert mlflow.MlflowClient(tracking_uri=tracking).get_run(result["run_id"]).info.status == "FINISHED"
    _print_result(result)
    assert f"model not logged, run {result['run_id']}" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="Bigrams doesn't support export: it doesn't derive from Exports"):
        export(saver.latest(Location(made["storage"]).join("bigrams")), tmp_path / "out")


def measured(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In every rank, yields the scores of one untrained model on the held-out rows."""
    changes = {"data.sources.0.path": folder, "data.sequence_length": None, "model": {**MODEL, "max_position_embeddings": 96}}
    made = job(
        **changes,
        **{"evaluate.samples": 70, "evaluate.fraction": 0.3, "train.global_batch_size": 24, "train.micro_batch_size": 4},
    )
    source = read(Location(folder))
    recipe = Classifier(made)
    recipe.bind([source])
    torch.manual_seed(0)
    model = recipe.build().eval()
    seen: list[dict[str, np.ndarray]] = []
    recipe.measure = lambda arrays: seen.append(arrays) or {"n": len(arrays["label"])}  # type: ignore[func-returns-value,method-assign]
    recipe.gathered = ("loss", "label")  # every bit of every sample's loss
    held = HeldOut(made, open_dataset(plan(made, [source])), recipe, SampleGroup())
    scores = held.scores(model, torch.device("cpu"), group, lambda: None)
    yield {"scores": scores, "losses": [float(x).hex() for arrays in seen for x in arrays["loss"]]}


def test_what_is_gathered_has_the_same_bits_on_any_number_of_workers(tmp_path):
    """The losses of 70 rows of varying length, in the samples' order, on 1, 2, and 3 workers. All ranks have the scores."""
    build_functions.dataset(tmp_path)
    told = ranks.run(f"{__name__}:measured", (1, 2, 3), str(tmp_path))
    assert len(told) == 6 and all(row["scores"]["n"] == 70 for row in told)
    found = [row["losses"] for row in told if row["rank"] == 0]
    assert [len(losses) for losses in found] == [70] * 3 and found[0] == found[1] == found[2]
    assert len(set(found[0])) > 60 and not any(row["losses"] for row in told if row["rank"])
