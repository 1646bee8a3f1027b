"""Says what is asked of each input of a batch inference: the task, the options of its answers, and the columns."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from heliostat.schema import Strict

Task = Literal["continue", "chat", "score", "embed", "classify", "embed-images"]
WRITES = ("continue", "chat")
OF_ANSWERS = {
    "continue": ("answer", "tokens", "finish"),
    "chat": ("answer", "tokens", "finish"),
    "score": ("nats", "tokens", "bits_per_byte", "truncated"),
    "embed": ("embedding", "tokens", "truncated"),
    "classify": ("label", "probability", "probabilities", "tokens", "truncated"),
    "embed-images": ("embedding",),
}
COLUMN = {"chat": "messages", "embed-images": "image"}  # of the input, where none is named; of the others `text`


class BatchSettings(Strict):
    """Describes a batch inference; all that an answer follows from, beside the model and the input itself."""

    task: Task = "continue"
    column: str = Field("", validate_default=True)
    """The column of the input that holds the prompt, the messages, the image, or the text to score, to embed or to classify."""
    keep: list[str] = []
    """Columns of the input that are written beside the answers, as text."""
    batch: int = Field(16, ge=1, le=4096)
    """Inputs that the model takes together."""
    seed: int = Field(0, ge=0, lt=2**63)
    options: dict[str, object] = {}
    """How text is written: `max_tokens`, `temperature`, `top_p`."""
    engine: Literal["transformers", "vllm"] = "transformers"

    @field_validator("column")
    @classmethod
    def _named(cls, given: str, info: ValidationInfo) -> str:
        return given or COLUMN.get(info.data.get("task", ""), "text")

    @property
    def written(self) -> tuple[str, ...]:
        """Returns the columns of the answers that are the input's: its text, and those that are kept."""
        return (*([] if self.task == "embed-images" else [self.column]), *self.keep)

    @property
    def identity(self) -> dict[str, object]:
        """Returns all of it, without the engine that there has always been."""
        return self.model_dump(exclude={"engine"} if self.engine == "transformers" else None)

    @model_validator(mode="after")
    def _apart(self) -> BatchSettings:
        """Refuses columns that would have the name of another in the answers."""
        written = ["id", *self.written, *OF_ANSWERS[self.task]]
        if twice := sorted({name for name in written if written.count(name) > 1}):
            raise ValueError(f"the answers would have two columns {twice[0]!r}; rename that of the input")
        return self
