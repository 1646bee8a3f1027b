"""Trains text-to-image models by diffusion or flow matching, in pixels or latents, with the backbones of `diffusers`.

    recipe: heliostat.recipes:TextToImage
    model:
      backbone: {arch: unet, block_out_channels: [64, 128], ...}      # or pixart, sd3; or {pretrained: FOLDER}
      text: {hidden_size: 128, length: 24}                            # trained with it; or {pretrained: FOLDER}: frozen
      autoencoder: {pretrained: FOLDER}                               # latents of this frozen AutoencoderKL; none: pixels
      objective: {prediction: v, zero_terminal_snr: true}             # see `noising`
      samples: {prompts: [...]}                                       # drawn after every evaluation

A sample's loss is the mean squared error of the network's prediction, weighted by the objective. The sample's noise, timestep,
and caption dropout depend only on the sample and the step (`rows`). So these are the same on any number of workers.

Held-out scores use fixed noise and timesteps. The scores are `loss`, and `loss_t0` to `loss_t3`: the loss in each quarter of the
range of noise strengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from heliostat import extras
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes import adapters
from heliostat.recipes.images import diffusers_folder, exporting, rows
from heliostat.recipes.images.adapted import AdaptedImages
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.gallery import PromptGallery, Say
from heliostat.recipes.images.noising import Process
from heliostat.recipes.images.parts import Denoiser, Parts
from heliostat.recipes.images.pipeline import decode, say
from heliostat.recipes.protocol import Batch, Companion, Draws, Evaluates, Generated, Loss, Paints, Recipe, Serves, Serving
from heliostat.schema import validate

if TYPE_CHECKING:
    from heliostat.recipes.images.generator import ImageCanvas, ImageGenerator

BUILT_IN = {"TextToImage": ("diffusers",)}
QUARTERS = 4
GOLDEN = 0.6180339887498949  # the fractional parts of its multiples fill [0, 1) evenly


class TextToImage(AdaptedImages, Recipe, Evaluates, Paints, Serves, Draws):
    kind = "rows"
    terms_per_sample = 1

    def __init__(self, job: Job) -> None:
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: not used for images. Remove this key")
        self.job, self.model = job, validate(Model, job.model, "model")
        self.adapter = adapters.read(job.model, self.model.backbone.get("pretrained"), "model.backbone.pretrained")
        self.version, bf16 = job.train.rules, job.train.precision == "bf16"
        frozen_type = torch.bfloat16 if self.version > 1 and bf16 else torch.float32
        self.parts = Parts(self.model, bool(job.train.activation_checkpointing), frozen_type)
        name = self.parts.name
        self.layout = {f"{name}.": f"{name}/diffusion_pytorch_model", "text_encoder.": "text_encoder/model"}
        self.process = Process(self.model.objective)
        self.sampler = self.model.samples.sampler or ("euler" if self.process.flow else "ddim")
        self.process.scheduler(self.sampler)
        self.seed, self.one_source = job.train.seed, job.data.one_source_batches
        if self.model.samples.judge and not any(p.label for p in self.model.samples.prompts):
            raise ConfigError(
                "model.samples.judge: needs prompts with a label. Add labels to model.samples.prompts, or set this key to false"
            )
        if self.model.samples.judge:
            extras.require("images", "sklearn", what="model.samples.judge")
        drawn = self.model.samples if self.model.samples.prompts else None
        judged = ("conditional_accuracy", "classifier_accuracy", "chance") if drawn and drawn.judge else ()
        compared = ("fid", "kid", "real_images") if drawn and drawn.features else ()
        self.scores = ("loss", *(f"loss_t{i}" for i in range(QUARTERS)), *judged, *compared)

    def bind(self, sources: list[Manifest]) -> None:
        self.sources = sources
        self.parts.bind(sources, self.one_source)

    def presume(self, rows: int) -> pa.Table | None:
        return None if hasattr(self, "sources") else self.parts.presume(rows)

    def build(self) -> nn.Module:
        model = self.parts.build()
        if self.adapter:
            adapters.add(self.adapter, model.get_submodule(self.parts.name), self.seed, self.job.train.precision)
        return model

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        facts = self.parts.facts
        assert facts
        if facts.content == "latents":
            (size,) = set(zip(content["width"].to_pylist(), content["height"].to_pylist(), strict=True))
            out = {"clean": rows.halves(content, "latent", self.parts.stored_shape(size))}
        else:
            out = {"clean": rows.pixels(content)}
        out["key"] = torch.from_numpy(keys.astype(np.int64))
        if self.version == 1:
            out |= rows.draw_on_host(self.seed, keys, *self._drawn(out["clean"])).named()
        return out | self.parts.captions(content)

    def _drawn(self, clean: torch.Tensor) -> tuple[tuple[int, ...], float, float, bool]:
        """Returns the arguments of `rows.draw` for images or stored latents: the shape of the noise, caption dropout, noise
        offset, and whether to sample latents from their distribution."""
        assert self.parts.facts
        height, width = clean.shape[2:]
        shape = self.parts.shape((width, height))
        if self.parts.facts.content == "latents":
            shape = clean.shape[1] // self.parts.moments, height, width
        return shape, self.model.caption_dropout, self.model.objective.noise_offset, self.parts.moments > 1

    def complete(self, batch: Batch) -> Batch:
        """Draws random numbers, encodes images and captions, and drops some captions. Returns `noise`, `image`, and `caption`."""
        return self._completed(batch, dropping=True)

    @torch.no_grad()
    def _completed(self, batch: Batch, dropping: bool) -> Batch:
        if "image" in batch:
            return batch
        if "noise" not in batch:
            batch = batch | rows.draw(self.seed, batch["key"], *self._drawn(batch["clean"])).named()
        captions: Batch = {key: batch[key] for key in self.parts.empty if key in batch}
        for key, empty in self.parts.empty_on(batch["key"].device).items() if dropping else ():
            dropped = batch["dropped"].view(-1, *[1] * (captions[key].dim() - 1))
            captions[key] = torch.where(dropped, empty, captions[key])
        return {key: batch[key] for key in ("key", "time", "noise")} | {
            "image": self.parts.clean(batch["clean"], batch.get("posterior")),
            **self.parts.conditioning(captions),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        batch = self.complete(batch)
        t = self.process.times(batch["time"])
        return Loss((self._errors(model, batch, t) * self.process.weights(t)).sum())

    def _errors(self, model: nn.Module, batch: Batch, t: torch.Tensor) -> torch.Tensor:
        """Computes the mean squared error of each sample of a completed batch, fp32 [samples]. `t`: the samples' times."""
        image, noise, dtype = batch["image"], batch["noise"], next(model.parameters()).dtype
        said = model(
            self.process.noisy(image, noise, t).to(dtype), self.process.told(t), batch["caption"], **self.parts.beside(batch)
        )
        return (said.float() - self.process.target(image, noise, t)).square().flatten(1).mean(1)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        batch = self._completed(batch, dropping=False)
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

    def flops_per_sample(self, model: nn.Module) -> float:
        """Counts the FLOPs of one sample: three times the FLOPs of the forward pass, or twice if only an adapter is trained.
        Counts these operator by operator on the meta device."""
        return self._flops

    @cached_property
    def _flops(self) -> float:
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            model = self.build()
            text, pooled = self.parts.text_shape.blank(1)
            if not self.model.frozen_text:
                text = torch.zeros(text.shape[:2], dtype=torch.long)
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros((1, *self.parts.shape())), torch.zeros((1,), dtype=torch.long), text, pooled)
        return (2.0 if self.adapter else 3.0) * counter.get_total_flops()

    def companions(self) -> dict[str, Companion]:
        return self.parts.companions()

    # for people ------------------------------------------------------------------------------------------------------

    def describe(self, content: pa.Table) -> str:
        row = content.select([c for c in ("id", "caption", "label") if c in content.column_names]).to_pylist()[0]
        return f"{row['caption']} ({row['id']}{', label ' + row['label'] if row.get('label') else ''})"

    def gallery(self) -> PromptGallery | None:
        """Returns the gallery to generate after every evaluation; None if the job has no prompts."""
        return PromptGallery(self) if self.model.samples.prompts else None

    def sampler_of(self, model: nn.Module, device: torch.device | str) -> Callable[[list[str]], Say]:
        """Returns a function that makes the `say(noisy, t)` of `pipeline.denoise` for given prompts.

        The returned function uses the model that is in training, on `device`.
        """
        dtype = next(model.parameters()).dtype

        def of(prompts: list[str]) -> Say:
            tokens = self.parts.tokens([*[""] * len(prompts), *prompts])
            text = self.parts.conditioning({name: values.to(device) for name, values in tokens.items()})
            captioned = partial(model, text=text.pop("caption"), **text)
            return say(captioned, bool(self.parts.given().get("guidance_embeds")), dtype, self.model.samples.guidance)

        return of

    def pixels_of(self, sampled: torch.Tensor) -> np.ndarray:
        """Decodes samples to pixels, uint8 [n, height, width, channels]."""
        vae = self.parts.frozen_on("vae", sampled.device) if self.parts.vae_config is not None else None
        pixels = decode(vae, sampled).float().cpu()
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    # the export ------------------------------------------------------------------------------------------------------

    def save_config(self, folder: Path) -> None:
        with torch.device("meta"):
            model = self.build()
        exporting.save(folder, self.parts, model, self.process, self.sampler)

    def load(self, folder: Path) -> nn.Module:
        pipeline = diffusers_folder.load(folder)
        return Denoiser(self.parts.name, pipeline.backbone, None if self.model.frozen_text else pipeline.text_encoder)

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        gallery = self.gallery()
        return gallery.demonstrate(folder) if gallery else []

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, object]:
        part = "unet" if (folder / "unet").is_dir() else "transformer"
        out = {
            **{key: value for key, value in model.items() if key != adapters.KEY},
            "backbone": {"pretrained": str(folder / part)},
        }
        if model.get("autoencoder"):
            out["autoencoder"] = {"pretrained": str(folder / "vae")}
        return {**out, "text": exporting.text_folders(folder, model["text"])} if model.get("text") else out

    @staticmethod
    def generator(folder: Path, options: dict[str, object]) -> ImageGenerator:
        from heliostat.recipes.images.generator import ImageGenerator

        return ImageGenerator(folder, options)

    @staticmethod
    def canvas(folder: Path) -> ImageCanvas:
        from heliostat.recipes.images.generator import ImageCanvas

        return ImageCanvas(folder)

    def serving(self) -> Serving:
        from mlflow.models import infer_signature

        samples = self.model.samples
        params = {"steps": samples.steps, "guidance": samples.guidance, "seed": 0}
        prompts = [*(p.text for p in samples.prompts), "an image"][:1]
        signature = infer_signature(prompts, ["base64"], params)
        return Serving(Path(__file__).with_name("server.py"), prompts, signature, diffusers_folder.REQUIREMENTS)


__all__ = ["Denoiser", "Generated", "TextToImage"]
