"""Tests that the model that MLflow serves takes the parameters of its signature, and answers like the exported one."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from heliostat.recipes.text import server
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.tracking.models import _unchecked

from tests.unit.build_job import BASE, job
from tests.unit.test_samples import make_text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a small language model with random weights, as the end of a run logs it."""
    folder = tmp_path_factory.mktemp("served")
    recipe = CausalLM(
        job(**{"model": {**BASE["model"], "vocab_size": 320}, "data.sequence_length": 16, "train.precision": "fp32"})
    )
    recipe.bind([make_text(folder / "data")])
    torch.manual_seed(0)
    recipe.build().save_pretrained(folder / "model")
    recipe.save_config(folder / "model")
    recipe.prompts = ("a b",)
    serving = recipe.serving()
    with _unchecked():
        mlflow.pyfunc.save_model(
            folder / "logged",
            python_model=str(serving.code),
            artifacts={"model": str(folder / "model")},
            signature=serving.signature,
            input_example=serving.example,
            pip_requirements=list(serving.requirements),
        )
    return mlflow.pyfunc.load_model(str(folder / "logged"))


def test_the_signature_names_the_parameters_and_their_defaults(served):
    """MLflow would derive its own signature from type hints, without parameters, and then drop the given ones."""
    params = {p.name: p.default for p in served.metadata.signature.params}
    assert params == {"max_tokens": 100, "temperature": 0.8, "top_p": 0.95, "seed": 0}
    assert [c.type.name for c in served.metadata.signature.inputs] == ["string"]


def test_parameters_reach_the_model(served):
    """A longer answer begins like the shorter one, a second prompt is answered as well, and the default is a hundred tokens."""
    few, many = (served.predict(["a b"], params={"max_tokens": n, "temperature": 0.0})[0] for n in (2, 12))
    assert many.startswith(few.rstrip("\ufffd")) and len(many) > len(few)
    assert len(served.predict(["a b", "c"], params={"max_tokens": 2})) == 2
    assert served.predict(["a b"], params={"max_tokens": 2, "seed": 1}) == served.predict(
        ["a b"], params={"max_tokens": 2, "seed": 1}
    )


@pytest.mark.parametrize("name", ["text/server.py", "images/server.py", "images/autoencoder_server.py", "served.py"])
def test_no_server_has_hints_from_which_mlflow_would_take_the_signature(name):
    """The server's code is in a model's own folder, where heliostat may not be installed."""
    text = (Path(server.__file__).parents[1] / name).read_text()
    assert "model_input: TypeFromExample" in text and "model_input: list" not in text


def test_a_logged_model_names_what_it_requires(served, tmp_path_factory):
    """Although MLflow doesn't compare them with all installed packages, which takes a second."""
    found = tmp_path_factory.getbasetemp() / "served0" / "logged" / "requirements.txt"
    assert {"mlflow", "torch", "transformers", "accelerate"} <= {line.split("=")[0] for line in found.read_text().split()}
