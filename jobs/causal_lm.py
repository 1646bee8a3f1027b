"""Next-token prediction with any causal language model that `transformers` can build.

    recipe: jobs.causal_lm:CausalLM
    model: {arch: llama, hidden_size: 256, ...}        # from a configuration: any key of that architecture's config class
    model: {pretrained: /models/llama-3-8b}            # from a folder in Hugging Face's format: weights and tokenizer must match

A sample is `data.sequence_length` consecutive tokens of a chunk, documents end to end. Every token but the first of a sample
is predicted; with `data.document_mask` attention and positions start anew at each document, and no document's first token is
predicted. Held-out scores: loss (nats per token), perplexity, and bits per byte of the text that the tokens stand for.
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
from heliostat import exports
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.recipe import Batch, Generated, Request, Serving
from heliostat.schema import Float, Strict, nearest, validate
from heliostat.spec import Job, divisors
from heliostat.text import brief
from pydantic import Field
from tokenizers import Tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from jobs import attention

IGNORED = -100
transformers_logging.disable_progress_bar()
BLIND = ("opt", "bloom", "mpt")  # their attention knows no position_ids, so it would see across documents
PROMPTS = ("def ", "import ")


class CausalLM:
    kind = "tokens"
    terms_per_sample: int | None
    scores = ("loss", "perplexity", "bits_per_byte")
    layout = {"": "model"}

    def __init__(self, job: Job) -> None:
        if not job.data.sequence_length:
            raise ConfigError("data.sequence_length: is required for a language model")
        self.length = job.data.sequence_length
        self.checkpointing = job.train.activation_checkpointing
        self.document_mask = job.data.document_mask
        self.terms_per_sample = None if self.document_mask else self.length - 1
        self.pretrained = job.model.get("pretrained")
        self.config = _pretrained_config(job.model) if self.pretrained else _config(job.model)
        if self.document_mask and (self.config.model_type in BLIND or not hasattr(self.config, "num_attention_heads")):
            raise ConfigError(
                f"data.document_mask: {self.config.model_type!r} cannot keep packed documents apart; set it to false"
            )
        self.vocabulary_given = bool(self.pretrained) or "vocab_size" in job.model
        self.config.use_cache = False
        short = self.length <= attention.LONGEST and self.config.model_type in attention.MODELS
        self.grouped = short and not job.workers.gpus
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest and longest < self.length:
            names = {"max_position_embeddings", self.config.attribute_map.get("max_position_embeddings")}
            if self.pretrained or names & set(job.model):
                raise ConfigError(
                    f"data.sequence_length: {self.length} is longer than the model's max_position_embeddings {longest}"
                )
            self.config.max_position_embeddings = self.length

    def bind(self, sources: list[Manifest]) -> None:
        tokenizers = {m.meta.get("tokenizer") for m in sources}
        if len(tokenizers) > 1:
            raise ConfigError("data.sources: the datasets were made with different tokenizers; prepare them with one")
        vocabulary, self.end = sources[0].fact("vocab_size"), sources[0].fact("end_of_document")
        try:
            self.tokenizer_json = sources[0].location.join("tokenizer.json").read()
        except FileNotFoundError as e:
            raise DataError(f"{sources[0].location}: has no tokenizer.json; prepare the dataset again") from e
        if hashlib.sha256(self.tokenizer_json).hexdigest() != sources[0].fact("tokenizer"):
            raise ConfigError(f"{sources[0].location.join('tokenizer.json')}: is not the tokenizer that made the dataset")
        if self.vocabulary_given:
            if self.config.vocab_size < vocabulary:
                raise ConfigError(f"model.vocab_size: {self.config.vocab_size} is below the tokenizer's {vocabulary}")
        else:
            self.config.vocab_size = -(-vocabulary // 64) * 64  # a multiple that matrix units like
        if not self.pretrained:
            self.config.bos_token_id = self.config.eos_token_id = self.end
            self.config.pad_token_id = None

    def build(self) -> torch.nn.Module:
        from transformers.initialization import no_init_weights
        from transformers.integrations import is_deepspeed_zero3_enabled

        if self.grouped:
            attention.register()
            self.config._attn_implementation = attention.NAME
        shapes_only = torch.get_default_device().type == "meta"
        if self.pretrained and not shapes_only:
            model = whole(self.pretrained, config=self.config, dtype=torch.float32)
        elif is_deepspeed_zero3_enabled():
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        else:
            # as at ZeRO-3: constructors draw no random numbers, so that every stage starts alike
            with no_init_weights():
                model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
            model.init_weights()
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    def load(self, folder: Path) -> torch.nn.Module:
        return whole(folder)

    # training --------------------------------------------------------------------------------------------------------

    def batch(self, content: np.ndarray, keys: np.ndarray | None = None) -> Batch:
        tokens = torch.from_numpy(np.ascontiguousarray(content)).long()
        labels = tokens.clone()
        labels[:, 0] = IGNORED
        batch = {"input_ids": tokens, "labels": labels}
        if self.document_mask:
            starts = torch.zeros_like(tokens, dtype=torch.bool)
            starts[:, 1:] = tokens[:, :-1] == self.end
            labels[starts] = IGNORED
            place = torch.arange(self.length)
            batch["position_ids"] = place - torch.where(starts, place, 0).cummax(dim=1).values
        return batch

    def terms(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return SummedCrossEntropy.apply(*_logits(model, batch))

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits, targets = _logits(model, batch)
        shape = batch["labels"].shape
        losses = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="none").view(shape)
        targets = targets.view(shape)
        predicted = targets != IGNORED
        size = self._token_bytes().to(targets.device)[targets.clamp(min=0)]
        return {"nats": losses.sum(1), "tokens": predicted.sum(1).float(), "bytes": (size * predicted).sum(1).float()}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["nats"] / sums["tokens"]
        perplexity = math.exp(min(loss, 700.0))
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": sums["nats"] / math.log(2) / max(1.0, sums["bytes"])}

    def gallery(self) -> None:
        return None

    def flops_per_sample(self, model: Any) -> float:
        """6 per weight and token (Kaplan et al. 2020, arXiv 2001.08361) plus attention's 12 layers x width x length per token."""
        embeddings = model.get_input_embeddings().weight
        tied = self.config.tie_word_embeddings
        numel = sum(_numel(p) for p in model.parameters()) - (0 if tied else _numel(embeddings))
        attention = 12 * self.config.num_hidden_layers * self.config.hidden_size * self.length
        return float(self.length * (6 * numel + attention))

    def _token_bytes(self) -> torch.Tensor:
        """Bytes of text behind each token, int64 [vocabulary]; special tokens stand for none."""
        if not hasattr(self, "_bytes"):
            tokenizer = self._raw_tokenizer
            special = {i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
            byte_level = "ByteLevel" in type(tokenizer.decoder).__name__  # then a character of a token is a byte of the text
            sizes = [0] * self.config.vocab_size
            for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
                if i not in special and i < len(sizes):
                    sizes[i] = len(token) if byte_level else len(tokenizer.decode([i]).encode())
            self._bytes = torch.tensor(sizes)
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
            transformers.AutoTokenizer.from_pretrained(self.pretrained).save_pretrained(folder)
        else:
            self.tokenizer().save_pretrained(folder)

    def _generation(self, config: Any) -> Any:
        """How the model writes unless it is told otherwise, and where it stops: as the pretrained folder or its config says."""
        kind = transformers.GenerationConfig
        if self.pretrained and (Path(self.pretrained) / "generation_config.json").is_file():
            return kind.from_pretrained(self.pretrained)
        return kind.from_model_config(config)

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        continued = TextGenerator(folder, {"max_tokens": 48})([Request(prompt, 0, None) for prompt in PROMPTS])
        return [(answer.prompt, answer.facts["text"]) for answer in continued]

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
        return {"pretrained": str(folder)}

    @staticmethod
    def generator(folder: Path, options: dict[str, Any]) -> TextGenerator:
        return TextGenerator(folder, options)

    def serving(self) -> Serving:
        from mlflow.models import infer_signature

        params = {"max_tokens": 100, "temperature": 0.8, "top_p": 0.95, "seed": 0}
        prompts = list(PROMPTS[:1])
        return Serving(Path(__file__).with_name("text_server.py"), prompts, infer_signature(prompts, ["text"], params))


def _logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [tokens, vocabulary] and, for each, the next token, or IGNORED at a sample's end. The logits are not sliced: that
    would copy them, forwards and backwards."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return logits.flatten(0, 1), F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].flatten()


class SummedCrossEntropy(torch.autograd.Function):
    """F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum"), in much less memory.

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


def _numel(parameter: torch.Tensor) -> int:
    return getattr(parameter, "ds_numel", None) or parameter.numel()


def _config(model: dict[str, Any]) -> Any:
    keys = {k: v for k, v in model.items() if k != "arch"}
    arch = str(model.get("arch"))
    if arch not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = nearest(arch, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)) or "; for example: llama, gpt2, qwen3"
        raise ConfigError(f"model.arch: {arch!r} is no causal language model of transformers{near}")
    kind = transformers.CONFIG_MAPPING[arch]
    act = keys.get("hidden_act", keys.get("activation_function"))
    if isinstance(act, str):
        _check_activation(act)
    known = {*kind.__dataclass_fields__, *kind.attribute_map}
    for key in keys:
        if key not in known:
            near = nearest(key, sorted(known))
            raise ConfigError(f"model.{key}: unknown key for arch {arch!r}{near}")
    try:
        _check_heads(kind, keys)
        config = kind(**keys)
        for size in ("hidden_size", "num_hidden_layers"):
            if getattr(config, size, 1) < 1:
                raise ConfigError(f"model.{size}: {getattr(config, size)} must be at least 1")
        heads, groups = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    except ConfigError:
        raise
    except Exception as e:  # transformers raises its own errors for values; the last line is the one that says what is wrong
        raise ConfigError(f"model: {brief((str(e).splitlines() or [type(e).__name__])[-1])}") from e
    if heads and groups and heads % groups:
        raise ConfigError(
            f"model.num_key_value_heads: {groups} does not divide num_attention_heads {heads}; {_divisor(heads, groups)}"
        )
    return config


def _check_activation(name: str) -> None:
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"model.hidden_act: {name!r} is no activation{nearest(name, list(ACT2FN))}")


def _check_heads(kind: Any, keys: dict[str, Any]) -> None:
    """ConfigError if the heads must divide the width and do not; an own head size, or defaults that do not, lift the rule."""
    field, default = kind.__dataclass_fields__.get("head_dim"), kind()
    if "head_dim" in keys or isinstance(getattr(field, "default", None), int):
        return
    usual: list[Any] = [getattr(default, name, None) for name in ("hidden_size", "num_attention_heads")]
    names = [(name, kind.attribute_map.get(name, name)) for name in ("hidden_size", "num_attention_heads")]
    width, heads = [next((keys[n] for n in both if n in keys), u) for both, u in zip(names, usual, strict=True)]
    if all(type(n) is int and n > 0 for n in (*usual, width, heads)) and usual[0] % usual[1] == 0 and width % heads:
        raise ConfigError(f"model.{names[1][1]}: {heads} does not divide {names[0][1]} {width}; {_divisor(width, heads)}")


def _divisor(number: int, near: int) -> str:
    return f"nearest that does: {min(divisors(number), key=lambda d: abs(d - near))}"


def _pretrained_config(model: dict[str, Any]) -> Any:
    extra = sorted(set(model) - {"pretrained"})
    if extra:
        raise ConfigError(f"model.{extra[0]}: a pretrained model takes its configuration from the folder; remove this key")
    folder = Path(model["pretrained"])
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.pretrained: {str(folder)!r} is not a model folder (no config.json)")
    with exports.using(folder):
        config = transformers.AutoConfig.from_pretrained(folder)
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(f"model.pretrained: {str(folder)!r} holds a {config.model_type!r}, which is no causal language model")
    return config


def whole(folder: str | Path, **options: Any) -> Any:
    """The model in a folder; ConfigError if a weight is missing, for which transformers would take random numbers."""
    kind: Any = transformers.AutoModelForCausalLM
    model, told = kind.from_pretrained(folder, output_loading_info=True, **options)
    if absent := sorted(set(told["missing_keys"]) - set(model.all_tied_weights_keys)):
        raise ConfigError(f"{folder}: lacks {len(absent)} of the model's weights, as {absent[0]}; is the folder whole?")
    return model


class Sampling(Strict):
    """How text is generated; temperature 0 takes the likeliest token each time."""

    max_tokens: int = Field(100, ge=1)
    temperature: Float = Field(0.8, ge=0)
    top_p: Float = Field(0.95, gt=0, le=1)


class TextGenerator:
    """Continues prompts with an exported model."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.sampling = validate(Sampling, options, "generate")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model = whole(folder)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, requests: list[Request]) -> list[Generated]:
        from jobs.text_server import continue_text

        out = []
        for request in requests:
            text = continue_text(self.model, self.tokenizer, request.prompt, **self.sampling.model_dump(), seed=request.seed)
            out.append(Generated(request.prompt, request.prompt + text, {"text": text}))
        return out
