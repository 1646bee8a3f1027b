"""Tests exports of adapters: plain peft, transformers, and diffusers load them, and compute what the trained model computes."""

import copy
import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from heliostat.apps.serve.adapters import Adapters
from heliostat.apps.serve.served import served
from heliostat.apps.serve.writer import Writer
from heliostat.checkpoint import layout
from heliostat.config.spec import Job
from heliostat.data.dataset import plan
from heliostat.data.manifest import read as read_manifest
from heliostat.errors import CheckpointError, ConfigError
from heliostat.inference import adapter_export, post_hoc
from heliostat.inference.batch.engines import LoadedModel
from heliostat.inference.export import export
from heliostat.plan import layouts
from heliostat.recipes import adapter_tensors, adapters, building, quantized
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.recipes.loading import load
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location
from heliostat.training import run
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.golden import data
from tests.unit import build_checkpoint, build_images, build_text_to_image
from tests.unit.build_images import UNET
from tests.unit.build_job import BASE, job

pytestmark = pytest.mark.ci

METHODS = ("lora", "rslora", "dora")
TOKENS = torch.arange(24).view(2, 12) * 5 % 96


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Returns a folder with a small language model in bf16, and the text that it is trained on."""
    return write_base(tmp_path_factory.mktemp("text"))


def write_base(folder: Path, **model: int) -> Path:
    recipe = CausalLM(job(model={**BASE["model"], **model}))
    recipe.bind([read_manifest(Location(str(data.tokens(folder / "causal_lm"))))])
    torch.manual_seed(0)
    recipe.build().to(torch.bfloat16).save_pretrained(folder / "base")
    recipe.save_config(folder / "base")
    return folder / "base"


def text_job(base: Path, method: str = "lora", bits: dict[str, str] | None = None, **changes) -> Job:
    model = {"pretrained": str(base), "adapter": {"method": method, "rank": 4, "alpha": 6.0, **(bits or {})}}
    sources = [{"path": str(base.parent / "causal_lm")}]
    return job(**{"model": model, "data.sources": sources, "train.precision": "fp32", "data.sequence_length": 32, **changes})


def saved(made: Job, folder: Path, scale: float = 0.3, kinds: tuple[str, ...] = (), **facts) -> layout.SavedCheckpoint:
    """Writes a checkpoint of two ranks, with a random adapter. `kinds`: of averages that are twice the adapter."""
    sources = [read_manifest(location) for location in made.sources]
    recipe = load(made, sources)
    generator, masters = torch.Generator().manual_seed(1), {}
    for name, p in building.build(recipe).named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator) * scale
            masters[f"master.{name}"] = (noise if p.dim() > 1 else p.detach() * (1 + noise)).flatten()
    masters |= {f"{kind}.{name.partition('.')[2]}": 2 * tensor for kind in kinds for name, tensor in masters.items()}
    plan_of = plan(made, sources)
    given = {"job": made.dump(), "data": plan_of.dump(), "data_digest": plan_of.digest}
    given["base"] = adapters.weights_digest(recipe.base())
    run, states = Location(str(folder)), [build_checkpoint.slices(masters, rank, 2) for rank in (0, 1)]
    build_checkpoint.save(run, 3, states, **{**given, **facts})
    return layout.open_checkpoint(run, 3)


def trained(checkpoint: layout.SavedCheckpoint) -> torch.nn.Module:
    """Returns the model of a checkpoint: the base with peft's layers."""
    recipe = load(checkpoint.job, [read_manifest(location) for location in checkpoint.job.sources])
    model = building.build(recipe)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(checkpoint.read(f"master.{name}").view(p.shape))
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("method", METHODS)
def test_plain_libraries_load_both_exports_of_a_language_model(base, tmp_path, method):
    checkpoint = saved(text_job(base, method), tmp_path / "run")
    right, plain = logits(trained(checkpoint)), transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (logits(plain) - right).abs().max() > 0.05
    export(checkpoint, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), right, atol=2e-5, rtol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size == 96
    export(checkpoint, tmp_path / "adapter", adapter=True)
    told = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert len(told["target_modules"]) == 7, "short names of layers, not one name per layer"
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(adapted), right, atol=2e-5, rtol=1e-4)
    size = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert size < (tmp_path / "merged/model.safetensors").stat().st_size / 2


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_the_endpoint_serves_an_exported_adapter_on_the_base(base, tmp_path, method):
    checkpoint = saved(text_job(base, method, **{"model.adapter.targets": ["q_proj", "down_proj"]}), tmp_path / "run")
    export(checkpoint, tmp_path / "adapter", adapter=True)
    loaded = LoadedModel(base)
    attached = Adapters(loaded.model.float(), {"mine": str(tmp_path / "adapter")})
    with attached.using(["mine", None]):
        both = logits(loaded.model)
    torch.testing.assert_close(both[0], logits(trained(checkpoint))[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(both[1], logits(loaded.model)[1])


def test_an_adapter_is_not_served_on_another_base(base, tmp_path):
    """The error names both bases, before a replica starts, and again in a replica whose alias has moved."""
    export(saved(text_job(base), tmp_path / "run"), tmp_path / "adapter", adapter=True)
    other = shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    save_file({n: t + 1 if n == "model.norm.weight" else t for n, t in tensors.items()}, other / "model.safetensors")
    digests = [adapters.weights_digest(folder) for folder in (base, other)]
    named = f"mine: .*base {str(base)!r} .digest {digests[0]}.*{str(other)!r} .digest {digests[1]}"
    asked = [f"mine={tmp_path / 'adapter'}"]
    assert served(str(base), "", None, None, None).with_adapters(asked).kind() == "text"
    with pytest.raises(ConfigError, match=named):
        served(str(other), "", None, None, None).with_adapters(asked).kind()
    with pytest.raises(ConfigError, match=named):
        Writer(other, 1, {"mine": str(tmp_path / "adapter")})


def test_an_adapter_of_a_base_in_4_bits_is_exported_with_the_numbers_that_it_was_trained_on(base, tmp_path, caplog):
    """Merged, the base has the rounded numbers. As an adapter, peft loads it on a base that is rounded in the same way."""
    checkpoint = saved(text_job(base, bits={"base": "nf4"}), tmp_path / "run")
    right = logits(trained(checkpoint))
    export(checkpoint, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), right, atol=2e-5, rtol=1e-4)
    export(checkpoint, tmp_path / "adapter", adapter=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unrounded = logits(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "adapter").eval())
    quantized.round_all(plain, adapters.linear_layers(plain))
    adapted = logits(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    torch.testing.assert_close(adapted, right, atol=2e-5, rtol=1e-4)
    assert (unrounded - right).abs().max() > 1e-3
    served(str(base), "", None, None, None).with_adapters([f"mine={tmp_path / 'adapter'}"]).kind()
    assert "mine: was trained on its base in 4 bits (nf4), but the endpoint's base isn't rounded" in caplog.text


def test_bitsandbytes_loads_the_base_in_4_bits_and_peft_adds_the_exported_adapter(tmp_path):
    """On CPUs, bitsandbytes 0.50 computes wrong numbers for layers of 32 or 96 inputs, so this base has 64 and 128."""
    pytest.importorskip("bitsandbytes")
    base = write_base(tmp_path, hidden_size=64, intermediate_size=128)
    checkpoint = saved(text_job(base, bits={"base": "nf4"}), tmp_path / "run")
    export(checkpoint, tmp_path / "adapter", adapter=True)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").train()  # for eval(), it would repack and round the scales
    torch.testing.assert_close(logits(adapted), logits(trained(checkpoint)), atol=2e-5, rtol=1e-4)


def test_in_bf16_the_difference_is_that_of_rounding(base, tmp_path):
    checkpoint = saved(text_job(base, **{"train.precision": "bf16"}), tmp_path / "run", 0.1)
    export(checkpoint, tmp_path / "merged")
    assert load_file(tmp_path / "merged/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    recipe = load(checkpoint.job, [read_manifest(location) for location in checkpoint.job.sources])
    found = adapter_export.require_same(checkpoint, recipe, tmp_path / "merged", False, torch.bfloat16)
    assert 0 < found.difference < 0.02 < found.effect


def test_a_wrong_export_is_deleted(base, tmp_path, monkeypatch):
    checkpoint = saved(text_job(base), tmp_path / "run")
    monkeypatch.setattr(adapter_tensors, "merge", lambda scale, weight, down, up, magnitude=None: weight - scale * (up @ down))
    with pytest.raises(CheckpointError, match=r"not exported, because the outputs of the files differ from the trained model's"):
        export(checkpoint, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


CHANGES = [
    ({"method": "rslora"}, "method: the run's checkpoint has lora, got rslora. Set it to lora"),
    ({"rank": 8}, "rank: the run's checkpoint has 4, got 8. Set it to 4"),
    ({"alpha": 7.0}, "alpha: the run's checkpoint has 6, got 7. Set it to 6"),
    ({"alpha": None}, "alpha: the run's checkpoint has 6, got 4. Set it to 6"),
    ({"base": "nf4"}, "base: the run's checkpoint has none, got nf4. Remove it"),
    ({"targets": ["q_proj"]}, r"targets: the run's checkpoint has all-linear, got \['q_proj'\]"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_a_run_resumes_only_with_its_own_adapter(base, tmp_path, change, said):
    """Otherwise a changed scale would load silently, and change the model."""
    made = text_job(base)
    checkpoint, adapter = saved(made, tmp_path / "run"), made.model["adapter"]
    assert run._settled(text_job(base, **{"model.adapter": {**adapter, "targets": "all-linear"}}), checkpoint)
    with pytest.raises(ConfigError, match=rf"^model\.adapter\.{said}.* or use another name for the run$"):
        run._settled(text_job(base, **{"model.adapter": {**adapter, **change}}), checkpoint)


def test_a_run_gains_and_loses_no_adapter_on_resume(base, tmp_path):
    made, whole = text_job(base), text_job(base, model={"pretrained": str(base)})
    with pytest.raises(ConfigError, match=r"^model\.adapter: the run's checkpoint trained one\. Set it to {'method': 'lora'"):
        run._settled(whole, saved(made, tmp_path / "one"))
    with pytest.raises(ConfigError, match=r"^model\.adapter: the run's checkpoint trained no adapter\. Remove this key"):
        adapters.require_resumable(made.model, whole.model)


def test_an_export_that_the_libraries_cannot_load_is_deleted(base, tmp_path, monkeypatch):
    checkpoint = saved(text_job(base), tmp_path / "run")
    write = adapter_export.write_record
    monkeypatch.setattr(adapter_export, "write_record", lambda folder, *rest: [write(folder, *rest), _spoil(folder)])
    with pytest.raises(ValueError, match="no_such_layer"):
        export(checkpoint, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()


def _spoil(folder: Path) -> None:
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**told, "target_modules": ["no_such_layer"]}))


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "merged"])
def test_an_adapter_is_exported_with_an_average_of_any_length(base, tmp_path, adapter):
    """The average at the only snapshot's step has the shortest length, so its sum is known."""
    checkpoint = saved(text_job(base, **{"train.ema": {"decay": None, "lengths": [0.1]}}), tmp_path / "run", kinds=("ema-100",))
    average = post_hoc.average(Location(str(tmp_path / "run")), checkpoint, 0.2)
    (one,) = average.summands
    export(checkpoint, tmp_path / "out", adapter=adapter, average=average)
    record = json.loads((tmp_path / "out" / (adapter_export.RECORD if adapter else "heliostat.json")).read_text())
    assert (record if adapter else record["origin"])["ema_length"] == 0.2
    name = "model.layers.0.self_attn.q_proj"
    factors = [one.factor * checkpoint.read(f"ema-100.{name}.{part}") for part in (adapters.DOWN, adapters.UP)]
    if adapter:
        files = load_file(tmp_path / "out/adapter_model.safetensors")
        written = [files[f"base_model.model.{name}.{short}.weight"].flatten() for short in ("lora_A", "lora_B")]
        assert all(torch.allclose(own, right) for own, right in zip(written, factors, strict=True))
    else:
        plain, files = load_file(base / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
        down, up = factors[0].view(4, -1), factors[1].view(-1, 4)
        assert torch.allclose(files[f"{name}.weight"], plain[f"{name}.weight"].float() + 1.5 * up @ down, atol=1e-6)


def test_another_base_an_adapter_of_zeros_and_a_run_without_an_adapter_are_rejected(base, tmp_path):
    copied = shutil.copytree(base.parent, tmp_path / "copied") / "base"
    checkpoint = saved(text_job(copied), tmp_path / "run")
    zero = saved(text_job(base), tmp_path / "zero", scale=0.0)
    tensors = load_file(copied / "model.safetensors")
    save_file({n: t + 1 if n == "model.norm.weight" else t for n, t in tensors.items()}, copied / "model.safetensors")
    with pytest.raises(ConfigError, match="the adapter was trained on another base than"):
        export(checkpoint, tmp_path / "one")
    with pytest.raises(CheckpointError, match="the adapter is empty or zero"):
        export(zero, tmp_path / "two", adapter=True)
    whole = job(**{"data.sources": [{"path": str(base.parent / "causal_lm")}], "train.precision": "fp32"})
    recipe = load(whole, [read_manifest(location) for location in whole.sources])
    with pytest.raises(ConfigError, match=r"^--adapter: .*the run has no adapter"):
        adapter_export.require(checkpoint, recipe)
    assert not any((tmp_path / name).exists() for name in ("one", "two"))


# images ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Returns a folder with digits, and the parts of a pipeline of Stable Diffusion: `unet`, `text`, `vae`."""
    folder = tmp_path_factory.mktemp("pictures")
    build_images.digits(folder / "digits", 80)
    build_text_to_image.clip(folder / "text", folder / "digits")
    build_text_to_image.autoencoder(folder / "vae", 1)
    torch.manual_seed(5)
    keys = {**{key: value for key, value in UNET.items() if key != "arch"}, "cross_attention_dim": 16, "sample_size": 4}
    backbone = diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **keys)
    build_text_to_image.woken(backbone).save_pretrained(folder / "unet")
    return folder


def image_job(folder: Path, method: str, **bits: str) -> Job:
    model = {
        "backbone": {"pretrained": str(folder / "unet")}, "text": {"pretrained": str(folder / "text"), "length": 8},
        "autoencoder": {"pretrained": str(folder / "vae")},
        "adapter": {"method": method, "rank": 2, "alpha": 5.0, "targets": ["to_q", "to_v", "to_out.0"], **bits},
    }  # fmt: skip
    return job(**{**build_images.job(folder / "digits"), "model": model, "train.precision": "fp32"})


@pytest.mark.parametrize("method", METHODS)
def test_plain_diffusers_loads_both_exports_of_a_pipeline(pictures, tmp_path, method):
    checkpoint = saved(image_job(pictures, method), tmp_path / "run", 2.0)
    recipe = load(checkpoint.job, [read_manifest(location) for location in checkpoint.job.sources])
    assert isinstance(recipe, TextToImage)
    model = trained(checkpoint)
    with torch.no_grad():
        right = recipe.answer(model)
        with adapters.switched_off(model):
            assert (recipe.answer(model) - right).abs().max() > 1e-2
    export(checkpoint, tmp_path / "merged")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    export(checkpoint, tmp_path / "adapter", adapter=True)
    plain = diffusers.StableDiffusionPipeline(
        **{**pipeline.components, "unet": diffusers.UNet2DConditionModel.from_pretrained(pictures / "unet")}
    )
    plain.load_lora_weights(tmp_path / "adapter")
    noisy, text = torch.randn(1, 4, 4, 4), torch.randn(1, 8, 16)
    with torch.no_grad():
        one, other = (p.unet(noisy, 7, encoder_hidden_states=text).sample for p in (pipeline, plain))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert TextToImage.exported(tmp_path / "merged", checkpoint.job.model).keys() == {"backbone", "text", "autoencoder"}


def test_an_adapter_of_a_backbone_in_4_bits_is_exported_with_the_numbers_that_it_was_trained_on(pictures, tmp_path):
    checkpoint = saved(image_job(pictures, "lora", base="nf4"), tmp_path / "run", 2.0)
    model = trained(checkpoint)
    assert len(quantized.layers_of(model)) > 4
    recipe = load(checkpoint.job, [read_manifest(location) for location in checkpoint.job.sources])
    for adapter in (True, False):
        export(checkpoint, tmp_path / str(adapter), adapter=adapter)
        with torch.no_grad():
            again = recipe.answer(recipe.reload(tmp_path / str(adapter), adapter).eval())
            torch.testing.assert_close(again, recipe.answer(model), atol=2e-5, rtol=1e-4)


def without_a_weight(folder: Path) -> str:
    """Removes the first tensor from a folder's weights. Returns its name."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = min(tensors)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "merged"])
def test_an_export_that_lacks_a_weight_of_the_backbone_is_not_compared(pictures, tmp_path, adapter):
    """diffusers would fill the gap with random numbers, and only log it."""
    copied = shutil.copytree(pictures, tmp_path / "copied")
    checkpoint = saved(image_job(copied, "lora"), tmp_path / "run", 2.0)
    recipe = load(checkpoint.job, [read_manifest(location) for location in checkpoint.job.sources])
    export(checkpoint, tmp_path / "made", adapter=adapter)
    name = without_a_weight(copied / "unet" if adapter else tmp_path / "made/unet")
    with pytest.raises(
        ConfigError, match=f"1 of the model's weights are missing, for example {re.escape(name)}. Copy the folder"
    ):
        recipe.reload(tmp_path / "made", adapter)


def test_a_recipe_with_an_adapter_of_its_own_resumes_and_is_planned(tmp_path):
    """The key `model.adapter` belongs to the recipe, which may give it any meaning."""
    made = job(recipe="tests.unit.build_recipe:Around", evaluate=None, model={"adapter": "bottleneck"})
    run_folder = Location(str(tmp_path / "run"))
    masters = [build_checkpoint.slices({"master.w": torch.ones(4)}, rank, 2) for rank in (0, 1)]
    build_checkpoint.save(run_folder, 3, masters, job=made.dump())
    assert run._settled(made.model_copy(update={"model": {"adapter": "prefix"}}), layout.open_checkpoint(run_folder, 3))
    assert 3 in {one.stage for one in layouts.candidates(made, 1)}


def test_a_run_of_images_resumes_only_with_its_own_adapter(pictures, tmp_path):
    made = image_job(pictures, "lora")
    checkpoint, reordered = saved(made, tmp_path / "run"), ["to_v", "to_q", "to_out.0"]
    model = {**made.model, "adapter": {**made.model["adapter"], "targets": reordered}}
    assert run._settled(made.model_copy(update={"model": model}), checkpoint)
    changed = made.model_copy(update={"model": {**model, "adapter": {**model["adapter"], "alpha": 2.0}}})
    with pytest.raises(ConfigError, match=r"^model\.adapter\.alpha: the run's checkpoint has 5, got 2"):
        run._settled(changed, checkpoint)
