"""The protocol between the engine and a job: what a recipe must say for its model to be trained.

The engine owns data order, ZeRO, accumulation, precision, checkpoints, metrics and restarts; a recipe owns the model
and what a batch, a loss and a score are. A recipe is made anew in every process, from the job and the datasets alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest

if TYPE_CHECKING:  # torch takes a second to import, and a faulty job is found without it
    import numpy as np
    import torch

    Batch = dict[str, torch.Tensor]
else:
    Batch = dict[str, Any]


@dataclass(frozen=True)
class Serving:
    """An MLflow pyfunc "model from code": the file that defines it (copied into the model), an input, the signature."""

    code: Path
    example: Any
    signature: Any
    requirements: tuple[str, ...] = ("mlflow", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Request:
    """A prompt to answer; `out` is where a file goes, if the answer is one (`file` of its facts then says where it is)."""

    prompt: str
    seed: int
    out: str | None


@dataclass(frozen=True)
class Generated:
    """An answer: as a person reads it, and as JSON values."""

    prompt: str
    shown: str
    facts: dict[str, Any]


class Gallery(Protocol):
    """Pictures that are drawn after every evaluation."""

    count: int

    def draw(self, model: torch.nn.Module, device: Any, numbers: list[int]) -> list[np.ndarray]:
        """The pictures of these numbers, uint8 [height, width, channels]; any rank may be asked for any."""

    def judge(self, pictures: list[np.ndarray], progressed: Callable[[], None]) -> tuple[dict[str, float], dict[str, bytes]]:
        """Rank 0 only, given all of them in order: scores, and PNG images for the log by name."""


class Recipe(Protocol):
    """Everything is called on every rank unless it says otherwise.

    A recipe that puts models on the device beside the one that is trained (frozen encoders) tells the plan with
    `frozen_bytes() -> tuple[int, int]`: what they take in every step, and what they take in an evaluation.
    """

    kind: str  # of the datasets it eats: "tokens" or "rows"
    terms_per_sample: int | None  # loss terms of every sample, or None where samples differ
    scores: tuple[str, ...]  # what `metrics`, and the gallery's `judge`, may report
    added: dict[str, float]  # optional: what is in the objective beside the loss, with its coefficient; `losses` gives it
    layout: dict[str, str]  # of an export: a parameter's prefix -> its file there, without .safetensors

    def __init__(self, job: Job) -> None:
        """Reads `job.model`; ConfigError, with no model library's traceback, if it makes no sense. Cheap."""

    def probe(self) -> None:
        """Driver only, optional: tries, in seconds and without the datasets, what `__init__` cannot tell; ConfigError."""

    def bind(self, sources: list[Manifest]) -> None:
        """Takes what the datasets fix (a tokenizer, a vocabulary size); ConfigError if they do not fit the model."""

    def build(self) -> torch.nn.Module:
        """The model in fp32 with its initial weights; the engine has seeded the RNG and, at ZeRO-3, set the stage."""

    def batch(self, content: Any, keys: np.ndarray) -> Batch:
        """CPU tensors from the samples' contents: int32 [batch, sequence_length] for tokens, an Arrow table of rows.

        `keys`, int64 [batch]: a number for each sample of each step, and for each held-out sample, whatever the number of
        workers; what is drawn at random for a sample should follow from it.
        """

    def describe(self, content: Any) -> str:
        """One sample, given as the content of a batch of one, as a person reads it."""

    def terms(self, batch: Batch) -> int:
        """The number of loss terms in a batch, before it is played; not called if `terms_per_sample` is set."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """The sum of the batch's loss terms; a step's loss is their sum over the global batch by their number there."""

    def losses(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Only where `added` names something: the loss, and a value for each name, [len(added)], a mean over the batch."""

    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Float [batch] per score and sample, to be summed over the held-out samples."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What people read, from the sums of `evaluate`; must hold `loss`."""

    def gallery(self) -> Gallery | None:
        """What is drawn after every evaluation, if anything is."""

    def flops_per_sample(self, model: torch.nn.Module) -> float:
        """Forward and backward FLOPs of one sample, for MFU."""

    def save_config(self, folder: Path) -> None:
        """Driver only: all of an export but the weights (config.json, tokenizer), so that from_pretrained loads it."""

    def load(self, folder: Path) -> torch.nn.Module:
        """The exported model, in the precision it was exported in."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Driver only: (prompt, what the exported model makes of it) for the log and the terminal."""

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
        """What `job.model` is for an exported folder, given what it was when it was trained."""

    @staticmethod
    def generator(folder: Path, options: dict[str, Any]) -> Callable[[list[Request]], list[Generated]]:
        """Loads an exported folder once and answers requests; ConfigError for options that this kind of model does not have."""

    def serving(self) -> Serving:
        """Driver only: how MLflow serves the exported folder."""
