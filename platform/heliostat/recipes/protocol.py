"""The protocol between the engine and a recipe: what it must say for its model to be trained, and what it may say beside that.

    class Mine(Recipe, Evaluates, Generates, Serves): ...

`Recipe` is what every recipe says: `build`, `batch` and `loss`; the rest has the usual answer. The other base classes are what a
recipe can do beside: be scored, exported, asked, served, drawn. What a job asks of a recipe that cannot do it is refused before
the first step (`heliostat.recipes.conformance`). docs/guides/recipe.md shows how one is written.

The engine owns data order, ZeRO, accumulation, precision, checkpoints, metrics and restarts; a recipe owns the model
and what a batch, a loss and a score are. A recipe is made anew in every process, from the job and the datasets alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import heliostat
from heliostat.config.spec import Job
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError

if TYPE_CHECKING:  # torch takes a second to import, and a faulty job is found without it
    import numpy as np
    import torch

    Batch = dict[str, torch.Tensor]
else:
    Batch = dict[str, Any]

GUIDE = "docs/guides/recipe.md"
IGNORED = -100  # in a batch's `labels`, where nothing is asked: padding, and what is masked out


class Part(NamedTuple):
    """Something beside the loss, as a mean over the batch. `weight`: in the objective; 0 only logs it."""

    value: torch.Tensor
    weight: float = 0.0


@dataclass(frozen=True)
class Loss:
    """What a batch gives. The objective of a step is the sum of its loss terms over their number in the global batch, plus each
    part's weight times its mean over the step's batches. Every part is logged by its name; the names are always the same."""

    sum: torch.Tensor  # of the batch's loss terms: a scalar
    parts: dict[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """How some of the parameters are trained; parameters of equal groups are one."""

    weight_decay: float | None = None  # None: the job's, train.optimizer.weight_decay
    lr: float = 1.0  # times the schedule's learning rate


@dataclass(frozen=True)
class Companion:
    """A model beside the one that is trained, as a frozen encoder, which the recipe puts on the device: the plan counts it. It is
    in no checkpoint, because the job names where it comes from."""

    bytes: int
    every_step: bool = True  # False: it is there in evaluations only


class Recipe(ABC):
    """What every recipe says. Everything is called on every rank unless it says otherwise."""

    kind: str  # of the datasets it eats: "tokens" or "rows"
    terms_per_sample: int | None = None  # loss terms of every sample, or None where samples differ
    frozen: tuple[str, ...] = ()  # submodules of the model that are not trained: no gradients, no dropout, saved once per run

    def __init__(self, job: Job) -> None:
        """Reads `job.model`; ConfigError, with no model library's traceback, if it makes no sense. Cheap."""
        self.job = job

    def probe(self) -> None:  # noqa: B027
        """Driver only: tries, in seconds and without the datasets, what `__init__` cannot tell; ConfigError."""

    def bind(self, sources: list[Manifest]) -> None:  # noqa: B027
        """Takes what the datasets fix (a tokenizer, a vocabulary size); ConfigError if they do not fit the model."""

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """The model in fp32 with its initial weights; the engine has seeded the RNG and, at ZeRO-3, set the stage."""

    @abstractmethod
    def batch(self, content: Any, keys: np.ndarray) -> Batch:
        """CPU tensors from the samples' contents: int32 [batch, sequence_length] for tokens, an Arrow table of rows.

        `keys`, int64 [batch]: a number for each sample of each step, and for each held-out sample, whatever the number of
        workers; what is drawn at random for a sample should follow from it. `heliostat.recipes.batches` pads rows of varying
        length and numbers the documents of a packed sample.
        """

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The sum of the batch's loss terms, and what else is to be minimised or logged."""

    def terms(self, batch: Batch) -> int:
        """The number of loss terms in a batch, before it is played; not called if `terms_per_sample` is set."""
        if "labels" in batch:
            return int((batch["labels"] != IGNORED).sum())
        return len(next(iter(batch.values())))

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        """How a trained parameter is trained: matrices decay; vectors (norms, biases) do not."""
        return Group() if len(shape) > 1 else Group(weight_decay=0.0)

    def companions(self) -> dict[str, Companion]:
        """Models on the device beside the one that is trained, by name."""
        return {}

    def flops_per_sample(self, model: torch.nn.Module) -> float | None:
        """Forward and backward FLOPs of one sample, for MFU; None: not known, and no MFU is told."""
        return None

    def describe(self, content: Any) -> str:
        """One sample, given as the content of a batch of one, as a person reads it."""
        if self.kind == "tokens":
            return " ".join(map(str, content[0].tolist()))
        row = content.to_pylist()[0]
        return ", ".join(f"{k} {f'({len(v)} bytes)' if isinstance(v, bytes) else v}" for k, v in row.items())


class Evaluates(ABC):
    """Is scored on the held-out samples: a job may ask for `evaluate`."""

    scores: tuple[str, ...] = ("loss",)  # what `metrics`, `measure` and a gallery's `judge` report
    gathered: tuple[str, ...] = ()  # what `evaluate` gives that is no sum: kept of every sample, for `measure`

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """By name: float [batch], to be summed over the held-out samples; [batch, ...] if it is `gathered`."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What people read, from the sums of `evaluate`: each by the sum of `terms`. Must hold `loss`."""
        if "terms" not in sums:
            raise ConfigError(f"recipe: {type(self).__name__}.evaluate gives no `terms` to divide by; add it ({GUIDE})")
        return {name: total / max(1.0, sums["terms"]) for name, total in sums.items() if name != "terms"}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """More for people to read, from what was gathered of all held-out samples, in their order: the same on any number of
        workers. Rank 0 only."""
        return {}


class Exports(ABC):
    """Its checkpoints become a folder that is used without the engine: `heliostat export`, and the end of every run."""

    layout: dict[str, str] = {"": "model"}  # a parameter's prefix, which is cut off -> its file, without .safetensors

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        """The tensors of each file (without .safetensors) by their names there; `shapes`: of the model's parameters, and of the
        buffers that checkpoints hold. As `layout` says."""
        return {
            file: {name.removeprefix(prefix): Weight((name,), shape) for name, shape in shapes.items() if name.startswith(prefix)}
            for prefix, file in self.layout.items()
        }

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Driver only: all of an export but the weights (config.json, tokenizer), so that from_pretrained loads it."""

    @abstractmethod
    def load(self, folder: Path) -> torch.nn.Module:
        """The exported model, in the precision it was exported in."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Driver only: (prompt, what the exported model makes of it) for the log and the terminal."""
        return []

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, Any]:
        """What `job.model` is for an exported folder, given what it was when it was trained."""
        return {"pretrained": str(folder)}


@dataclass(frozen=True)
class Weight:
    """A tensor of an export: the model's tensor of that name, or what `make` gives for several, which are read in fp32 when its
    turn comes; one such tensor is in memory at a time."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., torch.Tensor] | None = None


class Generates(Exports):
    """Its exports answer prompts: `heliostat generate`."""

    prompts: tuple[str, ...] = ()  # what the exported model is asked at the end of a run

    @staticmethod
    @abstractmethod
    def generator(folder: Path, options: dict[str, Any]) -> Callable[[list[Request]], list[Generated]]:
        """Loads an exported folder once and answers requests; ConfigError for options that this kind of model does not have."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        if not self.prompts:
            return []
        answers = self.generator(folder, {})([Request(prompt, 0, None) for prompt in self.prompts])
        return [(a.prompt, a.shown.removeprefix(a.prompt) if a.shown.startswith(a.prompt) else f" -> {a.shown}") for a in answers]


class Serves(Exports):
    """Its exports are logged to MLflow, which serves them: a job may ask for `mlflow.register`."""

    def serving(self) -> Serving:
        """Driver only: how MLflow serves the exported folder. As its `generator` answers, by heliostat itself, with the recipe's
        code; a file of its own needs neither."""
        from mlflow.models import infer_signature

        assert isinstance(self, Generates)
        asked = list(self.prompts[:1])
        code = Path(str(heliostat.__file__)).parent / "recipes" / "served.py"
        return Serving(code, asked, infer_signature(asked, ["answer"], {"seed": 0}), ("mlflow", "torch", "heliostat"))


class Draws(ABC):
    """Draws pictures after every evaluation."""

    @abstractmethod
    def gallery(self) -> Gallery | None:
        """What is drawn; None if the job asks for nothing."""


class Gallery(Protocol):
    """Pictures that are drawn after every evaluation."""

    count: int

    def draw(self, model: torch.nn.Module, device: Any, numbers: list[int]) -> list[np.ndarray]:
        """The pictures of these numbers, uint8 [height, width, channels]; any rank may be asked for any."""

    def judge(self, pictures: list[np.ndarray], progressed: Callable[[], None]) -> tuple[dict[str, float], dict[str, bytes]]:
        """Rank 0 only, given all of them in order: scores, and PNG images for the log by name."""


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
