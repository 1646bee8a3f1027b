"""Defines the protocol between the engine and a recipe (docs/guides/recipe.md).

A recipe derives from `Recipe` and implements `build`, `batch` and `loss`. The other base classes are abilities, such as export
and serving. If a recipe lacks an ability that a job needs, this job fails before the first step (`recipes.conformance`).

The engine owns data order, ZeRO, accumulation, precision, checkpoints, metrics and restarts. A recipe owns the model, batches,
losses, and scores. Every process makes its own recipe object, from only the job and the datasets.
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

if TYPE_CHECKING:  # importing torch takes a second, and most checks of a job need no torch
    import numpy as np
    import pyarrow as pa
    import torch
    import torch.distributed as dist
    from mlflow.models import ModelSignature

Batch = dict[str, "torch.Tensor"]
GUIDE = "docs/guides/recipe.md"
IGNORED = -100  # in a batch's `labels`, at tokens without a target: padding and masked tokens


class Part(NamedTuple):
    """Contains a batch mean to log in addition to the loss. `weight`: the mean's factor in the objective; 0 only logs it."""

    value: torch.Tensor
    weight: float = 0.0


@dataclass(frozen=True)
class Loss:
    """Contains the loss of a batch. A step's objective is the mean of the global batch's loss terms, plus each part's weight
    times its mean over the step's batches. Parts are logged by name, and all batches have parts with the same names."""

    sum: torch.Tensor  # sum of the batch's loss terms, a scalar
    parts: dict[str, Part] = field(default_factory=dict)
    routed: torch.Tensor | None = None  # int64 [layers, experts + 1]: tokens per expert; last column: dropped tokens


@dataclass(frozen=True)
class Group:
    """Describes how some parameters are trained. Parameters with equal groups form one parameter group of the optimizer."""

    weight_decay: float | None = None  # None: train.optimizer.weight_decay
    lr: float = 1.0  # factor of the schedule's learning rate
    hidden: bool | None = None  # whether Muon treats it as a hidden matrix; None: `building.hidden_matrices` decides


@dataclass(frozen=True)
class Companion:
    """Describes another model on the device, such as a frozen encoder. The plan counts this model; checkpoints leave it out."""

    bytes: int
    every_step: bool = True  # False: on the device only during evaluations


class Recipe(ABC):
    """Defines the methods of every recipe. The engine calls a method on every rank, unless its description says otherwise."""

    kind: str  # kind of the datasets: "tokens" or "rows"
    pipeline: str | None = None  # makes the datasets, for error messages
    terms_per_sample: int | None = None  # loss terms per sample; None if samples differ
    tiles: bool = False  # supports `train.tiled_loss` and `train.tiled_mlp`
    selects: bool = False  # can checkpoint only some layers; supports `train.activation_offload`
    chooses: bool = False  # supports `train.attention` and `train.fp8`
    balances: bool = False  # the engine calls `balance` after every step
    frozen: tuple[str, ...] = ()  # submodules that aren't trained: no gradients, no dropout, saved once per run

    def __init__(self, job: Job) -> None:
        """Reads `job.model`, and must be fast. Raises ConfigError, in one line, for invalid keys."""
        self.job = job

    def probe(self) -> None:  # noqa: B027
        """Runs checks that take seconds, on the driver, without datasets. Raises ConfigError if a check fails."""

    def bind(self, sources: list[Manifest]) -> None:  # noqa: B027
        """Reads values from the datasets (tokenizer, vocabulary size). Raises ConfigError if the datasets don't fit the model."""

    def assumed(self) -> str:
        """Describes the assumptions of a plan without datasets, such as a vocabulary size. Returns "" if there are none."""
        return ""

    def presume(self, rows: int) -> Content | None:  # noqa: B027
        """Returns placeholder samples for datasets that don't exist yet, in the job's sizes. None if sizes are unknown."""

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """Builds the model in fp32 with initial weights. The engine has seeded the RNG, and partitions the model at ZeRO-3."""

    @abstractmethod
    def batch(self, content: Content, keys: np.ndarray) -> Batch:
        """Makes CPU tensors from `content`: int32 [batch, sequence_length] for tokens, or an Arrow table for rows.

        `keys`: int64 [batch], one number per sample of each step, and per held-out sample. Seed a sample's random numbers with
        its key. A thread calls `batch` for the next step during the current step. Tensors named `host_...` stay on the host.
        """

    def complete(self, batch: Batch) -> Batch:
        """Adds values on the device that don't depend on trained weights, such as noise and outputs of frozen encoders. Computes
        no gradients, and draws nothing from torch's generators. On a GPU, runs on the upload stream while the previous
        micro-batch computes. `loss` and `evaluate` call `complete` if a batch isn't complete yet."""
        return batch

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Computes the sum of the batch's loss terms, and other values to minimize or log."""

    def terms(self, batch: Batch) -> int:
        """Counts a batch's loss terms before the forward pass. The engine doesn't call `terms` if `terms_per_sample` is set."""
        if "labels" in batch:
            return int((batch["labels"] != IGNORED).sum())
        return len(next(iter(batch.values())))

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        """Chooses a parameter's training settings. By default, matrices get weight decay, and vectors (norms, biases) don't."""
        return Group() if len(shape) > 1 else Group(weight_decay=0.0)

    def balance(self, model: torch.nn.Module, routed: torch.Tensor) -> None:  # noqa: B027
        """Changes the buffers that balance experts, equally on all workers. `routed`: `Loss.routed` of the global batch."""

    def exact(self, model: torch.nn.Module) -> list[str]:
        """Lists the names of buffers that stay in fp32 at every precision."""
        return []

    def companions(self) -> dict[str, Companion]:
        """Lists, by name, the models on the device in addition to the trained one."""
        return {}

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Lists a model's identical layers, which `train.compile: blocks` compiles one by one. Empty if unknown."""
        return []

    def active_parameters(self, model: torch.nn.Module) -> int | None:
        """Counts the parameters that one token uses, in a model with experts. Returns None if a token uses all parameters."""
        return None

    def flops_per_sample(self, model: torch.nn.Module) -> float | None:
        """Counts the forward and backward FLOPs of one sample, for MFU. If the result is None, heliostat doesn't report MFU."""
        return None

    def describe(self, content: Content) -> str:
        """Describes one sample for people. `content`: a batch of one sample."""
        if self.kind == "tokens":
            return " ".join(map(str, content[0].tolist()))
        row = cast("pa.Table", content).to_pylist()[0]
        return ", ".join(f"{k} {f'({len(v)} bytes)' if isinstance(v, bytes) else v}" for k, v in row.items())


class CouplesSamples(Recipe):
    """Trains with a loss over all samples of a step together, such as a contrastive loss. The engine processes each micro-batch
    twice (GradCache). So the loss and gradients equal those of the global batch, but need the memory of only one micro-batch."""

    terms_per_sample = 1

    @abstractmethod
    def represent(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Computes each sample's values for the loss, [batch, ...] by name, from only its batch, weights, and random numbers."""

    @abstractmethod
    def couple(self, vectors: dict[str, torch.Tensor]) -> Loss:
        """Computes a step's loss from all its samples' vectors, in order. `couple_some` can divide this work among workers."""

    @classmethod
    def shares_coupling(cls) -> bool:
        """Checks whether `couple_some` computes the same loss as `couple`: not if a class overrides only `couple`."""
        some, every = (next((c for c in cls.__mro__ if name in vars(c)), None) for name in ("couple_some", "couple"))
        return some is not None and every is not None and issubclass(some, every)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Computes the loss of a batch that contains all samples of a step."""
        return self.couple(self.represent(model, self.complete(batch)))


class Evaluates(ABC):
    """Evaluates the model on the held-out samples. Required for the job's section `evaluate`."""

    scores: tuple[str, ...] = ("loss",)  # names that `metrics`, `measure`, and a gallery's `judge` report
    gathered: tuple[str, ...] = ()  # results of `evaluate` that are kept for every sample, for `measure`

    def held_out_batch(self: Any, content: Content, keys: np.ndarray) -> Batch:
        """Makes the batch for `evaluate`, as `batch` does, but without values that only training needs."""
        return self.batch(content, keys)

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Computes scores by name: float [batch], summed over samples by the engine, or [batch, ...] for names in `gathered`."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Computes the metrics, including `loss`, from the sums of the scores. By default, divides each by the sum of `terms`."""
        if "terms" not in sums:
            raise ConfigError(f"recipe: {type(self).__name__}.evaluate returns no `terms` to divide by. Add `terms` ({GUIDE})")
        return {name: total / max(1.0, sums["terms"]) for name, total in sums.items() if name != "terms"}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """Computes additional metrics on rank 0, from the `gathered` scores of all held-out samples, in the samples' order."""
        return {}


class Exports(ABC):
    """Exports checkpoints to a folder that works without the engine, for `heliostat model export` and at the end of a run."""

    layout: dict[str, str] = {"": "model"}  # prefix of parameter names, which is removed -> file, without .safetensors

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        """Returns the tensors of each file of an export, by their names in the file. By default, the files are those of `layout`.
        `shapes`: the shapes of the model's parameters, and of the buffers in checkpoints."""
        return {
            file: {name.removeprefix(prefix): Weight((name,), shape) for name, shape in shapes.items() if name.startswith(prefix)}
            for prefix, file in self.layout.items()
        }

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Writes the files that from_pretrained needs (config.json, tokenizer), except the weights. Runs on the driver."""

    @abstractmethod
    def load(self, folder: Path) -> torch.nn.Module:
        """Loads the exported model, in the precision in which it was exported."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Runs the exported model on examples, on the driver. Returns (prompt, answer) of each example, for the log."""
        return []

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, object]:
        """Returns the `job.model` that loads an exported folder. `model`: the `job.model` that trained the exported model."""
        return {"pretrained": str(folder)}


@dataclass(frozen=True)
class Weight:
    """Describes a tensor of an export: one tensor of the model, or the result of `make` from several (`sources`). The sources are
    read in fp32 when the tensor is written. Only one tensor of an export is in memory at a time."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., torch.Tensor] | None = None


class CutsSamples(ABC):
    """Splits each sample over workers by ranges of tokens, for `train.parallel.sequence`. `Loss.parts` has means over tokens."""

    def require_cut(self, parts: int) -> None:  # noqa: B027
        """Raises ConfigError if samples can't be split over `parts` workers. Runs on the driver, and takes seconds."""

    @abstractmethod
    def cut(self, batch: Batch, part: int, parts: int) -> Batch:
        """Cuts range `part` of `parts` equal ranges out of a complete batch, with all values that the loss, terms, and scores
        need. The sum of each loss, term count, and score over all ranges must equal its value for the complete batch."""

    @abstractmethod
    def exchange(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """Makes workers exchange the data that their tokens need from other ranges. Worker i of the group has range i."""

    @abstractmethod
    def exchanged(self, parts: int) -> int:
        """Counts the elements that each of `parts` workers sends in a sample's forward pass, for the plan."""


class DividesExperts(ABC):
    """Trains a mixture of experts that are partitioned over workers. Required for `train.parallel.expert`."""

    @abstractmethod
    def require_divided(self, parts: int) -> None:
        """Raises ConfigError if the experts can't be partitioned into `parts` parts. Runs on the driver, and takes seconds."""

    @abstractmethod
    def stacked_experts(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Lists the modules whose parameters contain all experts of a layer, stacked in the first dimension."""

    def sent(self, model: torch.nn.Module) -> int:
        """Counts the tensor elements that go to experts and back in a sample's forward pass. The plan uses this number."""
        return 0

    @abstractmethod
    def exchange_tokens(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """Makes the model send each token to the group's worker with the token's expert. Experts are in rank order."""


class DividesMatrices(ABC):
    """Trains a model whose matrices are sharded over workers, which compute each sample together. Required for
    `train.parallel.tensor`. Nothing else in the model may depend on the number of workers."""

    @abstractmethod
    def require_matrices_divided(self, parts: int) -> None:
        """Raises ConfigError if the matrices can't be sharded into `parts` parts. Runs on the driver, and takes seconds."""

    @abstractmethod
    def divided_matrices(self, model: torch.nn.Module) -> Mapping[str, str]:
        """Maps module names to the way of sharding. `column`: weight and bias, by outputs. `row`: the weight, by inputs; workers
        add up the outputs. `summed`: not sharded, but with partial inputs; workers add up the module's gradients."""


class Generates(Exports):
    """Answers prompts with exported models. Required for `heliostat model generate`."""

    prompts: tuple[str, ...] = ()  # prompts for the exported model at the end of a run
    rendered: bool = False  # a chat template has rendered these prompts

    @staticmethod
    @abstractmethod
    def generator(folder: Path, options: dict[str, object]) -> Callable[[list[Request]], list[Generated]]:
        """Loads an exported folder once. Returns a function that answers requests. Raises ConfigError for unsupported options."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        answers = self.generator(folder, {})([Request(prompt, 0, None) for prompt in self.prompts]) if self.prompts else []
        return [(a.prompt, a.shown.removeprefix(a.prompt) if a.shown.startswith(a.prompt) else f" -> {a.shown}") for a in answers]


class Paints(Generates):
    """Generates images from prompts with exported models, for `model serve` and `model play`. Options may differ per call."""

    @staticmethod
    @abstractmethod
    def canvas(folder: Path) -> Canvas:
        """Loads an exported folder once. Returns an object that generates images."""


class Canvas(Protocol):
    """Generates images. `size`: width and height, in pixels. `defaults`: default options, with the keys of `generator`."""

    defaults: dict[str, object]

    @property
    def size(self) -> tuple[int, int]: ...

    def draw(self, prompts: list[str], seeds: list[int], options: dict[str, object]) -> list[bytes]:
        """Generates a PNG image for each prompt, each from its own seed. Raises ConfigError for an unknown option."""


class Serves(Exports):
    """Logs exported models to MLflow, which serves these models. Required for `mlflow.register`."""

    def serving(self) -> Serving:
        """Describes how MLflow serves the folder. Runs on the driver. The default uses `generator` and the recipe's code."""
        from mlflow.models import infer_signature

        assert isinstance(self, Generates)
        code, examples = Path(__file__).with_name("served.py"), list(self.prompts[:1])
        return Serving(code, examples, infer_signature(examples, ["answer"], {"seed": 0}), ("mlflow", "torch", "heliostat"))


class Draws(ABC):
    """Generates images, or answers to prompts, after every evaluation. Not if the recipe sets its attribute `draws` to false."""

    @abstractmethod
    def gallery(self) -> Gallery | None:
        """Returns the images (`Gallery`) to generate. Returns None if the job sets no images."""


class Gallery(Protocol):
    """Generates `count` images after every evaluation, and scores these images. A text is an array of tokens."""

    count: int

    def draw(self, model: torch.nn.Module, device: torch.device | str, numbers: list[int]) -> list[np.ndarray]:
        """Generates the images with these numbers, each uint8 [height, width, channels]. Runs on any rank."""

    def judge(self, pictures: list[np.ndarray], progressed: Callable[[], None]) -> tuple[dict[str, float], dict[str, bytes]]:
        """Scores all images, in order, on rank 0. Returns the scores, and files (PNG, or NAME.json) for the log, both by name."""


@dataclass(frozen=True)
class Serving:
    """Describes an MLflow pyfunc "model from code". MLflow copies the file `code` into the model. `example`: an example input."""

    code: Path
    example: object
    signature: ModelSignature
    requirements: tuple[str, ...] = ("mlflow", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Request:
    """Contains a prompt to answer. `out`: the path to write to, if the answer is a file (then also the fact `file`)."""

    prompt: str
    seed: int
    out: str | None


@dataclass(frozen=True)
class Generated:
    """Contains the answer to a prompt: `shown` as text for people, and `facts` as JSON values."""

    prompt: str
    shown: str
    facts: Mapping[str, object]
