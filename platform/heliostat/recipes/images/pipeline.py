"""Generates images from prompts as a diffusers pipeline, in pixels or latents. This file needs only diffusers and transformers.

An export contains a copy of this file, so that plain diffusers can load the export: DiffusionPipeline.from_pretrained(FOLDER,
trust_remote_code=True).

Each image of a call is drawn from its own generator, so a seed gives the same image alone or in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


def predict(
    backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor | None = None,
    mask: torch.Tensor | None = None, guidance: float = 1.0, lengths: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Computes the backbone's prediction. `t`: [n], from 0 to 1000. `text`: [n, tokens, width].

    `pooled`: [n, width], the embedding of the complete caption; None: the mean of the tokens. `mask`: [n, tokens], 0 for padding
    that the backbone ignores; None: the backbone ignores no token. `guidance`: the guidance scale that a distilled model gets as
    input. `lengths`: int64 [n] on the CPU, the sums of `mask`. Raises TypeError for a class that isn't a backbone.
    """
    kind = type(backbone).__name__
    if kind not in CALLS:
        raise TypeError(f"{kind} isn't a backbone of this pipeline")
    summary = text.mean(dim=1) if pooled is None else pooled
    prediction: torch.Tensor = CALLS[kind](backbone, noisy, t, Caption(text, summary, mask, guidance, lengths))
    return prediction


class Caption(NamedTuple):
    """Describes the text inputs of a backbone. The fields are the arguments of `predict`."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    mask: torch.Tensor | None
    guidance: float
    lengths: torch.Tensor | None


def _unet(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    return backbone(noisy, t, encoder_hidden_states=text.tokens, encoder_attention_mask=text.mask).sample


def _pixart(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    inputs: Any = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "encoder_attention_mask": text.mask}
    return backbone(noisy, encoder_hidden_states=text.tokens, timestep=t, **inputs).sample


def _sd3(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    return backbone(noisy, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=t).sample


def _flux(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    """Calls FLUX, whose tokens are squares of 2 x 2 latents, and whose time is between 0 and 1."""
    n, channels, height, width = noisy.shape
    rows, columns = height // 2, width // 2
    packed = noisy.view(n, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, rows * columns, 4 * channels)
    places = torch.zeros(rows, columns, 3, device=noisy.device)
    places[..., 1] += torch.arange(rows, device=noisy.device)[:, None]
    places[..., 2] += torch.arange(columns, device=noisy.device)[None, :]
    strength = torch.full((n,), text.guidance, device=noisy.device) if distilled(backbone) else None
    said = backbone(
        packed, encoder_hidden_states=text.tokens, pooled_projections=text.pooled, timestep=t / 1000, guidance=strength,
        img_ids=places.view(-1, 3), txt_ids=torch.zeros(text.tokens.shape[1], 3, device=noisy.device),
    ).sample  # fmt: skip
    return said.view(n, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape)


def _lumina(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    """Calls Lumina, whose time goes from noise (0) to image (1), so that its prediction has the other sign."""
    if noisy.is_cuda:  # else the class copies this list to the device in each call
        backbone.rope_embedder.freqs_cis = [table.to(noisy.device) for table in backbone.rope_embedder.freqs_cis]
    return -backbone(noisy, 1 - t / 1000, text.tokens, CaptionMask(text)).sample


def _sana(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    scaled = t * backbone.config.timestep_scale
    return backbone(noisy, encoder_hidden_states=text.tokens, timestep=scaled, encoder_attention_mask=text.mask).sample


def _prx(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    return backbone(noisy, timestep=t / 1000, encoder_hidden_states=text.tokens, attention_mask=text.mask).sample


CALLS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor, Caption], Any]] = {
    "UNet2DConditionModel": _unet,
    "CanvasUNet": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Lumina2Transformer2DModel": _lumina,
    "SanaTransformer2DModel": _sana,
    "PRXTransformer2DModel": _prx,
}


class CaptionMask:
    """Replaces the mask that Lumina's class requires, and from which it reads the captions' lengths. With `lengths`, the host
    doesn't wait for the device. Without a mask, no token is ignored, and attention gets no mask."""

    def __init__(self, text: Caption) -> None:
        self.shape, self._mask = text.tokens.shape[:2], text.mask
        lengths = text.mask.sum(1) if text.lengths is None and text.mask is not None else text.lengths
        self._lengths: list[int] = [self.shape[1]] * self.shape[0] if lengths is None else lengths.tolist()

    def sum(self, dim: int) -> CaptionMask:
        return self

    def tolist(self) -> list[int]:
        return self._lengths

    def bool(self) -> CaptionMask:
        return self

    def view(self, *shape: int) -> torch.Tensor | None:
        return None if self._mask is None else self._mask.bool().view(*shape)


def channels(backbone: Any) -> int:
    """Returns the channels of the noised tensor."""
    inputs: int = backbone.config.in_channels
    return inputs // 4 if type(backbone).__name__ == "FluxTransformer2DModel" else inputs


def distilled(backbone: Any) -> bool:
    """Returns whether a model gets the guidance scale as input, so that it needs no prediction without text."""
    return bool(getattr(backbone.config, "guidance_embeds", False))


def tokenize(tokenizer: Any, prompts: list[str]) -> Any:
    """Tokenizes prompts to input_ids and attention_mask, truncated and padded to the tokenizer's length."""
    length = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")


class Encoded(NamedTuple):
    """Holds what a text encoder returns. `tokens`: [n, tokens, width]. `pooled`: [n, width], of CLIP; None for other encoders."""

    tokens: torch.Tensor
    pooled: torch.Tensor | None


def encode(
    text_encoder: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    pooling: str | None = None,
    layer: str = "last",
    padding: str | None = None,
) -> Encoded:
    """Embeds token ids. With `pooling`, returns the mean over each text's tokens, [n, 1, width]. `layer`: `last`, with the
    encoder's final norm, or `penultimate`.

    `padding`: `seen`, the encoder attends to padding; `kept`, the encoder masks padding, but returns its embeddings; `zero`,
    these embeddings are zero, so they show which tokens are padding. The embedding of another token is never zero. None: `seen`
    for CLIP, `kept` for T5, `zero` for other encoders.
    """
    kind, read = text_encoder.config.model_type, mask[..., None]
    padding = padding or padding_of(kind)
    deeper = {"output_hidden_states": True} if layer == "penultimate" else {}
    out = text_encoder(input_ids=ids, **({} if padding == "seen" else {"attention_mask": mask}), **deeper)
    hidden = out.hidden_states[-2] if deeper else out.last_hidden_state
    pooled = getattr(out, "text_embeds", getattr(out, "pooler_output", None)) if "clip" in kind else None
    if pooling:
        return Encoded((hidden * read).sum(1, keepdim=True) / read.sum(1, keepdim=True), pooled)
    return Encoded(hidden * read if padding == "zero" else hidden, pooled)


def padding_of(kind: str) -> str:
    """Returns what a text encoder of this model type does with padding by default. CLIP was trained on padding."""
    return "seen" if "clip" in kind else "kept" if "t5" in kind and "gemma" not in kind else "zero"


def join(backbone: str, encoded: list[Encoded]) -> Encoded:
    """Joins the embeddings of several text encoders. `backbone`: the name of the backbone's class.

    - U-Net and SD3 concatenate CLIP encoders by width. SD3 then pads the width with zeros, and appends the tokens of T5.
    - FLUX takes the tokens of T5.
    - The pooled embedding is the concatenation of the pooled embeddings of CLIP. With one text encoder, it's None.
    """
    if len(encoded) == 1:
        return Encoded(encoded[0].tokens, None)
    clips = [(one.tokens, one.pooled) for one in encoded if one.pooled is not None]
    others = [one.tokens for one in encoded if one.pooled is None]
    pooled = torch.cat([summary for _, summary in clips], dim=-1)
    if backbone == "FluxTransformer2DModel":
        return Encoded(torch.cat(others, dim=1), pooled)
    tokens = torch.cat([each for each, _ in clips], dim=-1)
    if others:
        tokens = torch.nn.functional.pad(tokens, (0, others[0].shape[-1] - tokens.shape[-1]))
    return Encoded(torch.cat([tokens, *others], dim=1), pooled)


def unpadded(tokens: torch.Tensor) -> torch.Tensor:
    """Returns the mask [n, tokens] of embeddings that aren't padding, whose embeddings are zero."""
    return (tokens != 0).any(dim=-1)


def generators(seeds: list[int]) -> list[torch.Generator]:
    """Makes a random generator for each seed, on the CPU, so that every device draws the same numbers."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


class Guidance(NamedTuple):
    """Describes classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598). A scale of 1 turns guidance off.

    `interval`: the lowest and the highest time with guidance, from 0 (image) to 1 (noise). Outside this interval, the model only
    predicts with text, in half the time (Kynkaanniemi et al. 2024, arXiv 2404.07724). `rescale`: how much of the increase of the
    standard deviation to undo, from 0 to 1 (Lin et al. 2023, arXiv 2305.08891, section 3.4).
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    @property
    def plain(self) -> bool:
        """Checks whether the guidance is the same at all times, and without rescaling."""
        return self.interval == (0.0, 1.0) and not self.rescale

    def acts(self, time: float) -> bool:
        """Checks whether a step at this time needs predictions with and without text."""
        return self.scale != 1 and self.interval[0] <= time <= self.interval[1]

    def guide(self, without: torch.Tensor, having: torch.Tensor) -> torch.Tensor:
        """Combines the predictions without and with text, [n, ...]."""
        guided = without + self.scale * (having - without)
        if not self.rescale:
            return guided
        each = tuple(range(1, guided.dim()))
        ratio = having.std(each, keepdim=True) / guided.std(each, keepdim=True)
        return guided * (self.rescale * ratio + 1 - self.rescale)


def denoise(
    predictor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], scheduler: Any, shape: tuple[int, ...], steps: int,
    guidance: Guidance, draws: list[torch.Generator], device: Any, predicts_image: bool = False, clip: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Denoises random samples of the given shape, in fp32.

    `predictor(noisy, t)` returns predictions with text for n noisy samples. For 2n noisy samples, the first n predictions are
    without text.

    `predicts_image`: whether predictions are images, for flow matching. A predicted image x_0 at time s gives the velocity
    (x_s - x_0) / s. `clip`: clips predicted images to [-1, 1].
    """
    scheduler.set_timesteps(steps, device=device, **_shift(scheduler, shape))
    x = randn_tensor(shape, generator=draws, device=torch.device(device), dtype=torch.float32)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    times = (scheduler.timesteps / scheduler.config.num_train_timesteps).tolist()  # once, because the host waits for the device
    for t, time in zip(scheduler.timesteps, times, strict=True):
        acts = guidance.acts(time)
        noisy = torch.cat([x, x]) if acts else x
        if hasattr(scheduler, "scale_model_input"):
            noisy = scheduler.scale_model_input(noisy, t)
        prediction = predictor(noisy, t.expand(len(noisy))).float()
        if acts:
            prediction = guidance.guide(*prediction.chunk(2))
        if predicts_image:
            prediction = (x - (prediction.clamp(-1, 1) if clip else prediction)) / time
        x = scheduler.step(prediction, t, x, generator=draws, return_dict=False)[0]
    return x


def _shift(scheduler: Any, shape: tuple[int, ...]) -> dict[str, float]:
    """Returns the options of `set_timesteps` for a schedule that follows the size of the samples: the logarithm of the shift."""
    if not scheduler.config.get("use_dynamic_shifting"):
        return {}
    return {"mu": math.log(shape[-2] * shape[-1] / scheduler.config.base_image_seq_len) / 2}


def captioned(
    model: Callable[..., torch.Tensor], captions: dict[str, torch.Tensor], dtype: torch.dtype, scale: float | None = None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Makes the `predictor(noisy, t)` of `denoise` from a model and its captions, the arguments of `predict` for 2n captions. The
    first n captions are empty.

    `scale`: the guidance scale that a distilled model gets as input; None for other models. A distilled model only predicts with
    text, so its predictions with and without text are the same.
    """

    def plain(noisy: torch.Tensor, t: torch.Tensor, **more: Any) -> torch.Tensor:
        return model(noisy=noisy.to(dtype), t=t, **{name: values[-len(noisy) :] for name, values in captions.items()}, **more)

    def distilled(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        count = len(captions["text"]) // 2
        having = plain(noisy[-count:], t[-count:], guidance=scale)
        return torch.cat([having, having]) if len(noisy) > count else having

    return plain if scale is None else distilled


class TextToImagePipeline(DiffusionPipeline):
    unet: Any
    transformer: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    _execution_device: Any
    register_modules: Any
    register_to_config: Any
    config: Any
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]

    def __init__(self, scheduler: Any, text_encoder: Any, tokenizer: Any, unet: Any = None, transformer: Any = None,
                 vae: Any = None, text_encoder_2: Any = None, tokenizer_2: Any = None, text_encoder_3: Any = None,
                 tokenizer_3: Any = None, texts: list[dict[str, Any]] | None = None, masked: bool = False,
                 predicts_image: bool = False, sample_size: int | None = None, patch: int = 1) -> None:  # fmt: skip
        """Puts the models of an export together. `texts`: the arguments of `encode` for each text encoder; None: one encoder,
        without arguments. `masked`: whether the backbone ignores padding. `predicts_image`: see `denoise`. `sample_size`: the
        side of the noised tensor in training; None: the side in the backbone's configuration. `patch`: see `decode`."""
        super().__init__()
        self.register_to_config(texts=texts, masked=masked, predicts_image=predicts_image, sample_size=sample_size, patch=patch)
        self.register_modules(
            scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, transformer=transformer, vae=vae,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        )  # fmt: skip
        self.processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @property
    def backbone(self) -> Any:
        return self.unet if self.unet is not None else self.transformer

    @property
    def factor(self) -> int:
        """Returns the side, in pixels, of the image square that one latent encodes. Without an autoencoder, returns the side of a
        patch."""
        if self.vae is None:
            return int(self.config.patch)
        config = self.vae.config
        return int(2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1))

    @property
    def side(self) -> int:
        """Returns the side of an image in training, in pixels."""
        return int(self.config.sample_size or self.backbone.config.sample_size) * self.factor

    def captions(self, prompts: list[str], device: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Embeds prompts as arguments of `predict`: `text`, and `pooled` and `mask` if the backbone uses them."""
        encoded = []
        for number, settings in enumerate(self.config.texts or [{}], start=1):
            suffix = f"_{number}" if number > 1 else ""
            tokens = tokenize(getattr(self, f"tokenizer{suffix}"), prompts)
            ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
            encoded.append(encode(getattr(self, f"text_encoder{suffix}"), ids, mask, **settings))
        joined = join(type(self.backbone).__name__, encoded)
        pooled = {} if joined.pooled is None else {"pooled": joined.pooled.to(dtype)}
        lengths = tokens.attention_mask.sum(1).clamp(max=joined.tokens.shape[1])  # of one encoder: Lumina has no others
        mask = {"mask": unpadded(joined.tokens), "lengths": lengths} if self.config.masked else {}
        return {"text": joined.tokens.to(dtype), **pooled, **mask}

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str], height: int | None = None, width: int | None = None, num_inference_steps: int = 30,
        guidance_scale: float = 4.0, guidance_interval: tuple[float, float] = (0.0, 1.0), guidance_rescale: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None, output_type: str = "pil", return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """Generates an image for each prompt. `generator`: one for all prompts, or one per prompt. `height`, `width`: in pixels;
        by default, the size in training. `guidance_scale`, `guidance_interval`, `guidance_rescale`: see `Guidance`. A distilled
        model only has a scale."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        device, backbone = self._execution_device, self.backbone
        dtype = next(backbone.parameters()).dtype
        captions = self.captions([*[""] * len(prompts), *prompts], device, dtype)
        side = self.side
        shape = (len(prompts), channels(backbone), (height or side) // self.factor, (width or side) // self.factor)
        guidance = Guidance(guidance_scale, (guidance_interval[0], guidance_interval[1]), guidance_rescale)
        if distilled(backbone) and not guidance.plain:
            raise ValueError("guidance_interval, guidance_rescale: not supported by a distilled model. Remove them")
        draws = generator if isinstance(generator, list) else [generator or torch.Generator("cpu")] * len(prompts)
        x = denoise(
            captioned(partial(predict, backbone), captions, dtype, guidance_scale if distilled(backbone) else None),
            self.scheduler, shape, num_inference_steps, guidance, draws, device,
            self.config.predicts_image, clip=self.vae is None,
        )  # fmt: skip
        pixels = decode(self.vae, x, self.config.patch)
        images: Any = self.processor.postprocess(pixels.float().cpu(), output_type=output_type)
        if output_type == "pil" and pixels.shape[1] == 1:
            images = [image.convert("L") for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def decode(vae: Any, x: torch.Tensor, patch: int = 1) -> torch.Tensor:
    """Decodes samples to pixels in [-1, 1]. `patch`: without an autoencoder, the side of a patch of pixels."""
    if vae is None:
        return torch.nn.functional.pixel_shuffle(x.clamp(-1, 1), patch)
    dtype = next(vae.parameters()).dtype
    return vae.decode((x / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)).to(dtype)).sample.clamp(-1, 1)
