"""Tests jobs and pipelines that name models and datasets of the Hub: their downloads, and their records."""

import logging
import shutil

import pytest
import torch
import yaml
from heliostat.config import pretrained, spec
from heliostat.curation import prepare, prepare_report
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.plan.plan_file import plan_file
from heliostat.recipes import loading, model_origins
from heliostat.storage.locations import Location
from heliostat.tracking import card, models
from heliostat.validation import check
from transformers import AutoModelForCausalLM

from tests.unit import build_job
from tests.unit.build_language_model import ARCHITECTURES, write_model
from tests.unit.test_hub import parquet

CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (write_model(folder, ARCHITECTURES["llama"]) / "README.md").write_bytes(CARD)
    (folder / "model" / "heliostat.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def job_file(tiny, hub, tmp_path, monkeypatch):
    """Writes a job of `org/tiny` in its own workspace."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    hub.push("org/tiny", tiny / "model")
    changes = {"model": {"pretrained": "org/tiny"}, "data.sources.0.path": str(tiny / "data"), "data.sequence_length": 32}
    return build_job.write(tmp_path, **changes)


def weights(hub) -> list[str]:
    return [path for path in hub.downloads() if path.endswith(".safetensors")]


def test_check_and_plan_pin_a_model_and_download_no_weights(job_file, hub, caplog):
    caplog.set_level(logging.INFO)
    commit = hub.refs["models/org/tiny"]["main"]
    job = check.load_job(job_file)
    assert job.model == {"pretrained": "org/tiny"}
    checked, recipe = check.check_job(job)
    assert checked.model == {"pretrained": f"org/tiny@{commit}"} and recipe.config.hidden_size == 32
    assert f"model.pretrained: org/tiny@{commit}, " in caplog.text and " KB of weights" in caplog.text
    assert plan_file(job_file)["parameters"]["total"] > 10_000
    assert not weights(hub)

    trained = loading.load(checked, [manifest.read(checked.sources[0])]).build()  # as a worker does
    whole = AutoModelForCausalLM.from_pretrained(pretrained.located(checked).model["pretrained"])
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in trained.named_parameters())
    assert models.resolve("org/tiny", "sqlite://").samefile(pretrained.located(checked).model["pretrained"])
    assert len(weights(hub)) == 1


def test_a_folder_wins_over_a_name_of_the_hub(job_file, hub, tiny):
    shutil.copytree(tiny / "model", "org/tiny")
    hub.requests.clear()
    job, _ = check.check_job(check.load_job(job_file))
    assert job.model == {"pretrained": str(spec.workspace.root() / "org" / "tiny")} and not hub.requests


def test_a_run_that_resumes_keeps_the_commit_that_it_began_with(job_file, hub, tiny):
    job, _ = check.check_job(check.load_job(job_file))
    began = job.model["pretrained"]
    newer = hub.push("org/tiny", {"config.json": b"{}", "model.safetensors": b""})
    again = check.load_job(job_file)
    assert pretrained.pinned(again).model["pretrained"] == f"org/tiny@{newer}"
    assert pretrained.as_recorded(again, job.dump()).model["pretrained"] == began
    other = check.load_job(job_file, ["model.pretrained=org/tiny@v2"])  # which says so
    assert pretrained.as_recorded(other, job.dump()) == other


def test_the_parents_of_a_run_name_the_commit_and_its_license(job_file, hub):
    job, _ = check.check_job(check.load_job(job_file))
    (parent,) = card.parents(job)
    assert parent["folder"] == job.model["pretrained"] and parent["license"] == "apache-2.0" and parent["bytes"] > 10_000
    assert card.license_of(job, [parent]) == "apache-2.0" and not weights(hub)
    text = card.text(job, "r", 1, {}, [manifest.read(job.sources[0])], [parent])
    assert 'base_model: ["org/tiny"]' in text and parent["folder"] in text


def test_a_tokenizer_that_is_not_the_models_names_the_model_of_the_hub(job_file, hub, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "other")
    definition = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(definition.replace('"<|end|>"', '"<|stop|>"'))
    commit = hub.push("org/tiny", tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"write `tokenizer: \{{path: org/tiny@{commit}\}}`"):
        check.check_data(*check.check_job(check.load_job(job_file)))


def write_pipeline(folder, output, **keys):
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"pipeline": "tests.unit.build_pipeline:Here", "name": "d", "output": str(output), **keys}))
    return path


def test_a_dataset_of_the_hub_is_prepared_as_a_folder_with_its_commit_recorded(tiny, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_start_ray", lambda pipeline: None)
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(40)]
    content = {"README.md": b"# Text", "data/train-0.parquet": parquet(texts[:20]), "data/train-1.parquet": parquet(texts[20:])}
    commit, model = hub.push("org/d", content, "datasets"), hub.push("org/tiny", tiny / "model")
    keys = {"tokenizer": {"path": "org/tiny", "end_of_document": "<|end|>"}, "chunk_tokens": 200}
    file = write_pipeline(tmp_path, tmp_path / "out", input="hf://datasets/org/d", **keys)
    report = prepare.prepare(file, [], quiet=True)
    dataset = manifest.read(Location(str(tmp_path / "out")))
    assert dataset.meta["hub"] == {"input": f"hf://datasets/org/d@{commit}", "tokenizer.path": f"org/tiny@{model}"}
    assert report["hub"] == dataset.meta["hub"]
    assert f"from hf://datasets/org/d@{commit}" in "\n".join(prepare_report.explain(report))
    assert not weights(hub)  # of the tokenizer's model

    for path, data in content.items():
        if path.startswith("data/"):
            place = tmp_path / "plain" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    keys["tokenizer"] = {"path": str(tiny / "model"), "end_of_document": "<|end|>"}
    plain = write_pipeline(tmp_path, tmp_path / "again", input=str(tmp_path / "plain"), **keys)
    assert prepare.prepare(plain, [], quiet=True)["digest"] == dataset.digest  # where the same files come from doesn't count

    write_pipeline(tmp_path, tmp_path / "out", input="hf://datasets/org/d", **keys)
    hub.push("org/d", {**content, "README.md": b"# Better"}, "datasets")
    assert prepare.prepare(file, [], quiet=True)["up_to_date"]  # the same data
    hub.push("org/d", {**content, "data/train-1.parquet": parquet([t.upper() for t in texts[20:]])}, "datasets")
    assert prepare.prepare(file, ["input=hf://datasets/org/d@" + commit], quiet=True)["up_to_date"]
    assert prepare.prepare(file, [], quiet=True)["digest"] != dataset.digest


@pytest.mark.parametrize("header", ["date: 2024-99-99", f"a: {'[' * 3000}", "a: {"])
def test_a_models_card_that_is_not_readable_has_no_license(header, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{header}\n---\n")
    assert model_origins.of("org/tiny", tmp_path)["license"] is None
