"""Trains any causal language model that `transformers` can build on next-token prediction.

    recipe: heliostat.recipes:CausalLM
    model: {arch: llama, hidden_size: 256, ...}        # from a configuration: any key of that architecture's config class
    model: {..., init: {zero_output_projections: true}}   # other initial weights than the architecture's
    model: {pretrained: /models/llama-3-8b}            # from a folder in Hugging Face's format: weights and tokenizer must match
    model: {pretrained: ..., adapter: {rank: 16}}      # trains only an adapter (`recipes.adapters`)

A sample is `data.sequence_length` consecutive tokens of a row group, with documents packed end to end. The model predicts every
token except the first of a sample. With `data.document_mask`, attention and positions restart at each document, and no document's
first token is predicted. heliostat rejects architectures whose packed documents attend to each other in spite of that
(`packing`).

Held-out scores: loss (nats per token), perplexity, and bits per byte of the tokens' text.
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from tokenizers import Tokenizer

from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError
from heliostat.parallel import language_model
from heliostat.recipes import adapters, tokenizing
from heliostat.recipes.protocol import (
    Batch,
    CutsSamples,
    DividesExperts,
    DividesMatrices,
    Evaluates,
    Generates,
    Loss,
    Recipe,
    Request,
    Serves,
    Serving,
)
from heliostat.recipes.text import expert_keys, initial, plain_keys
from heliostat.recipes.text.adapted import AdaptedText

if TYPE_CHECKING:  # importing torch and transformers takes three seconds, and most jobs are checked without them
    import torch
    import torch.distributed as dist
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from heliostat.recipes.constants import Constant
    from heliostat.recipes.text.exporting import ExportedChat
    from heliostat.recipes.text.generator import TextGenerator
BUILT_IN = {"CausalLM": ("transformers",)}
SHOWN: dict[str, object] = {
    "max_tokens": 96,
    "temperature": 0.5,
    "chat": False,
}  # to show a finished run: a small model needs likely tokens


class CausalLM(AdaptedText, Recipe, Evaluates, CutsSamples, DividesExperts, DividesMatrices, Generates, Serves):
    kind = "tokens"
    language_model = True
    tiles = selects = chooses = True
    scores = ("loss", "perplexity", "bits_per_byte")

    def __init__(self, job: Job) -> None:
        self.job, self.length = job, self.sample_length(job)
        self.checkpointing, self.offload = job.train.activation_checkpointing, job.train.activation_offload
        self.document_mask, self.tiled, self.tiled_mlp = job.data.document_mask, job.train.tiled_loss, job.train.tiled_mlp
        self.attention: str | None = job.train.attention
        self.fp8 = job.train.fp8
        self.end = -1  # the token that ends documents; -1 until the datasets are known
        self.tile: int | None = None  # tokens per tile of an MLP, for trials that need small tiles
        self.terms_per_sample = None if self.document_mask else self.length - 1
        self.pretrained = job.model.get("pretrained")
        self.unbalanced = job.model.get("output_router_logits") is False  # the job turns off the router's loss explicitly
        self.vocabulary_given = bool(self.pretrained) or "vocab_size" in job.model
        self.adapter = adapters.read(job.model, self.pretrained)
        self.init = initial.read(job.model)
        self._bound: dict[str, object] = {}  # keys of the configuration that the datasets determine
        self.experts = expert_keys.read(job.model)
        self.balances = self.experts.router_bias_update_rate > 0
        self.plain = plain_keys.read(job.model)
        if self.plain is None:
            self.routes = bool(language_model.number(self.config))
            weight = expert_keys.router_loss_weight(self.config) or 0.0
            self.router_weight = weight if expert_keys.asks_router_loss(self.config) else None
            return
        self.routes, self.router_weight = False, None
        self._require_positions(self.plain.max_position_embeddings)

    def sample_length(self, job: Job) -> int:
        """Returns the tokens per sample. Raises ConfigError if the job doesn't set this number."""
        if not job.data.sequence_length:
            raise ConfigError(
                "data.sequence_length: required for a language model. Set this key to the number of tokens per sample"
            )
        return job.data.sequence_length

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Makes the model's configuration, which needs transformers. Raises ConfigError for invalid keys."""
        from heliostat.recipes.text import model_config

        config = model_config.from_folder(self.job.model) if self.pretrained else model_config.from_keys(self.job.model)
        _use_no_cache(config)
        config._experts_implementation = self.experts.experts_implementation
        longest = getattr(config, "max_position_embeddings", None)
        names = {"max_position_embeddings", config.attribute_map.get("max_position_embeddings")}
        if self.pretrained or names & set(self.job.model):
            self._require_positions(longest)
        elif longest and 0 < longest < self.length:
            config.max_position_embeddings = self.length
        for name, value in self._bound.items():
            setattr(config, name, value)
        return config

    def _require_positions(self, longest: int | None) -> None:
        """Raises ConfigError if samples are longer than the model's maximum."""
        if longest and 0 < longest < self.length:
            raise ConfigError(
                f"data.sequence_length: {self.length} is above the model's max_position_embeddings. Use at most {longest}"
            )

    def plainly(self) -> CausalLM:
        """Returns a copy of the recipe that uses only CPU reference implementations instead of GPU kernels. Tests of small models
        and `heliostat check --numerics` use this copy."""
        from heliostat.recipes.text import attention

        plain_recipe = copy.copy(self)
        plain_recipe.attention, plain_recipe.fp8 = attention.twin(self.attention), False
        return plain_recipe

    def small(self, config: PreTrainedConfig, length: int, end: int) -> CausalLM:
        """Returns a copy of the recipe for a test with a small model: with another configuration, initial weights, and samples of
        `length` tokens."""
        small_recipe = self.plainly()
        small_recipe.config, small_recipe.length, small_recipe.end = config, length, end
        small_recipe.pretrained = small_recipe.adapter = None
        return small_recipe

    def probe(self) -> None:
        from heliostat.recipes.text import probing

        probing.probe(self)

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        from heliostat.recipes.text import checkpointing

        return [*checkpointing.layers(model)]

    def require_cut(self, parts: int) -> None:
        from heliostat.parallel import cutting

        cutting.require(self, parts)

    def require_divided(self, parts: int) -> None:
        from heliostat.recipes.text import expert_keys

        expert_keys.require_divided(self, parts)

    def require_matrices_divided(self, parts: int) -> None:
        from heliostat.parallel import divided_matrices

        divided_matrices.require(self, parts)

    def bind(self, sources: list[Manifest]) -> None:
        self.sources, self.tokenizer_json = sources, tokenizing.definition(sources)
        size, self.end = sources[0].fact("vocab_size"), sources[0].fact("end_of_document")
        if self.pretrained:
            from heliostat.recipes.text import vocabulary

            vocabulary.require_same(Path(self.pretrained), sources[0], self.tokenizer_json)
        if self.vocabulary_given:
            vocab_size = (self.plain or self.config).vocab_size
            if vocab_size < size:
                raise ConfigError(f"model.vocab_size: {vocab_size} is below the tokenizer's size. Use at least {size}")
        else:
            self._bind(vocab_size=-(-size // 64) * 64)  # matrix units are fast with multiples of 64
        if not self.pretrained:
            self._bind(bos_token_id=self.end, eos_token_id=self.end, pad_token_id=None)

    def assumed(self) -> str:
        if self.vocabulary_given:
            return ""
        return (
            f"until the dataset is prepared, heliostat assumes the model's default vocabulary of {self.config.vocab_size:,} "
            "tokens. To change this size, set model.vocab_size"
        )

    def _bind(self, **values: int | None) -> None:
        """Sets keys of the configuration. If the configuration doesn't exist yet, sets these keys as soon as it exists."""
        self._bound |= values
        if "config" in vars(self):
            for name, value in values.items():
                setattr(self.config, name, value)

    def build(self) -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM

        from heliostat.recipes import weightless
        from heliostat.recipes.pretrained import from_config
        from heliostat.recipes.text import attention, checkpointing, float8, generator, tiled_mlp

        shapes_only = torch.get_default_device().type == "meta"
        config = attention.chosen(self.config, self.attention, shapes_only)
        if self.pretrained and not shapes_only and not weightless.wanted():
            model = generator.whole("model.pretrained", self.pretrained, config=config, dtype=torch.float32)
        else:
            model = from_config(AutoModelForCausalLM, config)
            if self.pretrained:
                weightless.comes_from(model, self.pretrained)
            initial.apply(self.init, model, self.config.model_type)
        if self.checkpointing:
            checkpointing.use(model, self.checkpointing, self.offload)
        if self.fp8 and not shapes_only:
            float8.use(model)
        if self.tiled_mlp:
            tiled_mlp.use(model, self.tile)
        if self.adapter:
            adapters.add(self.adapter, model, self.job.train.seed, self.job.train.precision)
        return model.train()

    def load(self, folder: Path) -> PreTrainedModel:
        from heliostat.recipes.text import generator

        model = generator.whole("model", folder)
        _use_no_cache(model.config)
        return model

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: np.ndarray, keys: np.ndarray | None = None) -> Batch:
        from heliostat.recipes.text import next_token

        return next_token.batch(content, self.end if self.document_mask else None)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        from heliostat.recipes.text import next_token

        counted = self.routes and not self.job.train.compile  # torch.compile would trace the hooks
        routing = next_token.Routing(self.router_weight, self.experts.router_z_loss_coef, counted)
        return next_token.loss(model, batch, routing, self.tiled)

    def balance(self, model: torch.nn.Module, routed: torch.Tensor) -> None:
        from heliostat.parallel import experts

        experts.balance(model, routed, self.experts.router_bias_update_rate)

    def exact(self, model: torch.nn.Module) -> list[str]:
        from heliostat.parallel import experts

        return [name for name, _ in experts.biases(model)] if self.routes else []

    def terms(self, batch: Batch) -> int:
        from heliostat.recipes.text import next_token

        return next_token.terms(batch)

    def cut(self, batch: Batch, part: int, parts: int) -> Batch:
        from heliostat.recipes.text import next_token

        return next_token.cut(batch, part, parts)

    def exchange(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        from heliostat.parallel import sequence_attention

        sequence_attention.use(cast("PreTrainedModel", model), group, self.job.train.micro_batch_size, self.document_mask)

    def stacked_experts(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        from heliostat.parallel import experts

        return [*experts.layers(model)]

    def sent(self, model: torch.nn.Module) -> int:
        rows = self.length * (language_model.chosen(self.config) or 0) * len(self.stacked_experts(model))
        return 2 * rows * self.config.get_text_config(decoder=True).hidden_size if rows else 0

    def exchange_tokens(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        from heliostat.parallel import divided_experts

        divided_experts.use(model, group)

    def divided_matrices(self, model: torch.nn.Module) -> dict[str, str]:
        from heliostat.parallel import divided_matrices

        return dict(divided_matrices.of(cast("PreTrainedModel", model)))

    def exchanged(self, parts: int) -> int:
        from heliostat.parallel import sequence_attention

        return sequence_attention.exchanged(self.config, self.length, parts)

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        from heliostat.recipes.text import next_token

        return next_token.evaluate(model, batch, self.end, self._sizes.on(batch["input_ids"].device), self.tiled)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["nats"] / sums["tokens"]
        perplexity = math.exp(min(loss, 700.0))
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": sums["nats"] / math.log(2) / max(1.0, sums["bytes"])}

    def active_parameters(self, model: torch.nn.Module) -> int | None:
        from heliostat.recipes.text import flops

        return flops.active(model, self.config) if self.routes else None

    def flops_per_sample(self, model: torch.nn.Module) -> float:
        from heliostat.recipes.text import flops

        return flops.per_sample(model, self.config, self.length)

    @cached_property
    def _sizes(self) -> Constant:
        from heliostat.recipes.constants import Constant

        return Constant(self._token_bytes)

    @cached_property
    def _token_bytes(self) -> torch.Tensor:
        """Counts the bytes of each token's text, int64 [2, vocabulary]: for a token inside a document, and for a document's first
        token."""
        import torch

        from heliostat.recipes.text import vocabulary

        return torch.tensor(vocabulary.sizes(self.raw_tokenizer, self.config.vocab_size))

    # for people ------------------------------------------------------------------------------------------------------

    def describe(self, content: np.ndarray) -> str:
        return self.raw_tokenizer.decode(content[0].tolist(), skip_special_tokens=False)

    @cached_property
    def raw_tokenizer(self) -> Tokenizer:
        return Tokenizer.from_str(self.tokenizer_json.decode())

    # the export ------------------------------------------------------------------------------------------------------

    def tokenizer(self) -> PreTrainedTokenizerFast:
        from transformers import PreTrainedTokenizerFast

        raw = Tokenizer.from_str(self.tokenizer_json.decode())
        end = raw.id_to_token(self.end)
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end, model_max_length=self.length)

    def save_config(self, folder: Path) -> None:
        from heliostat.recipes.text import exporting

        precision = self.job.train.precision
        exporting.write(folder, self.config, self.pretrained, self.tokenizer, self.sources, precision, self.chat())

    def chat(self) -> ExportedChat | None:
        """Returns the chat template and the end tokens of the export. None if the export keeps those of the model."""
        return None

    @cached_property
    def prompts(self) -> tuple[str, ...]:  # type: ignore[override]
        """Chooses prompts to demonstrate the exported model: the first words of held-out documents."""
        from heliostat.recipes.text import exporting

        return tuple(exporting.of_held_out(self.job, self.sources, self.raw_tokenizer, self.end))

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        continued = self.generator(folder, SHOWN)([Request(prompt, 0, None) for prompt in self.prompts])
        return [(answer.prompt, str(answer.facts["text"])) for answer in continued]

    @staticmethod
    def generator(folder: Path, options: dict[str, object]) -> TextGenerator:
        from heliostat.recipes.text.generator import TextGenerator

        return TextGenerator(folder, options)

    def serving(self) -> Serving:
        from mlflow.models import infer_signature

        params = {"max_tokens": 100, "temperature": 0.8, "top_p": 0.95, "seed": 0}
        example = list(self.prompts[:1])
        return Serving(Path(__file__).with_name("server.py"), example, infer_signature(example, ["text"], params))


def _use_no_cache(config: PreTrainedConfig) -> None:
    """Switches off the key-value cache, because the cache would let packed documents attend to each other. `generate`, and the
    configuration of an export, turn the cache on."""
    config.use_cache = config.get_text_config(decoder=True).use_cache = False
