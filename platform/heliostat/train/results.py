"""What a run leaves of itself when it ends: the summary of its training, and its result, which the command prints."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from heliostat.records import Format, open_


@open_
class Summary(TypedDict):
    eval: dict[str, float]
    startup: dict[str, float]
    tokens_per_second: float
    data_wait: float
    seconds_to_first_step: float


class Sample(TypedDict):
    prompt: str
    text: str


@open_
class Result(Summary):
    run_id: str
    model_uri: str
    checkpoint: str
    unit: str
    reference: dict[str, float | None]
    samples: list[Sample]


RESULT: Format[Any] = Format(Result, "result of a run", fix="delete it, and use --resume: it is made again")
SUMMARY: Format[Any] = Format(Summary, "summary of a training", fix="use `heliostat export` for the model")
