"""Prepares the captions of a text-to-image job: loads the frozen encoders, tokenizes and embeds captions, and reads stored
embeddings. Checks that the text encoders fit the data.

heliostat loads frozen encoders at their first use, so ZeRO never shards frozen encoders.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedTokenizerBase

from heliostat.data.device_streams import HOST, Arrival
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.recipes.constants import Constant
from heliostat.recipes.images import config, diffusers_folder, rows, texts
from heliostat.recipes.images.backbones.family import Family
from heliostat.recipes.images.config import Model
from heliostat.recipes.images.pipeline import Encoded, encode, join, padding_of, tokenize, unpadded
from heliostat.recipes.images.stored_arrays import ArrayFormat
from heliostat.recipes.images.texts import FrozenText, TextShape
from heliostat.recipes.text import masks

LENGTHS = f"{HOST}lengths"  # in a batch: the lengths of captions, which stay on the host


class CaptionParts:
    def __init__(self, model: Model, family: Family, frozen_type: torch.dtype) -> None:
        """Prepares the encoders without weights. `frozen_type`: the dtype of the frozen encoders."""
        self.model, self.family, self.frozen_type = model, family, frozen_type
        self.sources: list[Manifest] = []
        self.facts: rows.DatasetFacts | None = None
        self._loaded: dict[str, Any] = {}  # frozen encoders by name
        self._places: dict[str, tuple[torch.device, Arrival]] = {}  # devices of the frozen encoders

    def match_texts(self) -> None:
        """Raises ConfigError unless the job's text encoders are those that computed the datasets' embeddings."""
        assert self.facts
        f, first = self.facts, self.frozen_texts[0] if self.frozen_texts else None
        if (digest := f.models.get("text")) and (first is None or config.folder_digest(first.folder) != digest):
            raise ConfigError(
                "model.text.pretrained: the datasets were prepared with another model. Set this key to the other model's folder"
            )
        if f.texts and not first:
            raise ConfigError("model.text: the datasets contain embeddings. Set model.text to the pretrained text encoders")
        if f.text and first and len(self.frozen_texts) > 1:
            raise ConfigError(
                "model.text: a list given, but the datasets contain the embeddings of one text encoder. Prepare the datasets "
                "again with latents.text_encoders"
            )
        if f.text and first and f.text != (first.shape.tokens, first.shape.width):
            key = "pooling" if 1 in (f.text[0], first.shape.tokens) else "length"
            raise ConfigError(
                f"model.text.{key}: captions have {first.shape.tokens} embeddings of width {first.shape.width}, but "
                f"{f.text[0]} of width {f.text[1]} in the datasets. Set this key as in the pipeline's latents.{key}"
            )
        if f.text and first:
            usual = {"layer": "last", "padding": padding_of(first.config.model_type)}
            for key, value in usual.items():
                if first.settings[key] != value:
                    raise ConfigError(
                        f"model.text.{key}: {first.settings[key]} here, but {value} in the datasets. Set this key to {value}, or "
                        f"prepare the datasets again with latents.text_encoders, which has the key {key}"
                    )
        if f.texts:
            self.stored  # noqa: B018 (raises ConfigError unless the datasets have the embeddings of all text encoders)

    @cached_property
    def stored(self) -> list[rows.StoredText]:
        """Returns the stored embeddings of each text encoder of the job, in the job's order; empty without a list of stored text
        encoders. Raises ConfigError if the datasets lack the embeddings of a text encoder."""
        assert self.facts
        by_digest, out = {one.digest: one for one in self.facts.texts}, []
        for part in self.frozen_texts if by_digest else []:
            one = by_digest.get(config.folder_digest(part.folder))
            if one is None:
                raise ConfigError(
                    f"{part.key}.pretrained: the datasets have no embeddings of this text encoder. Set this key to a folder of "
                    "the pipeline's latents.text_encoders, or prepare the datasets again"
                )
            wanted = {**part.settings, "tokens": part.shape.tokens}
            for key, value in {**one.settings, "tokens": one.tokens}.items():
                if wanted[key] != value:
                    name = "length" if key == "tokens" else key
                    raise ConfigError(
                        f"{part.key}.{name}: {wanted[key]} here, but {value} in the datasets. Set this key to {value}, or "
                        "prepare the datasets again"
                    )
            out.append(one)
        return out

    def widths(self) -> dict[str, int]:
        """Returns the backbone's keys for the widths of the text."""
        keys = self.family.widths(self.given())
        if not self.model.frozen_text:
            return dict.fromkeys(keys, self.model.texts[0].hidden_size)
        shape = self.text_shape
        return {key: shape.pooled or shape.width if key == self.family.pooled else shape.width for key in keys}

    @cached_property
    def frozen_texts(self) -> list[FrozenText]:
        return texts.frozen(self.model.texts, self.family)

    @property
    def text_shape(self) -> TextShape:
        """Returns the shape of the embeddings that the backbone gets for a caption.

        Without datasets, uses the backbone's key for the width if the job sets this key, because the encoder's folder may be
        missing.
        """
        if not self.model.frozen_text:
            return TextShape(self.model.texts[0].length, self.model.texts[0].hidden_size)
        width = self.given().get(self.family.widths(self.given())[0])
        if self.facts is None and width and len(self.frozen_texts) == 1:
            return TextShape(self.model.texts[0].embeddings, width)
        return self._joined

    @cached_property
    def _joined(self) -> TextShape:
        return texts.joined(self.frozen_texts, self.family)

    def given(self) -> config.Keys:
        """Returns the backbone's keys from the job, or the configuration in the pretrained backbone's folder."""
        keys = self.model.backbone
        return config.folder_config(config.PRETRAINED, keys["pretrained"]) | keys if "pretrained" in keys else keys

    @property
    def embedded(self) -> bool:
        """Returns whether the datasets contain embeddings of the captions."""
        assert self.facts
        return bool(self.facts.text or self.facts.texts)

    def frozen(self, name: str) -> Any:
        """Loads a frozen encoder (`vae`, `text_encoder`, `text_encoder_2`) at its first use, so that ZeRO never shards it."""
        if name not in self._loaded:
            if name == "vae":
                assert self.model.autoencoder
                self._loaded[name] = config.frozen_autoencoder(self.model.autoencoder.pretrained, self.frozen_type)
            else:
                (part,) = [part for part in self.frozen_texts if part.name == name]
                self._loaded[name] = config.frozen_text_encoder(part.folder, self.frozen_type)
        return self._loaded[name]

    def frozen_on(self, name: str, device: torch.device) -> Any:
        """Returns a frozen encoder on a device. Any CUDA stream may use the encoder."""
        model = self.frozen(name)
        if name not in self._places or self._places[name][0] != device:
            model.to(device)
            self._places[name] = device, Arrival(device)
        self._places[name][1].awaited()
        return model

    @cached_property
    def tokenizers(self) -> list[PreTrainedTokenizerBase]:
        """Returns the tokenizer of each text encoder."""
        if self.model.frozen_text:
            return [config.frozen_tokenizer(part.folder, part.text.length) for part in self.frozen_texts]
        assert self.facts
        definition = self.sources[0].file("tokenizer.json").read()
        return [diffusers_folder.tokenizer(definition, self.facts.end, self.model.texts[0].length)]

    def captions(self, content: pa.Table) -> dict[str, torch.Tensor]:
        """Reads the captions of rows: as stored embeddings (`text`, `pooled`), or as token ids with masks (`text`, `mask`). The
        names of a second text encoder end in `_2`."""
        if self.embedded:
            stored = self.stored_columns().items()
            return {name: form.unpack(content[column].to_pylist()) for name, (column, form) in stored}
        return self.tokens(content["caption"].to_pylist())

    def tokens(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Tokenizes captions for each text encoder."""
        out: dict[str, torch.Tensor] = {}
        for number, tokenizer in enumerate(self.tokenizers, start=1):
            suffix, tokens = f"_{number}" if number > 1 else "", tokenize(tokenizer, captions)
            out |= {f"text{suffix}": tokens.input_ids, f"mask{suffix}": tokens.attention_mask}
        return out

    def stored_columns(self) -> dict[str, tuple[str, ArrayFormat]]:
        """Returns the column and the format of each stored embedding, by its name in a batch."""
        assert self.facts
        if self.facts.text:
            return {"text": ("embedding", ArrayFormat(self.facts.text))}
        parts = zip(self.frozen_texts, self.stored, strict=True)
        return {f"{name}{part.suffix}": column for part, one in parts for name, column in one.columns.items()}

    @cached_property
    def empty(self) -> dict[str, torch.Tensor]:
        """Encodes the empty caption, as `captions` does."""
        assert self.facts
        if not self.embedded:
            return {name: values[0] for name, values in self.tokens([""]).items()}
        raw = np.frombuffer(self.sources[0].file("empty_caption.bin").read(), np.float16)
        forms = [("embedding", ArrayFormat(self.facts.text))] if self.facts.text else []
        forms += [column for one in self.facts.texts for column in one.columns.values()]
        starts = np.cumsum([0, *(math.prod(form.shape) for _, form in forms)])
        of = {name: raw[at : at + math.prod(form.shape)] for (name, form), at in zip(forms, starts, strict=False)}
        stored = self.stored_columns().items()
        return {name: torch.from_numpy(of[column].reshape(form.shape).copy()).float() for name, (column, form) in stored}

    def empty_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns the encoded empty caption (`empty`) on a device. Later calls return the same tensors."""
        return {name: constant.on(device) for name, constant in self._empty.items()}

    @cached_property
    def _empty(self) -> dict[str, Constant]:
        return {name: Constant(values) for name, values in self.empty.items()}

    @torch.no_grad()
    def conditioning(self, captions: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Prepares captions (`captions`) for the model. Returns `caption`: token ids if the model contains the text encoder, else
        embeddings. `pooled`: the pooled embeddings of several text encoders. `mask`: 0 for padding that the backbone ignores."""
        if not self.model.frozen_text:
            return {"caption": captions["text"]}
        encoded = []
        for part in self.frozen_texts:
            text = captions[f"text{part.suffix}"]
            if text.is_floating_point():
                encoded.append(Encoded(text, captions.get(f"pooled{part.suffix}")))
                continue
            with masks.unread(whole=True):
                encoder = self.frozen_on(part.name, text.device)
                encoded.append(encode(encoder, text, captions[f"mask{part.suffix}"], **part.settings))
        tokens, pooled = join(self.family.cls.__name__, encoded)
        out = {"caption": tokens} if pooled is None else {"caption": tokens, "pooled": pooled}
        if not isinstance(tokens, FakeTensor) and any(part.masked for part in self.frozen_texts):  # a plan counts all tokens
            out["mask"] = unpadded(tokens)
        return out

    @property
    def counted(self) -> bool:
        """Returns whether the backbone's class needs the captions' lengths on the host."""
        return self.family.counts and any(part.masked for part in self.frozen_texts)

    def lengths(self, captions: dict[str, torch.Tensor]) -> torch.Tensor:
        """Counts the tokens of captions (`captions`) of the only text encoder that the backbone doesn't ignore, int64 [n]."""
        text = captions["text"]
        counts = unpadded(text).sum(1) if text.is_floating_point() else captions["mask"].sum(1)
        return counts.clamp(max=self.frozen_texts[0].shape.tokens)

    @staticmethod
    def beside(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns the model's arguments besides the caption."""
        names = {"pooled": "pooled", "mask": "mask", "lengths": LENGTHS}
        return {name: batch[key] for name, key in names.items() if key in batch}


def presumed(part: FrozenText) -> rows.StoredText:
    """Describes the stored embeddings of a text encoder in a dataset that doesn't exist yet."""
    settings: dict[str, Any] = part.settings
    return rows.StoredText(f"presumed{part.suffix}", part.shape.tokens, part.shape.width, part.shape.pooled, **settings)
