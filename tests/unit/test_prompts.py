"""Tests that a language model's sample prompts come from its dataset: first words of documents that weren't trained on."""

from pathlib import Path

import pytest
from heliostat.data.dataset import open_dataset, plan
from heliostat.data.manifest import Manifest
from heliostat.recipes.text import exporting
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit import test_samples
from tests.unit.build_job import job

NAMES = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Finn", "Gwen", "Hugo")
PROSE = [f"{NAMES[i % 8]} walked home through rain number {i} and thought of the sea." for i in range(120)]


def bound(monkeypatch: pytest.MonkeyPatch, folder: Path, texts: list[str], **changes: object) -> tuple[CausalLM, Manifest]:
    monkeypatch.setattr(test_samples, "TEXTS", texts)
    source = test_samples.make_text(folder)
    changes = {"data.sources.0.path": str(folder), "data.sequence_length": 48, "model.vocab_size": None, **changes}
    recipe = CausalLM(job(**changes))
    recipe.bind([source])
    return recipe, source


def test_the_prompts_of_prose_are_words_of_its_held_out_documents(monkeypatch, tmp_path):
    """Code has other prompts. Both kinds come from documents that no step trains on."""
    recipe, source = bound(monkeypatch, tmp_path, PROSE, **{"evaluate.fraction": 0.3})
    assert len(recipe.prompts) == 2 and all(p.split()[1:] == ["walked", "home", "through"] for p in recipe.prompts)
    data = open_dataset(plan(recipe.job, [source]))
    held = data.gather(data.order.held_out(1000)).content
    texts = [recipe.raw_tokenizer.decode(tokens.tolist()) for tokens in held]
    assert all(any(prompt in text for text in texts) for prompt in recipe.prompts)


def test_the_prompts_of_code_are_code(monkeypatch, tmp_path):
    recipe, _ = bound(monkeypatch, tmp_path, test_samples.TEXTS, **{"evaluate.fraction": 0.3})
    assert recipe.prompts and all(p.startswith(("def ", "return ")) for p in recipe.prompts)


def test_where_nothing_is_held_out_the_prompts_are_of_what_is_trained_on(monkeypatch, tmp_path):
    recipe, _ = bound(monkeypatch, tmp_path, PROSE, evaluate=None)
    assert recipe.prompts and all("walked" in p for p in recipe.prompts)


def test_without_its_dataset_the_prompt_is_a_plain_one_and_that_is_said(monkeypatch, tmp_path, caplog):
    recipe, source = bound(monkeypatch, tmp_path, PROSE)
    for path in source.chunks["path"].unique().to_pylist():
        (tmp_path / path).unlink()
    assert recipe.prompts == ("The",) and "can't read the datasets, so the prompt is 'The': " in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n\n  It was the best of times, it was", "It was the best"),
        ("import os\nimport sys", "import os"),
        ("***\n---\nreal words here now", "real words here"),
        ("word", "word"),
        ("a" * 100 + " b", "a" * 40),
        ("", ""),
    ],
)
def test_the_first_words_are_of_the_first_line_that_has_any(text, words):
    assert exporting.opening(text) == words
