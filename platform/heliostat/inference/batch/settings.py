"""Says what is asked of each input of a batch inference: the task, the options of its answers, and the columns."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from heliostat.config.schema import Strict

Task = Literal["continue", "score", "embed"]
OF_ANSWERS = {
    "continue": ("answer", "tokens", "finish"),
    "score": ("nats", "tokens", "bits_per_byte", "truncated"),
    "embed": ("embedding", "tokens", "truncated"),
}


class Settings(Strict):
    """Describes a batch inference; all that an answer follows from, beside the model and the input itself."""

    task: Task = "continue"
    column: str = Field("text", min_length=1)
    """The column of the input that holds the prompt, or the text to score or to embed."""
    keep: list[str] = []
    """Columns of the input that are written beside the answers, as text."""
    batch: int = Field(16, ge=1, le=4096)
    """Inputs that the model takes together."""
    seed: int = Field(0, ge=0, lt=2**63)
    options: dict[str, Any] = {}
    """How text is continued: `max_tokens`, `temperature`, `top_p`."""

    @model_validator(mode="after")
    def _apart(self) -> Settings:
        """Refuses columns that would have the name of another in the answers."""
        written = ["id", self.column, *self.keep, *OF_ANSWERS[self.task]]
        if twice := sorted({name for name in written if written.count(name) > 1}):
            raise ValueError(f"the answers would have two columns {twice[0]!r}; rename that of the input")
        return self
