"""Trains any causal language model that `transformers` can build on next-token prediction.

    recipe: heliostat.recipes:CausalLM
    model: {arch: llama, hidden_size: 256, ...}        # from a configuration: any key of that architecture's config class
    model: {pretrained: /models/llama-3-8b}            # from a folder in Hugging Face's format: weights and tokenizer must match

A sample is `data.sequence_length` consecutive tokens of a chunk, documents end to end. Every token but the first of a sample is
predicted; with `data.document_mask` attention and positions start anew at each document, and no document's first token is
predicted; architectures in which packed documents attend to each other all the same are refused (`packing`).

Held-out scores: loss (nats per token), perplexity, and bits per byte of the text that the tokens stand for.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers  # its names are imported when they are first used: a faulty job is found sooner
from pydantic import Field
from tokenizers import Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from heliostat.config.schema import Float, Strict, validate
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.recipes.batches import segments
from heliostat.recipes.huggingface import from_config
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.protocol import (
    IGNORED,
    Batch,
    Evaluates,
    Generated,
    Generates,
    Loss,
    Part,
    Recipe,
    Request,
    Serves,
    Serving,
)
from heliostat.recipes.text import attention, flops, model_config, packing, prompts, router_loss, token_bytes, vocabulary

transformers_logging.disable_progress_bar()


class CausalLM(Recipe, Evaluates, Generates, Serves):
    kind = "tokens"
    scores = ("loss", "perplexity", "bits_per_byte")

    def __init__(self, job: Job) -> None:
        if not job.data.sequence_length:
            raise ConfigError("data.sequence_length: is required for a language model")
        self.job, self.length = job, job.data.sequence_length
        self.checkpointing = job.train.activation_checkpointing
        self.document_mask = job.data.document_mask
        self.terms_per_sample = None if self.document_mask else self.length - 1
        self.pretrained = job.model.get("pretrained")
        self.config = model_config.from_folder(job.model) if self.pretrained else model_config.from_keys(job.model)
        self.router_weight = (router_loss.coefficient(self.config) or 0.0) if router_loss.wanted(self.config) else None
        self.unbalanced = job.model.get("output_router_logits") is False  # and said so
        self.vocabulary_given = bool(self.pretrained) or "vocab_size" in job.model
        _use_no_cache(self.config)
        short = self.length <= attention.LONGEST and self.config.model_type in attention.MODELS
        self.grouped = short and not job.workers.gpus
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest and 0 < longest < self.length:
            names = {"max_position_embeddings", self.config.attribute_map.get("max_position_embeddings")}
            if self.pretrained or names & set(job.model):
                raise ConfigError(
                    f"data.sequence_length: {self.length} is longer than the model's max_position_embeddings {longest}"
                )
            self.config.max_position_embeddings = self.length

    def probe(self) -> None:
        if self.document_mask:
            packing.require_apart(self)
        router_loss.probe(self, self.unbalanced)

    def bind(self, sources: list[Manifest]) -> None:
        tokenizers = {m.meta.get("tokenizer") for m in sources}
        if len(tokenizers) > 1:
            raise ConfigError("data.sources: the datasets were made with different tokenizers; prepare them with one")
        self.sources = sources
        size, self.end = sources[0].fact("vocab_size"), sources[0].fact("end_of_document")
        made = sources[0].file("tokenizer.json")
        try:
            self.tokenizer_json = made.read()
        except FileNotFoundError as e:
            raise DataError(f"{made}: is not there; prepare the dataset again") from e
        if hashlib.sha256(self.tokenizer_json).hexdigest() != sources[0].fact("tokenizer"):
            raise ConfigError(f"{made}: is not the tokenizer that made the dataset")
        if self.pretrained:
            self._check_tokenizer(Path(self.pretrained), sources[0])
        if self.vocabulary_given:
            if self.config.vocab_size < size:
                raise ConfigError(f"model.vocab_size: {self.config.vocab_size} is below the tokenizer's {size}")
        else:
            self.config.vocab_size = -(-size // 64) * 64  # a multiple that matrix units like
        if not self.pretrained:
            self.config.bos_token_id = self.config.eos_token_id = self.end
            self.config.pad_token_id = None

    def _check_tokenizer(self, folder: Path, source: Manifest) -> None:
        """Raises ConfigError if the model's tokens mean something else than the dataset's."""
        its = vocabulary.of_folder(folder)
        if its == self.tokenizer_json:
            return
        whose = f"model.pretrained: {str(folder)!r}"
        what = vocabulary.difference(self._raw_tokenizer, vocabulary.load(its, whose), self.end)
        if what:
            raise ConfigError(
                f"{whose} has another tokenizer than data.sources.0.path {str(source.location)!r} ({what}); prepare the dataset "
                f"with the model's own, `tokenizer: {{path: {folder}}}` in its pipeline's file"
            )

    def build(self) -> torch.nn.Module:
        if self.grouped:
            attention.register()
            self.config._attn_implementation = attention.NAME
        shapes_only = torch.get_default_device().type == "meta"
        if self.pretrained and not shapes_only:
            model = whole("model.pretrained", self.pretrained, config=self.config, dtype=torch.float32)
        else:
            model = from_config(transformers.AutoModelForCausalLM, self.config)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def load(self, folder: Path) -> torch.nn.Module:
        model = whole("model", folder)
        _use_no_cache(model.config)
        return model

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: np.ndarray, keys: np.ndarray | None = None) -> Batch:
        tokens = torch.from_numpy(np.ascontiguousarray(content)).long()
        labels = tokens.clone()
        labels[:, 0] = IGNORED
        batch = {"input_ids": tokens, "labels": labels}
        if self.document_mask:
            documents = segments(tokens, self.end)
            labels[documents.starts] = IGNORED
            batch["position_ids"] = documents.positions
        return batch

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        outputs = _outputs(model, batch)
        summed = SummedCrossEntropy.apply(*_flat(outputs, batch))
        if self.router_weight is None:
            return Loss(summed)
        return Loss(summed, {router_loss.NAME: Part(outputs.aux_loss, self.router_weight)})

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits, targets = _flat(_outputs(model, batch), batch)
        shape = batch["labels"].shape
        losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none").view(shape)
        targets = targets.view(shape)
        predicted = targets != IGNORED
        first = batch["input_ids"] == self.end  # the target opens a document
        size = self._token_bytes().to(targets.device)[first.long(), targets.clamp(min=0)]
        return {"nats": losses.sum(1), "tokens": predicted.sum(1).float(), "bytes": (size * predicted).sum(1).float()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["nats"] / sums["tokens"]
        perplexity = math.exp(min(loss, 700.0))
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": sums["nats"] / math.log(2) / max(1.0, sums["bytes"])}

    def flops_per_sample(self, model: Any) -> float:
        return flops.per_sample(model, self.config, self.length)

    def _token_bytes(self) -> torch.Tensor:
        """Counts the bytes of text behind each token, int64 [2, vocabulary]: inside a document, and as its first token."""
        if not hasattr(self, "_bytes"):
            self._bytes = torch.tensor(token_bytes.sizes(self._raw_tokenizer, self.config.vocab_size))
        return self._bytes

    # for people ------------------------------------------------------------------------------------------------------

    def describe(self, content: np.ndarray) -> str:
        return self._raw_tokenizer.decode(content[0].tolist(), skip_special_tokens=False)

    @cached_property
    def _raw_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer_json.decode())

    # the export ------------------------------------------------------------------------------------------------------

    def tokenizer(self) -> Any:
        raw = Tokenizer.from_str(self.tokenizer_json.decode())
        end = raw.id_to_token(self.end)
        fast = transformers.PreTrainedTokenizerFast
        return fast(tokenizer_object=raw, bos_token=end, eos_token=end, model_max_length=self.length)

    def save_config(self, folder: Path) -> None:
        config = type(self.config).from_dict(self.config.to_dict())
        config.use_cache = True
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)
        self._generation(config).save_pretrained(folder)
        if self.pretrained:
            from_folder("model.pretrained", transformers.AutoTokenizer, self.pretrained).save_pretrained(folder)
            (folder / "tokenizer.json").write_bytes(vocabulary.of_folder(Path(self.pretrained)))  # as it is, not as it is read
        else:
            self.tokenizer().save_pretrained(folder)

    def _generation(self, config: Any) -> Any:
        """Returns how the exported model generates by default, and where it stops: as the pretrained folder or its config
        says."""
        kind = transformers.GenerationConfig
        if self.pretrained and (Path(self.pretrained) / "generation_config.json").is_file():
            return kind.from_pretrained(self.pretrained)
        return kind.from_model_config(config)

    @cached_property
    def prompts(self) -> tuple[str, ...]:  # type: ignore[override]
        """Chooses the prompts that the exported model is shown with: the first words of held-out documents."""
        return tuple(prompts.of_held_out(self.job, self.sources, self._raw_tokenizer, self.end))

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        continued = TextGenerator(folder, {"max_tokens": 48})([Request(prompt, 0, None) for prompt in self.prompts])
        return [(answer.prompt, answer.facts["text"]) for answer in continued]

    @staticmethod
    def generator(folder: Path, options: dict[str, Any]) -> TextGenerator:
        return TextGenerator(folder, options)

    def serving(self) -> Serving:
        from mlflow.models import infer_signature

        params = {"max_tokens": 100, "temperature": 0.8, "top_p": 0.95, "seed": 0}
        example = list(self.prompts[:1])
        return Serving(Path(__file__).with_name("server.py"), example, infer_signature(example, ["text"], params))


def _use_no_cache(config: Any) -> None:
    """Switches off the key-value cache, which `generate` wants and an export's configuration asks for: with it, packed documents
    would attend to each other."""
    config.use_cache = config.get_text_config(decoder=True).use_cache = False


def _outputs(model: torch.nn.Module, batch: Batch) -> Any:
    return model(**{k: v for k, v in batch.items() if k != "labels"})


def _flat(outputs: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Flattens logits to [tokens, vocabulary] and pairs each with the next token, or IGNORED at a sample's end. The logits are
    not sliced: that would copy them, forwards and backwards."""
    return outputs.logits.flatten(0, 1), F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].flatten()


class SummedCrossEntropy(torch.autograd.Function):
    """Computes F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum") in much less memory.

    The gradient is computed with the loss, a block of rows at a time, so no fp32 copy of the logits ever exists as a whole: at
    8,192 tokens and a vocabulary of 128,256 that is 8 GB less. On a CPU it is as fast as torch's own.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        rows = max(1, (1 << 20 if logits.device.type == "cpu" else 1 << 26) // logits.shape[1])
        for block, goal, out in zip(logits.split(rows), targets.split(rows), gradient.split(rows), strict=True):
            counted = goal != IGNORED
            at = goal.clamp(min=0).unsqueeze(1)
            scores = torch.log_softmax(block, dim=1, dtype=torch.float32)
            total -= (scores.gather(1, at).squeeze(1) * counted).sum()
            scores.exp_().scatter_add_(1, at, scores.new_full((), -1.0).expand_as(at))
            out.copy_(scores.mul_(counted.unsqueeze(1)))
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0]), None


def whole(key: str, folder: str | Path, **options: Any) -> Any:
    """Loads the model in a folder; ConfigError if a weight is missing, which transformers would initialise at random."""
    model, told = from_folder(key, transformers.AutoModelForCausalLM, folder, output_loading_info=True, **options)
    if absent := sorted(set(told["missing_keys"]) - set(model.all_tied_weights_keys)):
        raise ConfigError(f"{folder}: lacks {len(absent)} of the model's weights, as {absent[0]}; is the folder whole?")
    return model


class Sampling(Strict):
    """Describes how text is generated; temperature 0 takes the likeliest token each time."""

    max_tokens: int = Field(100, ge=1)
    temperature: Float = Field(0.8, ge=0)
    top_p: Float = Field(0.95, gt=0, le=1)


class TextGenerator:
    """Continues prompts with an exported model."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.sampling = validate(Sampling, options, "generate")
        self.tokenizer = from_folder("model", transformers.AutoTokenizer, folder)
        model = whole("model", folder)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, requests: list[Request]) -> list[Generated]:
        from heliostat.recipes.text.server import continue_text

        out = []
        for request in requests:
            text = continue_text(self.model, self.tokenizer, request.prompt, **self.sampling.model_dump(), seed=request.seed)
            out.append(Generated(request.prompt, request.prompt + text, {"text": text}))
        return out
