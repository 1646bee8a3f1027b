"""Tests that the example in docs/guides/recipe.md is a complete recipe, by running it unchanged."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from heliostat.data.dataset import open_dataset
from heliostat.recipes.counter_random import normals
from heliostat.recipes.protocol import Loss, Recipe
from heliostat.validation import check
from PIL import Image

from tests.unit import build_images
from tests.unit.build_job import job

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "recipe.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)[1]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    (tmp_path / "guided").mkdir()
    (tmp_path / "guided" / "digits.py").write_text(block("python"))
    build_images.digits(tmp_path / "data")
    written = yaml.safe_load(block("yaml")) | {"recipe": "guided.digits:Digits", "storage": str(tmp_path / "runs")}
    written["data"]["sources"][0]["path"] = str(tmp_path / "data")
    written["mlflow"]["uri"] = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(written))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("guided")]:
        del sys.modules[name]


def test_the_guides_recipe_passes_the_check_and_learns(workspace):
    """Its job is valid as written, and some of its steps over the engine's own batches lower the loss."""
    checked = check.check(check.load_job(workspace / "job.yaml"))
    job, recipe, data = checked.job, checked.recipe, open_dataset(checked.plan)
    torch.manual_seed(0)
    model = recipe.build()
    optimizer, losses = torch.optim.AdamW(model.parameters(), job.train.optimizer.lr), []
    for step in range(60):
        content = data.read(data.order.locate(data.order.step(step).ravel()))
        batch = recipe.batch(content, np.arange(32) + 32 * step)
        loss = recipe.loss(model, batch)
        assert recipe.terms(batch) == 32 and list(loss.parts) == ["confidence"]
        (loss.sum / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.sum.item() / 32)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    with torch.no_grad():
        scores = {name: float(value.sum()) for name, value in recipe.evaluate(model, batch).items()}
    assert set(recipe.metrics(scores)) == set(recipe.scores)
    assert recipe.describe(content.slice(0, 1)).startswith("id digits#")


def test_the_guides_example_of_complete_draws_from_keys_and_takes_a_complete_batch():
    """A sample's noise depends on its key, in any batch. `loss` completes an incomplete batch."""
    code = next(block for block in re.findall(r"```py\n(.*?)```", GUIDE, re.DOTALL) if "def complete" in block)
    names = {"io": io, "np": np, "torch": torch, "Image": Image, "Loss": Loss, "normals": normals}
    exec(compile(code, "docs/guides/recipe.md", "exec"), names)
    members = {name: names[name] for name in ("batch", "complete", "loss")}
    recipe = type("Noisy", (Recipe,), {**members, "kind": "rows", "build": lambda self: torch.nn.Linear(8, 8)})(job())
    png = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(png, format="png")
    rows, model = pa.table({"image": [png.getvalue()] * 3}), recipe.build()
    batch = recipe.complete(recipe.batch(rows, np.array([5, 6, 7])))
    alone = recipe.complete(recipe.batch(rows.slice(0, 1), np.array([6])))
    assert torch.equal(batch["noise"][1:2], alone["noise"]) and not torch.equal(batch["noise"][0], batch["noise"][1])
    assert recipe.complete(batch) is batch
    loss = recipe.loss(model, recipe.batch(rows, np.array([5, 6, 7])))
    assert torch.equal(loss.sum, recipe.loss(model, batch).sum) and loss.sum.shape == ()


def test_every_base_class_is_in_the_guide():
    """Every message that refers to a page names an existing page."""
    from heliostat.recipes import protocol

    assert Path(protocol.GUIDE).name == "recipe.md" and "## From the first form" in GUIDE
    for name in (
        "Recipe",
        "Evaluates",
        "Exports",
        "Generates",
        "Serves",
        "Draws",
        "Loss",
        "Part",
        "Group",
        "Companion",
        "Weight",
    ):
        assert hasattr(protocol, name) and re.search(rf"\b{name}\b", GUIDE), name
