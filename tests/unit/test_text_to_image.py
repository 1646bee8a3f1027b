"""Tests the text-to-image recipe: random numbers by sample, losses as sums, invalid models, and its pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from heliostat.curation.images import tasks
from heliostat.curation.images.latents import Latents
from heliostat.data import manifest
from heliostat.data.dataset import open_dataset, plan
from heliostat.errors import ConfigError
from heliostat.recipes.images import config, diffusers_folder
from heliostat.recipes.images import rows as image_rows
from heliostat.recipes.images.pipeline import TextToImagePipeline, generators
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location
from heliostat.training.worker.micro_batches import BatchPlan
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.unit import build_images
from tests.unit.build_images import PIXART, SD3, TEXT, UNET, folder_of, image, prepared
from tests.unit.build_job import job

BACKBONES = {"unet": UNET, "pixart": PIXART, "sd3": SD3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_images.digits(tmp_path_factory.mktemp("digits") / "data", 120)


def recipe(dataset: Path, **model: Any) -> TextToImage:
    made = TextToImage(job(**build_images.job(dataset, **model)))
    made.bind([manifest.read(Location(str(dataset)))])
    return made


def woken(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model with random numbers in place of its initial zeros, with which every output is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model


def rows(dataset: Path, count: int = 12) -> Any:
    made = plan(job(**build_images.job(dataset)), [manifest.read(Location(str(dataset)))])
    data = open_dataset(made)
    return data.read(data.order.locate(np.arange(count)))


@pytest.mark.parametrize(
    "objective", [{"prediction": "epsilon"}, {"prediction": "v", "min_snr": 5.0}, {"prediction": "flow"}], ids=str
)
@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_a_batchs_loss_is_the_sum_of_its_samples_whatever_the_cut(arch, objective, dataset):
    """Noise, times, and caption dropout depend on each sample's key, so micro-batches and their order change nothing."""
    made, content, keys = recipe(dataset, backbone=BACKBONES[arch], objective=objective), rows(dataset), np.arange(100, 112)
    torch.manual_seed(0)
    model = woken(made.build())
    assert made.terms(made.batch(content, keys)) == 12 * made.terms_per_sample
    with torch.no_grad():
        whole = made.loss(model, made.batch(content, keys)).sum.item()
        parts = sum(made.loss(model, made.batch(content.slice(i, 4), keys[i : i + 4])).sum.item() for i in (0, 4, 8))
        turned = np.roll(np.arange(12), 5)
        torch.manual_seed(9)
        other = made.loss(model, made.batch(content.take(turned), keys[turned])).sum.item()
        again = made.loss(model, made.batch(content, keys + 1000)).sum.item()
    assert whole == pytest.approx(parts, rel=1e-5) == pytest.approx(other, rel=1e-5)
    assert abs(whole - again) > 1e-3, "another key, other noise"


def test_draws_are_normal_uniform_and_dropped_as_often_as_asked():
    """For the numbers on the host. test_counter_random tests those on the device."""
    draw = image_rows.draw_on_host
    made = draw(7, np.arange(4000), (1, 4, 4), 0.2, 0.0, True)
    assert abs(float(made.noise.mean())) < 0.02 and abs(float(made.noise.std()) - 1) < 0.02
    assert 0.49 < float(made.time.mean()) < 0.51 and float(made.time.max()) < 1
    assert 0.18 < float(made.dropped.float().mean()) < 0.22
    assert made.posterior is not None and abs(float((made.posterior * made.noise).mean())) < 0.02
    offset = draw(7, np.arange(4000), (1, 4, 4), 0.0, 0.5, False).noise
    assert abs(float(offset.mean(dim=(1, 2, 3)).var()) - (0.25 + 1 / 16)) < 0.02
    assert torch.equal(draw(7, np.array([5]), (1, 4, 4), 0.2, 0.0, True).noise[0], made.noise[5])
    assert not torch.equal(draw(8, np.array([5]), (1, 4, 4), 0.2, 0.0, True).noise[0], made.noise[5])


@pytest.mark.parametrize("version", [1, 2])
def test_random_numbers_are_of_a_step_whatever_computes_it(version, dataset):
    """The noise, time, and caption of each sample of a step don't depend on the number of workers, or on the micro-batches and
    their number.

    They are the same after a resume, which creates its own recipe.
    """
    content = rows(dataset, 24)

    def drawn(workers: int, micro: int) -> dict[str, torch.Tensor]:
        wanted = {
            "train.recipe_version": version,
            "train.global_batch_size": 8,
            "train.micro_batch_size": micro,
            "data.virtual_ranks": 4,
        }
        given = job(**build_images.job(dataset, caption_dropout=0.5, objective={"noise_offset": 0.1}), **wanted)
        made, data = TextToImage(given), [manifest.read(Location(str(dataset)))]
        made.bind(data)
        batch_plan, parts = BatchPlan(given, plan(given, data)), list[dict[str, torch.Tensor]]()
        for rank in range(workers):
            keys = np.concatenate([batch_plan.keys(2, range(lane, lane + 1)) for lane in range(rank, 4, workers)])
            for some in np.split(keys, len(keys) // micro):
                parts.append(made.complete(made.batch(content.take(some), some)))
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: values[whole["key"].argsort()] for name, values in whole.items()}

    right = drawn(1, 2)
    assert right["key"].tolist() == list(range(16, 24)) and len(right["time"].unique()) == 8
    for workers, micro in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1)):
        other = drawn(workers, micro)
        assert right.keys() == other.keys() and all(torch.equal(other[name], right[name]) for name in right)


def test_version_1_sends_its_random_numbers_and_version_2_its_keys(dataset):
    """Checks a batch on its way to the device."""
    names = {}
    for version in (1, 2):
        made = TextToImage(job(**build_images.job(dataset), **{"train.recipe_version": version}))
        made.bind([manifest.read(Location(str(dataset)))])
        names[version] = set(made.batch(rows(dataset), np.arange(12)))
    assert names[2] == {"clean", "text", "mask", "key"} and names[1] == names[2] | {"noise", "time", "dropped"}


def test_a_dropped_caption_is_an_empty_one_in_training_and_never_in_evaluation(dataset):
    made, content = recipe(dataset, caption_dropout=0.5), rows(dataset)
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            seen.append(text)
            return noisy * self.weight

    batch = made.batch(content, np.arange(12))
    made.loss(Spy(), batch)
    made.evaluate(Spy(), batch)
    empty = made.parts.empty["text"]
    dropped = image_rows.draw(made.seed, batch["key"], *made._drawn(batch["clean"])).dropped
    assert 0 < int(dropped.sum()) < 12
    assert all(torch.equal(seen[0][i], empty if dropped[i] else batch["text"][i]) for i in range(12))
    assert torch.equal(seen[1], batch["text"])
    assert (batch["text"] != empty).any(1).all()


def test_evaluation_is_on_fixed_noise_and_its_quarters_make_up_the_loss(dataset):
    made, content = recipe(dataset), rows(dataset)
    torch.manual_seed(0)
    model = woken(made.build()).eval()
    with torch.no_grad():
        one, two = (
            {n: float(v.sum()) for n, v in made.evaluate(model, made.batch(content, np.arange(12))).items()} for _ in range(2)
        )
    assert one == two
    scores = made.metrics(one)
    assert sum(one[f"samples_t{i}"] for i in range(4)) == 12 and min(one[f"samples_t{i}"] for i in range(4)) >= 2
    assert sum(one[f"loss_t{i}"] for i in range(4)) == pytest.approx(one["loss"], rel=1e-5)
    assert scores["loss"] == pytest.approx(one["loss"] / 12)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"backbone": {"arch": "unett"}}, "model.backbone.arch: 'unett' isn't a backbone. Did you mean 'unet'?"),
        (
            {"backbone": {**UNET, "layer_per_block": 1}},
            "model.backbone.layer_per_block: unknown key for arch 'unet'. Did you mean",
        ),
        ({"backbone": {**UNET, "norm_num_groups": 3}}, "model.backbone: "),
        ({"backbone": {**UNET, "in_channels": 4}}, "model.backbone.in_channels: 4 given, but the data has 1"),
        ({"backbone": {"pretrained": "/nowhere"}}, "model.backbone.pretrained: '/nowhere' isn't a model folder"),
        ({"text": {"pretrained": "/nowhere"}}, "model.text.pretrained: '/nowhere' isn't a model folder"),
        ({"text": {"hidden_size": 30, "num_attention_heads": 4}}, "num_attention_heads: 4 doesn't divide hidden_size 30"),
        ({"autoencoder": {"pretrained": "/nowhere"}}, "model.autoencoder.pretrained: '/nowhere' isn't a model folder"),
        ({"objective": {"prediction": "flow"}, "samples": {"sampler": "ddim"}}, "Use euler"),
        ({"objectives": {}}, "objectives: unknown key. Did you mean 'objective'?"),
    ],
)
def test_models_that_make_no_sense_are_one_line_that_names_the_key(model, says, dataset):
    with pytest.raises(ConfigError) as e:
        recipe(dataset, **model)
    assert says in str(e.value) and "\n" not in str(e.value)


PIXARTS = {
    "the variance too": ({"out_channels": 2}, "model.backbone.out_channels: 2 given, but the prediction target has 1 channels."),
    "the class's default": ({}, "model.backbone.out_channels: 8 given, but the prediction target has 1"),
    "sizes wanted": (
        {"out_channels": 1, "use_additional_conditions": True}, "model.backbone.use_additional_conditions: not supported",
    ),
    "another width": ({"out_channels": 1, "caption_channels": 24}, "model.backbone.caption_channels: 24 given, but"),
}  # fmt: skip


def pixart(folder: Path, **keys: Any) -> str:
    from diffusers import PixArtTransformer2DModel

    given = {k: v for k, v in PIXART.items() if k != "arch"}
    made = {**given, "in_channels": 1, "caption_channels": 16, "cross_attention_dim": 16, "sample_size": 8, **keys}
    PixArtTransformer2DModel(**made).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("case", PIXARTS)
def test_a_pretrained_pixart_that_cannot_be_trained_is_one_line_before_anything_starts(case, dataset, tmp_path):
    keys, says = PIXARTS[case]
    with pytest.raises(ConfigError) as e:
        recipe(dataset, backbone={"pretrained": pixart(tmp_path, **keys)})
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_pretrained_pixart_that_can_be_trained_is(dataset, tmp_path):
    """Conditions of None mean no conditions at this size, and are accepted."""
    made = recipe(dataset, backbone={"pretrained": pixart(tmp_path, out_channels=1)})
    loss = made.loss(made.build(), made.batch(rows(dataset), np.arange(12))).sum
    loss.backward()
    assert loss.isfinite()


def test_sizes_that_a_pixart_takes_none_for_are_wanted_where_its_side_is_128(dataset):
    made = recipe(dataset, backbone=PIXART).parts
    made.model = made.model.model_copy(update={"backbone": {"pretrained": "x"}})
    said = [made._conditioned(given) for given in ({}, {"sample_size": 64}, {"use_additional_conditions": False})]
    assert said == [True, False, False]


def test_another_pretrained_backbone_that_wants_more_than_images_and_captions_is_refused_too(dataset, tmp_path):
    from diffusers import UNet2DConditionModel

    keys = {k: v for k, v in UNET.items() if k != "arch"} | {"in_channels": 1, "out_channels": 1, "cross_attention_dim": 16}
    UNet2DConditionModel(**keys, addition_embed_type="text_time", addition_time_embed_dim=8,
                         projection_class_embeddings_input_dim=24).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"model\.backbone\.pretrained: the backbone needs more inputs than images and captions \("
    ) as e:
        recipe(dataset, backbone={"pretrained": str(tmp_path)})
    assert "\n" not in str(e.value)


# initial weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["unet", "pixart"])
def test_a_backbone_from_nothing_begins_as_its_authors_have_it(arch, dataset):
    """Its output is zero, because every branch's last layer is zero (U-Net), or that of cross-attention and of the network
    (PixArt)."""
    made = recipe(dataset, backbone=BACKBONES[arch])
    torch.manual_seed(0)
    model: Any = made.build()
    backbone = model.unet if arch == "unet" else model.transformer
    zero = {n.rpartition(".")[0] for n, p in backbone.named_parameters() if n.endswith("weight") and not p.any()}
    if arch == "unet":
        ends = ("conv2", "attentions.0.proj_out", "attentions.1.proj_out", "conv_out")
        assert zero == {n for n, _ in backbone.named_modules() if n.endswith(ends)} and len(zero) > 10
    else:
        assert zero == {"proj_out", *(f"transformer_blocks.{i}.attn2.to_out.0" for i in range(2))}
        linear = {n: m for n, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)}
        assert not any(m.bias.any() for m in linear.values() if m.bias is not None)
        small = ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "adaln_single.linear", "caption_projection.linear_1")
        for name in (n for n in linear if n.endswith(small)):
            assert 0.015 < float(linear[name].weight.detach().std()) < 0.025
        width, parts = 16, {"attn1.to_q": 3, "attn2.to_q": 1, "attn2.to_v": 2, "attn1.to_out.0": 1}
        for name, count in parts.items():
            bound = (6 / (width + count * width)) ** 0.5
            assert 0.9 * bound < float(linear[f"transformer_blocks.1.{name}"].weight.detach().abs().max()) <= bound
    said = made.loss(model, made.batch(rows(dataset), np.arange(12))).sum
    noise = made.complete(made.batch(rows(dataset), np.arange(12)))["noise"]
    assert said.item() == pytest.approx(float(noise.square().flatten(1).mean(1).sum()), rel=1e-5)  # epsilon, answered with 0
    torch.manual_seed(0)
    again = made.build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# frozen models -------------------------------------------------------------------------------------------------------


def test_frozen_encoders_compute_in_the_jobs_precision_near_fp32(dataset, tmp_path):
    """Within 2 % of fp32, in bf16 with half the memory. Runs of version 1, and jobs in fp32, keep fp32's bits."""
    text = {"pretrained": str(clip(tmp_path / "clip", dataset)), "length": 8}
    model = {"text": text, "autoencoder": {"pretrained": str(autoencoder(tmp_path / "vae", 1))}}
    parts: dict[tuple[int, str], Any] = {}
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for case in ((1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")):
        changes = {"train.recipe_version": case[0], "train.precision": case[1]}
        made = TextToImage(job(**{**build_images.job(dataset, **model), **changes}))
        made.bind([manifest.read(Location(str(dataset)))])
        batch = made.batch(rows(dataset), np.arange(12))
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


def test_frozen_encoders_are_in_the_plan_and_leave_the_device_when_only_drawing_needs_them(dataset, tmp_path):
    from types import SimpleNamespace

    from heliostat.plan import memory
    from heliostat.plan.model_stats import build, stats_of

    text = {"pretrained": str(clip(tmp_path / "clip", dataset)), "length": 8}
    made = recipe(dataset, text=text, autoencoder={"pretrained": str(autoencoder(tmp_path / "vae", 1))},
                  samples={"prompts": [{"text": "the digit one"}], "per_prompt": 1, "steps": 2})  # fmt: skip
    parts = made.parts
    sizes = {n: sum(4 * p.numel() for p in getattr(parts, n).parameters()) for n in ("text_encoder", "vae")}
    both = sum(sizes.values())
    assert stats_of(made, build(made)).frozen_models == (both, both)  # images and captions are encoded in every step
    state = memory.StateBytes(10, 10, 10, 10, 0, 0)
    assert memory.need(state, 0, 100, False, (both, both)).frozen == both
    assert (
        memory.need(state, 0, 100, False, (0, both)).frozen == both - 100 and memory.need(state, 0, 2 * both, False).frozen == 0
    )

    moved = dict.fromkeys(sizes, "")
    for name in sizes:
        module = getattr(parts, name)
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
def test_a_job_is_planned_before_its_dataset_exists(latents, dataset, tmp_path):
    """By the sizes of its backbone, as if the dataset held latents and embeddings, or images and embeddings."""
    from heliostat.errors import DataError
    from heliostat.plan import planner

    text = {"pretrained": str(clip(tmp_path / "clip", dataset)), "length": 8}
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


# the pipeline --------------------------------------------------------------------------------------------------------


def autoencoder(folder: Path, channels: int = 3) -> Path:
    torch.manual_seed(3)
    blocks = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    AutoencoderKL(channels, channels, latent_channels=4, norm_num_groups=4, sample_size=16, **blocks).save_pretrained(folder)
    return folder


def clip(folder: Path, dataset: Path, width: int = 16) -> Path:
    torch.manual_seed(4)
    config = CLIPTextConfig(vocab_size=320, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                            max_position_embeddings=8)  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    diffusers_folder.tokenizer((dataset / "tokenizer.json").read_bytes(), 0, 8).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("prediction", "sampler"), [("epsilon", "ddim"), ("v", "ddpm"), ("v", "dpm++"), ("epsilon", "dpm++")])
def test_latents_are_sampled_as_stable_diffusions_own_pipeline_does(prediction, sampler, dataset, tmp_path):
    """With the same parts, seeds, guidance, and steps: pixels agree within 2e-3 of their range, one by one and in a batch."""
    from diffusers import UNet2DConditionModel
    from heliostat.recipes.images.noising import NoiseObjective, Process

    torch.manual_seed(0)
    keys = {k: v for k, v in UNET.items() if k != "arch"}
    unet = UNet2DConditionModel(**keys, in_channels=4, out_channels=4, sample_size=8, cross_attention_dim=16).eval()
    vae = AutoencoderKL.from_pretrained(autoencoder(tmp_path / "vae"))
    encoder = CLIPTextModel.from_pretrained(clip(tmp_path / "clip", dataset)).eval()
    tokenizer = diffusers_folder.tokenizer((dataset / "tokenizer.json").read_bytes(), 0, 8)
    scheduler = Process(NoiseObjective(prediction=prediction)).scheduler(sampler)
    parts: dict[str, Any] = {"scheduler": scheduler, "text_encoder": encoder, "tokenizer": tokenizer, "unet": unet, "vae": vae}
    ours = TextToImagePipeline(**parts)
    theirs: Any = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    prompts = ["the digit one", "seven, handwritten"]
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "np"}
    a = ours(prompts, generator=generators([1, 2]), **call).images
    b = theirs(prompts, generator=generators([1, 2]), **call).images
    assert a.shape == b.shape == (2, 16, 16, 3) and float(np.abs(a - b).max()) < 2e-3
    alone = ours(prompts[1], generator=generators([2]), **call).images
    assert float(np.abs(alone[0] - a[1]).max()) < 2e-3
    other = ours(prompts[1], generator=generators([3]), **call).images
    assert float(np.abs(other[0] - a[1]).max()) > 0.02


@pytest.mark.parametrize("arch", sorted(BACKBONES))
@pytest.mark.parametrize("prediction", ["v", "flow"])
def test_an_exported_folder_loads_with_plain_diffusers_and_draws_the_same(arch, prediction, dataset, tmp_path):
    """Weights as `export` stores them, and everything else as the recipe saves it. Then DiffusionPipeline alone loads the
    folder."""
    from safetensors.torch import save_file

    made = recipe(dataset, backbone=BACKBONES[arch], objective={"prediction": prediction})
    torch.manual_seed(0)
    model = woken(made.build()).eval()
    made.save_config(tmp_path)
    for prefix, file in made.layout.items():
        mine = {n.removeprefix(prefix): t.contiguous() for n, t in model.state_dict().items() if n.startswith(prefix)}
        save_file(mine, tmp_path / f"{file}.safetensors", {"format": "pt"})
    prompts = ["the digit one", "seven, handwritten"]
    plain: Any = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    plain.set_progress_bar_config(disable=True)
    draws = [torch.Generator("cpu").manual_seed(s) for s in (5, 6)]
    theirs = plain(prompts, num_inference_steps=5, guidance_scale=2.0, generator=draws).images
    ours = diffusers_folder.load(tmp_path)(
        prompts, num_inference_steps=5, guidance_scale=2.0, generator=generators([5, 6])
    ).images
    assert [np.asarray(i).tolist() for i in theirs] == [np.asarray(i).tolist() for i in ours]
    assert theirs[0].size == (8, 8) and theirs[0].mode == "L"
    from heliostat.recipes.images.pipeline import denoise

    with torch.no_grad():  # as it is drawn while it is trained
        say = made.sampler_of(model, "cpu")(prompts)
        scheduler = made.process.scheduler(made.sampler, clip=True)
        trained = made.pixels_of(denoise(say, scheduler, (2, 1, 8, 8), 5, 2.0, generators([5, 6]), "cpu"))
    assert all(np.abs(trained[i][:, :, 0].astype(int) - np.asarray(theirs[i]).astype(int)).max() <= 1 for i in range(2))


def test_latents_with_clip_and_a_unet_are_exported_as_stable_diffusion(dataset, tmp_path):
    text = {"pretrained": str(clip(tmp_path / "clip", dataset)), "length": 8}
    made = recipe(dataset, text=text, autoencoder={"pretrained": str(autoencoder(tmp_path / "vae", 1))})
    assert made.parts.shape() == (4, 4, 4)
    torch.manual_seed(0)
    model = made.build()
    assert not any("text_encoder" in n or "vae" in n for n, _ in model.named_parameters()), "frozen parts are not trained"
    from safetensors.torch import save_file

    out = tmp_path / "out"
    made.save_config(out)
    mine = {n.removeprefix("unet."): t.contiguous() for n, t in model.state_dict().items()}
    save_file(mine, out / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    plain: Any = DiffusionPipeline.from_pretrained(out)
    assert type(plain) is StableDiffusionPipeline


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_frozen_encoder_conditions_and_is_not_trained(kind, dataset, tmp_path):
    folder = tmp_path / kind
    if kind == "clip":
        clip(folder, dataset, 24)
    else:
        torch.manual_seed(5)
        T5EncoderModel(T5Config(vocab_size=320, d_model=24, d_ff=32, num_layers=1, num_heads=2, d_kv=12)).save_pretrained(folder)
        diffusers_folder.tokenizer((dataset / "tokenizer.json").read_bytes(), 0, 8).save_pretrained(folder)
    made = recipe(dataset, text={"pretrained": str(folder), "length": 8})
    torch.manual_seed(0)
    model = woken(made.build())
    batch = made.batch(rows(dataset), np.arange(12))
    loss = made.loss(model, batch).sum
    loss.backward()
    assert made.parts.width == 24 and all(p.grad is None for p in made.parts.text_encoder.parameters())
    text = made.parts.conditioning(batch["text"], batch["mask"])
    assert text.shape == (12, 8, 24) and text.std() > 0


def latents_of(tmp_path: Path, dataset: Path, at: str = "clip") -> Latents:
    return Latents(autoencoder=str(autoencoder(tmp_path / "vae", 1)), text_encoder=str(clip(tmp_path / at, dataset)), length=8)


@pytest.mark.parametrize("which", ["autoencoder", "text"])
def test_a_frozen_model_without_safetensors_is_refused(which, dataset, tmp_path):
    """A pickle would be loaded instead, and the digest that names the model doesn't cover it."""
    latents = latents_of(tmp_path, dataset)
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
        recipe(dataset, **{which: given})


def test_latents_follow_from_the_tokenizers_files_wherever_they_lie(dataset, tmp_path):
    """The digests of models stay the same, by which jobs know them. So a job whose model made the dataset isn't rejected."""
    latents = latents_of(tmp_path, dataset, "model/text_encoder")
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


def test_a_worker_encodes_by_the_models_that_are_in_the_folders_now(dataset, tmp_path):
    """A later prepare may reuse the process of an idle worker."""
    folder_of(tmp_path / "in", [(f"{i}.png", image(16, 16, seed=i), {"caption": f"number {i}"}) for i in range(3)])
    folders = {"autoencoder": str(autoencoder(tmp_path / "vae")), "text_encoder": str(clip(tmp_path / "clip", dataset))}
    keys = {"name": "test", "input": str(tmp_path / "in"), "resolution": 16, "latents": {**folders, "length": 8}}

    def made(name: str) -> tuple[list[bytes], bytes]:
        found, _ = prepared({**keys, "output": str(tmp_path / name)})
        (path,) = set(found.paths)
        return pq.read_table(tmp_path / name / path)["latent"].to_pylist(), (tmp_path / name / "empty_caption.bin").read_bytes()

    first = made("1")
    for weights in (next((tmp_path / name).glob("*.safetensors")) for name in ("vae", "clip")):
        save_file({name: weight * 0.9 for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    second = made("2")
    tasks._encoder.cache_clear()
    assert second == made("3") and second[0] != first[0] and second[1] != first[1]


def test_datasets_that_do_not_belong_together_are_refused(dataset, tmp_path):
    whole = manifest.read(Location(str(dataset)))
    other = manifest.Manifest(whole.location, whole.chunks, {**whole.meta, "size": [16, 8]})
    with pytest.raises(ConfigError, match=r"data.one_source_batches: required"):
        image_rows.facts([whole, other], False)
    assert image_rows.facts([whole, other], True).size == (8, 8)
    with pytest.raises(ConfigError, match="have different numbers of channels"):
        image_rows.facts([whole, manifest.Manifest(whole.location, whole.chunks, {**whole.meta, "channels": 3})], True)
    with pytest.raises(ConfigError, match="contains no images"):
        image_rows.facts([manifest.Manifest(whole.location, whole.chunks, {"kind": "rows"})], True)
    assert TEXT["length"] == 8
