"""Tests the cache of counts: it holds for the same model and the same code only, and a hit doesn't import torch."""

import subprocess
import sys

import pytest
from heliostat.plan import count_cache, model_stats, planner
from heliostat.recipes import CausalLM

from tests.unit.build_job import job

LLAMA = {
    "model": {"arch": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "data.sequence_length": 16,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(count_cache.PLACE, str(tmp_path))
    return tmp_path / "counts"


def counts(**changes):
    j = job(**{**LLAMA, **changes})
    recipe = CausalLM(j)
    return count_cache.get(
        j, recipe, lambda: model_stats.count(j, recipe, None, [planner.sample(j, recipe, n) for n in (1, 2, 3)])
    )


def test_kept_counts_are_the_counts(folder, monkeypatch):
    counted = counts()
    monkeypatch.setattr(model_stats, "count", None)  # which would fail
    assert counts() == counted
    assert counts(name="another", **{"train.steps": 7, "train.optimizer.lr": 0.5}) == counted


@pytest.mark.parametrize(
    "change",
    [
        {"data.sequence_length": 32},
        {"train.precision": "fp32"},
        {"train.parallel": {"tensor": 2}, "workers.count": 2},
        {"model": {**LLAMA["model"], "num_hidden_layers": 3}},
        {"model": {**LLAMA["model"], "vocab_size": 4096}},
    ],
)
def test_another_model_has_another_key(change):
    plain, other = job(**LLAMA), job(**{**LLAMA, **change})
    assert count_cache.key(plain, CausalLM(plain)) != count_cache.key(other, CausalLM(other))


def test_what_only_divides_the_state_or_the_samples_has_the_same_key_and_counts():
    made = [
        job(**{**LLAMA, "workers.count": 2, "train.zero.stage": 3, **more}) for more in ({}, {"train.parallel": {"sequence": 2}})
    ]
    made.append(job(**{**LLAMA, "workers.count": 2, "train.zero.stage": 1}))
    assert len({count_cache.key(one, CausalLM(one)) for one in made}) == 1
    first, *others = (
        model_stats.count(one, CausalLM(one), None, [planner.sample(one, CausalLM(one), n) for n in (1, 2, 3)]) for one in made
    )
    assert all(one == first for one in others)


def test_other_code_or_another_dataset_has_another_key(monkeypatch):
    class Source:
        digest = "a"

    j = job(**LLAMA)
    recipe = CausalLM(j)
    was = count_cache.key(j, recipe)
    recipe.sources = [Source()]
    bound = count_cache.key(j, recipe)
    monkeypatch.setattr(count_cache, "_code", lambda: ["changed"])
    assert len({was, bound, count_cache.key(j, recipe)}) == 3


def test_a_pretrained_folder_and_a_recipe_of_ones_own_are_counted_each_time(tmp_path):
    j = job(**LLAMA)
    recipe = CausalLM(j)
    for change in ({"model": {"pretrained": str(tmp_path)}}, {"recipe": "jobs.mine:Recipe"}):
        assert count_cache.key(j.model_copy(update=change), recipe) is None


def test_a_damaged_file_is_counted_anew_and_said(folder, caplog):
    counted = counts()
    (place,) = folder.iterdir()
    whole = place.read_text()
    place.write_text(whole[:100])
    assert counts() == counted and place.read_text() == whole
    assert "so heliostat counts the model again" in caplog.text and str(place) in caplog.text


def test_the_newest_are_kept(folder, monkeypatch):
    monkeypatch.setattr(count_cache, "KEPT", 1)
    counts()
    counts(**{"data.sequence_length": 8})
    assert len(list(folder.iterdir())) == 1


def test_an_empty_place_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(count_cache.PLACE, "")
    counts()
    assert not list(tmp_path.iterdir())


def test_planning_imports_no_torch_by_itself():
    code = "import sys; from heliostat.plan import planner; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
