"""Runs texts through a Hugging Face folder's model: safetensors and tokenizer.json alone, no code of the folder's.

What is computed of a text, such as a classifier's score, does not depend on the texts beside it: texts are padded to lengths that
follow from their own, and batches are always full, so that every text of a length goes through the same kernels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.errors import ConfigError
from heliostat.tasks import files

if TYPE_CHECKING:
    from tokenizers import Encoding

LEAST_TOKENS = 32  # that a text is padded to
CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def describe(folder: str, name: str = "model") -> dict[str, Any]:
    """Reads the folder's config.json; ConfigError, which begins with `name`, if something that is needed is not there."""
    try:
        config = json.loads(files.read(name, str(Path(folder) / CONFIG)))
    except ValueError as e:
        raise ConfigError(
            f"{name}: {folder!r}: {CONFIG} is not JSON ({e}); name a folder that save_pretrained has written"
        ) from e
    if not isinstance(config, dict):
        raise ConfigError(f"{name}: {folder!r}: {CONFIG} is no mapping; name a folder that save_pretrained has written")
    if "auto_map" in config:
        raise ConfigError(
            f"{name}: {folder!r} needs code that it brings ({CONFIG}: auto_map), which is not run; take another model"
        )
    missing = [what for what, there in (("safetensors", weights(folder)), (TOKENIZER, (Path(folder) / TOKENIZER).is_file()))
               if not there]  # fmt: skip
    if missing:
        raise ConfigError(f"{name}: {folder!r} has no {missing[0]}; save it by save_pretrained, with its fast tokenizer")
    return config


def weights(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def labels(config: dict[str, Any]) -> list[str]:
    """Lists the labels in the order of the model's outputs."""
    named = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return [named[key] for key in sorted(named, key=int)]


def digests(folder: str) -> dict[str, str]:
    """Returns the SHA-256 of all files that scores follow from."""
    paths = [*weights(folder), Path(folder) / CONFIG, Path(folder) / TOKENIZER]
    return {path.name: files.digest("model", str(path)) for path in paths}


def padded(tokens: int, most: int) -> int:
    """Returns the length that a text of so many tokens is padded to: a power of two, or one and a half of one."""
    length = LEAST_TOKENS
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return min(length, max(most, tokens))


def check_length(config: dict[str, Any], max_tokens: int) -> None:
    """Raises ConfigError if the model cannot read so many tokens."""
    most = config.get("max_position_embeddings")
    if isinstance(most, int) and max_tokens > most:
        raise ConfigError(f"max_tokens: {max_tokens:,} is more than the model can read; give at most {most:,}")


class Reader:
    """Runs texts, or pairs of them, through a folder's model, on a GPU if there is one; a subclass says which, and what of its
    output. Of a pair that is longer than `max_tokens` the second text is cut."""

    pairs = False

    def __init__(self, folder: str, what: str, max_tokens: int, batch: int, name: str = "model") -> None:
        import torch
        from tokenizers import Tokenizer

        self.batch, self.max_tokens = batch, max_tokens
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.tokenizer = Tokenizer.from_file(str(Path(folder) / TOKENIZER))
            model = self.load(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        except Exception as e:  # of many kinds: what is wrong with a folder of others
            fault = str(e).partition("\n")[0]
            raise ConfigError(f"{name}: {folder!r} cannot be loaded as {what} ({fault})") from e
        self.model = model.eval().to(self.device)
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_tokens, strategy="only_second" if self.pairs else "longest_first")
        self.pad = model.config.pad_token_id or 0
        self.typed = self.pairs and getattr(model.config, "type_vocab_size", 1) > 1

    def load(self, folder: str, **options: Any) -> Any:
        """Loads the folder's model, with these options of transformers."""
        raise NotImplementedError

    def __call__(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> list[tuple[Any, bool]]:
        """Returns (what is computed, whether the text, or the pair, was longer than max_tokens) of each."""
        encoded = self.tokenizer.encode_batch(texts)
        by_length = dict[int, list[int]]()
        for i, one in enumerate(encoded):
            by_length.setdefault(padded(len(one.ids), self.max_tokens), []).append(i)
        found: list[Any] = [None] * len(texts)
        for length, which in sorted(by_length.items()):
            for start in range(0, len(which), self.batch):
                part = which[start : start + self.batch]
                for i, value in zip(part, self._computed([encoded[i] for i in part], length), strict=False):
                    found[i] = value
        return [(value, bool(one.overflowing)) for value, one in zip(found, encoded, strict=True)]

    def _computed(self, rows: list[Encoding], length: int) -> list[Any]:
        import torch

        rows = rows + [rows[0]] * (self.batch - len(rows))

        def tensor(lists: list[list[int]], fill: int) -> Any:
            return torch.tensor([one + [fill] * (length - len(one)) for one in lists], device=self.device)

        ids, mask = tensor([row.ids for row in rows], self.pad), tensor([[1] * len(row.ids) for row in rows], 0)
        types = {"token_type_ids": tensor([row.type_ids for row in rows], 0)} if self.typed else {}
        with torch.inference_mode():
            return self.values(self.model(input_ids=ids, attention_mask=mask, **types), ids, mask)

    def values(self, output: Any, ids: Any, mask: Any) -> list[Any]:
        """Computes a value for each row of a batch from the model's output, the tokens and which of them count."""
        raise NotImplementedError


class SequenceClassifier(Reader):
    """Runs texts through a sequence classifier."""

    def load(self, folder: str, **options: Any) -> Any:
        import transformers

        from heliostat.recipes.pretrained import whole

        return whole("model", transformers.AutoModelForSequenceClassification, folder, **options)


class Scorer(SequenceClassifier):
    """Scores texts by a label of a classifier."""

    def __init__(self, folder: str, label: str, max_tokens: int, batch: int) -> None:
        self.place = labels(describe(folder)).index(label)
        super().__init__(folder, "a sequence classifier", max_tokens, batch)
        self.outputs = self.model.config.num_labels
        self.independent = self.model.config.problem_type == "multi_label_classification"

    def values(self, output: Any, ids: Any, mask: Any) -> list[float]:
        logits = output.logits.float()
        if self.outputs > 1:  # of one output: a regression, such as a grade from 0 to 5
            logits = logits.sigmoid() if self.independent else logits.softmax(-1)
        return [round(value, 5) for value in logits[:, self.place].tolist()]


class Likelihood(Reader):
    """Measures the mean negative logarithm of the probabilities that a causal language model gives a text's tokens, behind the
    first; None for one token, or none. ConfigError if a model gives what is not finite."""

    def __init__(self, folder: str, max_tokens: int, batch: int) -> None:
        self.folder = folder
        super().__init__(folder, "a causal language model", max_tokens, batch)

    def load(self, folder: str, **options: Any) -> Any:
        import transformers

        from heliostat.recipes.pretrained import whole

        return whole("model", transformers.AutoModelForCausalLM, folder, **options)

    def values(self, output: Any, ids: Any, mask: Any) -> list[float | None]:
        from torch.nn.functional import cross_entropy

        def mean(logits: Any, row: Any, count: int) -> float | None:
            if count < 2:
                return None
            nats = float(cross_entropy(logits[: count - 1].float(), row[1:count]))
            if not math.isfinite(nats):
                raise ConfigError(f"model: {self.folder!r} gives probabilities that are not finite; take another model")
            return nats

        lengths = mask.sum(1).tolist()
        return [mean(logits, row, count) for logits, row, count in zip(output.logits, ids, lengths, strict=True)]
