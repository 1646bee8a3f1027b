"""Tests the frozen models of a text-to-image recipe: precision, memory, and the latents that they encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.curation.images import encoding
from heliostat.curation.images.latents import Latents
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.recipes.images import config, diffusers_folder
from heliostat.recipes.images import rows as image_rows
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from tests.unit import build_images
from tests.unit.build_images import folder_of, image, prepared
from tests.unit.build_job import job
from tests.unit.build_text_to_image import autoencoder, bert, clip, recipe, rows, woken

pytestmark = pytest.mark.usefixtures("one_thread")


def test_frozen_encoders_compute_in_the_jobs_precision_near_fp32(digits, tmp_path):
    """Within 2 % of fp32, in bf16 with half the memory. Runs of version 1, and jobs in fp32, keep fp32's bits."""
    text = {"pretrained": str(clip(tmp_path / "clip", digits)), "length": 8}
    model = {"text": text, "autoencoder": {"pretrained": str(autoencoder(tmp_path / "vae", 1))}}
    parts: dict[tuple[int, str], Any] = {}
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for case in ((1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")):
        changes = {"train.recipe_version": case[0], "train.precision": case[1]}
        made = TextToImage(job(**{**build_images.job(digits, **model), **changes}))
        made.bind([manifest.read(Location(str(digits)))])
        batch = made.batch(rows(digits), np.arange(12))
        drawn = image_rows.draw(3, batch["key"], *made._drawn(batch["clean"])).named()
        drawn["dropped"][:] = False
        found[case], parts[case] = made.complete(batch | drawn), made.parts
    exact = found[1, "fp32"]
    for name in ("image", "caption"):
        assert torch.equal(found[1, "bf16"][name], exact[name]) and torch.equal(found[2, "fp32"][name], exact[name])
        near = found[2, "bf16"][name].float()
        assert 1e-4 < float((near - exact[name]).norm() / exact[name].norm()) < 0.02
    companions = [{name: c.bytes for name, c in parts[2, precision].companions().items()} for precision in ("fp32", "bf16")]
    assert companions[0] == {name: 2 * size for name, size in companions[1].items()} and len(companions[0]) == 2


def test_frozen_encoders_are_in_the_plan_and_leave_the_device_when_only_drawing_needs_them(digits, tmp_path):
    from types import SimpleNamespace

    from heliostat.plan import memory
    from heliostat.plan.model_stats import build, stats_of

    text = {"pretrained": str(clip(tmp_path / "clip", digits)), "length": 8}
    made = recipe(digits, text=text, autoencoder={"pretrained": str(autoencoder(tmp_path / "vae", 1))},
                  samples={"prompts": [{"text": "the digit one"}], "per_prompt": 1, "steps": 2})  # fmt: skip
    parts = made.parts
    sizes = {n: sum(4 * p.numel() for p in parts.frozen(n).parameters()) for n in ("text_encoder", "vae")}
    both = sum(sizes.values())
    assert stats_of(made, build(made)).frozen_models == (both, both)  # images and captions are encoded in every step
    state = memory.StateBytes(10, 10, 10, 10, 0, 0)
    assert memory.need(state, 0, 100, False, (both, both)).frozen == both
    assert (
        memory.need(state, 0, 100, False, (0, both)).frozen == both - 100 and memory.need(state, 0, 2 * both, False).frozen == 0
    )

    moved = dict.fromkeys(sizes, "")
    for name in sizes:
        module = parts.frozen(name)
        module.to = lambda device, n=name: moved.__setitem__(n, str(device))
    parts.rest()
    assert moved == {"text_encoder": "", "vae": ""}  # the next step needs them where they are
    kept = SimpleNamespace(**{**vars(parts.facts), "content": "latents", "text": (8, 16)})
    parts.facts = kept  # the datasets hold what the encoders say
    beside = parts.companions().values()
    assert sum(c.bytes for c in beside) == both and not any(c.every_step for c in beside)
    parts.rest()
    assert moved == {"text_encoder": "cpu", "vae": "cpu"}


@pytest.mark.parametrize("latents", [True, False])
@pytest.mark.ci
def test_a_job_is_planned_before_its_dataset_exists(latents, digits, tmp_path):
    """By the sizes of its backbone, as if the dataset held latents and embeddings, or images and embeddings."""
    from heliostat.errors import DataError
    from heliostat.plan import planner

    text = {"pretrained": str(clip(tmp_path / "clip", digits)), "length": 8}
    channels = 4 if latents else 1
    sized = {**build_images.UNET, "sample_size": 8, "in_channels": channels, "out_channels": channels}
    vae = {"autoencoder": {"pretrained": str(autoencoder(tmp_path / "vae"))}} if latents else {}
    wanted = job(**build_images.job(tmp_path / "nowhere", backbone=sized, text=text, **vae))
    j, made, unread = planner.bound(wanted, TextToImage(wanted))
    found = planner.plan(j, made)
    assert "nowhere" in unread and found["parameters"]["total"] == sum(p.numel() for p in made.build().parameters())
    assert made.parts.facts.size == ((16, 16) if latents else (8, 8)) and found["memory"]["activations"] > 0
    wanted = job(**build_images.job(tmp_path / "nowhere", backbone=build_images.UNET, text=text))
    with pytest.raises(DataError, match=r"needs the dataset: .*model\.backbone\.sample_size"):
        planner.bound(wanted, TextToImage(wanted))


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_frozen_encoder_conditions_and_is_not_trained(kind, digits, tmp_path):
    folder = tmp_path / kind
    if kind == "clip":
        clip(folder, digits, 24)
    else:
        torch.manual_seed(5)
        T5EncoderModel(T5Config(vocab_size=320, d_model=24, d_ff=32, num_layers=1, num_heads=2, d_kv=12)).save_pretrained(folder)
        diffusers_folder.tokenizer((digits / "tokenizer.json").read_bytes(), 0, 8).save_pretrained(folder)
    made = recipe(digits, text={"pretrained": str(folder), "length": 8})
    torch.manual_seed(0)
    model = woken(made.build())
    batch = made.batch(rows(digits), np.arange(12))
    loss = made.loss(model, batch).sum
    loss.backward()
    assert made.parts.text_shape.width == 24 and all(p.grad is None for p in made.parts.frozen("text_encoder").parameters())
    text = made.parts.conditioning({"text": batch["text"], "mask": batch["mask"]})["caption"]
    assert text.shape == (12, 8, 24) and text.std() > 0


def latents_of(tmp_path: Path, digits: Path, at: str = "clip") -> Latents:
    return Latents(autoencoder=str(autoencoder(tmp_path / "vae", 1)), text_encoder=str(clip(tmp_path / at, digits)), length=8)


@pytest.mark.parametrize("which", ["autoencoder", "text"])
def test_a_frozen_model_without_safetensors_is_refused(which, digits, tmp_path):
    """A pickle would be loaded instead, and the digest that names the model doesn't cover it."""
    latents = latents_of(tmp_path, digits)
    latents.check(((16, 16),), 1)
    folder, name = (
        (tmp_path / "vae", "diffusion_pytorch_model") if which == "autoencoder" else (tmp_path / "clip", "pytorch_model")
    )
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / f"{name}.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"^latents\.(autoencoder|text_encoder): '.*' has no safetensors weights\. Save"):
        latents.check(((16, 16),), 1)
    load = config.frozen_autoencoder if which == "autoencoder" else config.frozen_text_encoder
    with pytest.raises(ConfigError, match=rf"^model\.{which}\.pretrained: .* has no safetensors"):
        load(str(folder))
    given: dict[str, Any] = {"pretrained": str(folder)} | ({"length": 8} if which == "text" else {})
    with pytest.raises(ConfigError, match=rf"^model\.{which}\.pretrained: .* has no safetensors"):
        recipe(digits, **{which: given})


def test_latents_follow_from_the_tokenizers_files_wherever_they_lie(digits, tmp_path):
    """The digests of models stay the same, by which jobs know them. So a job whose model made the dataset isn't rejected."""
    latents = latents_of(tmp_path, digits, "model/text_encoder")
    folder = tmp_path / "model" / "text_encoder"
    for path in folder.glob("*.txt"):
        path.unlink()
    plain, models = latents.identity(), latents.models()
    assert plain == {"models": models, "length": 8}  # as it was before the digest of a tokenizer was in it
    for name in ("merges.txt", "spiece.model"):
        seen = [plain]
        for text in ("one", "two"):
            (folder / name).write_text(text)
            found = latents.identity()
            assert found not in seen and found["models"] == models
            seen.append(found)
        (folder / name).unlink()
    (tmp_path / "model" / "tokenizer").mkdir()
    for path in folder.glob("tokenizer*"):
        path.rename(tmp_path / "model" / "tokenizer" / path.name)
    before = latents.identity()
    assert config.frozen_tokenizer(str(folder), 8)("one").input_ids
    (tmp_path / "model" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert latents.identity() != before and latents.identity()["models"] == before["models"]


def test_a_worker_encodes_by_the_models_that_are_in_the_folders_now(digits, tmp_path):
    """A later prepare may reuse the process of an idle worker."""
    folder_of(tmp_path / "in", [(f"{i}.png", image(16, 16, seed=i), {"caption": f"number {i}"}) for i in range(3)])
    folders = {"autoencoder": str(autoencoder(tmp_path / "vae")), "text_encoder": str(clip(tmp_path / "clip", digits))}
    keys = {"name": "test", "input": str(tmp_path / "in"), "resolution": 16, "latents": {**folders, "length": 8}}

    def made(name: str) -> tuple[list[bytes], bytes]:
        found, _ = prepared({**keys, "output": str(tmp_path / name)})
        (path,) = set(found.paths)
        return pq.read_table(tmp_path / name / path)["latent"].to_pylist(), (tmp_path / name / "empty_caption.bin").read_bytes()

    first = made("1")
    for weights in (next((tmp_path / name).glob("*.safetensors")) for name in ("vae", "clip")):
        save_file({name: weight * 0.9 for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    second = made("2")
    encoding.loaded.cache_clear()
    assert second == made("3") and second[0] != first[0] and second[1] != first[1]


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_a_frozen_model_that_lacks_a_weight_is_one_line(digits, tmp_path, name):
    """The libraries would fill the gap with random numbers, so that the run learns from noise."""
    folders = {"text_encoder": clip(tmp_path / "clip", digits), "vae": autoencoder(tmp_path / "vae", 1)}
    (file,) = folders[name].glob("*.safetensors")
    tensors = load_file(file)
    lost = next(key for key in tensors if "conv_out.weight" in key or "fc2.weight" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, file, {"format": "pt"})
    made = recipe(digits, text={"pretrained": str(folders["text_encoder"]), "length": 8},
                  autoencoder={"pretrained": str(folders["vae"])})  # fmt: skip
    with pytest.raises(ConfigError, match=r"1 of the model's weights are missing, for example .*(conv_out|fc2)\.weight\. Copy"):
        made.parts.frozen(name)


def test_a_text_encoder_without_a_pooler_is_complete(digits, tmp_path):
    """Published weights of BERT's relatives often lack the pooler, which heliostat doesn't use."""
    folder = bert(tmp_path / "bert", digits, 8, 16)
    before = config.frozen_text_encoder(str(folder))
    (file,) = folder.glob("*.safetensors")
    save_file({key: tensor for key, tensor in load_file(file).items() if "pooler" not in key}, file, {"format": "pt"})
    after = config.frozen_text_encoder(str(folder))
    assert not any("pooler" in name for name, _ in after.named_parameters())
    ids = torch.arange(6)[None]
    assert torch.equal(before(ids).last_hidden_state, after(ids).last_hidden_state)
    assert config.frozen_bytes(str(folder), torch.float32) == sum(4 * p.numel() for p in after.parameters())
