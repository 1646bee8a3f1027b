"""Tests the user recipes in jobs/examples: what they draw, pad, count, and reject."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from heliostat import errors, schema
from heliostat import text as text_
from heliostat.config import spec, workspace
from heliostat.curation import prepare
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.recipes import batches, pretrained, protocol
from heliostat.recipes.batches import pad, segments
from heliostat.recipes.protocol import IGNORED, Request
from heliostat.storage.locations import Location

from jobs.examples.classifier import Classifier
from jobs.examples.masked_lm import MaskedLM
from tests.unit import build_functions
from tests.unit.build_job import job
from tests.unit.test_split import prepared

ROOT = Path(__file__).parents[2]
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
CLASSIFIER = {"recipe": "jobs.examples.classifier:Classifier", "model": MODEL, "data.sequence_length": None}
MASKED = {"recipe": "jobs.examples.masked_lm:MaskedLM", "model": MODEL, "data.sequence_length": 64}


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    return build_functions.dataset(tmp_path_factory.mktemp("functions"))


def rows(functions) -> pa.Table:
    return pq.read_table(functions.location.join(functions.paths[0]).path)


def masked(tmp_path) -> MaskedLM:
    """Returns the recipe on a dataset of tokens with its own tokenizer."""
    from jobs.examples.functions import train

    definition = train([path.read_text() for path in sorted((ROOT / "jobs").glob("*.py"))[:3]], 300)
    source = prepared(tmp_path, 50)
    (tmp_path / "tokenizer.json").write_text(definition)
    made = MaskedLM(job(**MASKED))
    made.bind([manifest.Manifest(Location(str(tmp_path)), source.chunks, {**source.meta, "tokenizer": "t"})])
    return made


@pytest.mark.parametrize("name", ["masked_lm", "classifier"])
def test_a_recipe_of_ones_own_is_short_and_uses_the_public_protocol_alone(name):
    """It has under 100 lines, and doesn't use the engine's internals."""
    lines, shared = ((ROOT / "jobs" / "examples" / f"{file}.py").read_text().splitlines() for file in (name, "bert"))
    assert len(lines) < 100 and len(shared) < 100
    used = {line.split()[1] for line in [*lines, *shared] if line.startswith("from heliostat")}
    assert used <= {module.__name__ for module in (protocol, batches, pretrained, spec, errors, schema, text_, manifest)}


def test_masks_follow_from_the_samples_keys(tmp_path):
    """Masks don't depend on the batch or the worker, and other keys give other masks. They cover 15 %, and at least one token of
    every sample."""
    made = masked(tmp_path)
    content, keys = np.random.default_rng(0).integers(0, 300, (64, 64)).astype(np.int32), np.arange(64)
    whole = made.batch(content, keys)
    for part in (slice(3, 9), slice(40, 41)):
        for name, found in made.batch(content[part], keys[part]).items():
            assert torch.equal(found, whole[name][part])
    assert not torch.equal(whole["labels"], made.batch(content, keys + 64)["labels"])
    asked = whole["labels"] != IGNORED
    assert 0.13 < asked.float().mean() < 0.17 and (asked.sum(1) > 0).all()
    hidden = whole["input_ids"][asked] == made.tokenizer.mask_token_id
    assert 0.75 < hidden.float().mean() < 0.85
    assert torch.equal(whole["input_ids"][~asked], torch.from_numpy(content).long()[~asked])
    assert made.terms(whole) == int(asked.sum())


def test_rows_of_varying_length_are_padded_and_what_is_cut_is_counted(functions):
    """Checks labels, masks, and shapes. The shares of padding and of truncated texts are parts of the loss that are only
    logged."""
    made = Classifier(job(**CLASSIFIER))
    made.bind([functions])
    content = rows(functions).slice(0, 16)
    batch = made.batch(content, np.arange(16))
    lengths = [len(made.tokenizer(text)["input_ids"]) for text in content["text"].to_pylist()]
    assert batch["attention_mask"].sum(1).tolist() == [min(n, 64) for n in lengths]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == made.tokenizer.pad_token_id).all()
    assert [made.config.id2label[int(n)] for n in batch["labels"]] == content["label"].to_pylist()
    model = made.build().eval()
    with torch.no_grad():
        loss = made.loss(model, batch)
        alone = [made.loss(model, made.batch(content.slice(i, 1), np.arange(1))).sum for i in range(16)]
    torch.testing.assert_close(loss.sum, sum(alone), rtol=1e-4, atol=1e-4)  # padding changes nothing
    assert loss.parts["cut"].value == np.mean([n > 64 for n in lengths]) and loss.parts["cut"].weight == 0
    assert 0 < loss.parts["padding"].value < 1


def test_an_export_names_the_type_of_its_weights_and_is_computed_in_fp32(functions, tmp_path, monkeypatch):
    """In bf16, an answer would depend on its batch. A base in fp32 doesn't change this."""
    made = Classifier(job(**CLASSIFIER))
    made.bind([functions])
    base = made.build()
    base.save_pretrained(tmp_path / "base")
    tuned = Classifier(job(**{**CLASSIFIER, "model": {"pretrained": str(tmp_path / "base")}}))
    tuned.bind([functions])
    tuned.build().to(torch.bfloat16).save_pretrained(tmp_path / "export")
    tuned.save_config(tmp_path / "export")
    kind = transformers.AutoModelForSequenceClassification
    assert kind.from_pretrained(tmp_path / "export").dtype == torch.bfloat16
    assert tuned.load(tmp_path / "export").dtype == torch.float32
    used = list[torch.dtype]()
    monkeypatch.setattr(Classifier, "answer", lambda model, *_: used.append(model.dtype))
    Classifier.generator(tmp_path / "export", {})([Request("def", 0, None)])
    assert used == [torch.float32]


def test_f1_is_of_all_samples_together():
    made = Classifier(job(**CLASSIFIER))
    found = made.measure({"label": np.array([0, 0, 1, 2]), "predicted": np.array([0, 1, 1, 1])})
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 2 / 4 + 0) / 3)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.hiden_size": 3}, r"model\.hiden_size: unknown key of BertConfig. Did you mean 'hidden_size'"),
        ({"model.hidden_size": 33}, r"model\.num_attention_heads: 2 doesn't divide hidden_size 33"),
        ({"model.hidden_size": "x"}, r"^model: "),
        ({"model": {"pretrained": "nowhere"}}, r"model\.pretrained: 'nowhere' isn't a model folder"),
    ],
)
@pytest.mark.parametrize("kind", [CLASSIFIER, MASKED])
def test_models_that_make_no_sense_are_one_line(kind, changes, says):
    made = {**kind, "model": dict(MODEL), **changes}
    with pytest.raises(ConfigError, match=says) as e:
        workspace.import_path("recipe", made["recipe"])(job(**made))
    assert "\n" not in str(e.value)


def test_the_example_pipeline_gives_the_same_dataset_again(functions, tmp_path):
    """The dataset doesn't depend on its location. Its labels are the packages, and an unknown package is rejected."""
    again = build_functions.dataset(tmp_path)
    assert again.digest == functions.digest and again.fact("classes") == ["http", "json"]
    assert again.rows == again.fact("documents") > 100 and again.chunks.num_rows > 2
    with pytest.raises(ConfigError, match=r"packages\.1: 'jsom' is no package"):
        build_functions.dataset(tmp_path, packages=["http", "jsom"])


def test_the_example_pipelines_file_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    _, pipeline = prepare.load(Path("jobs/examples/data/functions.yaml"), [])
    pipeline.check()
    assert len(pipeline.inputs()) > 50


# what recipes make batches with --------------------------------------------------------------------------------------


def test_padding_keeps_values_in_their_rows_and_counts_what_it_cuts():
    found = pad([[1, 2, 3], [], list(range(20))], fill=9, longest=12)
    assert found.values.shape == (3, 12) and found.cut == 8
    assert found.values[0].tolist() == [1, 2, 3] + [9] * 9 and found.values[2].tolist() == list(range(12))
    assert found.mask.sum(1).tolist() == [3, 0, 12] and found.padding == pytest.approx(1 - 15 / 36)
    assert pad([[1], [2, 3]], multiple=8).values.shape == (2, 8) and pad([[]]).values.shape == (1, 8)


def test_segments_number_the_documents_of_a_packed_sample():
    tokens = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    found = segments(tokens, end=0)
    assert found.ids.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    assert found.positions.tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert found.starts.int().tolist() == [[0, 0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0, 0]]
