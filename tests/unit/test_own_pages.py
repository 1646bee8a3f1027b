"""Tests that the pages on your own data and model (docs/own/) write valid files: five keys are a job, and a page's recipe learns.

`tests/integration/test_own_pages.py` types the pages unchanged.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from heliostat.config import spec
from heliostat.recipes import conformance

from docs.site.walk import steps
from tests.unit.build_job import job

PAGES = sorted((Path(__file__).parents[2] / "docs" / "own").glob("*.md"))
FILES = dict(step.file for page in PAGES for step in steps(page.read_text(encoding="utf-8")) if step.file)
JOBS = sorted(name for name, text in FILES.items() if name.endswith(".yaml") and "\nmodel:" in text)
PIPELINES = sorted(name for name, text in FILES.items() if name.endswith(".yaml") and "\npipeline:" in text)


def leaves(value: object) -> int:
    return sum(map(leaves, value.values())) if isinstance(value, dict) else 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_model", None)


def test_every_page_has_a_pipeline_and_a_job():
    assert len(PAGES) == len(JOBS) == len(PIPELINES) == 5


@pytest.mark.parametrize("name", JOBS)
def test_a_job_of_a_page_is_valid(name, folder):
    assert spec.load(folder / name).name == Path(name).stem


def test_own_text_a_dataset_and_a_class_take_five_or_six_keys():
    keys = {name: {**yaml.safe_load(FILES[name]), "model": 1} for name in ("writer.yaml", "reader.yaml", "conv.yaml")}
    assert {name: leaves(value) for name, value in keys.items()} == {"writer.yaml": 5, "reader.yaml": 5, "conv.yaml": 6}


def test_the_pages_recipe_is_complete_and_learns(folder):
    my_model = importlib.import_module("my_model")  # the page's file, in the folder of this test
    recipe = conformance.require_class("recipe", "my_model:ConvLM", my_model.ConvLM)(job(model={"width": 32}))
    recipe.vocabulary = 17
    torch.manual_seed(0)
    model = recipe.build()
    tokens = np.arange(8 * 33, dtype=np.int32).reshape(8, 33) % 17  # each follows from the one before
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-2), []
    for _ in range(30):
        batch = recipe.batch(tokens, np.arange(8))
        loss = recipe.loss(model, batch).sum / recipe.terms(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert recipe.terms(batch) == 8 * 32 and losses[-1] < 0.3 * losses[0]
