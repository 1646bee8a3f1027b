"""Tests the shipped jobs: every file passes the check, and the models have the sizes that their comments state."""

import json
import re
from pathlib import Path

import pytest
import torch
from heliostat.recipes import weightless
from heliostat.validation import check
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "jobs").glob("*.yaml"), *(ROOT / "jobs" / "examples").glob("*.yaml")])
pytestmark = pytest.mark.usefixtures("in_repository")


def flux(folder: Path) -> str:
    """Writes the configuration of FLUX.1-dev, and an empty file of weights, which the check doesn't read."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        FluxTransformer2DModel(guidance_embeds=True).save_config(folder)
    (folder / "diffusion_pytorch_model.safetensors").touch()
    return f"model.backbone.pretrained={folder}"


def language_model(folder: Path) -> str:
    """Saves a small language model, the base of the example of an adapter."""
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(config).save_pretrained(folder)
    return f"model.pretrained={folder}"


def encoders(folder: Path) -> dict[str, str]:
    """Writes the configurations of the frozen encoders of `prx-1b`, `sd3-medium`, and `flux-lora`, with empty files of weights.
    Returns the folders by name."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, T5Config, T5GemmaConfig, T5GemmaModuleConfig

    clip = {"vocab_size": 49408, "max_position_embeddings": 77, "architectures": ["CLIPTextModelWithProjection"]}
    big = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    gemma = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 256000}
    t5 = T5Config(vocab_size=32128, d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    configs = {
        "clip-l": CLIPTextConfig(**clip, **large, projection_dim=768),
        "clip-g": CLIPTextConfig(**clip, **big, projection_dim=1280),
        "t5": t5,
        "t5gemma": T5GemmaConfig(encoder=T5GemmaModuleConfig(**gemma), is_encoder_decoder=False),
    }
    for name, config in configs.items():
        config.save_pretrained(folder / name)
        (folder / name / "model.safetensors").touch()
    blocks = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(**blocks, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, shift_factor=0.1)
    vae.save_config(folder / "vae")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").touch()
    return {name: str(folder / name) for name in (*configs, "vae")}


TEXTS = {  # encoders and lengths
    "prx-1b": (("t5gemma", 256),),
    "sd3-medium": (("clip-l", 77), ("clip-g", 77), ("t5", 77)),
    "flux-lora": (("clip-l", 77), ("t5", 512)),
}


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("prx-1b", 1_170_691_648),
        pytest.param("sd3-medium", 2_028_328_000, marks=pytest.mark.ci),
        pytest.param("flux-lora", 86_743_040, marks=pytest.mark.ci),
    ],
)
def test_a_job_of_images_has_a_plan_and_a_dry_run_at_full_size(name, trained, tmp_path, monkeypatch):
    """From the configurations of its encoders alone, before its dataset exists: the job fits on its devices, and its ranks share
    the fp32 master weights and the two moments of each trained parameter."""
    from heliostat.plan import dryrun

    monkeypatch.setenv("HELIOSTAT_CACHE", "")  # which would make the second run of this test empty
    folders = encoders(tmp_path)
    text = [{"pretrained": folders[kind], "length": length} for kind, length in TEXTS[name]]
    settings = [f"model.text={json.dumps(text if len(text) > 1 else text[0])}", f"data.path={tmp_path / 'nowhere'}"]
    settings += [f"model.autoencoder.pretrained={folders['vae']}", f"storage={tmp_path / 'runs'}"]
    found = dryrun.dry_run(ROOT / "jobs" / f"{name}.yaml", settings + ([flux(tmp_path / "flux")] if name == "flux-lora" else []))
    averages = 1 if name == "sd3-medium" else 0  # its job keeps an average
    assert found["largest_share"] * found["workers"] == pytest.approx(4 * (3 + averages) * trained, rel=0.02)
    assert found["checkpoint_bytes"] == pytest.approx(4 * (3 + averages) * trained, rel=0.02)  # and SD3's buffer of positions


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_job_file_passes_the_check(path, tmp_path):
    """Keys, rules, and model are valid. The job has its file's name, so no two jobs write to one run. The base of an adapter is a
    folder, which a test must make."""
    bases = {"flux-lora": flux, **dict.fromkeys(("lora", "sft", "dpo", "assistant-sft", "assistant-dpo"), language_model)}
    changes = [bases[path.stem](tmp_path)] if path.stem in bases else None
    job, recipe = check.check_file(path, changes)
    assert job.name == path.stem
    assert recipe.kind in ("tokens", "rows")


def test_there_are_jobs():
    """Otherwise the parametrized tests above would pass on an empty folder."""
    assert {
        "quickstart",
        "llama3-8b",
        "long-context-128k",
        "moe-8x1b",
        "qwen3-30b-a3b",
        "gpt-1b",
        "quickstart-diffusion",
        "stable-diffusion-2",
        "dit-xl-2",
        "prx-1b",
        "sd3-medium",
        "flux-lora",
        "masked-lm",
        "classifier",
    } <= {p.stem for p in FILES}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama3-8b", 8_030_261_248),
        ("long-context-128k", 8_030_261_248),
        ("gpt-1b", 1_315_819_520),
        ("moe-8x1b", 6_429_272_064),
        ("qwen3-30b-a3b", 30_532_122_624),  # as published
        ("stable-diffusion-2", 865_910_724),  # as published
        ("dit-xl-2", 610_837_648),
        ("prx-1b", 1_170_691_648),
        ("sd3-medium", 2_028_328_000),
    ],
)
def test_a_full_scale_model_has_the_parameters_that_its_comment_says(name, parameters):
    """The model is built on the meta device, with tied weights counted once. The file's comment has the number."""
    path = ROOT / "jobs" / f"{name}.yaml"
    _, recipe = check.check_file(path)
    with torch.device("meta"):
        model = recipe.build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert re.search(r"\(([\d,]+) parameters", path.read_text())[1] == f"{parameters:,}"


def test_llama3_8b_is_the_published_shape():
    """Checks what the parameter count doesn't show: grouped heads, rotary base, normalization, and tokens per step."""
    job, recipe = check.check_file(ROOT / "jobs" / "llama3-8b.yaml")
    c = recipe.config
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.max_position_embeddings) == (32, 8, 128, 8192)
    assert (c.rms_norm_eps, c.rope_parameters["rope_theta"], c.tie_word_embeddings) == (1e-5, 500_000.0, False)
    assert job.train.global_batch_size * job.data.sequence_length == 4_194_304


@pytest.mark.parametrize(("name", "active"), [("moe-8x1b", 1_861_675_008), ("qwen3-30b-a3b", 3_353_032_704)])
def test_a_mixture_says_what_is_active_and_balances_its_experts(name, active):
    """The file's comment has the number (Qwen3-30B-A3B: 3.3 billion published). Some loss balances the experts."""
    path = ROOT / "jobs" / f"{name}.yaml"
    _, recipe = check.check_file(path)
    with torch.device("meta"):
        assert recipe.active_parameters(recipe.build()) == active
    assert f"{active:,} active for a token" in path.read_text()
    assert recipe.router_weight and recipe.config._experts_implementation == "grouped_mm"


def test_qwen3_30b_a3b_is_the_published_shape():
    """128 experts of width 768, 8 of them per token, and heads of 128 on a width of 2,048."""
    c = check.check_file(ROOT / "jobs" / "qwen3-30b-a3b.yaml")[1].config
    assert (c.num_experts, c.num_experts_per_tok, c.moe_intermediate_size, c.norm_topk_prob) == (128, 8, 768, True)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size) == (32, 4, 128, 2048)


def test_stable_diffusion_2_is_the_published_recipe():
    """Batch, latents, the text's width, and the noise schedule. DiT-XL/2 has 28 layers of width 1,152 on patches of 2."""
    job, recipe = check.check_file(ROOT / "jobs" / "stable-diffusion-2.yaml")
    keys, objective = recipe.model.backbone, recipe.model.objective
    assert (job.train.global_batch_size, keys["in_channels"], keys["cross_attention_dim"], job.train.ema.decay) == (
        2048,
        4,
        1024,
        0.9999,
    )
    assert (objective.beta_start, objective.beta_end, objective.steps) == (0.00085, 0.012, 1000)
    _, dit = check.check_file(ROOT / "jobs" / "dit-xl-2.yaml")
    keys = dit.model.backbone
    assert (keys["num_layers"], keys["num_attention_heads"] * keys["attention_head_dim"], keys["patch_size"]) == (28, 1152, 2)


def test_flux_lora_trains_a_small_part_of_the_published_model(tmp_path):
    """The base has the published number of parameters, and only the adapter is trained."""
    path = ROOT / "jobs" / "flux-lora.yaml"
    _, recipe = check.check_file(path, [flux(tmp_path)])
    with torch.device("meta"), weightless.building():
        model = recipe.build()
    trained = {p for p in model.parameters() if p.requires_grad}
    base = sum(p.numel() for p in model.parameters() if p not in trained)
    assert base == 11_901_408_320 and f"{base:,} parameters" in path.read_text()
    assert 0 < sum(p.numel() for p in trained) < 0.02 * base
