"""Defines the section `train.ema`: the averages of the weights that a run keeps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from heliostat.config.fields import Positive
from heliostat.optim import power_averages
from heliostat.schema import Float, Strict

Length = Annotated[Float, Field(ge=power_averages.SHORTEST, le=power_averages.LONGEST)]
EMA = "ema"  # kind of the tensors of the average with `decay`


class Ema(Strict):
    decay: Annotated[Float, Field(gt=0, lt=1)] | None = 0.9999
    """Maximum decay of the average. The decay at step t is min(decay, (1 + t) / (10 + t)). null: no such average, and evaluation
    and export use the average with the shortest of `lengths`."""
    lengths: list[Length] = []
    """Lengths of power-function averages, as fractions of the run, such as [0.05, 0.1]. From their snapshots, `heliostat model
    export --ema-length` computes the average of any length. See docs/post-hoc-ema.md"""
    every: Positive | None = None
    """Steps between two snapshots of these averages: a multiple of `checkpoint.every`. Unset: every checkpoint."""

    @model_validator(mode="after")
    def _complete(self) -> Ema:
        if self.decay is None and not self.lengths:
            raise ValueError("decay: null needs lengths. Set lengths, or remove the section ema")
        if self.every and not self.lengths:
            raise ValueError(f"every: {self.every} has no effect without lengths. Set lengths, or remove every")
        for length in self.lengths:
            if abs(length * 1000 - round(length * 1000)) > 1e-9:
                raise ValueError(f"lengths: {length:g} has more than three decimals. Use {round(length, 3):g}")
        if len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths: {self.lengths} lists a length twice. List each length once")
        return self

    @property
    def kinds(self) -> list[str]:
        """Lists the kinds of tensors of the averages. Evaluations and exports use the first kind."""
        return [*([EMA] if self.decay is not None else []), *self.by_length]

    @property
    def by_length(self) -> dict[str, float]:
        """Returns the lengths of the power-function averages, by the kind of their tensors, in ascending order."""
        return {power_averages.kind(length): length for length in sorted(self.lengths)}

    def snapshot_due(self, step: int, otherwise: int) -> bool:
        """Returns whether a snapshot is due after a step. `otherwise`: the interval if `every` isn't set."""
        return bool(self.lengths) and step % (self.every or otherwise) == 0
