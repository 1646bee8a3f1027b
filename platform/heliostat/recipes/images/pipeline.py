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


def predict(backbone: Any, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Computes the backbone's prediction. `t`: [n]. `text`: [n, tokens, width]. Raises TypeError for a class that isn't a
    backbone."""
    kind = type(backbone).__name__
    if kind == "UNet2DConditionModel":
        return backbone(noisy, t, encoder_hidden_states=text).sample
    if kind == "PixArtTransformer2DModel":
        sizes = {"resolution": None, "aspect_ratio": None}
        return backbone(noisy, encoder_hidden_states=text, timestep=t, added_cond_kwargs=sizes).sample
    if kind == "SD3Transformer2DModel":
        return backbone(noisy, encoder_hidden_states=text, pooled_projections=text.mean(dim=1), timestep=t).sample
    raise TypeError(f"{kind} isn't a backbone of this pipeline")


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
    model_cpu_offload_seq = "text_encoder->unet->transformer->vae"
    _optional_components = ["unet", "transformer", "vae"]

    def __init__(self, scheduler: Any, text_encoder: Any, tokenizer: Any, unet: Any = None, transformer: Any = None,
                 vae: Any = None, pooling: str | None = None, predicts_image: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.register_to_config(pooling=pooling, predicts_image=predicts_image)
        self.register_modules(
            scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, transformer=transformer, vae=vae
        )
        self.processor = VaeImageProcessor(vae_scale_factor=self.factor)

    @property
    def backbone(self) -> Any:
        return self.unet if self.unet is not None else self.transformer

    @property
    def factor(self) -> int:
        """Returns the side, in pixels, of the image square that one latent encodes. Returns 1 without an autoencoder."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1

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
        side = backbone.config.sample_size * self.factor
        shape = (len(prompts), backbone.config.in_channels, (height or side) // self.factor, (width or side) // self.factor)
        guidance = Guidance(guidance_scale, guidance_interval, guidance_rescale)
        draws = generator if isinstance(generator, list) else [generator or torch.Generator("cpu")] * len(prompts)
        x = denoise(
            lambda noisy, t: predict(backbone, noisy.to(dtype), t, text[-len(noisy) :]),
            self.scheduler, shape, num_inference_steps, guidance, draws, device,
            self.config.predicts_image, clip=self.vae is None,
        )  # fmt: skip
        pixels = decode(self.vae, x)
        images: Any = self.processor.postprocess(pixels.float().cpu(), output_type=output_type)
        if output_type == "pil" and pixels.shape[1] == 1:
            images = [image.convert("L") for image in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def decode(vae: Any, x: torch.Tensor) -> torch.Tensor:
    """Decodes samples to pixels in [-1, 1]."""
    if vae is None:
        return x.clamp(-1, 1)
    dtype = next(vae.parameters()).dtype
    return vae.decode((x / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(dtype)).sample.clamp(-1, 1)
