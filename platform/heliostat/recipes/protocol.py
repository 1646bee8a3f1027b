"""Defines the protocol between the engine and a recipe: what a recipe must implement for its model to be trained, and what else
it can (docs/guides/recipe.md).

`Recipe` is the base of every recipe, which must implement `build`, `batch` and `loss`; the rest has a default. The other base
classes are abilities: to be scored, exported, prompted and served, and to draw pictures. A job that asks for an ability that its
recipe lacks is rejected before the first step (`heliostat.recipes.conformance`).

The engine owns data order, ZeRO, accumulation, precision, checkpoints, metrics and restarts; a recipe owns the model and what a
batch, a loss and a score are. Every process makes its own recipe, from the job and the datasets alone.
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
    """Describes how some of the parameters are trained; parameters with equal groups are trained as one group."""

    weight_decay: float | None = None  # None: the job's, train.optimizer.weight_decay
    lr: float = 1.0  # times the schedule's learning rate
    hidden: bool | None = None  # a hidden matrix, as Muon steps them; None: `building.hidden_matrices` finds out


@dataclass(frozen=True)
class Companion:
    """Describes another model, such as a frozen encoder: the recipe puts it on the device, the plan counts it, it isn't saved."""

    bytes: int
    every_step: bool = True  # False: it is there in evaluations only


class Recipe(ABC):
    """Defines what every recipe implements. Every method is called on every rank unless its description restricts that."""

    kind: str  # of the datasets it eats: "tokens" or "rows"
    terms_per_sample: int | None = None  # loss terms of every sample, or None where samples differ
    tiles: bool = False  # computes its loss and its MLPs in tiles where `train.tiled_loss` and `train.tiled_mlp` ask for it
    selects: bool = False  # checkpoints some of its layers, or with their inputs on the host, where the job asks for it
    chooses: bool = False  # computes attention and linear layers as `train.attention` and `train.fp8` say
    balances: bool = False  # has a `balance` that is to be called after every step
    frozen: tuple[str, ...] = ()  # submodules of the model that are not trained: no gradients, no dropout, saved once per run

    def __init__(self, job: Job) -> None:
        """Reads `job.model`; ConfigError, with no model library's traceback, if it makes no sense. Cheap."""
        self.job = job

    def probe(self) -> None:  # noqa: B027
        """Tries on the driver, in seconds and without the datasets, what `__init__` cannot check; ConfigError if it fails."""

    def bind(self, sources: list[Manifest]) -> None:  # noqa: B027
        """Takes what the datasets determine (a tokenizer, a vocabulary size); ConfigError if they do not fit the model."""

    def assumed(self) -> str:
        """Describes what a plan without the datasets assumes of the model, such as its vocabulary size; empty: nothing."""
        return ""

    def presume(self, rows: int) -> Content | None:  # noqa: B027
        """Returns samples of datasets that don't exist yet, by the job's sizes; None if it is bound, or lacks them."""

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """Builds the model in fp32 with its initial weights; the engine has seeded the RNG and, at ZeRO-3, set the stage."""

    @abstractmethod
    def batch(self, content: Content, keys: np.ndarray) -> Batch:
        """Makes CPU tensors from the samples' contents: int32 [batch, sequence_length] for tokens, an Arrow table for rows.

        `keys`, int64 [batch]: a number for each sample of each step, and for each held-out sample; draw what is random from it.
        One thread calls this for the next step while the present one computes. `heliostat.recipes.batches` has helpers."""

    def complete(self, batch: Batch) -> Batch:
        """Adds to a batch on the device what weights in training don't change, such as noise and outputs of frozen encoders.

        No gradients, no numbers of torch's generators. The engine calls it before `loss`; on a GPU on the uploads' stream, while
        the micro-batch before is computed. `loss` and `evaluate` complete a batch that isn't complete."""
        return batch

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Computes the sum of the batch's loss terms, and whatever else is minimised or logged."""

    def terms(self, batch: Batch) -> int:
        """Counts the loss terms of a batch, before its forward pass; not called if `terms_per_sample` is set."""
        if "labels" in batch:
            return int((batch["labels"] != IGNORED).sum())
        return len(next(iter(batch.values())))

    def group(self, name: str, shape: tuple[int, ...]) -> Group:
        """Decides how a parameter is trained: by default matrices get weight decay, vectors (norms, biases) don't."""
        return Group() if len(shape) > 1 else Group(weight_decay=0.0)

    def balance(self, model: torch.nn.Module, routed: torch.Tensor) -> None:  # noqa: B027
        """Changes buffers that balance experts, the same on every worker. `routed`: as in `Loss`, of the step's global batch."""

    def exact(self, model: torch.nn.Module) -> list[str]:
        """Lists the buffers that stay in fp32 whatever the precision, by names."""
        return []

    def companions(self) -> dict[str, Companion]:
        """Lists, by name, the models on the device next to the one that is trained."""
        return {}

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Lists the layers of a model that are the same, which `train.compile: blocks` compiles one by one; none if not known."""
        return []

    def active_parameters(self, model: torch.nn.Module) -> int | None:
        """Counts the parameters that one token meets, of a model with experts; None: all."""
        return None

    def flops_per_sample(self, model: torch.nn.Module) -> float | None:
        """Counts the forward and backward FLOPs of one sample, for MFU; None: not known, and MFU is not reported."""
        return None

    def describe(self, content: Content) -> str:
        """Describes one sample, given as the content of a batch of one, for people to read."""
        if self.kind == "tokens":
            return " ".join(map(str, content[0].tolist()))
        row = cast("pa.Table", content).to_pylist()[0]
        return ", ".join(f"{k} {f'({len(v)} bytes)' if isinstance(v, bytes) else v}" for k, v in row.items())


class CouplesSamples(Recipe):
    """Trains on a loss of all samples of a step together, such as a contrastive one. The engine goes over each micro-batch twice
    (GradCache): loss and gradients are those of the global batch, on any number of workers, and memory that of a micro-batch."""

    terms_per_sample = 1

    @abstractmethod
    def represent(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Computes what the loss needs of each sample, [batch, ...] by name, the same when it is called again with the same
        random numbers. Gradients flow through floating-point numbers."""

    @abstractmethod
    def couple(self, vectors: dict[str, torch.Tensor]) -> Loss:
        """Computes a step's loss from its samples' vectors, in their order: on every worker, or shared with a `CouplesSome`."""

    @classmethod
    def shares_coupling(cls) -> bool:
        """Tells whether `couple_some` is of the loss that `couple` computes; where a class overrides `couple` alone, it isn't."""
        some, every = (next((c for c in cls.__mro__ if name in vars(c)), None) for name in ("couple_some", "couple"))
        return some is not None and every is not None and issubclass(some, every)

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Computes the loss of a batch that is a whole step."""
        return self.couple(self.represent(model, self.complete(batch)))


class Evaluates(ABC):
    """Evaluates its model on the held-out samples: a job may ask for `evaluate`."""

    scores: tuple[str, ...] = ("loss",)  # what `metrics`, `measure` and a gallery's `judge` report
    gathered: tuple[str, ...] = ()  # what `evaluate` gives that is no sum: kept of every sample, for `measure`

    @abstractmethod
    def evaluate(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Computes scores by name: float [batch], summed over the held-out samples; [batch, ...] for names in `gathered`."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Computes the reported metrics, among them `loss`, from the sums of `evaluate`: by default each over that of `terms`."""
        if "terms" not in sums:
            raise ConfigError(f"recipe: {type(self).__name__}.evaluate gives no `terms` to divide by; add it ({GUIDE})")
        return {name: total / max(1.0, sums["terms"]) for name, total in sums.items() if name != "terms"}

    def measure(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        """Computes more metrics from the `gathered` scores of all held-out samples, in the samples' order. On rank 0 only."""
        return {}


class Exports(ABC):
    """Exports its checkpoints to a folder that is used without the engine: by `heliostat model export`, and at the end of every
    run."""

    layout: dict[str, str] = {"": "model"}  # a parameter's prefix, which is cut off -> its file, without .safetensors

    def tensors(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Weight]]:
        """Maps each file of an export to its tensors by their names there; by default as `layout` assigns them. `shapes`: of the
        model's parameters, and of the buffers that checkpoints hold."""
        return {
            file: {name.removeprefix(prefix): Weight((name,), shape) for name, shape in shapes.items() if name.startswith(prefix)}
            for prefix, file in self.layout.items()
        }

    @abstractmethod
    def save_config(self, folder: Path) -> None:
        """Writes on the driver all of an export but the weights (config.json, tokenizer), so that from_pretrained loads it."""

    @abstractmethod
    def load(self, folder: Path) -> torch.nn.Module:
        """Loads the exported model, in the precision in which it was exported."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        """Runs the exported model on the driver: (prompt, answer) of each example, for the log."""
        return []

    @staticmethod
    def exported(folder: Path, model: dict[str, Any]) -> dict[str, object]:
        """Derives `job.model` for an exported folder from the `job.model` that it was trained with."""
        return {"pretrained": str(folder)}


@dataclass(frozen=True)
class Weight:
    """Describes a tensor of an export: the model's tensor of that name, or what `make` computes from several, which are read in
    fp32 when it is written; one such tensor is in memory at a time."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., torch.Tensor] | None = None


class CutsSamples(ABC):
    """Trains with each sample cut over several workers, a stretch of tokens each: a job may ask for `train.parallel.sequence`.
    The loss has no parts, or parts that are means over tokens."""

    def require_cut(self, parts: int) -> None:  # noqa: B027
        """Raises ConfigError if the model's samples cannot be cut over so many workers; on the driver, in seconds."""

    @abstractmethod
    def cut(self, batch: Batch, part: int, parts: int) -> Batch:
        """Cuts the part-th of so many equal stretches of a whole batch, with all that the loss, its terms and scores need of it:
        their sums over the parts are those of the whole."""

    @abstractmethod
    def exchange(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """Makes the model exchange what a token needs of other stretches, which the group's workers have in rank order."""

    @abstractmethod
    def exchanged(self, parts: int) -> int:
        """Counts, for the plan, the elements that each of so many workers sends to the others in a forward pass over a sample."""


class DividesExperts(ABC):
    """Trains a mixture whose experts are divided over workers: a job may ask for `train.parallel.expert`."""

    @abstractmethod
    def require_divided(self, parts: int) -> None:
        """Raises ConfigError if the model's experts cannot be divided into so many parts; on the driver, in seconds."""

    @abstractmethod
    def stacked_experts(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """Lists the modules whose own parameters hold all experts of a layer, one after another in their first dimension."""

    def sent(self, model: torch.nn.Module) -> int:
        """Counts, for the plan, the elements that a sample's tokens are on their way to experts and back, in a forward pass."""
        return 0

    @abstractmethod
    def exchange_tokens(self, model: torch.nn.Module, group: dist.ProcessGroup) -> None:
        """Makes the model send tokens to the group's worker that has their expert; each has its part, in rank order."""


class DividesMatrices(ABC):
    """Trains a model whose layers' matrices are divided over workers, which compute each sample together: a job may ask for
    `train.parallel.tensor`. Nothing else of the model depends on how many there are."""

    @abstractmethod
    def require_matrices_divided(self, parts: int) -> None:
        """Raises ConfigError if the model's matrices cannot be divided into so many parts; on the driver, in seconds."""

    @abstractmethod
    def divided_matrices(self, model: torch.nn.Module) -> Mapping[str, str]:
        """Lists modules by name whose weights, and biases of outputs, are divided: `column` by outputs, `row` by inputs, whose
        products the workers add up. `summed`: whole, but applied to a part of what passes, so gradients are added up."""


class Generates(Exports):
    """Answers prompts with its exports: `heliostat model generate`."""

    prompts: tuple[str, ...] = ()  # what the exported model is asked at the end of a run

    @staticmethod
    @abstractmethod
    def generator(folder: Path, options: dict[str, object]) -> Callable[[list[Request]], list[Generated]]:
        """Loads an exported folder once and answers requests; ConfigError for options that this kind of model does not have."""

    def demonstrate(self, folder: Path) -> list[tuple[str, str]]:
        if not self.prompts:
            return []
        answers = self.generator(folder, {})([Request(prompt, 0, None) for prompt in self.prompts])
        return [(a.prompt, a.shown.removeprefix(a.prompt) if a.shown.startswith(a.prompt) else f" -> {a.shown}") for a in answers]


class Paints(Generates):
    """Draws pictures of prompts with its exports, over and over with other options: `heliostat model serve` and `play`."""

    @staticmethod
    @abstractmethod
    def canvas(folder: Path) -> Canvas:
        """Loads an exported folder once."""


class Canvas(Protocol):
    """Draws pictures. `size`: width and height of the model's own, in pixels; `defaults`: options, as `generator` takes them."""

    defaults: dict[str, object]

    @property
    def size(self) -> tuple[int, int]: ...

    def draw(self, prompts: list[str], seeds: list[int], options: dict[str, object]) -> list[bytes]:
        """Draws a picture for each prompt, as PNG, from its own seed; ConfigError for an unknown option."""


class Serves(Exports):
    """Logs its exports to MLflow, which serves them: a job may ask for `mlflow.register`."""

    def serving(self) -> Serving:
        """Describes how MLflow serves the folder, on the driver. By default by `generator`, which needs the recipe's code."""
        from mlflow.models import infer_signature

        assert isinstance(self, Generates)
        code, examples = Path(__file__).with_name("served.py"), list(self.prompts[:1])
        return Serving(code, examples, infer_signature(examples, ["answer"], {"seed": 0}), ("mlflow", "torch", "heliostat"))


class Draws(ABC):
    """Draws pictures after every evaluation."""

    @abstractmethod
    def gallery(self) -> Gallery | None:
        """Returns the gallery to draw; None if the job asks for none."""


class Gallery(Protocol):
    """Draws `count` pictures after every evaluation and scores them."""

    count: int

    def draw(self, model: torch.nn.Module, device: torch.device | str, numbers: list[int]) -> list[np.ndarray]:
        """Draws the pictures of these numbers, each uint8 [height, width, channels]; any rank may be asked for any of them."""

    def judge(self, pictures: list[np.ndarray], progressed: Callable[[], None]) -> tuple[dict[str, float], dict[str, bytes]]:
        """Judges all pictures, given in order, on rank 0 only: scores, and PNG images for the log, both by name."""


@dataclass(frozen=True)
class Serving:
    """Describes an MLflow pyfunc "model from code": its file, which is copied into the model, an example input, the signature."""

    code: Path
    example: object
    signature: ModelSignature
    requirements: tuple[str, ...] = ("mlflow", "torch", "transformers", "accelerate")


@dataclass(frozen=True)
class Request:
    """Holds a prompt to answer; `out`: where a file is written, if the answer is one (its `file` fact holds the place)."""

    prompt: str
    seed: int
    out: str | None


@dataclass(frozen=True)
class Generated:
    """Holds the answer to a prompt: `shown` as text for people, `facts` as JSON values."""

    prompt: str
    shown: str
    facts: Mapping[str, object]
