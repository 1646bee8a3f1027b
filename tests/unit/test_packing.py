"""Tests data.document_mask: accepted where packed documents don't see each other, rejected where they do, and used by
`evaluate`."""

import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError
from heliostat.evaluation.losses import evaluate
from heliostat.parallel import tiny
from heliostat.recipes import exported
from heliostat.recipes.text import packing
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location
from transformers import CONFIG_MAPPING

from tests.unit.build_job import BASE, ROOT, job
from tests.unit.test_causal_lm import END, recipe
from tests.unit.test_tokenizers import TEXTS, dataset, trained

MASK = {"data.document_mask": True}
LEAKY = ("afmoe", "biogpt", "bloom", "gpt_oss", "jamba", "mamba", "minimax", "nemotron_h", "openai-gpt", "opt", "qwen3_5_text",
         pytest.param("qwen3_next", marks=pytest.mark.ci), "recurrent_gemma", "xglm")  # fmt: skip
APART = ("deepseek_v3", "falcon", "gemma3_text", "gpt2", "gpt_neox", "llama", "mixtral", "olmo2", "phi", "qwen3_moe")


@pytest.mark.parametrize("arch", LEAKY)
def test_an_architecture_that_leaks_is_refused_with_document_mask_alone(arch):
    """For any size: here each class's defaults, with billions of parameters. Before, most were accepted, and trained across
    documents."""
    model = {"arch": arch}
    recipe(model).probe()
    with pytest.raises(
        ConfigError, match=r"data\.document_mask: .* attends across packed documents.*\. Set data.document_mask to false"
    ) as e:
        recipe(model, **MASK).probe()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("arch", APART)
def test_an_architecture_that_keeps_documents_apart_is_taken(arch):
    """Dense models and mixtures of experts, with windows, latent attention, and learned or rotary positions."""
    recipe({"arch": arch}, **MASK).probe()


def test_positions_that_follow_the_longest_document_are_refused():
    """If the highest position chooses the rotary frequencies, a document's result depends on the lengths of others."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0}
    model = {**BASE["model"], "arch": "phi3", "max_position_embeddings": 4096, "pad_token_id": 0}
    for original, leaks in ((64, False), (16, True)):
        made = recipe({**model, "rope_parameters": rope, "original_max_position_embeddings": original}, 64, **MASK)
        if leaks:
            with pytest.raises(ConfigError, match="attends across packed documents"):
                made.probe()
        else:
            made.probe()


def test_what_cannot_be_tried_is_refused_and_says_why(monkeypatch):
    monkeypatch.setattr(tiny, "LARGEST", 0)
    monkeypatch.setattr(packing, "_known", {})
    with pytest.raises(ConfigError, match=r"data\.document_mask: can't check whether 'llama' keeps"):
        recipe(**MASK).probe()


def test_trying_a_model_of_eight_billion_takes_seconds():
    """In CPU time, without imports. The trial model has some layers with some heads."""
    big = {"arch": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336, "vocab_size": 128256}  # fmt: skip
    recipe(**MASK, **{"data.sequence_length": 32}).probe()
    made = recipe(big, 8192, **MASK)
    began = time.process_time()
    made.probe()
    assert time.process_time() - began < 5


def test_the_small_model_keeps_what_decides():
    """Kinds of layers, shared keys, and windows that are shorter than a sample."""
    config = CONFIG_MAPPING["gemma3_text"](
        num_attention_heads=8, num_key_value_heads=4, sliding_window=1024, num_hidden_layers=26
    )
    small = next(tiny.shrunk(config, 4096))
    assert set(small.layer_types) == set(config.layer_types) and len(small.layer_types) == small.num_hidden_layers == tiny.LAYERS
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (2, 1, config.head_dim)
    assert small.sliding_window == 1024 * tiny.LENGTH // 4096 == 12
    assert next(tiny.shrunk(config, 256)).sliding_window > tiny.LENGTH


def test_an_exported_model_is_scored_as_in_training(tmp_path):
    """An export's configuration requests a cache for `generate`. With a cache, documents would see each other during scoring."""
    torch.manual_seed(0)
    made = recipe(**MASK)
    model = made.build().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path)
    config = Path(tmp_path / "config.json")
    config.write_text(config.read_text().replace('"use_cache": false', '"use_cache": true'))
    content = np.random.default_rng(0).integers(1, 96, (3, 64)).astype(np.int32)
    content[:, [9, 30]] = END
    scorer = CausalLM(job(model={"pretrained": str(tmp_path)}, **MASK))
    scorer.end = END
    made._token_bytes = scorer._token_bytes = torch.ones((2, 96), dtype=torch.int64)
    with torch.no_grad():
        trained = made.evaluate(model, made.batch(content))
        scored = scorer.evaluate(scorer.load(tmp_path).eval(), scorer.batch(content))
    torch.testing.assert_close(scored["nats"], trained["nats"], rtol=1e-5, atol=1e-4)


def in_two_parts(place: Location) -> manifest.Manifest:
    """Writes the dataset with its documents in two row groups, of which the second may be held out."""
    file = Path(place.path) / "shards" / "0.parquet"
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=len(table) // 2, write_page_checksum=True)
    rows = manifest.read_footer(place, "shards/0.parquet", "tokens")
    rows = [{**row, "place": 0 if row["row_group"] else manifest.PLACES - 1} for row in rows]
    return manifest.write(place, rows, manifest.read(place).meta)


def test_heliostat_evaluate_scores_an_export_with_the_mask_that_it_was_trained_with(tmp_path, monkeypatch):
    """The command's own code, on an export as training writes it, gives the score of the model in memory."""
    monkeypatch.chdir(ROOT)
    dataset(tmp_path / "data", trained("byte-level"), [text[i : i + 150] for text in TEXTS for i in range(0, 3000, 150)])
    source = in_two_parts(Location(str(tmp_path / "data")))
    made_job = job(
        **MASK, **{"model.vocab_size": 1000, "data.sources": [{"path": str(tmp_path / "data")}], "evaluate.fraction": 0.5}
    )
    made = CausalLM(made_job)
    made.bind([source])
    torch.manual_seed(0)
    model = made.build().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "model")
    made.save_config(tmp_path / "model")
    order = open_dataset(plan(made_job, [source]))
    exported.write(tmp_path / "model", made_job, {"data_version": order.plan.version})
    content = order.read(order.order.held_out(16))
    with torch.no_grad():
        sums = {k: float(v.sum()) for k, v in made.evaluate(model, made.batch(content)).items()}
    scores = evaluate(tmp_path / "model", str(tmp_path / "data"), 16, None, None)
    assert scores == pytest.approx(made.metrics(sums), rel=1e-5)
