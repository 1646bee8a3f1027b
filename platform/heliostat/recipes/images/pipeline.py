"""Generates images from prompts as a diffusers pipeline, in pixels or latents. This file needs only diffusers and transformers.

An export contains a copy of this file, so that plain diffusers can load the export: DiffusionPipeline.from_pretrained(FOLDER,
trust_remote_code=True).

Each image of a call is drawn from its own generator, so a seed gives the same image alone or in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor


def predict(
    backbone: Any,
    noisy: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    pooled: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    guidance: float = 1.0,
) -> torch.Tensor:
    """Computes the backbone's prediction. `t`: [n], from 0 to 1000. `text`: [n, tokens, width].

    `pooled`: [n, width], the embedding of the complete caption; None: the mean of the tokens. `mask`: [n, tokens], 0 for padding
    that the backbone ignores; None: the backbone ignores no token. `guidance`: the guidance scale that a distilled model gets as
    input. Raises TypeError for a class that isn't a backbone.
    """
    kind = type(backbone).__name__
    if kind not in CALLS:
        raise TypeError(f"{kind} isn't a backbone of this pipeline")
    caption = Caption(text, text.mean(dim=1) if pooled is None else pooled, mask, guidance)
    prediction: torch.Tensor = CALLS[kind](backbone, noisy, t, caption)
    return prediction


class Caption(NamedTuple):
    """Describes the text inputs of a backbone. The fields are the arguments of `predict`."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    mask: torch.Tensor | None
    guidance: float


def _unet(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    return backbone(noisy, t, encoder_hidden_states=text.tokens, encoder_attention_mask=text.mask).sample


def _pixart(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    sizes = {"resolution": None, "aspect_ratio": None}
    return backbone(
        noisy, encoder_hidden_states=text.tokens, timestep=t, added_cond_kwargs=sizes, encoder_attention_mask=text.mask
    ).sample


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
    mask: Any = EveryToken(text.tokens.shape[0], text.tokens.shape[1]) if text.mask is None else text.mask
    return -backbone(noisy, 1 - t / 1000, text.tokens, mask).sample


def _sana(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    scaled = t * backbone.config.timestep_scale
    return backbone(noisy, encoder_hidden_states=text.tokens, timestep=scaled, encoder_attention_mask=text.mask).sample


def _prx(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: Caption) -> Any:
    return backbone(noisy, timestep=t / 1000, encoder_hidden_states=text.tokens, attention_mask=text.mask).sample


CALLS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor, Caption], Any]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Lumina2Transformer2DModel": _lumina,
    "SanaTransformer2DModel": _sana,
    "PRXTransformer2DModel": _prx,
}


class EveryToken:
    """Replaces the mask that Lumina's class requires, if no token is ignored.

    The class reads the lengths of captions from the mask. On a GPU, this waits for the device; without values, as in a plan, it's
    impossible. The lengths of this mask are known without a tensor, and attention gets no mask.
    """

    def __init__(self, captions: int, tokens: int) -> None:
        self.shape = (captions, tokens)

    def sum(self, dim: int) -> EveryToken:
        return self

    def tolist(self) -> list[int]:
        return [self.shape[1]] * self.shape[0]

    def bool(self) -> EveryToken:
        return self

    def view(self, *shape: int) -> None:
        return None


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


def embed(text_encoder: Any, ids: torch.Tensor, mask: torch.Tensor, pooling: str | None = None) -> torch.Tensor:
    """Embeds token ids as [n, tokens, width]. With `pooling`, returns the mean over each text's tokens, [n, 1, width].

    T5 and BERT mask padding. CLIP doesn't mask padding, because its training didn't mask padding. BERT's embeddings of padding
    are zero, so they show which tokens are padding: the embedding of another token is never zero.
    """
    kind, read = text_encoder.config.model_type, mask[..., None]
    hidden = text_encoder(input_ids=ids, **({} if "clip" in kind else {"attention_mask": mask}))[0]
    if pooling:
        return (hidden * read).sum(1, keepdim=True) / read.sum(1, keepdim=True)
    return hidden if "clip" in kind or "t5" in kind else hidden * read


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
    predictor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    scheduler: Any,
    shape: tuple[int, ...],
    steps: int,
    guidance: Guidance,
    draws: list[torch.Generator],
    device: Any,
    predicts_image: bool = False,
    clip: bool = False,
) -> torch.Tensor:
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
    model_cpu_offload_seq = "text_encoder->unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]

    def __init__(self, scheduler: Any, text_encoder: Any, tokenizer: Any, unet: Any = None, transformer: Any = None,
                 vae: Any = None, pooling: str | None = None, predicts_image: bool = False,
                 sample_size: int | None = None, patch: int = 1) -> None:  # fmt: skip
        """Puts the models of an export together. `predicts_image`: see `denoise`. `sample_size`: the side of the noised tensor in
        training; None: the side in the backbone's configuration. `patch`: see `decode`."""
        super().__init__()
        self.register_modules(
            scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, transformer=transformer, vae=vae
        )
        self.register_to_config(pooling=pooling, predicts_image=predicts_image, sample_size=sample_size, patch=patch)
        self.processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @property
    def backbone(self) -> Any:
        return self.unet if self.unet is not None else self.transformer

    @property
    def factor(self) -> int:
        """Returns the side, in pixels, of the image square that one latent encodes. Without an autoencoder, returns the side of a
        patch."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else self.config.patch

    @property
    def side(self) -> int:
        """Returns the side of an image in training, in pixels."""
        return int(self.config.sample_size or self.backbone.config.sample_size) * self.factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generates an image for each prompt. `generator`: one for all prompts, or one per prompt. `height`, `width`: in pixels;
        by default, the size in training. `guidance_scale`, `guidance_interval`, `guidance_rescale`: see `Guidance`."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        device, backbone = self._execution_device, self.backbone
        dtype = next(backbone.parameters()).dtype
        tokens = tokenize(self.tokenizer, [*[""] * len(prompts), *prompts])
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        text = embed(self.text_encoder, ids, mask, self.config.pooling).to(dtype)
        side = self.side
        shape = (len(prompts), channels(backbone), (height or side) // self.factor, (width or side) // self.factor)
        guidance = Guidance(guidance_scale, guidance_interval, guidance_rescale)
        draws = generator if isinstance(generator, list) else [generator or torch.Generator("cpu")] * len(prompts)
        x = denoise(
            lambda noisy, t: predict(backbone, noisy.to(dtype), t, text[-len(noisy) :]),
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
    return vae.decode((x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(dtype)).sample.clamp(-1, 1)
