"""Tests the key `chat` of a suite: the model gets each question as the message of a user, rendered by its own chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from heliostat.errors import ConfigError
from heliostat.evaluation import scoring, suite, tasks
from lm_eval.api.instance import Instance

from tests.unit.test_batch_tasks import write_writer

QUESTIONS = ["1 + 3 =", "11 - 39 ="]
TASK = {
    "task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "test.jsonl"}}, "test_split": "test",
    "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4}, "metric_list": [{"metric": "exact_match"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_writer(tmp_path_factory.mktemp("writer"))


def write_suite(folder: Path, chat: bool) -> Path:
    described = {"name": "sums", "tasks": ["sums"], "chat": chat, "contamination": {"measure": False}}
    (folder / "sums.yaml").write_text(yaml.safe_dump(TASK))
    (folder / "test.jsonl").write_text("".join(json.dumps({"question": q, "answer": "4"}) + "\n" for q in QUESTIONS))
    (folder / "suite.yaml").write_text(yaml.safe_dump(described))
    return folder / "suite.yaml"


@pytest.mark.parametrize("chat", [False, True])
def test_a_question_is_rendered_by_the_chat_template_only_if_the_suite_chats(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    asked, place = suite.load(write_suite(tmp_path, chat))
    (task,) = tasks.build(asked, place, tmp_path / "cache")
    model = scoring.load(writer, asked)
    prompts, generate = list[str](), model.generate_until

    def recorded(requests: list[Instance], **options: Any) -> list[str]:
        prompts.extend(one.args[0] for one in requests)
        return generate(requests, **options)

    monkeypatch.setattr(model, "generate_until", recorded)
    row, values = scoring.score(model, task, asked)
    tokenizer = transformers.AutoTokenizer.from_pretrained(writer)
    rendered = [tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
                for q in QUESTIONS]  # fmt: skip
    assert sorted(prompts) == sorted(rendered if chat else QUESTIONS) and set(rendered).isdisjoint(QUESTIONS)
    assert row["examples"] == len(values) == len(QUESTIONS)


def test_a_suite_that_chats_needs_a_chat_template(writer: Path, tmp_path: Path) -> None:
    asked, _ = suite.load(write_suite(tmp_path, True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(writer)
    model = transformers.AutoModelForCausalLM.from_pretrained(writer)
    tokenizer.chat_template = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mute")
    with pytest.raises(ConfigError, match=r"^chat: the tokenizer in .*mute has no chat template\. Remove this key"):
        scoring.load(tmp_path / "mute", asked)
