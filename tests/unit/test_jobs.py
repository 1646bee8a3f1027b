"""The jobs that are handed out: every file passes the check, and the models are the size that they claim."""

import re
from pathlib import Path

import pytest
import torch
from heliostat import check

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "jobs").glob("*.yaml"), *(ROOT / "jobs" / "examples").glob("*.yaml")])


@pytest.fixture(autouse=True)
def workspace(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_job_file_passes_the_check(path):
    """Valid keys, rules and model; named after its file, so that no two write to one run."""
    job, recipe = check.check_file(path)
    assert job.name == path.stem
    assert recipe.kind in ("tokens", "rows")


def test_there_are_jobs():
    """The parametrized tests above would pass on an empty folder."""
    assert {
        "quickstart",
        "llama3-8b",
        "long-context-128k",
        "gpt-1b",
        "quickstart-diffusion",
        "stable-diffusion-2",
        "dit-xl-2",
        "masked-lm",
        "classifier",
    } <= {p.stem for p in FILES}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3-8b", 8_030_261_248),
        ("long-context-128k", 8_030_261_248),
        ("gpt-1b", 1_315_819_520),
        ("stable-diffusion-2", 865_910_724),  # as published
        ("dit-xl-2", 610_837_648),
    ],
)
def test_a_full_scale_model_has_the_parameters_that_its_comment_says(name, parameters):
    """Built on the meta device, tied weights counted once; the number stands in the file's comment."""
    path = ROOT / "jobs" / f"{name}.yaml"
    _, recipe = check.check_file(path)
    with torch.device("meta"):
        model = recipe.build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert re.search(r"\(([\d,]+) parameters", path.read_text())[1] == f"{parameters:,}"


def test_llama3_8b_is_the_published_shape():
    """What the parameter count alone does not show: grouped heads, rotary base, normalisation, tokens a step."""
    job, recipe = check.check_file(ROOT / "jobs" / "llama3-8b.yaml")
    c = recipe.config
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.max_position_embeddings) == (32, 8, 128, 8192)
    assert (c.rms_norm_eps, c.rope_parameters["rope_theta"], c.tie_word_embeddings) == (1e-5, 500_000.0, False)
    assert job.train.global_batch * job.data.sequence_length == 4_194_304


def test_stable_diffusion_2_is_the_published_recipe():
    """Batch, latents, the text's width and the noise schedule; DiT-XL/2 has 28 layers of width 1,152 on patches of 2."""
    job, recipe = check.check_file(ROOT / "jobs" / "stable-diffusion-2.yaml")
    keys, objective = recipe.model.backbone, recipe.model.objective
    assert (job.train.global_batch, keys["in_channels"], keys["cross_attention_dim"], job.train.ema.decay) == (
        2048,
        4,
        1024,
        0.9999,
    )
    assert (objective.beta_start, objective.beta_end, objective.steps) == (0.00085, 0.012, 1000)
    _, dit = check.check_file(ROOT / "jobs" / "dit-xl-2.yaml")
    keys = dit.model.backbone
    assert (keys["num_layers"], keys["num_attention_heads"] * keys["attention_head_dim"], keys["patch_size"]) == (28, 1152, 2)
