"""Says what is asked of each input of a batch inference: the task, the options of its answers, and the columns."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field

from heliostat.config.schema import Strict

Task = Literal["continue", "score", "embed"]
TASKS = get_args(Task)


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
