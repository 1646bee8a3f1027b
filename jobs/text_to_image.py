"""Text to image by diffusion or flow matching, in pixels or latents, with the backbones of `diffusers`.

    recipe: jobs.text_to_image:TextToImage
    model:
      backbone: {arch: unet, block_out_channels: [64, 128], ...}      # or pixart, sd3; or {pretrained: FOLDER}
      text: {hidden_size: 128, length: 24}                            # trained with it; or {pretrained: FOLDER}: frozen
      autoencoder: {pretrained: FOLDER}                               # latents of this frozen AutoencoderKL; none: pixels
      objective: {prediction: v, zero_terminal_snr: true}             # see jobs.noising
      samples: {prompts: [...]}                                       # drawn after every evaluation

A sample's loss is the mean squared error of what the network says, weighted by the objective. Its noise, timestep and caption
dropout belong to the sample and the step (`jobs.image_rows`), so they are the same on any number of workers. Held-out scores are
on noise and timesteps that never change: `loss`, and `loss_t0` to `loss_t3` by quarter of the noise's strength.
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipe import Batch, Generated, Serving
from heliostat.schema import validate
from heliostat.spec import Job
from torch import nn

from jobs import diffusion_config, image_export, image_rows
from jobs.diffusion_config import Model
from jobs.image_gallery import Gallery
from jobs.image_pipeline import decode, embed, predict, tokenize
from jobs.noising import Process

QUARTERS = 4
GOLDEN = 0.6180339887498949  # multiples of it fill [0, 1) evenly


class Denoiser(nn.Module):
    """All that is trained: the backbone and, if it is not frozen, the text encoder. The names are a pipeline's."""

    def __init__(self, part: str, backbone: nn.Module, text_encoder: nn.Module | None) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, backbone)
        if text_encoder is not None:
            self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """`text`: token ids for the encoder that is trained with it, else embeddings."""
        if not text.is_floating_point():
            text = self.text_encoder(input_ids=text)[0]
        return predict(getattr(self, self.part), noisy, t, text.to(noisy.dtype))


class TextToImage:
    kind = "rows"
    terms_per_sample = 1

    def __init__(self, job: Job) -> None:
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: images have none; remove it")
        self.model = validate(Model, job.model, "model")
        self.arch, _ = diffusion_config.backbone_class(self.model.backbone)
        self.part = "unet" if self.arch == "unet" else "transformer"
        self.layout = {f"{self.part}.": f"{self.part}/diffusion_pytorch_model", "text_encoder.": "text_encoder/model"}
        self.process = Process(self.model.objective)
        self.sampler = self.model.samples.sampler or ("euler" if self.process.flow else "ddim")
        self.process.scheduler(self.sampler)
        self.seed, self.checkpointing = job.train.seed, job.train.activation_checkpointing
        self.one_source = job.data.one_source_batches
        if self.model.samples.judge and not any(p.label for p in self.model.samples.prompts):
            raise ConfigError("model.samples.judge: needs prompts with a label; add labels, or set it to false")
        self.facts: image_rows.Facts | None = None

    # the data and the models -----------------------------------------------------------------------------------------

    def bind(self, sources: list[Manifest]) -> None:
        self.sources, self.facts = sources, image_rows.facts(sources, self.one_source)
        f = self.facts
        if f.content == "latents" and self.vae_config is None:
            raise ConfigError("model.autoencoder: is needed, because the datasets hold latents; give the one that made them")
        folders = {"autoencoder": self.model.autoencoder, "text": self.model.text if self.model.text.pretrained else None}
        for name, digest in f.models.items():
            folder = folders[name]
            if folder is None or diffusion_config.folder_digest(str(folder.pretrained)) != digest:
                raise ConfigError(f"model.{name}.pretrained: is not the model that computed the datasets; give that one")
        if f.text and f.text != (self.model.text.length, self.width):
            raise ConfigError(f"model.text.length: {self.model.text.length}, but the datasets hold {f.text[0]}; set it to that")
        if not self.model.text.pretrained and f.tokenizer is None:
            raise ConfigError("model.text: the datasets have no tokenizer; prepare them with one, or give model.text.pretrained")
        given = self._given()
        if given.get("in_channels", self.shape()[0]) != self.shape()[0]:
            raise ConfigError(f"model.backbone.in_channels: {given['in_channels']}, but the data has {self.shape()[0]}")
        with torch.device("meta"):
            self.build()  # what makes no sense is found here

    @cached_property
    def vae_config(self) -> dict[str, Any] | None:
        folder = self.model.autoencoder
        return diffusion_config.folder_config("model.autoencoder.pretrained", folder.pretrained) if folder else None

    @cached_property
    def width(self) -> int:
        """Of the text's embeddings."""
        return diffusion_config.text_width(self.model.text)

    def _given(self) -> dict[str, Any]:
        """The backbone's keys, or its folder's configuration."""
        keys = self.model.backbone
        return diffusion_config.folder_config("model.backbone.pretrained", keys["pretrained"]) if "pretrained" in keys else keys

    def shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """Channels, height and width of what is noised; `size`: width and height in pixels."""
        assert self.facts
        width, height = size or self.facts.size
        if self.vae_config is None:
            return self.facts.channels, height, width
        factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
        return self.vae_config["latent_channels"], height // factor, width // factor

    def _defaults(self) -> dict[str, Any]:
        """The backbone's keys that follow from the data and the text encoder."""
        out: dict[str, Any] = {}
        keys = self.model.backbone
        if self.facts:
            out |= dict.fromkeys(diffusion_config.TEXT_WIDTHS[self.arch], self.width)
            channels, height, width = self.shape()
            out |= {"in_channels": channels, "out_channels": channels, "sample_size": max(height, width)}
        if self.arch == "pixart":
            out |= {"cross_attention_dim": keys.get("num_attention_heads", 16) * keys.get("attention_head_dim", 72)}
            out |= {"use_additional_conditions": False}
        if self.arch == "sd3":
            out |= {"caption_projection_dim": keys.get("num_attention_heads", 18) * keys.get("attention_head_dim", 64)}
        return out

    def build(self) -> nn.Module:
        trained, end = not self.model.text.pretrained, self.facts.end if self.facts else 0
        encoder = None
        if trained:
            vocabulary = -(-self.facts.vocabulary // 64) * 64 if self.facts else 64
            encoder = diffusion_config.build_text_encoder(self.model.text, vocabulary, end)
        backbone = diffusion_config.build_backbone(self.model.backbone, self._defaults())
        if self.checkpointing:
            backbone.enable_gradient_checkpointing()
            if encoder is not None:
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return Denoiser(self.part, backbone, encoder).train()

    @cached_property
    def vae(self) -> Any:
        """The frozen autoencoder, made when it is first needed: outside ZeRO, whatever the stage."""
        return diffusion_config.frozen_autoencoder(self.model.autoencoder.pretrained) if self.model.autoencoder else None

    @cached_property
    def text_encoder(self) -> Any:
        """The frozen text encoder, as `vae`."""
        return diffusion_config.frozen_text_encoder(str(self.model.text.pretrained))

    @cached_property
    def tokenizer(self) -> Any:
        if self.model.text.pretrained:
            return diffusion_config.frozen_tokenizer(self.model.text.pretrained, self.model.text.length)
        assert self.facts
        definition = self.sources[0].location.join("tokenizer.json").read()
        return image_export.tokenizer(definition, self.facts.end, self.model.text.length)

    @cached_property
    def empty(self) -> dict[str, torch.Tensor]:
        """A batch's `text` and `mask` of no caption: token ids [length], or the stored embedding [length, width]."""
        assert self.facts
        if self.facts.text:
            raw = self.sources[0].location.join("empty_caption.bin").read()
            return {"text": torch.from_numpy(np.frombuffer(raw, np.float16).reshape(self.facts.text).copy()).float()}
        tokens = tokenize(self.tokenizer, [""])
        return {"text": tokens.input_ids[0], "mask": tokens.attention_mask[0]}

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        assert self.facts
        stored = self.facts.content == "latents"
        if stored:
            channels = self.shape()[0]
            (size,) = set(zip(content["width"].to_pylist(), content["height"].to_pylist(), strict=True))
            shape = self.shape(size)
            out = {"clean": image_rows.halves(content, "latent", (2 * channels, *shape[1:]))}
        else:
            out = {"clean": image_rows.pixels(content)}
            shape = self.shape((out["clean"].shape[3], out["clean"].shape[2]))
        objective = self.model.objective
        sampled = self.vae_config is not None
        draws = image_rows.draw(self.seed, keys, shape, self.model.caption_dropout, objective.noise_offset, sampled)
        out |= {
            "time": draws.time,
            "dropped": draws.dropped,
            "noise": draws.noise,
            "key": torch.from_numpy(keys.astype(np.int64)),
        }
        if draws.posterior is not None:
            out["posterior"] = draws.posterior
        if self.facts.text:
            out["text"] = image_rows.halves(content, "embedding", self.facts.text)
        else:
            tokens = tokenize(self.tokenizer, content["caption"].to_pylist())
            out |= {"text": tokens.input_ids, "mask": tokens.attention_mask}
        return out

    def terms(self, batch: Batch) -> int:
        return len(batch["clean"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        t = self.process.times(batch["time"])
        captions: Batch = {key: batch[key] for key in ("text", "mask") if key in batch}
        for key, empty in self.empty.items():
            dropped = batch["dropped"].view(-1, *[1] * (captions[key].dim() - 1))
            captions[key] = torch.where(dropped, empty.to(dropped.device), captions[key])
        return (self._errors(model, batch | captions, t) * self.process.weights(t)).sum()

    def _errors(self, model: nn.Module, batch: Batch, t: torch.Tensor) -> torch.Tensor:
        """The mean squared error of each sample."""
        clean = self._clean(batch)
        dtype = next(model.parameters()).dtype
        noisy = self.process.noisy(clean, batch["noise"], t)
        said = model(noisy.to(dtype), self.process.told(t), self._conditioning(batch["text"], batch.get("mask"), dtype))
        return (said.float() - self.process.target(clean, batch["noise"], t)).square().flatten(1).mean(1)

    @torch.no_grad()
    def _clean(self, batch: Batch) -> torch.Tensor:
        """What is noised: the pixels, or a sample of the latents' distribution, in its scale."""
        clean = batch["clean"]
        if self.vae_config is None:
            return clean
        if self.facts and self.facts.content == "images":
            self.vae.to(clean.device)
            clean = self.vae.encode(clean).latent_dist.parameters
        mean, logvar = clean.chunk(2, dim=1)
        latents = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * batch["posterior"]
        return (latents - (self.vae_config.get("shift_factor") or 0.0)) * self.vae_config.get("scaling_factor", 0.18215)

    @torch.no_grad()
    def _conditioning(self, text: torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """What the model is given of the captions: ids for the encoder inside it, embeddings of the frozen one."""
        if text.is_floating_point():
            return text.to(dtype)
        if not self.model.text.pretrained:
            return text
        assert mask is not None
        return embed(self.text_encoder.to(text.device), text, mask).to(dtype)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        place = torch.remainder((batch["key"] + 0.5) * GOLDEN, 1.0).float()
        errors = self._errors(model, batch, self.process.times(place))
        out = {"loss": errors, "samples": torch.ones_like(errors)}
        quarter = (place * QUARTERS).long()
        for i in range(QUARTERS):
            out |= {f"loss_t{i}": errors * (quarter == i), f"samples_t{i}": (quarter == i).float()}
        return out

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        names = ["loss", *(f"loss_t{i}" for i in range(QUARTERS))]
        return {n: sums[n] / max(1.0, sums[n.replace("loss", "samples")]) for n in names}

    def flops_per_sample(self, model: Any) -> float:
        """Forward, counted operator by operator on a model without storage, times three."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            model = self.build()
            text = torch.zeros((1, self.model.text.length), dtype=torch.long)
            if self.model.text.pretrained:
                text = torch.zeros((1, self.model.text.length, self.width))
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros((1, *self.shape())), torch.zeros((1,), dtype=torch.long), text)
        return 3.0 * counter.get_total_flops()

    # for people ------------------------------------------------------------------------------------------------------

    def describe(self, content: pa.Table) -> str:
        row = content.select([c for c in ("id", "caption", "label") if c in content.column_names]).to_pylist()[0]
        return f"{row['caption']} ({row['id']}{', label ' + row['label'] if row.get('label') else ''})"

    def gallery(self) -> Gallery | None:
        """What is drawn after every evaluation; none without prompts."""
        return Gallery(self) if self.model.samples.prompts else None

    def sampler_of(self, model: nn.Module, device: Any) -> Any:
        """say(prompts) -> say(noisy, t), as `image_pipeline.denoise` asks for it, of the model that is being trained."""
        dtype = next(model.parameters()).dtype

        def of(prompts: list[str]) -> Any:
            tokens = tokenize(self.tokenizer, [*[""] * len(prompts), *prompts])
            text = self._conditioning(tokens.input_ids.to(device), tokens.attention_mask.to(device), dtype)
            return lambda noisy, t: model(noisy.to(dtype), t, text)

        return of

    def pixels_of(self, sampled: torch.Tensor) -> np.ndarray:
        """uint8 [n, height, width, channels] of what was sampled."""
        vae = self.vae.to(sampled.device) if self.vae_config is not None else None
        pixels = decode(vae, sampled).float().cpu()
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    # the export ------------------------------------------------------------------------------------------------------

    def save_config(self, folder: Path) -> None:
        image_export.save(self, folder)
        shutil.copy(Path(__file__).with_name("image_pipeline.py"), folder / "pipeline.py")

    def load(self, folder: Path) -> nn.Module:
        pipeline = image_export.load(folder)
        return Denoiser(self.part, pipeline.backbone, None if self.model.text.pretrained else pipeline.text_encoder)

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        gallery = self.gallery()
        return gallery.demonstrate(folder) if gallery else []

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
        part = "unet" if (folder / "unet").is_dir() else "transformer"
        out = {**model, "backbone": {"pretrained": str(folder / part)}}
        if model.get("autoencoder"):
            out["autoencoder"] = {"pretrained": str(folder / "vae")}
        if model.get("text", {}).get("pretrained"):
            out["text"] = {**model["text"], "pretrained": str(folder / "text_encoder")}
        return out

    @staticmethod
    def generator(folder: Path, options: dict[str, Any]) -> Any:
        from jobs.image_generator import ImageGenerator

        return ImageGenerator(folder, options)

    def serving(self) -> Serving:
        return image_export.serving(self)


__all__ = ["Denoiser", "Generated", "TextToImage"]
