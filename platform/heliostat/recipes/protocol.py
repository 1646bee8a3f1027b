"""Defines the protocol between the engine and a recipe (docs/guides/recipe.md).

A recipe derives from `Recipe` and implements `build`, `batch` and `loss`. The other base classes are abilities, such as export
and serving. A job that needs an ability that its recipe lacks is rejected before the first step (`recipes.conformance`).

The engine owns data order, ZeRO, accumulation, precision, checkpoints, metrics and restarts. A recipe owns the model, batches,
losses, and scores. Every process makes its own recipe, from the job and the datasets alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from heliostat.config.spec import Job
from heliostat.data.content import Content
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError

if TYPE_CHECKING:  # torch takes a second to import, and a faulty job is found without it
    import numpy as np
    import pyarrow as pa
    import torch
    import torch.distributed as dist
    from mlflow.models import ModelSignature

Batch = dict[str, "torch.Tensor"]
GUIDE = "docs/guides/recipe.md"
IGNORED = -100  # in a batch's `labels`, where nothing is asked: padding, and what is masked out


class Part(NamedTuple):
    """Holds a value in addition to the loss, as a mean over the batch. `weight`: its factor in the objective; 0 only logs it."""

    value: torch.Tensor
    weight: float = 0.0


@dataclass(frozen=True)
class Loss:
    """Holds the loss of a batch. A step's objective is the sum of its loss terms over their number in the global batch, plus each
    part's weight times its mean over the step's batches. Parts are logged by name; the names are always the same."""

    sum: torch.Tensor  # of the batch's loss terms: a scalar
    parts: dict[str, Part] = field(default_factory=dict)
    routed: torch.Tensor | None = None  # int64 [layers, experts + 1]: tokens that each expert was given; last, those dropped


@dataclass(frozen=True)
class Group:
    """Describes the training of some parameters; parameters with equal groups are one group of the optimizer."""

    weight_decay: float | None = None  # None: the job's, train.optimizer.weight_decay
    lr: float = 1.0  # times the schedule's learning rate
    hidden: bool | None = None  # a hidden matrix, as Muon steps them; None: `building.hidden_matrices` finds out


@dataclass(frozen=True)
class Companion:
    """Describes another model, such as a frozen encoder: the plan counts it, and checkpoints leave it out."""

    bytes: int
    every_step: bool = True  # False: it is there in evaluations only


class Recipe(ABC):
    """Defines the methods of every recipe. The engine calls them on every rank, unless their description restricts that."""

    kind: str  # of the datasets it eats: "tokens" or "rows"
    terms_per_sample: int | None = None  # loss terms of every sample, or None where samples differ
    tiles: bool = False  # computes its loss and its MLPs in tiles where `train.tiled_loss` and `train.tiled_mlp` ask for it
    selects: bool = False  # checkpoints some of its layers, or with their inputs on the host, where the job asks for it
    chooses: bool = False  # computes attention and linear layers as `train.attention` and `train.fp8` say
    balances: bool = False  # has a `balance` that is to be called after every step
    frozen: tuple[str, ...] = ()  # submodules of the model that are not trained: no gradients, no dropout, saved once per run

    def __init__(self, job: Job) -> None:
        """Reads `job.model`; ConfigError in one line for invalid keys. Cheap."""
        self.job = job

    def probe(self) -> None:  # noqa: B027
        """Tests on the driver, in seconds and without the datasets, what `__init__` can't check; ConfigError if it fails."""

    def bind(self, sources: list[Manifest]) -> None:  # noqa: B027
        """Takes the values that the datasets determine (tokenizer, vocabulary size); ConfigError if they don't fit the model."""

    def assumed(self) -> str:
        """Describes the assumptions of a plan without the datasets, such as a vocabulary size; empty if there are none."""
        return ""

    def presume(self, rows: int) -> Content | None:  # noqa: B027
        """Returns samples of datasets that don't exist yet, from the job's sizes; None if they are unknown."""

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """Builds the model in fp32 with its initial weights; the engine has seeded the RNG and, at ZeRO-3, set the stage."""

    @abstractmethod
    def batch(self, content: Content, keys: np.ndarray) -> Batch:
        """Makes CPU tensors from the samples' contents: int32 [batch, sequence_length] for tokens, an Arrow table for rows.

        `keys`, int64 [batch]: a number for each sample of each step, and for each held-out sample; derive random numbers from
        it. One thread calls this for the next step while the current one computes. `heliostat.recipes.batches` has helpers.
        """

    def complete(self, batch: Batch) -> Batch:
        """Adds values on the device that don't depend on trained weights, such as noise and outputs of frozen encoders.

        No gradients, and no numbers from torch's generators. The engine calls it before `loss`; on a GPU it uses the upload
        stream, while the previous micro-batch computes. `loss` and `evaluate` complete a batch that isn't complete."""
        return batch

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Computes the sum of the batch's loss terms, and other values to minimize or log."""

    def terms(self, batch: Batch) -> int:
        """Counts the loss terms of a batch, before its forward pass; not called if `terms_per_sample` is set."""
        if "labels" in batch:
            return int((batch["labels"] != IGNORED).sum())
        return len(next(iter(batch.values())))

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        """Decides how a parameter is trained: by default, matrices get weight decay, and vectors (norms, biases) don't."""
        return Group() if len(shape) > 1 else Group(weight_decay=0.0)

    def balance(self, model: torch.nn.Module, routed: torch.Tensor) -> None:  # noqa: B027
        """Changes buffers that balance experts, identically on every worker. `routed`: as in `Loss`, for the global batch."""

    def exact(self, model: torch.nn.Module) -> list[str]:
        """Lists the names of buffers that stay in fp32 at every precision."""
        return []

    def companions(self) -> dict[str, Companion]:
        """Lists, by name, the models on the device in addition to the trained one."""
        return {}

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Lists a model's identical layers, which `train.compile: blocks` compiles one by one; empty if unknown."""
        return []

    def active_parameters(self, model: torch.nn.Module) -> int | None:
        """Counts the parameters that one token uses, in a model with experts; None means all."""
        return None

    def flops_per_sample(self, model: torch.nn.Module) -> float | None:
        """Counts the forward and backward FLOPs of one sample, for MFU; None if it isn't known, and then MFU isn't reported."""
        return None

    def describe(self, content: Content) -> str:
        """Describes one sample, given as a batch of one, for people to read."""
        if self.kind == "tokens":
            return " ".join(map(str, content[0].tolist()))
        row = cast("pa.Table", content).to_pylist()[0]
        return ", ".join(f"{k} {f'({len(v)} bytes)' if isinstance(v, bytes) else v}" for k, v in row.items())


class CouplesSamples(Recipe):
    """Trains on a loss over all samples of a step together, for example a contrastive one. The engine processes each
    micro-batch twice (GradCache), so loss and gradients are those of the global batch, in one micro-batch's memory."""

    terms_per_sample = 1

    @abstractmethod
    def represent(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Computes each sample's values for the loss, [batch, ...] by name; a function of batch, weights, and random numbers."""

    @abstractmethod
    def couple(self, vectors: dict[str, torch.Tensor]) -> Loss:
        """Computes a step's loss from its samples' vectors, in order: on every worker, or shared with a `CouplesSome`."""

    @classmethod
    def shares_coupling(cls) -> bool:
        """Checks whether `couple_some` computes the same loss as `couple`. If a class overrides only `couple`, it doesn't."""
        some, every = (next((c for c in cls.__mro__ if name in vars(c)), None) for name in ("couple_some", "couple"))
        return some is not None and every is not None and issubclass(some, every)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Computes the loss of a batch that is a whole step."""
        return self.couple(self.represent(model, self.complete(batch)))


class Evaluates(ABC):
    """Evaluates its model on the held-out samples; required for a job's `evaluate`."""

    scores: tuple[str, ...] = ("loss",)  # what `metrics`, `measure` and a gallery's `judge` report
    gathered: tuple[str, ...] = ()  # what `evaluate` gives that is no sum: kept of every sample, for `measure`

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Computes scores by name: float [batch], summed over the held-out samples; [batch, ...] for names in `gathered`."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Computes the reported metrics, among them `loss`, from the sums of `evaluate`: by default each over that of `terms`."""
        if "terms" not in sums:
            raise ConfigError(f"recipe: {type(self).__name__}.evaluate returns no `terms` to divide by. Add it ({GUIDE})")
        return {name: total / max(1.0, sums["terms"]) for name, total in sums.items() if name != "terms"}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """Computes more metrics from the `gathered` scores of all held-out samples, in the samples' order. On rank 0 only."""
        return {}


class Exports(ABC):
    """Exports checkpoints to a folder that works without the engine: for `heliostat model export`, and at a run's end."""

    layout: dict[str, str] = {"": "model"}  # a parameter's prefix, which is cut off -> its file, without .safetensors

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        """Maps each file of an export to its tensors, by their names there; by default in the files of `layout`. `shapes`:
        those of the model's parameters, and of the buffers in checkpoints."""
        return {
            file: {name.removeprefix(prefix): Weight((name,), shape) for name, shape in shapes.items() if name.startswith(prefix)}
            for prefix, file in self.layout.items()
        }

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Writes everything in an export except the weights (config.json, tokenizer) for from_pretrained. On the driver."""

    @abstractmethod
    def load(self, folder: Path) -> torch.nn.Module:
        """Loads the exported model, in the precision in which it was exported."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Runs the exported model on the driver: (prompt, answer) of each example, for the log."""
        return []

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, object]:
        """Derives an exported folder's `job.model` from the `job.model` of the training."""
        return {"pretrained": str(folder)}


@dataclass(frozen=True)
class Weight:
    """Describes a tensor of an export: the model's tensor of that name, or the result of `make` from several tensors, which
    are read in fp32 when it is written. One such tensor is in memory at a time."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., torch.Tensor] | None = None


class CutsSamples(ABC):
    """Trains with each sample split over workers by ranges of tokens (`train.parallel.sequence`). Parts are means over tokens."""

    def require_cut(self, parts: int) -> None:  # noqa: B027
        """Raises ConfigError if the model's samples can't be split over so many workers; on the driver, in seconds."""

    @abstractmethod
    def cut(self, batch: Batch, part: int, parts: int) -> Batch:
        """Cuts one of so many equal ranges out of a complete batch, with everything that the loss, its terms, and scores need.
        Their sums over the ranges equal those of the complete batch."""

    @abstractmethod
    def exchange(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """Makes the model exchange what a token needs from other ranges, which the group's workers hold in rank order."""

    @abstractmethod
    def exchanged(self, parts: int) -> int:
        """Counts, for the plan, the elements that each worker sends to the others in a forward pass over a sample."""


class DividesExperts(ABC):
    """Trains a mixture whose experts are partitioned over workers; required for `train.parallel.expert`."""

    @abstractmethod
    def require_divided(self, parts: int) -> None:
        """Raises ConfigError if the model's experts can't be partitioned into so many parts; on the driver, in seconds."""

    @abstractmethod
    def stacked_experts(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Lists the modules whose parameters hold all experts of a layer, stacked in their first dimension."""

    def sent(self, model: torch.nn.Module) -> int:
        """Counts, for the plan, the elements that a sample's tokens send to experts and back, in a forward pass."""
        return 0

    @abstractmethod
    def exchange_tokens(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """Makes the model send tokens to the worker in the group that holds their expert; experts are in rank order."""


class DividesMatrices(ABC):
    """Trains a model whose matrices are sharded over workers, which compute each sample together; required for
    `train.parallel.tensor`.

    Nothing else in the model depends on their number.
    """

    @abstractmethod
    def require_matrices_divided(self, parts: int) -> None:
        """Raises ConfigError if the model's matrices can't be sharded into so many parts; on the driver, in seconds."""

    @abstractmethod
    def divided_matrices(self, model: torch.nn.Module) -> Mapping[str, str]:
        """Lists by name the modules whose weights, and biases of outputs, are sharded: `column` by outputs; `row` by inputs, so
        workers add up their products. `summed`: not sharded, but applied to a part of the data, so workers add up gradients."""


class Generates(Exports):
    """Answers prompts with its exports; required for `heliostat model generate`."""

    prompts: tuple[str, ...] = ()  # what the exported model is asked at the end of a run

    @staticmethod
    @abstractmethod
    def generator(folder: Path, options: dict[str, object]) -> Callable[[list[Request]], list[Generated]]:
        """Loads an exported folder once and answers requests; ConfigError for options that this kind of model doesn't have."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        if not self.prompts:
            return []
        answers = self.generator(folder, {})([Request(prompt, 0, None) for prompt in self.prompts])
        return [(a.prompt, a.shown.removeprefix(a.prompt) if a.shown.startswith(a.prompt) else f" -> {a.shown}") for a in answers]


class Paints(Generates):
    """Generates images for prompts with its exports, with changing options; `model serve` and `model play` need it."""

    @staticmethod
    @abstractmethod
    def canvas(folder: Path) -> Canvas:
        """Loads an exported folder once."""


class Canvas(Protocol):
    """Generates images. `size`: width and height, in pixels; `defaults`: options, in the form of `generator`."""

    defaults: dict[str, object]

    @property
    def size(self) -> tuple[int, int]: ...

    def draw(self, prompts: list[str], seeds: list[int], options: dict[str, object]) -> list[bytes]:
        """Generates an image for each prompt, as PNG, from its own seed; ConfigError for an unknown option."""


class Serves(Exports):
    """Logs its exports to MLflow, which serves them; required for `mlflow.register`."""

    def serving(self) -> Serving:
        """Describes how MLflow serves the folder, on the driver. The default uses `generator`, which needs the recipe's code."""
        from mlflow.models import infer_signature

        assert isinstance(self, Generates)
        code, examples = Path(__file__).with_name("served.py"), list(self.prompts[:1])
        return Serving(code, examples, infer_signature(examples, ["answer"], {"seed": 0}), ("mlflow", "torch", "heliostat"))


class Draws(ABC):
    """Generates images after every evaluation."""

    @abstractmethod
    def gallery(self) -> Gallery | None:
        """Returns the gallery to generate; None if the job asks for none."""


class Gallery(Protocol):
    """Generates `count` images after every evaluation and scores them."""

    count: int

    def draw(self, model: torch.nn.Module, device: torch.device | str, numbers: list[int]) -> list[np.ndarray]:
        """Generates the images with these numbers, each uint8 [height, width, channels]; on any rank."""

    def judge(self, pictures: list[np.ndarray], progressed: Callable[[], None]) -> tuple[dict[str, float], dict[str, bytes]]:
        """Scores all images, in order, on rank 0: returns scores, and PNG images for the log, both by name."""


@dataclass(frozen=True)
class Serving:
    """Describes an MLflow pyfunc "model from code": its file, which is copied into the model, an example input, the signature."""

    code: Path
    example: object
    signature: ModelSignature
    requirements: tuple[str, ...] = ("mlflow", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Request:
    """Holds a prompt to answer. `out`: the file for an answer that is one (its `file` fact names it)."""

    prompt: str
    seed: int
    out: str | None


@dataclass(frozen=True)
class Generated:
    """Holds the answer to a prompt: `shown` as text for people, `facts` as JSON values."""

    prompt: str
    shown: str
    facts: Mapping[str, object]
