"""Trains embedders on pairs of what belongs together, contrastively: what those of texts and of images have in common.

All other pairs of a step are a pair's negatives, on whichever worker they are (`CouplesSamples`), but for those that share one of
its sides (`contrastive`).

Held-out scores: the loss of all held-out pairs against each other, recall at 1, 5 and 10, and the mean reciprocal rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from pydantic import ValidationError

from heliostat.config.spec import Job
from heliostat.errors import ConfigError, DataError
from heliostat.recipes.protocol import CouplesSamples, Evaluates, Loss, Part
from heliostat.schema import Strict, explain

if TYPE_CHECKING:
    import torch

    from heliostat.recipes.protocol import Batch

SCORES = ("recall_at_1", "recall_at_5", "recall_at_10", "mrr")


class EmbedsPairs(CouplesSamples, Evaluates):
    """Represents each sample as two embeddings of length 1, by the names of its `sides`: what asks, and what it is to find.

    Beside them `represent` gives `names`, int64 [batch, 2], by which equal sides are known, and `cut`: where a text was too long.
    """

    kind = "rows"
    sides: tuple[str, str]
    own: type[Strict]  # defines the keys of `model` beside those of its architecture
    scores: tuple[str, ...] = ("loss", *SCORES)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.data.sequence_length:
            raise ConfigError("data.sequence_length: rows have none; remove it, and set model.max_tokens")
        if job.train.global_batch < 2:
            raise ConfigError("train.global_batch: 1 pair has no other to be told from; give 2 or more")
        if "init" in job.model:
            raise ConfigError("model.init: is of language models; remove it")
        self.keys = _own_keys(self.own, job.model)
        self.temperature: float = self.keys.temperature  # divides the cosines of the pairs in the loss
        self.pretrained = job.model.get("pretrained")

    def couple(self, found: dict[str, torch.Tensor]) -> Loss:
        return self._coupled(found, None)

    def couple_some(self, found: dict[str, torch.Tensor], some: slice) -> Loss:
        return self._coupled(found, some)

    def _coupled(self, found: dict[str, torch.Tensor], some: slice | None) -> Loss:
        from heliostat.recipes.contrastive import contrast

        asking, asked = self.sides
        made, pairs, cut = (
            contrast(found[asking], found[asked], found["names"], self.temperature, some),
            len(found["names"]),
            found["cut"],
        )
        was_cut = cut.float().mean() if some is None else cut[some].float().sum() / cut.numel()
        parts = {"accuracy": made.right / pairs, "masked": made.masked, "cut": was_cut}
        return Loss(made.loss, {name: Part(value) for name, value in parts.items()})

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        found = self.represent(model, batch)
        return {name: found[name] for name in self.gathered}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        import torch

        from heliostat.recipes import contrastive

        asking, asked, names = (arrays[name] for name in (*self.sides, "names"))
        queries, documents, same = (torch.from_numpy(array) for array in (asking, asked, names))
        made = [contrastive.contrast(queries, documents, same, self.temperature, some) for some in contrastive.blocks(len(names))]
        loss = sum(float(one.loss) for one in made) / len(names)
        return {"loss": loss, **contrastive.recall(contrastive.ranks(asking, asked, names))}


def _own_keys(kind: type[Strict], model: dict[str, Any]) -> Any:
    """Reads the keys of a job's `model` that are no architecture's; ConfigError for wrong values."""
    try:
        return kind.model_validate({k: v for k, v in model.items() if k in kind.model_fields})
    except ValidationError as e:
        raise ConfigError("\n  ".join(explain(e, kind, "model"))) from e


def present(content: Any, column: str) -> list[Any]:
    """Returns a column's values; DataError if a row has none."""
    if nulls := content[column].null_count:
        raise DataError(f"{nulls} of {len(content)} rows of a batch have no {column!r}; leave such rows out of the dataset")
    return content[column].to_pylist()


def named(sides: Sequence[Sequence[str | bytes]]) -> torch.Tensor:
    """Makes the `names` of samples from what their two sides are, texts or bytes: numbers by which equal ones are known."""
    import torch

    return torch.tensor([[_number(value) for value in side] for side in sides]).T.contiguous()


def _number(value: str | bytes) -> int:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return xxhash.xxh64_intdigest(data) - (1 << 63)
