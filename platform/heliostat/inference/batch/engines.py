"""Continues, scores, embeds, or classifies batches of texts with a model's folder.

An answer depends only on the text, its seed, and the options. The other inputs in the batch change only the order of
floating-point sums, because the random noise comes from each input's own seed. Prompts of different lengths share a batch only if
padding doesn't change the model's logits (`pads_hold` tests this).

- continue, chat: the answer is sampled as `heliostat.inference.sampling` describes.
- score: the sum of the negative log-likelihoods of all tokens, in nats. A beginning-of-document token precedes the first token.
- embed: the mean of the tokens' last hidden states, normalized to length 1. An embedder uses the pooling that its folder sets
  (`heliostat.recipes.text.sentence_folder`).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from heliostat.errors import ConfigError, HeliostatError
from heliostat.inference.sampling import Draw, noisy
from heliostat.recipes import pretrained
from heliostat.recipes.images import clip_folder
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.text import chat, encoder, sentence_folder
from heliostat.recipes.text.generator import Sampling, ends, prompt_tokens, whole
from heliostat.schema import validate
from heliostat.text import brief

LOGITS_BYTES = 256 << 20  # maximum bytes of a scored batch's logits: one per position and token of the vocabulary
UNKNOWN = 1 << 32  # tokens: a tokenizer whose limit is this number or more has no limit
PROBES = ((5, 6, 7), (9, 8, 7, 6, 5, 4, 3))  # two short prompts; the first gets padding
CLOSE = 1e-3  # relative to the largest logit: two results with a smaller difference count as equal


@dataclass(frozen=True)
class Input:
    """Holds an input: a text or an image. `seed`: random seed for the answer to this input."""

    text: str
    seed: int
    image: bytes = b""


@dataclass
class Answer:
    """Holds an answer's columns in `values`. If there is no answer, `bad` has the reason, and `detail` an explanation."""

    values: dict[str, Any] = field(default_factory=dict)
    bad: str = ""
    detail: str = ""


class BadInputError(Exception):
    """Reports that an input can't be answered, with the reason (`bad`) and an explanation (`detail`) for the input's
    `Answer`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.answer = Answer(bad=reason, detail=detail)


class DeadEngineError(HeliostatError):
    """Reports that an engine has died and can't answer any input."""


class LoadedModel:
    """Loads a model and its tokenizer.

    `longest`: maximum tokens of an input; None means no limit. `writes`: whether the model is a language model. `head`: the Auto
    class to load a model with another head. If `weights` is False, `model` is None.
    """

    def __init__(self, folder: Path, head: type | None = None, weights: bool = True) -> None:
        self.folder = folder
        self.tokenizer = from_folder("model", transformers.AutoTokenizer, folder)
        how = sentence_folder.read(folder)
        self.pooling = how.pooling if how else "mean"
        self.pairs = clip_folder.is_one(folder)
        self.writes = not (how or head or self.pairs)
        self.model: Any = self._load(folder, head) if weights else None
        self.config = from_folder("model", transformers.AutoConfig, folder) if self.model is None else self.model.config
        limits = (how.max_tokens if how else None, encoder.places(self.config, self.model), self.tokenizer.model_max_length)
        self.longest: int | None = min((n for n in limits if n is not None and n < UNKNOWN), default=None)
        own = self.config.get_text_config().pad_token_id if head else None  # some heads find the end of a text by this token
        candidates = (own, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        self.pad = next(token for token in candidates if token is not None)

    def _load(self, folder: Path, head: type | None) -> Any:
        if head:
            model = pretrained.whole("model", head, folder)
        else:
            model = whole("model", folder) if self.writes else encoder.load("model", folder)
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def generation(self) -> transformers.GenerationConfig:
        """Returns the generation settings of the model's folder. If the folder has none, returns the settings in the model's
        configuration."""
        if self.model is not None:
            return self.model.generation_config
        if not (self.folder / "generation_config.json").is_file():
            return transformers.GenerationConfig.from_model_config(self.config)
        return from_folder("model", transformers.GenerationConfig, self.folder)

    def seen(self, tokens: list[int], text: str) -> list[int]:
        """Returns the tokens of a text that the model reads, at most `longest`.

        A language model reads the first tokens. For other models the tokenizer cuts the text, and keeps the special tokens at
        its end.
        """
        if self.longest is None or len(tokens) <= self.longest:
            return tokens
        if self.writes:
            return tokens[: self.longest]
        return self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]

    def embedded(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Computes the embeddings of texts: fp32 [texts, width], normalized to length 1."""
        if self.pairs:
            return clip_folder.of_texts(self.model, ids, mask)
        return encoder.embed(self.model.base_model, ids, mask, self.pooling)


class BatchEngine(ABC):
    """Answers inputs in batches of similar length, with a model that is loaded once. An input that fails doesn't affect other
    inputs.

    Raises HeliostatError if there are several inputs and all of them fail, because then the model is the cause.
    """

    def __init__(self, model: Path | LoadedModel, batch: int) -> None:
        self.batch = batch
        loaded = model if isinstance(model, LoadedModel) else LoadedModel(model)
        self.tokenizer, self.model, self.longest, self.pad = loaded.tokenizer, loaded.model, loaded.longest, loaded.pad
        self.loaded = loaded

    def __call__(self, inputs: Sequence[Input]) -> list[Answer]:
        encoded, answers = list[list[int]](), list[Answer]()
        for one in inputs:
            try:
                encoded.append(self.encode(one.text))
            except BadInputError as e:
                encoded.append([])
                answers.append(e.answer)
            else:
                answers.append(self.refusal(encoded[-1]) or Answer())
        open_ = [i for i, answer in enumerate(answers) if not answer.bad]
        for chosen in self.batches({i: len(encoded[i]) for i in open_}):
            batch = self._answered([encoded[i] for i in chosen], [inputs[i] for i in chosen])
            for i, answer in zip(chosen, batch, strict=True):
                answers[i] = answer
        if len(open_) > 1 and all(answers[i].bad == "failed" for i in open_):
            raise HeliostatError(
                f"the model can't answer any of the inputs. The first input failed with: {answers[open_[0]].detail}"
            )
        return answers

    def encode(self, text: str) -> list[int]:
        """Returns an input's token ids; raises BadInputError if the input can't be encoded."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def refusal(self, tokens: list[int]) -> Answer | None:
        """Returns an answer with the reason why the model can't answer an input of these tokens; None if the model can answer
        it."""
        return None

    def rows(self, longest: int) -> int:
        """Returns the maximum number of inputs in a batch whose longest input has `longest` tokens."""
        return self.batch

    def batches(self, lengths: dict[int, int]) -> Iterator[list[int]]:
        """Yields batches of inputs, from the shortest input to the longest, so that a batch has little padding."""
        waiting: list[int] = []
        for i in sorted(lengths, key=lambda i: (lengths[i], i)):
            if waiting and (len(waiting) >= self.rows(lengths[i]) or self.apart(lengths[waiting[-1]], lengths[i])):
                yield waiting
                waiting = []
            waiting.append(i)
        if waiting:
            yield waiting

    def apart(self, one: int, other: int) -> bool:
        """Returns whether inputs of these lengths must not share a batch, because padding would change the model's logits."""
        return False

    def _answered(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        try:
            with torch.inference_mode():
                return self.answer(tokens, inputs)
        except Exception as e:  # a model can raise any error for an input; the other inputs are still answered
            if isinstance(e, torch.AcceleratorError) or type(e).__name__ == "EngineDeadError":  # EngineDeadError is vLLM's
                raise DeadEngineError(f"the engine has died ({type(e).__name__}: {brief(e)}). Run the command again") from e
            if len(inputs) == 1:
                return [Answer(bad="failed", detail=f"{type(e).__name__}: {e}"[:500])]
        return [self._answered([t], [i])[0] for t, i in zip(tokens, inputs, strict=True)]

    @abstractmethod
    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        """Answers a batch: one answer per input, in the same order."""

    def padded(self, rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rows as one tensor of ids [rows, longest], and the attention mask of the same shape."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        for row, tokens in enumerate(rows):
            place = slice(longest - len(tokens), None) if left else slice(0, len(tokens))
            ids[row, place], mask[row, place] = torch.tensor(tokens), 1
        return ids.to(self.model.device), mask.to(self.model.device)


def sampling(options: dict[str, object], longest: int | None) -> Sampling:
    """Reads sampling options. Raises ConfigError if the options are invalid, or if `max_tokens` leaves no room for a prompt.

    `longest`: maximum tokens of prompt and answer; None if unlimited.
    """
    keys = validate(Sampling, options, "options")
    if longest is not None and keys.max_tokens >= longest:
        raise ConfigError(
            f"max_tokens: {keys.max_tokens:,} leaves no room for a prompt: prompt and answer have at most "
            f"{longest:,} tokens. Pass --max-tokens below {longest:,}"
        )
    return keys


class Continue(BatchEngine):
    """Continues prompts by up to `max_tokens` tokens. An empty prompt starts a new document. Every end token of the model's
    folder ends an answer."""

    def __init__(self, model: Path | LoadedModel, batch: int, options: dict[str, object]) -> None:
        super().__init__(model, batch)
        self.sampling = sampling(options, self.longest)
        self.pads = self.model is not None and pads_hold(self)
        self.ends = ends(self.tokenizer, self.loaded.generation())
        if self.model is not None:  # ignores the folder's sampling settings: a penalty would change the model's distribution
            self.model.generation_config = transformers.GenerationConfig()

    def encode(self, text: str) -> list[int]:
        return prompt_tokens(self.tokenizer, text)

    def refusal(self, tokens: list[int]) -> Answer | None:
        if not tokens:
            return Answer(bad="empty", detail="no token, and the tokenizer has none that begins a document")
        room = None if self.longest is None else self.longest - self.sampling.max_tokens
        if room is not None and len(tokens) > room:
            return Answer(bad="too_long", detail=f"{len(tokens)} tokens, and the model has room for {room} before its answer")
        return None

    def apart(self, one: int, other: int) -> bool:
        return not self.pads and one != other

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        ids, mask = self.padded(tokens, left=True)
        sampler = [Noise([one.seed for one in inputs], self.sampling)] if self.sampling.temperature else []
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=self.sampling.max_tokens, do_sample=False, pad_token_id=self.pad,
            eos_token_id=self.ends or None, logits_processor=LogitsProcessorList(sampler),
        )  # fmt: skip
        return [self.read(row.tolist()) for row in out[:, ids.shape[1] :]]

    def read(self, tokens: list[int]) -> Answer:
        """Decodes the generated token ids, and returns the answer."""
        written = list(itertools.takewhile(lambda token: token not in self.ends, tokens))
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return Answer({"answer": text, "tokens": len(written), "finish": "stop" if len(written) < len(tokens) else "length"})


class Chat(Continue):
    """Answers chats with the tokenizer's chat template. Each chat is a list of messages in JSON."""

    def encode(self, text: str) -> list[int]:
        try:
            messages = chat.read(text)
        except ConfigError as e:
            raise BadInputError("no_messages", str(e)) from e
        try:
            return chat.encode(self.tokenizer, messages)
        except ConfigError as e:
            raise BadInputError("template", str(e)) from e


class Noise(LogitsProcessor):
    """Adds each row's random noise to the row's scores, so that greedy decoding becomes sampling."""

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.draws = [Draw(sampling.temperature, sampling.top_p, seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> Any:
        return noisy(scores, self.draws)


def pads_hold(engine: BatchEngine) -> bool:
    """Returns whether padding on the left leaves a prompt's logits unchanged. In a model with a recurrent state, padding
    changes the state, and so the logits."""
    vocabulary = engine.model.config.get_text_config().vocab_size
    rows = [[token % vocabulary for token in probe] for probe in PROBES]
    with torch.inference_mode():
        ids, mask = engine.padded(rows, left=True)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        try:
            both = engine.model(input_ids=ids, attention_mask=mask, position_ids=places).logits[0, -1]
        except TypeError:  # the model takes no positions
            both = engine.model(input_ids=ids, attention_mask=mask).logits[0, -1]
        alone = engine.model(input_ids=engine.padded(rows[:1], left=True)[0]).logits[0, -1]
    return bool((both - alone).abs().max() <= CLOSE * alone.abs().max())


class Score(BatchEngine):
    """Scores texts. A text that exceeds the model's maximum is cut, and its answer has `truncated` true."""

    def encode(self, text: str) -> list[int]:
        tokens = super().encode(text)
        begin = self.tokenizer.bos_token_id
        return tokens if begin is None or tokens[:1] == [begin] else [begin, *tokens]

    def refusal(self, tokens: list[int]) -> Answer | None:
        return Answer(bad="empty", detail="fewer than two tokens: none follows another") if len(tokens) < 2 else None

    def rows(self, longest: int) -> int:
        longest = longest if self.longest is None else min(longest, self.longest)
        return max(1, min(self.batch, LOGITS_BYTES // (4 * longest * self.model.config.get_text_config().vocab_size)))

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        cut = [row[: self.longest] for row in tokens]
        ids, mask = self.padded(cut, left=False)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        lost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        nats = (lost.double() * mask[:, 1:]).sum(-1).tolist()
        return [self.read(*row) for row in zip(nats, cut, tokens, inputs, strict=True)]

    def read(self, nats: float, cut: list[int], tokens: list[int], source: Input) -> Answer:
        """Builds the answer for a text. `nats`: negative log-likelihood of the tokens in `cut`, which fit into the model's
        maximum."""
        truncated = len(cut) < len(tokens)
        text = self.tokenizer.decode(cut, skip_special_tokens=True) if truncated else source.text
        size = max(1, len(text.encode("utf-8", "replace")))
        bits = nats / math.log(2) / size
        return Answer({"nats": nats, "tokens": len(cut) - 1, "bits_per_byte": bits, "truncated": truncated})


class Embed(BatchEngine):
    """Embeds texts. A text that exceeds the model's maximum is cut, and its answer has `truncated` true."""

    def refusal(self, tokens: list[int]) -> Answer | None:
        return None if tokens else Answer(bad="empty", detail="no token")

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        cut = [self.loaded.seen(row, one.text) for row, one in zip(tokens, inputs, strict=True)]
        return [
            Answer({"embedding": vector, "tokens": len(short), "truncated": len(short) < len(row)})
            for vector, short, row in zip(self.vectors(cut), cut, tokens, strict=True)
        ]

    def vectors(self, cut: list[list[int]]) -> Sequence[object]:
        """Embeds a batch of texts, each as a list of token ids. Returns one vector [width] per text."""
        ids, mask = self.padded(cut, left=False)
        return list(self.loaded.embedded(ids, mask).cpu().numpy())


class Classify(BatchEngine):
    """Returns each text's likeliest label, and the probabilities of all labels.

    A text that exceeds the model's maximum is cut, and its answer has `truncated` true. If a text can have several labels
    (`problem_type` multi_label_classification), the probabilities are independent.
    """

    def __init__(self, folder: Path, batch: int) -> None:
        super().__init__(LoadedModel(folder, transformers.AutoModelForSequenceClassification), batch)
        config = self.model.config
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        self.independent = config.problem_type == "multi_label_classification"
        last = getattr(config, "summary_type", "") == "last"  # XLNet reads the last position, even if it is padding
        self.mixes = config.get_text_config().pad_token_id is not None and not last

    def apart(self, one: int, other: int) -> bool:
        return not self.mixes and one != other

    def refusal(self, tokens: list[int]) -> Answer | None:
        return None if tokens else Answer(bad="empty", detail="no token")

    def answer(self, tokens: list[list[int]], inputs: list[Input]) -> list[Answer]:
        cut = [self.loaded.seen(row, one.text) for row, one in zip(tokens, inputs, strict=True)]
        ids, mask = self.padded(cut, left=False)
        logits = self.model(input_ids=ids, attention_mask=mask).logits.double()
        all_shares = (logits.sigmoid() if self.independent else torch.softmax(logits, -1)).tolist()
        return [self._read(*row) for row in zip(all_shares, cut, tokens, strict=True)]

    def _read(self, shares: list[float], cut: list[int], tokens: list[int]) -> Answer:
        best = max(range(len(shares)), key=shares.__getitem__)
        return Answer({"label": self.labels[best], "probability": shares[best], "probabilities": shares,
                       "tokens": len(cut), "truncated": len(cut) < len(tokens)})  # fmt: skip
