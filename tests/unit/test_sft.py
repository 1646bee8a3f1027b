"""Tests supervised fine-tuning: batches of packs, the loss over trained tokens, the checks of datasets and templates, and
exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import transformers
from heliostat.data.conversations import PACKS
from heliostat.data.manifest import Manifest, read
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import documents
from heliostat.recipes import loading
from heliostat.recipes.protocol import IGNORED
from heliostat.recipes.text import conversations, next_token, packs, templates
from heliostat.recipes.text.sft import SFT
from heliostat.storage.locations import Location

from tests.unit import build_conversations
from tests.unit.build_conversations import CHATML, STOP, sft

LENGTH = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_conversations.packs(tmp_path_factory.mktemp("sft") / "packs")


def sources(*folders: Path) -> list[Manifest]:
    return [read(Location(str(folder))) for folder in folders]


def bound(data: Path, **changes: Any) -> SFT:
    recipe = loading.load(sft(data, **changes), sources(data))
    assert isinstance(recipe, SFT)
    return recipe


def rows(data: Path) -> pa.Table:
    return pq.read_table(data / "shards/0.parquet")


def drawn_packs(seed: int, count: int = 5) -> pa.Table:
    """Draws packs of one to four conversations, with random tokens and masks."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        lengths = draw.integers(1, 7, draw.integers(1, 5)).tolist()
        size = sum(lengths)
        made.append({"ids": [f"{number}.{i}" for i in range(len(lengths))], "lengths": lengths,
                     "tokens": draw.integers(0, 90, size).tolist(), "trained": (draw.random(size) < 0.5).tolist()})  # fmt: skip
    return pa.Table.from_pylist(made, schema=PACKS)


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_has_each_conversation_once_with_its_mask_and_its_own_positions(seed: int) -> None:
    table = drawn_packs(seed)
    made = packs.batch(table, LENGTH, 0, 90, apart=True, fixed=True)
    assert made["input_ids"].shape == made["labels"].shape == made["position_ids"].shape == (5, LENGTH)
    for row, ids, labels, positions in zip(
        table.to_pylist(), *(made[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True
    ):
        size = len(row["tokens"])
        assert ids == [*row["tokens"], *[0] * (LENGTH - size)]
        starts = {sum(row["lengths"][:i]) for i in range(len(row["lengths"]))}
        right = [t if m and i not in starts else IGNORED
                 for i, (t, m) in enumerate(zip(row["tokens"], row["trained"], strict=True))]  # fmt: skip
        assert labels == [*right, *[IGNORED] * (LENGTH - size)]
        assert positions == [p for n in (*row["lengths"], LENGTH - size) for p in range(n)]


@pytest.mark.parametrize("seed", range(3))
def test_a_slice_of_a_table_gives_the_same_batch_as_its_rows_alone(seed: int) -> None:
    table = drawn_packs(seed, 8)
    sliced = packs.batch(table.slice(3, 4), LENGTH, 0, 90, True, True)
    copied = packs.batch(pa.Table.from_pylist(table.to_pylist()[3:7], schema=PACKS), LENGTH, 0, 90, True, True)
    assert all(torch.equal(sliced[name], copied[name]) for name in copied)
    assert [c.tokens.tolist() for c in packs.conversations(table.slice(3, 4))] == [
        row["tokens"][sum(row["lengths"][:i]) : sum(row["lengths"][: i + 1])]
        for row in table.to_pylist()[3:7]
        for i in range(len(row["lengths"]))
    ]


@pytest.mark.parametrize(
    "changes",
    [{"lengths": [2]}, {"trained": [True] * 4}, {"tokens": [1, 2, 90]}, {"tokens": [1, -1, 2]},
     {"lengths": [], "tokens": [], "trained": []},
     {"lengths": [25], "tokens": [1] * 25, "trained": [True] * 25}],
)  # fmt: skip
def test_a_row_that_is_not_a_pack_is_an_error(changes: dict[str, Any]) -> None:
    row = {"ids": ["a"], "lengths": [3], "tokens": [1, 2, 3], "trained": [False, True, True]}
    with pytest.raises(DataError, match="Prepare the dataset again"):
        packs.batch(pa.Table.from_pylist([row, {**row, **changes}], schema=PACKS), LENGTH, 0, 90, True, False)


def alone(model: torch.nn.Module, table: pa.Table) -> tuple[torch.Tensor, int]:
    """Sums the loss of conversations, each by itself in a batch of one, without padding and masks."""
    total, terms = torch.zeros(()), 0
    for conversation in packs.conversations(table):
        ids = torch.from_numpy(conversation.tokens.astype(np.int64))
        goals = torch.where(torch.from_numpy(conversation.trained.copy()), ids, IGNORED)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, goals, ignore_index=IGNORED, reduction="sum")
        terms += int((goals != IGNORED).sum())
    return total, terms


@pytest.mark.parametrize("changes", [{}, {"train.tiled_loss": True}, {"train.attention": "eager"}], ids=str)
def test_the_loss_and_gradient_of_packs_are_those_of_each_conversation_alone(data: Path, changes: dict[str, Any]) -> None:
    recipe, table = bound(data, **changes), rows(data).slice(0, 6)
    assert max(map(len, table["ids"].to_pylist())) > 1, "no pack has several conversations"
    torch.manual_seed(0)
    model = recipe.build()
    batch = recipe.batch(table, np.arange(6))
    loss = recipe.loss(model, batch)
    loss.sum.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    right, terms = alone(model, table)
    right.backward()
    assert recipe.terms(batch) == terms
    assert loss.sum.item() == pytest.approx(right.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert torch.allclose(packed[name], p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max())), name


@pytest.mark.parametrize("tiled", [False, True])
def test_the_output_layer_computes_only_trained_tokens(data: Path, tiled: bool) -> None:
    """Most of the cost of a large vocabulary. A micro-batch without trained tokens is possible: its step has others."""
    recipe, table = bound(data, **{"train.tiled_loss": tiled}), rows(data).slice(0, 2)
    masked = table.set_column(3, table.schema.field(3), pa.array([[False] * len(row) for row in table["trained"].to_pylist()]))
    model = recipe.build()
    for content in (table, masked):
        batch = recipe.batch(content, np.arange(2))
        with next_token._only(model, batch["predicted"]):
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        assert logits.shape[:2] == (1, recipe.terms(batch))
        model.zero_grad()
        recipe.loss(model, batch).sum.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("tiled", [False, True])
def test_the_scores_are_the_loss_and_the_share_of_right_tokens(data: Path, tiled: bool) -> None:
    recipe, table = bound(data, **{"train.tiled_loss": tiled}), rows(data).slice(0, 4)
    torch.manual_seed(0)
    model = recipe.build().eval()
    with torch.no_grad():
        batch = recipe.batch(table, np.arange(4))
        sums = {name: float(values.sum()) for name, values in recipe.evaluate(model, batch).items()}
        right, terms = alone(model, table)
        first = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].argmax(-1)
    hits = int((first == batch["labels"][:, 1:]).sum())
    scores = recipe.metrics(sums)
    assert scores["loss"] == pytest.approx(right.item() / terms, rel=1e-5)
    assert scores["accuracy"] == pytest.approx(hits / terms)
    assert set(scores) == set(recipe.scores)


# datasets that don't fit ---------------------------------------------------------------------------------------------


def test_a_dataset_of_preferences_is_rejected_by_name(tmp_path: Path) -> None:
    other = build_conversations.preferences(tmp_path / "pairs")
    with pytest.raises(ConfigError, match=r"data.sources.0.path: .* a dataset of preferences, but SFT trains on conversations"):
        bound(other)


def test_packs_of_several_conversations_need_document_masks(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.document_mask: false, but the packs .* would see each other"):
        bound(data, **{"data.document_mask": False})
    bound(build_conversations.packs(tmp_path / "single", 8, pack=False), **{"data.document_mask": False})


def test_the_length_is_a_fact_of_the_dataset(data: Path, tmp_path: Path) -> None:
    assert bound(data).length == 96
    with pytest.raises(ConfigError, match=r"data.sequence_length: only for token datasets"):
        bound(data, **{"data.sequence_length": 96})
    with pytest.raises(ConfigError, match=r"up to 96 tokens, which is above the model's max_position_embeddings. .*: 64"):
        bound(data, **{"model": {**build_conversations.MODEL, "max_position_embeddings": 64}})


def test_datasets_with_different_templates_are_rejected(data: Path, tmp_path: Path) -> None:
    other = build_conversations.packs(tmp_path / "other", 16, template=CHATML + " ")
    job = sft(data, **{"data.sources": [{"path": str(data)}, {"path": str(other)}]})
    with pytest.raises(ConfigError, match=r"data.sources: the datasets have different chat templates"):
        loading.load(job, sources(data, other))


# the export -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, recipe = tmp_path_factory.mktemp("exported") / "model", bound(data, **{"train.precision": "fp32"})
    torch.manual_seed(0)
    recipe.build().save_pretrained(folder)
    recipe.save_config(folder)
    return folder


def test_an_export_has_the_template_of_the_dataset_and_stops_at_the_end_of_a_turn(data: Path, export: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert tokenizer.chat_template == CHATML
    ends = transformers.GenerationConfig.from_pretrained(export).eos_token_id
    assert tokenizer.convert_tokens_to_ids(STOP) in ends and tokenizer.eos_token_id in ends
    chat = [{"role": "user", "content": "amber birch"}, {"role": "assistant", "content": "amber"}]
    raw = build_conversations.tokenizer()
    assert tokenizer.apply_chat_template(chat, return_dict=False) == build_conversations.render(raw, chat).tokens


def test_the_trained_tokens_of_samples_are_the_loss_terms_also_if_workers_share_samples(data: Path) -> None:
    """The dataset's facts count the same tokens."""
    recipe, table = bound(data), rows(data)
    batch = recipe.rows(table)
    trained = recipe.trained(batch)
    assert len(trained) == table.num_rows and int(trained.sum()) == recipe.terms(batch) == recipe.facts[0]["counts"]["trained"]
    parts = [recipe.trained(next_token.cut(batch, part, 2)) for part in range(2)]
    assert torch.equal(parts[0] + parts[1], trained) and parts[1].any()


def test_an_export_also_stops_at_other_ends_that_the_template_writes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3 ends calls of built-in tools with another token than answers."""
    recipe = bound(data)
    assert "<|im_start|>" in CHATML and "<|endoftext|>" not in CHATML
    before, start = recipe.chat().ends, recipe.raw_tokenizer.token_to_id("<|im_start|>")
    monkeypatch.setattr(conversations, "ALSO_END", ("<|im_start|>", "<|endoftext|>", "<|eom_id|>"))
    assert start not in before and recipe.chat().ends == sorted([*before, start])


def pretrained(folder: Path) -> dict[str, Any]:
    return {"model": {"pretrained": str(folder)}}


def test_a_model_with_another_template_is_rejected_unless_the_job_accepts_the_change(
    data: Path, export: Path, tmp_path: Path
) -> None:
    assert bound(data, **pretrained(export)).length == 96
    other = tmp_path / "other"
    other.mkdir()
    for file in export.iterdir():
        (other / file.name).symlink_to(file)
    (other / "chat_template.jinja").unlink()
    (other / "chat_template.jinja").write_text(CHATML.replace("user", "human") + "{# other #}")
    with pytest.raises(ConfigError, match=r"model.pretrained: .*chat template \(\w{12}\) differs from the template \(\w{12}\)"):
        bound(data, **pretrained(other))
    recipe = bound(data, **{"model": {"pretrained": str(other), "chat_template": "dataset"}})
    recipe.save_config(tmp_path / "saved")
    assert templates.of_folder(tmp_path / "saved") == CHATML


def test_a_model_without_a_template_gets_the_template_of_the_dataset(data: Path, export: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in export.iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).symlink_to(file)
    assert templates.of_folder(base) is None
    recipe = bound(data, **pretrained(base))
    recipe.save_config(tmp_path / "saved")
    assert templates.of_folder(tmp_path / "saved") == CHATML


def test_a_template_is_read_from_the_settings_of_a_tokenizer(tmp_path: Path) -> None:
    for named in ("one", [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]):
        (tmp_path / templates.SETTINGS).write_text(json.dumps({"chat_template": named}))
        assert templates.of_folder(tmp_path) == "one"
    (tmp_path / templates.SETTINGS).write_text("[")
    with pytest.raises(ConfigError, match=r"isn't valid JSON with a chat template"):
        templates.of_folder(tmp_path)


# answers --------------------------------------------------------------------------------------------------------------


def test_the_answers_are_those_of_greedy_generation_one_by_one(data: Path) -> None:
    recipe = bound(data, **{"model": {**build_conversations.MODEL, "samples": {"prompts": ["birch cedar"], "held_out": 3,
                                                                             "max_tokens": 7}}})  # fmt: skip
    torch.manual_seed(1)
    model, gallery = recipe.build().eval(), recipe.gallery()
    assert gallery and gallery.count == 4
    together = gallery.draw(model, "cpu", [0, 1, 2, 3])
    for prompt, answer in zip(recipe.answered, together, strict=True):
        tokens = list(prompt.tokens)
        for _ in range(7):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in recipe.ends:
                break
        assert answer.tolist() == tokens[len(prompt.tokens) :]
    first = json.loads(gallery.judge(together)[1]["answers.json"])[0]
    assert first["prompt"] == "<|im_start|>user\nbirch cedar<|im_end|>\n<|im_start|>assistant\n" and first["wanted"] == ""


def test_the_prompts_end_where_the_first_answer_begins(data: Path) -> None:
    recipe = bound(data)
    for prompt in recipe.prompts_of(rows(data)):
        text = recipe.raw_tokenizer.decode(prompt.tokens, skip_special_tokens=False)
        assert text.endswith("<|im_start|>assistant\n") and text.count("assistant") == 1
        words = text.split("user\n")[1].split("<|im_end|>")[0].split()
        assert recipe.raw_tokenizer.decode(prompt.wanted) == words[0]


def test_a_prompt_that_leaves_no_positions_for_its_answer_is_an_error(data: Path) -> None:
    samples = {"prompts": ["birch", "birch " * 300], "held_out": 0, "max_tokens": 10}
    model = {**build_conversations.MODEL, "max_position_embeddings": 300, "samples": samples}
    with pytest.raises(ConfigError, match=r"model.samples.prompts.1: 3\d\d tokens, and max_tokens leaves 290 of"):
        bound(data, **{"model": model}).gallery()


def test_prompts_without_evaluations_are_warned_about(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = {"model": {**build_conversations.MODEL, "samples": {"prompts": ["birch"]}}}
    bound(data, **samples).probe()
    assert not caplog.messages
    bound(data, **samples, evaluate=None).probe()
    assert caplog.messages == [
        "model.samples.prompts: answered only at the end of the run. To answer them during the run, set evaluate.every"
    ]


def test_a_job_without_samples_answers_nothing(data: Path) -> None:
    assert bound(data, **{"model": {**build_conversations.MODEL, "samples": None}}).gallery() is None
    with pytest.raises(ConfigError, match=r"model.samples: not supported with train.parallel.sequence"):
        bound(data, **{"model": {**build_conversations.MODEL, "samples": {"held_out": 2}}, "train.parallel": {"sequence": 2},
                       "workers.count": 2})  # fmt: skip


def test_the_texts_of_a_model_s_conversations_are_compared_with_tasks(data: Path, tmp_path: Path) -> None:
    """`model benchmark` searches these texts for the examples of a suite."""
    pairs = build_conversations.preferences(tmp_path / "pairs", number=3)
    with pytest.raises(ConfigError, match="Only text datasets"):
        documents.open_text(Location(str(data)))
    for folder, number in ((data, 96), (pairs, 6)):
        reader = documents.Documents(documents.open_text(Location(str(folder)), chats=True))
        texts = [text for some in reader.texts(range(len(sources(folder)[0].chunks))) for text in some]
        assert len(texts) == number and not reader.damaged
        assert texts[0].startswith(("system\n", "user\n")) and "assistant\n" in texts[0]
