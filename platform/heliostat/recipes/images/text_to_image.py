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

import logging
from collections.abc import Callable
from functools import cached_property
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
from heliostat.optim.matrix_shapes import FILTERS
from heliostat.recipes import adapters
from heliostat.recipes.images import (
    alignment,
    captions,
    contrastive,
    diffusers_folder,
    exporting,
    held_out,
    quality,
    rows,
    stored_features,
    training_aids,
)
from heliostat.recipes.images.adapted import AdaptedImages
from heliostat.recipes.images.conditioning import LENGTHS
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.decoding import decoded
from heliostat.recipes.images.gallery import Predictor, PromptGallery
from heliostat.recipes.images.noising import Process
from heliostat.recipes.images.parts import Denoiser, Parts
from heliostat.recipes.images.pipeline import captioned, decode
from heliostat.recipes.protocol import Batch, Companion, Draws, Evaluates, Generated, Group, Loss, Paints, Recipe, Serves, Serving
from heliostat.schema import validate_key

if TYPE_CHECKING:
    from heliostat.recipes.images.generator import ImageCanvas, ImageGenerator

log = logging.getLogger(__name__)

BUILT_IN = {"TextToImage": ("diffusers",)}
NO_AIDS: Batch = {}
QUARTERS = 4
DECODED = 4  # stored latents that the autoencoder decodes at a time
CONDITIONING = {"time_embedding", "time_emb_proj", "add_embedding", "encoder_hid_proj", "canvases", "canvas_gates"}  # of a U-Net
ENDS = ("conv_in", "conv_out", "proj")  # convolutions at the ends of a backbone
TRAINING_KEYS = ("contrastive", "immiscible", "repa", "tread")  # don't matter for scores; need certain micro-batches or datasets
GOLDEN = 0.6180339887498949  # the fractional parts of its multiples fill [0, 1) evenly


class TextToImage(AdaptedImages, Recipe, Evaluates, Paints, Serves, Draws):
    kind = "rows"
    terms_per_sample = 1

    def __init__(self, job: Job) -> None:
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: not used for images. Remove this key")
        self.job, self.model = job, validate_key(Model, job.model, "model")
        self.adapter = adapters.read(job.model, self.model.backbone.get("pretrained"), "model.backbone.pretrained")
        self.version, bf16 = job.train.rules, job.train.precision == "bf16"
        frozen_type = torch.bfloat16 if self.version > 1 and bf16 else torch.float32
        self.parts = Parts(self.model, bool(job.train.activation_checkpointing), frozen_type, job.train.seed)
        training_aids.require_uncompiled(self.model, bool(job.train.compile))
        self.global_batch = job.train.global_batch_size
        name = self.parts.name
        self.layout = {f"{name}.": f"{name}/diffusion_pytorch_model", "text_encoder.": "text_encoder/model"}
        self.process = Process(self.model.objective)
        self.sampler = self.model.samples.sampler or ("euler" if self.process.flow else "ddim")
        self.process.scheduler(self.sampler)
        if self.model.orthogonal_filters and not job.train.optimizer.orthogonalizes:
            raise ConfigError(
                f"model.orthogonal_filters: not supported by train.optimizer.name {job.train.optimizer.name!r}. "
                "Set the optimizer to muon, or remove this key"
            )
        if self.model.contrastive:
            self.model.contrastive.require(job, self.process)
        if self.model.immiscible:
            self.model.immiscible.require(job, self.model.objective.noise_offset)
        self.seed, self.one_source = job.train.seed, job.data.one_source_batches
        if self.model.samples.judge and not any(p.label for p in self.model.samples.prompts):
            raise ConfigError(
                "model.samples.judge: needs prompts with a label. Add labels to model.samples.prompts, or set this key to false"
            )
        if self.model.samples.judge:
            extras.require("images", "sklearn", what="model.samples.judge")
        if self.model.samples.held_out:
            extras.require("images", "sklearn", what="model.samples.held_out")
        drawn = self.model.samples if self.model.samples.prompts else None
        judged: tuple[str, ...] = ("conditional_accuracy", "classifier_accuracy", "chance") if drawn and drawn.judge else ()
        judged += held_out.NAMES if self.model.samples.held_out else ()
        self.scores = ("loss", *(f"loss_t{i}" for i in range(QUARTERS)), *judged, *(quality.names(drawn) if drawn else ()))

    def bind(self, sources: list[Manifest]) -> None:
        self.sources = sources
        if self.model.samples.prompts:
            quality.require(self.model.samples)
        elif self.model.samples.features or self.model.samples.clip:
            log.warning(
                "model.samples: no scores for features and clip, because the job has no prompts. Add model.samples.prompts"
            )
        self.parts.bind(sources, self.one_source)
        if self.model.samples.held_out:
            held_out.held_out(self.model.samples.held_out, sources)
        captions.require_columns(self.model.captions, sources)

    def presume(self, rows: int) -> pa.Table | None:
        return None if hasattr(self, "sources") else self.parts.presume(rows)

    def build(self) -> nn.Module:
        model = self.parts.build()
        if self.adapter:
            adapters.add(self.adapter, model.get_submodule(self.parts.name), self.seed, self.job.train.precision)
        return model

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        """Returns the parameter's group. With `model.orthogonal_filters`, filters between hidden convolutions are hidden
        matrices, and the layers that read times and captions aren't."""
        if self.model.orthogonal_filters and len(shape) > 1 and not CONDITIONING.isdisjoint(name.split(".")):
            return Group(hidden=False)
        hidden = self.model.orthogonal_filters and len(shape) == FILTERS and name.split(".")[-2] not in ENDS
        return Group(hidden=True) if hidden else super().group(name, shape)

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        batch = self.held_out_batch(content, keys)
        return batch | self._assigned(batch)

    def held_out_batch(self, content: pa.Table, keys: np.ndarray) -> Batch:
        facts = self.parts.facts
        assert facts
        if self.model.captions and hasattr(self, "sources"):  # placeholder samples have one caption
            stored = [column for column, _ in self.parts.stored_columns().values()] if self.parts.embedded else []
            content = captions.chosen(content, self.model.captions, self.seed, keys, stored)
        if facts.content == "latents":
            (size,) = set(zip(content["width"].to_pylist(), content["height"].to_pylist(), strict=True))
            out = {"clean": facts.latents(self.parts.stored_shape(size)).unpack(content["latent"].to_pylist())}
        else:
            out = {"clean": rows.pixels(content)}
        out["key"] = torch.from_numpy(keys.astype(np.int64))
        if self.version == 1:
            out |= rows.draw_on_host(self.seed, keys, *self._drawn(out["clean"])).named()
        out |= self.parts.captions(content)
        if self.model.repa and facts.features:
            out |= facts.features.batch(content["features"].to_pylist())
        if self.parts.counted:
            out[LENGTHS] = self._lengths(out)
        return out

    def _lengths(self, batch: Batch) -> torch.Tensor:
        """Counts the tokens of captions, without and with dropped captions, int64 [n, 2]. The host would otherwise read the
        lengths from the device in `loss`."""
        own, empty = (self.parts.lengths(texts) for texts in (batch, {k: v[None] for k, v in self.parts.empty.items()}))
        dropped = batch.get("dropped", rows.scalars(self.seed, batch["key"], self.model.caption_dropout)[1])
        return torch.stack([own, torch.where(dropped, empty, own)], 1)

    def _assigned(self, batch: Batch) -> Batch:
        """Computes, on the host, what the host would otherwise read from the device in `loss`: the index of each image's noise
        (`model.immiscible.group`). Returns this index, `assigned`, with the random numbers of `draw`."""
        near = self.model.immiscible
        if not (near and near.group) or self.parts.encodes:
            return {}
        drawn = batch if "noise" in batch else rows.draw(self.seed, batch["key"], *self._drawn(batch["clean"])).named()
        out = {name: drawn[name] for name in ("time", "dropped", "noise", "posterior") if name in drawn}
        return out | {"assigned": near.assigned(self.parts.clean(batch["clean"], drawn.get("posterior")), drawn["noise"])}

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
        return self._completed(batch, training=True)

    @torch.no_grad()
    def _completed(self, batch: Batch, training: bool) -> Batch:
        if "image" in batch:
            return batch
        if "noise" not in batch:
            batch = batch | rows.draw(self.seed, batch["key"], *self._drawn(batch["clean"])).named()
        texts: Batch = {key: batch[key] for key in self.parts.empty if key in batch}
        for key, empty in self.parts.empty_on(batch["key"].device).items() if training else ():
            dropped = batch["dropped"].view(-1, *[1] * (texts[key].dim() - 1))
            texts[key] = torch.where(dropped, empty, texts[key])
        out = {key: batch[key] for key in ("key", "time", "noise")} | {
            "image": self.parts.clean(batch["clean"], batch.get("posterior")),
            **self.parts.conditioning(texts),
            **({"features": stored_features.values(batch)} if "features" in batch else {}),
        }
        if "mask" in out and LENGTHS in batch:
            out[LENGTHS] = batch[LENGTHS][:, int(training)]
        if training and "assigned" in batch:
            out["noise"] = out["noise"][batch["assigned"]]
        elif training and self.model.immiscible:
            out["noise"] = self.model.immiscible.choose(self.seed, out["key"], out["image"], out["noise"])
        if training and self.model.contrastive:
            out["contrasted"] = contrastive.contrasted(*(values for key, values in texts.items() if key.startswith("text")))
        return out

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        batch = self.complete(batch)
        t = self.process.times(batch["time"], batch["image"].shape[2:])
        answer = self._predicted(model, batch, t, training_aids.arguments(self.model, batch))
        prediction, similarity = answer if isinstance(answer, tuple) else (answer, None)
        errors = self.process.errors(prediction, batch["image"], batch["noise"], t)
        parts = self.model.contrastive.part(self.process, prediction, batch, t) if self.model.contrastive else {}
        if self.model.repa and similarity is not None:
            parts |= {"repa": alignment.part(self.model.repa, similarity, batch["key"], self.global_batch)}
        return Loss((errors * self.process.weights(t)).sum(), parts)

    def _predicted(self, model: nn.Module, batch: Batch, t: torch.Tensor, aids: Batch = NO_AIDS) -> Any:
        """Computes the network's prediction for a completed batch. `t`: the samples' times.

        `aids`: arguments of the model that only training uses. With features, also returns each sample's similarity to them.
        """
        noisy = self.process.noisy(batch["image"], batch["noise"], t).to(next(model.parameters()).dtype)
        return model(noisy, self.process.network_time(t), batch["caption"], **self.parts.beside(batch), **aids)

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        batch = self._completed(batch, training=False)
        place = torch.remainder((batch["key"] + 0.5) * GOLDEN, 1.0).float()
        t = self.process.times(place, batch["image"].shape[2:])
        errors = self.process.errors(self._predicted(model, batch, t), batch["image"], batch["noise"], t)
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
            aids = training_aids.blank(self.model, self.parts.facts.features if self.parts.facts else None)
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros((1, *self.parts.shape())), torch.zeros((1,), dtype=torch.long), text, pooled, **aids)
        return (2.0 if self.adapter else 3.0) * counter.get_total_flops()

    def companions(self) -> dict[str, Companion]:
        return self.parts.companions()

    # for people ------------------------------------------------------------------------------------------------------

    def describe(self, content: pa.Table) -> str:
        row = content.select([c for c in ("id", "caption", "label") if c in content.column_names]).to_pylist()[0]
        return f"{row['caption']} ({row['id']}{', label ' + row['label'] if row.get('label') else ''})"

    def gallery(self) -> PromptGallery | None:
        """Returns the gallery to generate after every evaluation; None if the job has no prompts."""
        if self.model.samples.held_out:
            return held_out.HeldOutGallery(self)
        return PromptGallery(self) if self.model.samples.prompts else None

    def sampler_of(self, model: nn.Module, device: torch.device | str) -> Callable[[list[str]], Predictor]:
        """Returns a function that makes the `predictor(noisy, t)` of `pipeline.denoise` for given prompts.

        The returned function uses the model that is in training, on `device`.
        """
        dtype = next(model.parameters()).dtype

        def of(prompts: list[str]) -> Predictor:
            tokens = self.parts.tokens([*[""] * len(prompts), *prompts])
            text = self.parts.conditioning({name: values.to(device) for name, values in tokens.items()})
            if self.parts.counted:
                text[LENGTHS] = self.parts.lengths(tokens)
            scale = self.model.samples.guidance if self.parts.distilled else None
            return captioned(model, {"text": text["caption"], **self.parts.beside(text)}, dtype, scale)

        return of

    def pixels_of(self, sampled: torch.Tensor) -> np.ndarray:
        """Decodes samples to pixels, uint8 [n, height, width, channels]."""
        vae = self.parts.frozen_on("vae", sampled.device) if self.parts.vae_config is not None else None
        pixels = decode(vae, sampled, self.model.patch).float().cpu()
        return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()

    @torch.no_grad()
    def pictures_of(self, content: pa.Table, device: torch.device | str) -> list[np.ndarray]:
        """Decodes the images of rows, or their stored latents, to uint8 [height, width, channels]. The rows have one size."""
        facts = self.parts.facts
        assert facts
        if facts.content == "images":
            return list(decoded(content["image"].to_pylist()))
        size, out = (content["width"][0].as_py(), content["height"][0].as_py()), list[np.ndarray]()
        latents = facts.latents(self.parts.stored_shape(size)).unpack(content["latent"].to_pylist())
        for part in latents.to(device).split(DECODED):
            means = torch.zeros_like(part.chunk(self.parts.moments, dim=1)[0])
            out += list(self.pixels_of(self.parts.clean(part, means)))
        self.parts.rest()
        return out

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
        scored = {key: value for key, value in model.items() if key not in (*TRAINING_KEYS, adapters.KEY)}
        out = {**scored, "backbone": {"pretrained": str(folder / part)}}
        if model.get("autoencoder"):
            out["autoencoder"] = {"pretrained": str(folder / "vae")}
        if model.get("text"):
            out["text"] = exporting.text_folders(folder, model["text"])
        if model.get("samples"):
            out["samples"] = quality.of_export(model["samples"])
        return out

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
        params = {"steps": samples.steps, "seed": 0, **exporting.guidance(self.parts, self.process)}
        prompts = [*(p.text for p in samples.prompts), "an image"][:1]
        signature = infer_signature(prompts, ["base64"], params)
        return Serving(Path(__file__).with_name("server.py"), prompts, signature, diffusers_folder.REQUIREMENTS)


__all__ = ["Denoiser", "Generated", "TextToImage"]
