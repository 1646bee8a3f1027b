"""Says how documents are cut into passages: all that an index follows from, beside the dataset and the embedder."""

from __future__ import annotations

from pydantic import Field, model_validator

from heliostat.schema import Strict


class IndexSettings(Strict):
    """Describes the passages of an index."""

    chunk_tokens: int = Field(256, ge=16, le=1 << 20)
    """Tokens of the dataset's tokenizer that a passage has at most."""
    overlap: int = Field(32, ge=0)
    """Tokens of a passage that the next one begins with."""

    @model_validator(mode="after")
    def _forward(self) -> IndexSettings:
        """Refuses passages that would be mostly the one before."""
        if self.overlap * 2 > self.chunk_tokens:
            raise ValueError(f"overlap {self.overlap} is more than half of chunk_tokens {self.chunk_tokens}; give a smaller one")
        return self
