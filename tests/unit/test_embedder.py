"""Tests the embedder: which pairs are negatives, how a text is found, valid jobs, and an export that records how it embeds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import transformers
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError
from heliostat.evaluation.losses import evaluate
from heliostat.inference.batch.engines import Embed, Input
from heliostat.recipes import contrastive, exported
from heliostat.recipes.conformance import require_abilities, require_class
from heliostat.recipes.text import encoder, sentence_folder
from heliostat.recipes.text.embedder import Embedder
from heliostat.recipes.text.sentence_folder import Embedding
from heliostat.storage.locations import Location

from tests.unit import build_pairs
from tests.unit.build_least_recipe import Least


def unit(rows: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_is_infonce_in_both_directions_and_equal_texts_are_no_negatives() -> None:
    query, text, temperature = unit(5), unit(5, 1), 0.3
    names = torch.tensor([[1, 11], [2, 12], [3, 12], [4, 14], [4, 15]])  # 1 and 2 share their text, 3 and 4 their query
    found = contrastive.contrast(query, text, names, temperature)
    scores = (query @ text.T / temperature).tolist()
    alike, loss = {(1, 2), (2, 1), (3, 4), (4, 3)}, 0.0
    for i in range(5):
        others = [j for j in range(5) if (i, j) not in alike]
        loss -= scores[i][i] - np.log(sum(np.exp(scores[i][j]) for j in others)) / 2
        loss += np.log(sum(np.exp(scores[j][i]) for j in others)) / 2
    assert float(found.loss) == pytest.approx(loss, rel=1e-5) and int(found.masked) == 4
    plain = contrastive.contrast(query, text, torch.arange(10).view(5, 2), temperature)
    assert int(plain.masked) == 0 and plain.loss > found.loss


def test_ranks_count_each_different_text_once_and_ties_against_the_model() -> None:
    text = np.eye(4, dtype=np.float32)[[0, 1, 1, 2, 3]]  # 1 and 2 are one text
    query = np.array([[0.9, 0.8, 0.1, 0.0], [0.9, 0.8, 0.1, 0.0], [0.0, 0.1, 0.0, 0.2], [0.5, 0.5, 0.5, 0.5],
                      [0.4, 0.3, 0.2, 0.1]], np.float32)  # fmt: skip
    names = np.array([[1, 11], [2, 12], [3, 12], [4, 13], [5, 14]])
    assert contrastive.ranks(query, text, names).tolist() == [1, 2, 2, 4, 4]
    names[4, 0] = 1  # and so the first text is right for it as well
    query[4] = query[0]
    assert contrastive.ranks(query, text, names)[4] == 1
    told = contrastive.recall(np.array([1, 2, 6, 20]))
    assert told == {
        "recall_at_1": 0.25,
        "recall_at_5": 0.5,
        "recall_at_10": 0.75,
        "mrr": pytest.approx((1 + 1 / 2 + 1 / 6 + 1 / 20) / 4),
    }


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_in_no_pooling(left) -> None:
    states, mask = torch.arange(24.0).view(2, 4, 3), torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    if not left:
        mask = mask.flip(1)
    for row, places in enumerate((mask[0].nonzero(), mask[1].nonzero())):
        own = states[row, places.flatten()]
        for pooling, right in {"mean": own.mean(0), "last": own[-1], "cls": own[0]}.items():
            assert torch.equal(encoder.pool(states, mask, pooling)[row], right), pooling


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_a_text_without_tokens_is_zeros(pooling) -> None:
    states, mask = torch.ones(2, 4, 3), torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    states[1] = torch.nan  # as attention to nothing may give
    assert encoder.pool(states, mask, pooling).tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_pairs.dataset(tmp_path_factory.mktemp("pairs") / "data")


def recipe(data: Path, **changes: Any) -> Embedder:
    made = Embedder(build_pairs.embedder(data, **changes))
    made.bind([manifest.read(Location(str(data)))])
    return made


def batch(made: Embedder, rows: list[tuple[str, str]]) -> Any:
    table = pa.table(
        {"query": [q for q, _ in rows], "text": [t for _, t in rows]},
        schema=pa.schema(dict.fromkeys(("query", "text"), pa.string())),
    )
    return made.batch(table, np.arange(len(rows)))


def test_a_batch_knows_equal_texts_ends_each_and_counts_what_is_cut(data) -> None:
    made = recipe(data)
    found = batch(made, [("amber", "amber birch"), ("cedar", "amber birch"), ("amber", "delta " * 40), ("", "")])
    end, (a, b, c, d) = made.tokenizer.eos_token_id, found["names"].tolist()
    assert a[1] == b[1] != c[1] and a[0] == c[0] != b[0] and d[0] == d[1]
    assert found["cut"].tolist() == [[0, 0], [0, 0], [0, 1], [0, 0]]
    assert found["text_ids"].shape == (4, 24) and found["text_ids"][2, 23] == end  # at max_tokens, with its end
    for side in ("query", "text"):
        lengths = found[f"{side}_mask"].sum(1)
        assert lengths.min() == 1  # of no text the end alone
        assert (found[f"{side}_ids"][torch.arange(4), lengths - 1] == end).all()


@pytest.mark.parametrize(("changes", "said"), [
    ({"data.sequence_length": 64}, "data.sequence_length: only for token datasets"),
    ({"train.global_batch_size": 1, "train.micro_batch_size": 1, "data.virtual_ranks": 1},
     "train.global_batch_size: a batch of 1 pair"),
    ({"model.pooling": "max"}, "model.pooling"),
    ({"model.temperature": 0}, "model.temperature"),
    ({"model.max_tokens": 64}, "model.max_tokens: 64 is above the model's max_position_embeddings. Use at most 32"),
    ({"model.arch": "vit"}, "model.arch: 'vit' isn't a text encoder or decoder"),
    ({"model.init": {"zero_output_projections": True}}, "model.init"),
    ({"model.widht": 3}, "model.widht: unknown key"),
    ({"model.vocab_size": 100}, "model.vocab_size: 100 is below the tokenizer's"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_by_its_key(data, changes, said) -> None:
    with pytest.raises(ConfigError, match=said):
        made = recipe(data, **changes)
        made.probe()


def test_a_loss_that_couples_samples_is_an_ability_of_its_own(data) -> None:
    made = recipe(data)
    assert require_class("recipe", "x", Embedder) is Embedder
    require_abilities(made.job, made)
    with pytest.raises(
        ConfigError, match=r"`couple`, but heliostat never calls `couple`\. Derive the recipe from .*CouplesSamples"
    ):
        require_class("recipe", "x", type("Plain", (Least,), {"couple": lambda *_: None}))


@pytest.mark.parametrize(("arch", "pooling"), [("bert", "mean"), ("llama", "last")])
def test_an_export_embeds_as_it_was_trained_to(data, tmp_path, arch, pooling) -> None:
    """In plain transformers, and in batch inference with truncated texts. A decoder uses its last token."""
    changes = {"model.arch": arch, "model.pooling": pooling, "model.num_key_value_heads": None if arch == "bert" else 2}
    made = recipe(data, **{k: v for k, v in changes.items() if v is not None})
    torch.manual_seed(1)
    model = made.build().eval()
    made.save_config(tmp_path)
    model.save_pretrained(tmp_path)
    assert sentence_folder.read(tmp_path) == Embedding(pooling, 24)
    texts = ["amber birch cedar", "delta " * 40, "jetty"]
    with torch.no_grad():
        right = made.represent(model, batch(made, [(text, text) for text in texts]))["text"].numpy()
    found = Embed(tmp_path, 2)([Input(text, 0) for text in texts])
    assert [answer.values["truncated"] for answer in found] == [False, True, False]
    for answer, vector in zip(found, right, strict=True):
        assert np.allclose(answer.values["embedding"], vector, atol=1e-5)
    tokenizer, plain = transformers.AutoTokenizer.from_pretrained(tmp_path), transformers.AutoModel.from_pretrained(tmp_path)
    given = tokenizer(texts[:1], return_tensors="pt")
    states = plain.eval()(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state[0]
    vector = states.mean(0) if pooling == "mean" else states[-1]
    assert np.allclose(F.normalize(vector, dim=0).detach().numpy(), right[0], atol=1e-5)
    again = Embedder(build_pairs.embedder(data, model=Embedder.exported(tmp_path, made.job.model)))
    again.bind([manifest.read(Location(str(data)))])
    assert again.tokenizer("amber")["input_ids"] == made.tokenizer("amber")["input_ids"]
    exported.write(tmp_path, made.job, {"run_id": "f" * 32, "step": 1, "data_version": 2})
    rows = open_dataset(plan(made.job, made.sources))
    held = batch(made, [(row["query"], row["text"]) for row in rows.read(rows.order.held_out(96)).to_pylist()])
    with torch.no_grad():
        expected = made.measure(
            {name: value.numpy() for name, value in made.evaluate(model, held).items() if name in made.gathered}
        )
    assert evaluate(tmp_path, str(data), 96, None, None) == pytest.approx(expected, rel=1e-4)


def test_measures_are_of_all_held_out_pairs(data) -> None:
    made, vectors = recipe(data), unit(6).numpy()
    arrays = {"query": vectors, "text": vectors[[0, 1, 2, 3, 5, 4]], "names": np.arange(12).reshape(6, 2)}
    told = made.measure(arrays)
    assert set(told) == set(made.scores) and told["recall_at_1"] == pytest.approx(4 / 6) and told["recall_at_10"] == 1


@pytest.mark.parametrize(("file", "value", "said"), [
    ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "2"}], "module 'Dense' isn't supported"),
    ("modules.json", [{"type": "a.Transformer", "path": ""}], "the Pooling module is missing, or the Transformer module is"),
    ("modules.json", {"a": 1}, "list of modules"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling by max_tokens isn't supported"),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "pooling by mean, cls isn't"),
    ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "../2"}], "is outside"),
    ("modules.json", [{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "2"}], "Copy the folder"),
])  # fmt: skip
def test_a_folder_that_embeds_in_another_way_is_refused(tmp_path, file, value, said) -> None:
    sentence_folder.write(tmp_path, Embedding("mean", 24), 8)
    (tmp_path / file).write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=said):
        sentence_folder.read(tmp_path)
    assert sentence_folder.read(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(("said", "pooling"), [
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"), ({"pooling_mode": "lasttoken"}, "last"),
    ({"word_embedding_dimension": 8}, "mean"),
])  # fmt: skip
def test_a_folder_may_say_its_pooling_without_a_list_of_modules(tmp_path, said, pooling) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(said))
    assert sentence_folder.embeds(tmp_path) and sentence_folder.read(tmp_path) == Embedding(pooling, None)
    assert exported.is_model(tmp_path) is False
