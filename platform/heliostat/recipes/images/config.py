"""Defines the section `model:` of a text-to-image job, and builds the models in this section: backbones, text encoders,
autoencoders.

Backbones are diffusers' classes, built from their keys or loaded from a folder. Keys that follow from the data (channels, the
text's width) are optional. Frozen encoders come from folders. ZeRO never shards frozen encoders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from transformers import AutoConfig, AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedConfig, PreTrainedTokenizerBase

from heliostat.errors import ConfigError
from heliostat.recipes import partitioning, weightless
from heliostat.recipes.adapters import Adapter
from heliostat.recipes.exported import using
from heliostat.recipes.folder_digests import digest_of, sha256
from heliostat.recipes.folder_digests import folder_digest as folder_digest
from heliostat.recipes.images import attention_norms, frozen_autoencoders, text_encoders
from heliostat.recipes.images.alignment import Repa
from heliostat.recipes.images.backbones.family import SIZE, Family
from heliostat.recipes.images.backbones.table import FAMILIES, named
from heliostat.recipes.images.captions import CaptionText
from heliostat.recipes.images.contrastive import Contrastive
from heliostat.recipes.images.immiscible import Immiscible
from heliostat.recipes.images.interval import Interval
from heliostat.recipes.images.noising import NoiseObjective
from heliostat.recipes.images.pipeline import Guidance
from heliostat.recipes.images.quality_config import ClipScore, Features
from heliostat.recipes.images.token_routing import Tread
from heliostat.recipes.pretrained import from_config, from_folder, whole, whole_part
from heliostat.recipes.text import encoder
from heliostat.schema import Float, Strict, nearest
from heliostat.storage.hub import files
from heliostat.storage.records import Format
from heliostat.text import brief

Keys = dict[str, Any]  # of a diffusers configuration
CONFIG = Format(Keys, "model's configuration", ConfigError)
PRETRAINED = "model.backbone.pretrained"
FOLDER_FIX = "Set this key to such a folder, for example after hf download NAME --local-dir FOLDER"
VOCABULARIES = (".txt", ".model", ".tiktoken")  # suffixes of tokenizer files other than JSON: merges.txt, vocab.txt, spiece.model

Padding = Literal["seen", "kept", "zero", "masked"]
Sampler = Literal["ddpm", "ddim", "dpm++", "euler"]


class Text(Strict):
    """Describes a text encoder. With `pretrained`, the encoder is a frozen text encoder (CLIP, T5, BERT, Gemma) from a folder.
    Without `pretrained`, the encoder is a CLIP text encoder with these keys, and trains with the model."""

    pretrained: str | None = None
    """Folder with a CLIP, T5, BERT, or Gemma text encoder, which stays frozen. You can combine `pretrained` only with `length`,
    `pooling`, `layer`, `padding`, and `whiten`. Unset: a CLIP text encoder with the keys below, trained with the model."""
    pooling: Literal["mean"] | None = None
    """`mean`: the model gets one embedding per caption, the mean over the caption's tokens. Needs `pretrained`. Unset: the model
    gets one embedding per token."""
    layer: Literal["last", "penultimate"] | None = None
    """Layer that gives the embeddings: the last layer with the final norm, or the layer before. Needs `pretrained`. Unset:
    `penultimate` for `lumina` and for CLIP in a list of text encoders, else `last`."""
    padding: Padding | None = None
    """Padding of short captions. `seen`: the text encoder attends to it. `kept`: the text encoder masks it, but the backbone
    attends to its embeddings. `zero`: as `kept`, but these embeddings are zero. `masked`: the backbone masks it, too. Needs
    `pretrained`. Unset: `seen` for CLIP, and for T5 in a list of text encoders; `masked` for `lumina`, `sana`, and `prx`;
    `kept` for T5; else `zero`."""
    whiten: bool = False
    """Initializes the backbone's projection of captions so that the datasets' captions have mean zero and unit covariance. Needs
    `pooling`, and a new U-Net with `encoder_hid_dim_type: text_proj`."""
    length: int = Field(default=77, gt=1)
    """Maximum tokens of a caption; longer captions are truncated."""
    hidden_size: int = Field(default=256, gt=0)
    """Width of the text encoder's hidden states."""
    num_hidden_layers: int = Field(default=2, gt=0)
    """Number of the text encoder's layers."""
    num_attention_heads: int = Field(default=4, gt=0)
    """Number of attention heads; must divide hidden_size."""
    intermediate_size: int = Field(default=1024, gt=0)
    """Width of the feed-forward layers."""

    @model_validator(mode="after")
    def _fits(self) -> Text:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads: {self.num_attention_heads} doesn't divide hidden_size {self.hidden_size}")
        frozen = ("pooling", "layer", "padding")
        if self.pretrained and self.model_fields_set - {"pretrained", "length", "whiten", *frozen}:
            known = ", ".join(("pretrained", "length", "whiten", *frozen))
            raise ValueError(f"a pretrained encoder takes its shape from its folder. Set only {known}")
        for key in frozen:
            if getattr(self, key) and not self.pretrained:
                raise ValueError(f"{key} needs a pretrained encoder. Set pretrained, or remove {key}")
        return self

    @property
    def embeddings(self) -> int:
        """Returns the number of embeddings of a caption."""
        return 1 if self.pooling else self.length


def _form(value: object) -> str:
    return "list" if isinstance(value, list) else "one"


OneOrMore = Annotated[Annotated[Text, Tag("one")] | Annotated[list[Text], Tag("list")], Discriminator(_form)]


class Folder(Strict):
    pretrained: str
    """Folder of a frozen model."""


class Prompt(Strict):
    text: str = Field(min_length=1)
    """Prompt to generate images for after every evaluation."""
    label: str | None = None
    """Label that the classifier of `judge` should see in these images. Unset: images are generated, but not scored."""


class Samples(Strict):
    """Describes the images to generate after every evaluation, and the defaults of `heliostat model generate`."""

    prompts: list[Prompt] = []
    """Prompts to generate images for after every evaluation."""
    seed: int = Field(default=0, ge=0)
    """Random seed of the first image; each further image uses the next seed."""
    steps: int = Field(default=30, gt=0)
    """Number of sampling steps."""
    guidance: Float = Field(default=4.0, ge=0)
    """Classifier-free guidance scale: how strictly images follow the prompt; 1 turns guidance off."""
    guidance_interval: Interval = (0.0, 1.0)
    """Lowest and highest time with guidance, from 0 (image) to 1 (noise). Outside this interval, sampling takes half the time."""
    guidance_rescale: Float = Field(default=0.0, ge=0, le=1)
    """How much of the contrast that guidance adds to undo, from 0 to 1. The paper uses 0.7."""
    sampler: Sampler | None = None
    """Sampler. With prediction `flow`, only `euler` is supported. With other predictions, `euler` isn't supported. Unset: `euler`
    for `flow`, else `ddim`."""
    per_prompt: int = Field(default=4, gt=0)
    """Images per prompt."""
    judge: bool = False
    """Scores samples of labeled prompts with a classifier trained on the real images, see docs/diffusion.md#scores-and-samples"""
    held_out: str | None = Field(default=None, min_length=1)
    """Held-out dataset whose captions are the prompts, see docs/pictures.md#held-out-pictures. Unset: `prompts` are the
    prompts."""
    features: Features | None = None
    """Image model whose features FID, KID, precision, recall, density, coverage, and memorization use. Unset: these scores aren't
    computed, see docs/image-quality.md"""
    clip: ClipScore | None = None
    """CLIP model for the CLIP score and CMMD. Unset: these scores aren't computed, see docs/image-quality.md"""

    @model_validator(mode="after")
    def _one_source(self) -> Samples:
        own = ("prompts", "per_prompt", "judge", "features", "clip")
        if self.held_out and (unused := [key for key in own if getattr(self, key) != type(self).model_fields[key].default]):
            raise ValueError(f"held_out brings its own prompts and scores. Remove held_out, or remove {', '.join(unused)}")
        return self

    @property
    def draws(self) -> bool:
        """Returns whether the run generates images after every evaluation."""
        return bool(self.prompts or self.held_out)

    @property
    def guided(self) -> Guidance:
        """Returns the guidance as the sampler's argument."""
        return Guidance(self.guidance, self.guidance_interval, self.guidance_rescale)


class Model(Strict):
    backbone: Keys
    """`arch: unet`, `canvas`, `pixart`, `sd3`, `flux`, `lumina`, `sana`, or `prx` with the keys of that class in diffusers, or
    `pretrained: FOLDER`. If you don't set channels, sizes, and the text width, they follow from the data."""
    adapter: Adapter | None = None
    """Adapter to train on a pretrained backbone, which stays frozen (docs/adapters.md). Unset: all weights are trained."""
    text: OneOrMore = Text()
    """The text encoder, or a list of pretrained text encoders, which SD3, FLUX, and U-Nets with two CLIP encoders join."""
    autoencoder: Folder | None = None
    """Frozen autoencoder in whose latent space the model works. Unset: the model works on pixels."""
    patch: int = Field(default=1, gt=0)
    """Side of a patch in pixels: the model works on patches as channels (docs/pictures.md#patches). 1: no patches. Must be 1
    with an autoencoder."""
    orthogonal_filters: bool = False
    """Muon also optimizes the filters of hidden convolutions, as matrices with a row per output. Needs `train.optimizer.name:
    muon`."""
    objective: NoiseObjective = NoiseObjective()
    """Noise schedule, prediction target, and loss weights."""
    repa: Repa | None = None
    """Aligns hidden states with stored features of an image model, see docs/diffusion-algorithms.md#repa. Unset: no alignment."""
    tread: Tread | None = None
    """Lets some tokens skip blocks in training, see docs/diffusion-algorithms.md#tread. Unset: all tokens use all blocks."""
    captions: list[CaptionText] = []
    """Texts to choose from as the caption of an image, with weights. Unset: the column `caption`."""
    contrastive: Contrastive | None = None
    """Contrastive flow matching: pushes predictions away from those of another caption. Unset: off."""
    immiscible: Immiscible | None = None
    """Immiscible diffusion: pairs images with near noise. Unset: noise doesn't depend on the image."""
    caption_dropout: Float = Field(default=0.1, ge=0, lt=1)
    """Fraction of captions that are dropped in training, so that the model learns unconditional generation for guidance."""
    samples: Samples = Samples()
    """Samples to generate after every evaluation, and the defaults of `heliostat model generate`."""

    @property
    def texts(self) -> list[Text]:
        return self.text if isinstance(self.text, list) else [self.text]

    @property
    def frozen_text(self) -> bool:
        return bool(self.texts[0].pretrained)

    @model_validator(mode="after")
    def _several(self) -> Model:
        if isinstance(self.text, list) and not (1 <= len(self.text) <= 3 and all(text.pretrained for text in self.text)):
            raise ValueError("text: a list has one to three text encoders, each with pretrained. Use a mapping for one encoder")
        return self


def backbone_family(keys: Keys) -> tuple[str, Family]:
    """Returns the name and the family of `model.backbone`. Raises ConfigError for an unknown backbone, for keys that the class
    doesn't have, or for a configuration that heliostat doesn't train."""
    if "pretrained" in keys:
        kind = None if set(keys) - {"pretrained", SIZE} else folder_config(PRETRAINED, keys["pretrained"]).get("_class_name")
        known = named(kind)
        allowed = {"pretrained", *(() if known is None or SIZE in known[1].own({SIZE: 0}) else (SIZE,))}
        if extra := sorted(set(keys) - allowed):
            raise ConfigError(
                f"model.backbone.{extra[0]}: a pretrained backbone takes its configuration from its folder. Remove this key"
            )
        if known is None:
            raise ConfigError(f"{PRETRAINED}: {keys['pretrained']!r} contains a {kind!r}, which isn't a supported backbone")
        return known
    name = str(keys.get("arch"))
    if name not in FAMILIES:
        raise ConfigError(f"model.backbone.arch: {name!r} isn't a backbone{nearest(name, list(FAMILIES))}")
    attention_norms.require_supported(name, keys, FAMILIES[name].known)
    for key in keys:
        if key != "arch" and key not in FAMILIES[name].known:
            raise ConfigError(f"model.backbone.{key}: unknown key for arch {name!r}{nearest(key, FAMILIES[name].known)}")
    return name, FAMILIES[name]


def folder_config(key: str, folder: str) -> Keys:
    try:
        return CONFIG.read(Path(folder) / "config.json")
    except OSError as e:
        raise ConfigError(f"{key}: {folder!r} isn't a model folder (no readable config.json). {FOLDER_FIX}") from e
    except ConfigError as e:
        raise ConfigError(f"{key}: {e}") from e


def load_or_build(cls: Any, folder: str | Path) -> Any:
    """Loads a diffusers model in fp32 from a folder. Raises ConfigError if a weight is missing.

    Inside `weightless.building`, and on the meta device, builds the model without weights instead.
    """
    if weightless.wanted() or torch.get_default_device().type == "meta":
        model = cls.from_config(cls.load_config(folder))
        weightless.comes_from(model, folder)
        return model
    return whole_part(cls, folder, torch.float32)


def build_backbone(keys: Keys, defaults: dict[str, object]) -> Any:
    """Builds the backbone from `keys`, with `defaults` for missing keys. With the key `pretrained`, loads the backbone from its
    folder."""
    _, family = backbone_family(keys)
    if "pretrained" in keys:
        return load_or_build(family.cls, keys["pretrained"])
    config = family.own({**defaults, **keys})
    try:
        with partitioning.constructing():
            backbone = family.cls(**config)
    except (ValueError, TypeError, NotImplementedError, IndexError, KeyError, ZeroDivisionError, RuntimeError) as e:
        raise ConfigError(f"model.backbone: {brief(e)}") from e
    attention_norms.require_used(keys, backbone)
    family.initialize(backbone)
    return backbone


def build_text_encoder(text: Text, vocabulary: int, end: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=text.hidden_size,
        projection_dim=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        intermediate_size=text.intermediate_size,
        max_position_embeddings=text.length,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return from_config(CLIPTextModel, config)


def require_weights(key: str, folder: str) -> None:
    """Raises ConfigError unless the weights of a frozen model are safetensors files, because the model's digest doesn't cover
    `.bin` files."""
    if not any(Path(folder).glob("*.safetensors")) and not files.absent_weights(Path(folder)):
        raise ConfigError(f"{key}: {folder!r} has no safetensors weights. Save the model with save_pretrained")


def frozen_text_encoder(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    require_weights("model.text.pretrained", folder)
    kind = text_encoders.kind("model.text.pretrained", from_folder("model.text.pretrained", AutoConfig, folder))
    options = {"use_safetensors": True, "dtype": dtype, **encoder.without_pooler(kind)}
    model: Any = whole("model.text.pretrained", kind, folder, **options).eval().requires_grad_(False)
    model.config.use_cache = False  # decoders would keep keys and values to generate text
    return model


def frozen_bytes(config: Keys | str, dtype: torch.dtype) -> int:
    """Counts the bytes of a frozen autoencoder from its configuration, or of a frozen text encoder from its folder. Reads no
    weights."""
    with torch.device("meta"):
        if isinstance(config, dict):
            model: torch.nn.Module = frozen_autoencoders.kind("model.autoencoder.pretrained", config).from_config(config)
        else:
            model = text_encoders.build("model.text.pretrained", from_folder("model.text.pretrained", AutoConfig, config))
    return dtype.itemsize * sum(p.numel() for p in model.parameters())


def tokenizer_folder(folder: str) -> Path:
    """Finds the tokenizer of a frozen text encoder: in the encoder's folder, or next to it, as in the pipelines of diffusers
    (`text_encoder_2` and `tokenizer_2`)."""
    own = Path(folder)
    if any(own.glob("tokenizer*")):
        return own
    named = own.name.replace("text_encoder", "tokenizer")
    return own.parent / (named if named != own.name else "tokenizer")


def frozen_tokenizer(folder: str, length: int) -> PreTrainedTokenizerBase:
    tokenizer = from_folder("model.text.pretrained", AutoTokenizer, tokenizer_folder(folder))
    tokenizer.model_max_length = length
    tokenizer.padding_side = "right"  # decoders such as Gemma pad on the left to generate text
    return tokenizer


def text_config(folder: str) -> PreTrainedConfig:
    """Reads the configuration of a frozen text encoder. Raises ConfigError if the folder has none."""
    folder_config("model.text.pretrained", folder)
    with using(Path(folder)):
        config: PreTrainedConfig = from_folder("model.text.pretrained", AutoConfig, folder)
    return config


def frozen_autoencoder(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    require_weights("model.autoencoder.pretrained", folder)
    cls = frozen_autoencoders.kind("model.autoencoder.pretrained", folder_config("model.autoencoder.pretrained", folder))
    return whole_part(cls, folder, dtype, use_safetensors=True).eval().requires_grad_(False)


def tokenizer_digest(folder: str) -> str | None:
    """Computes a digest of those tokenizer files of a frozen text encoder that the folder's digest doesn't cover. Returns None if
    the digest of the folder covers all tokenizer files.

    The manifests of datasets record this digest next to the folder's digest.
    """
    place = tokenizer_folder(folder)
    suffixes = (*VOCABULARIES, *(() if place == Path(folder) else (".json",)))
    listed = {p.name: sha256(p) for p in place.iterdir() if p.suffix in suffixes} if place.is_dir() else {}
    return digest_of(listed) if listed else None
