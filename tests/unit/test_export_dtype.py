"""Tests the type of an export's weights in its configuration, and the type in which heliostat computes with the export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from heliostat.checkpoint import layout
from heliostat.config.spec import Job
from heliostat.data.dataset import plan
from heliostat.data.manifest import read
from heliostat.evaluation import scoring
from heliostat.evaluation.suite import Suite
from heliostat.inference.batch import loading
from heliostat.inference.batch.engines import Input, LoadedModel
from heliostat.inference.export import export
from heliostat.inference.generate import answer
from heliostat.inference.vllm_engine import engine_options
from heliostat.recipes import building, exported
from heliostat.recipes.folder_digests import weights_digest
from heliostat.recipes.images.embedder import ImageEmbedder
from heliostat.recipes.loading import load
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.embedder import Embedder
from heliostat.recipes.text.server import TextServer
from heliostat.storage.locations import Location
from safetensors.torch import load_file

from tests.golden import data
from tests.unit import build_checkpoint, build_images, build_pairs
from tests.unit.build_job import BASE, job

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ASKED = [Input(text, seed) for seed, text in enumerate(["def ", "class A", "import os\nimport ", "a", "for i in range(9)"])]
ADAPTER = {"method": "lora", "rank": 4}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return data.tokens(tmp_path_factory.mktemp("data") / "tokens")


def exported_model(folder: Path, tokens: Path, precision: str, model: dict[str, object]) -> Path:
    """Exports a checkpoint with initial weights, and returns the export's folder."""
    changes = {"model": model, "data.sources": [{"path": str(tokens)}], "data.sequence_length": 32, "train.precision": precision}
    made: Job = job(**changes)
    sources = [read(location) for location in made.sources]
    torch.manual_seed(1)
    recipe = load(made, sources)
    masters = {
        f"master.{n}": p.detach().float().flatten() for n, p in building.build(recipe).named_parameters() if p.requires_grad
    }
    if "adapter" in model:
        masters = {name: torch.randn(len(tensor)) / 9 for name, tensor in masters.items()}
    of_plan, run = plan(made, sources), Location(str(folder / "run"))
    facts = {"job": made.dump(), "data": of_plan.dump(), "data_digest": of_plan.digest}
    if "adapter" in model:
        facts["base"] = weights_digest(recipe.base())
    build_checkpoint.save(run, 3, [build_checkpoint.slices(masters, rank, 2) for rank in (0, 1)], **facts)
    export(layout.open_checkpoint(run, 3), folder / "export")
    return folder / "export"


def stored(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.fixture(scope="module", params=TYPES)
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(precision, tokens, tmp_path_factory) -> Path:
    return exported_model(tmp_path_factory.mktemp(precision), tokens, precision, BASE["model"])


@pytest.mark.parametrize("adapter", [False, True])
def test_the_configuration_names_the_type_of_the_weights(model, precision, tokens, tmp_path, adapter):
    """So plain transformers, and vLLM on its own, need no more memory than the files: also after an adapter was merged into a
    base of the other type."""
    if adapter:
        model = exported_model(tmp_path, tokens, precision, {"pretrained": str(model), "adapter": ADAPTER})
    assert stored(model) == {TYPES[precision]}
    assert transformers.AutoConfig.from_pretrained(model).dtype == TYPES[precision]
    assert transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").dtype == TYPES[precision]


@pytest.mark.parametrize("task", ["continue", "score", "embed"])
def test_batch_inference_computes_an_export_in_fp32(model, tmp_path, task):
    """In bf16, an answer would depend on its batch. Exports of earlier versions name float32 in their configuration: the answers
    are bitwise theirs."""
    earlier = shutil.copytree(model, tmp_path / "earlier")
    (earlier / exported.RECORD).unlink()
    settings = json.loads((earlier / "config.json").read_text())
    (earlier / "config.json").write_text(json.dumps({**settings, "dtype": "float32"}))
    options = {"max_tokens": 8, "temperature": 0.7} if task == "continue" else {}
    one, other, single = (
        [answer.values for answer in loading.engine(folder, task, batch, options)(ASKED)]
        for folder, batch in ((model, 4), (earlier, 4), (model, 1))
    )
    assert list(map(str, one)) == list(map(str, other))
    assert task != "continue" or one == single


def test_each_way_to_compute_an_export_is_in_fp32(model):
    """The endpoint, `generate`, `evaluate`, `benchmark`, MLflow's server, and vLLM: as batch inference."""
    server, config = TextServer(), transformers.AutoConfig.from_pretrained(model)
    server.load_context(type("Context", (), {"artifacts": {"model": str(model)}}))
    models = [
        LoadedModel(model).model,
        exported.generator(model, {}).model,
        CausalLM(job()).load(model),
        scoring.load(model, Suite(name="suite", tasks=["task"])).model,
        server.model,
    ]
    assert {one.dtype for one in models} == {torch.float32}
    assert engine_options(model, config, None, 1)["dtype"] == "float32"
    assert answer(model, "def ", {"max_tokens": 4}, 0, None).facts["text"] == server.predict(None, ["def "], {"max_tokens": 4})[0]


@pytest.mark.parametrize("named", [True, False])
def test_another_model_is_computed_in_the_type_of_its_configuration(model, precision, tmp_path, named):
    """A folder of the Hub in bf16 keeps its memory and speed on a GPU. If its configuration names no type, both engines use
    the type of its weights."""
    folder = shutil.copytree(model, tmp_path / "hub")
    (folder / exported.RECORD).unlink()
    if not named:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "dtype"}))
    config = transformers.AutoConfig.from_pretrained(folder)
    assert LoadedModel(folder).model.dtype == TYPES[precision]
    assert engine_options(folder, config, None, 1)["dtype"] == str(TYPES[precision]).removeprefix("torch.")


def test_embedders_name_the_type_of_their_weights(tmp_path):
    """Text embedders and CLIP models, whose configuration has configurations of its two parts."""
    pairs, images = build_pairs.dataset(tmp_path / "pairs"), build_images.digits(tmp_path / "images", 60)
    recipes = {
        "text": Embedder(build_pairs.embedder(pairs, **{"train.precision": "bf16"})),
        "images": ImageEmbedder(build_images.embedder(images, **{"train.precision": "bf16"})),
    }
    for (name, recipe), source in zip(recipes.items(), (pairs, images), strict=True):
        recipe.probe()
        recipe.bind([read(Location(str(source)))])
        recipe.build().to(torch.bfloat16).save_pretrained(tmp_path / name)
        recipe.save_config(tmp_path / name)
        loaded = transformers.AutoModel.from_pretrained(tmp_path / name, dtype="auto")
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
