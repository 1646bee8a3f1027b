"""Tests that the known silent faults of fine-tuning are named before step 1, each with its message.

Faults of adapters that are saved empty are in tests/integration/test_lora.py, faults that only a step shows are in
tests/integration/test_numerics.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.data import manifest
from heliostat.data.conversations import PACKS
from heliostat.errors import ConfigError, DataError
from heliostat.recipes import loading
from heliostat.recipes.protocol import IGNORED
from heliostat.recipes.text.conversations import LearnsConversations
from heliostat.recipes.text.sft import SFT
from heliostat.storage.locations import Location
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.integration import fine_tuning_data
from tests.unit import build_conversations
from tests.unit.build_conversations import CHATML, END, STOP
from tests.unit.build_job import job


def loaded(data: Path, **changes: Any) -> Any:
    recipe = loading.load(build_conversations.sft(data, **changes), [manifest.read(Location(str(data)))])
    assert isinstance(recipe, LearnsConversations)
    return recipe


def test_a_dataset_in_which_all_tokens_are_masked(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": "amber birch"}]] * 8
    with pytest.raises(ConfigError, match=r"^data\.sources\.0\.path: .* 8 of 8 rows \(100\.0%\) have no trained token"):
        loaded(build_conversations.packs(tmp_path / "packs", chats=chats, pack=False)).audit()


def model(folder: Path, **settings: Any) -> Path:
    """Writes a model with the tokenizer of the datasets, and other settings of this tokenizer."""
    raw = build_conversations.tokenizer()
    fine_tuning_data.base(folder, raw)
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, **settings).save_pretrained(folder)
    return folder


def test_a_dataset_that_another_template_rendered(tmp_path: Path) -> None:
    data = build_conversations.packs(tmp_path / "packs")
    other = model(tmp_path / "model", chat_template=CHATML.replace("assistant", "model"))
    with pytest.raises(ConfigError, match=r"^model\.pretrained: .* chat template .* differs from the template .* that rendered"):
        loaded(data, model={"pretrained": str(other)})


def trained(recipe: Any, data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    table = pq.read_table(data / "shards/0.parquet")
    batch = recipe.batch(table, np.arange(len(table)))
    return batch["input_ids"], batch["labels"]


def test_a_tokenizer_whose_padding_is_the_end_of_turn_still_learns_to_stop(tmp_path: Path) -> None:
    """Other tools mask all padding tokens, and with them the ends of turns."""
    data, folder = build_conversations.packs(tmp_path / "packs"), model(tmp_path / "model", pad_token=STOP, chat_template=CHATML)
    assert AutoTokenizer.from_pretrained(folder).pad_token == STOP
    recipe = loaded(data, model={"pretrained": str(folder)})
    _, labels = trained(recipe, data)
    (source,) = recipe.audit()["sources"]
    stop = build_conversations.tokenizer().token_to_id(STOP)
    assert int((labels == stop).sum()) == source["trained_ends"] == source["sampled_turns"] > 0


def test_a_template_whose_end_of_turn_is_the_padding_trains_no_padding(tmp_path: Path) -> None:
    """heliostat pads with the token that ends documents. Here, each answer ends with the same token."""
    raw, rows = build_conversations.tokenizer(), []
    end = raw.token_to_id(END)
    for number, chat in enumerate(build_conversations.conversations(16)):
        one = build_conversations.render(raw, chat[:2] if chat[0]["role"] == "user" else chat[1:3])
        tokens, mask = [*one.tokens[:-2], end], [*one.trained[:-2], True]
        rows.append({"ids": [str(number)], "lengths": [len(tokens)], "tokens": tokens, "trained": mask})
    names = "untrained", "cut", "split", "retokenized", "ended", "padding"
    counts = {"conversations": 16, "turns": 16, "trained_ends": 16, **dict.fromkeys(names, 0)}
    counts |= {"tokens": sum(len(row["tokens"]) for row in rows), "trained": sum(sum(row["trained"]) for row in rows)}
    facts = {"form": "packs", "sequence_length": 96, "turns": "all", "end_of_turn": True, "end": end, "counts": counts}
    data = build_conversations.write(tmp_path / "packs", rows, PACKS, raw, facts)
    recipe = loaded(data)
    ids, labels = trained(recipe, data)
    assert int((labels == end).sum()) == 16 < int((ids == end).sum()), "the padding has the same token, and no label"
    assert int((labels != IGNORED).sum()) == counts["trained"]
    assert recipe.audit()["warnings"] == []


def test_a_dataset_that_does_not_train_the_ends_of_turns_is_warned_about(tmp_path: Path) -> None:
    (warning,) = loaded(build_conversations.packs(tmp_path / "packs", end_of_turn=False)).audit()["warnings"]
    assert warning.endswith("the end of no turn is trained, so the model doesn't learn to stop")


def test_packs_without_masks(tmp_path: Path) -> None:
    data = build_conversations.packs(tmp_path / "packs")
    with pytest.raises(ConfigError, match=r"^data\.document_mask: false, but the packs of .* contain several conversations"):
        loaded(data, **{"data.document_mask": False})
    recipe = loaded(data, model={"arch": "opt"})
    assert isinstance(recipe, SFT)
    with pytest.raises(ConfigError, match=r"^data\.document_mask: 'opt' attends across packed documents"):
        recipe.probe()


# preferences ---------------------------------------------------------------------------------------------------------


def preferred(data: Path, folder: Path, **keys: Any) -> Any:
    made = job(**{"recipe": "heliostat.recipes:DPO", "model": {"pretrained": str(folder), **keys}, "data.sequence_length": None,
                  "data.sources": [{"path": str(data)}]})  # fmt: skip
    return loading.load(made, [manifest.read(Location(str(data)))])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    fine_tuning_data.build(folder)
    return folder


def test_a_reference_of_another_model(made: Path, tmp_path: Path) -> None:
    assert preferred(made / "referred", made / "base").from_dataset
    other = LlamaForCausalLM.from_pretrained(made / "base")
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text((made / "base/tokenizer.json").read_text())
    with pytest.raises(ConfigError, match=r"^data\.sources\.0\.path: .* has log-probabilities of another reference \(.*\) than"):
        preferred(made / "referred", tmp_path / "other")


def test_answers_without_a_difference_or_without_a_prompt(made: Path) -> None:
    """The labels of a pair come from its own prompt and answers."""
    table, recipe = pq.read_table(made / "pairs/shards/0.parquet"), preferred(made / "pairs", made / "base", adapter={"rank": 4})
    same = table.set_column(3, table.schema.field(3), table["chosen"])
    empty = table.set_column(1, table.schema.field(1), pa.array([[]] * len(table), pa.list_(pa.int32())))
    for rows, message in ((same, "`chosen` and `rejected` are equal"), (empty, "`prompt` has no tokens")):
        with pytest.raises(DataError, match=f"row 'pair-0000': {message}"):
            recipe.batch(rows, np.arange(len(rows)))
