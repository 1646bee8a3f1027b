"""Tests the target folder of `heliostat model export`, and the files in it afterwards."""

import json

import pytest
from heliostat.checkpoint import layout
from heliostat.errors import ConfigError
from heliostat.inference.export import export
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location
from safetensors.torch import load_file, save_file

from tests.unit import fuzz_targets
from tests.unit.build_job import job


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Writes a checkpoint of a language model with any weights."""
    monkeypatch.chdir(fuzz_targets.ROOT)
    (tmp_path / "right").mkdir()
    fuzz_targets.checkpoints(tmp_path / "right")
    return layout.open_checkpoint(Location(str(tmp_path / "right" / "run")), 20)


def test_a_folder_that_holds_something_is_not_written_into(made, tmp_path):
    """It doesn't replace a file either, and nothing in the folder changes."""
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "config.json").write_text("mine")
    for place in (tmp_path / "to", tmp_path / "to" / "config.json"):
        with pytest.raises(ConfigError, match=r"/to.*: not empty, and .* Pass another folder"):
            export(made, place)
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["config.json"]
    assert (tmp_path / "to" / "config.json").read_text() == "mine"


def test_how_the_model_writes_is_exported(made, tmp_path):
    """A loader of the folder knows where the model stops. For a pretrained model, the export keeps its folder's settings."""
    from heliostat.inference.export import recipe_of

    recipe = recipe_of(made)[1]
    recipe.save_config(tmp_path / "one")
    found = json.loads((tmp_path / "one" / "generation_config.json").read_text())
    assert found["eos_token_id"] == found["bos_token_id"] == 0
    (tmp_path / "one" / "generation_config.json").write_text(json.dumps({**found, "temperature": 0.5, "do_sample": True}))
    recipe.pretrained = str(tmp_path / "one")
    recipe.save_config(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "generation_config.json").read_text())["temperature"] == 0.5


def test_a_model_folder_that_lacks_a_weight_is_refused(tmp_path, monkeypatch):
    """For writing, scoring, and fine-tuning. transformers would use random numbers for the weight, with an easily missed
    warning."""
    monkeypatch.chdir(fuzz_targets.ROOT)
    (tmp_path / "right").mkdir()
    target = fuzz_targets.models(tmp_path / "right")
    target.read(tmp_path / "right")
    place = tmp_path / "right" / "model" / "model.safetensors"
    tensors = load_file(place)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, place, {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"model: 1 of the model's weights are missing, for example model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        target.read(tmp_path / "right")
    changes = {"model": {"pretrained": str(place.parent)}, "train.precision": "fp32", "data.sequence_length": 16}
    with pytest.raises(ConfigError, match="1 of the model's weights are missing"):
        CausalLM(job(**changes)).build()
