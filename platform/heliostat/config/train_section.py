"""Defines the section `train` of the job file: the optimizer's steps, and how they are computed."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from heliostat.config import schedules
from heliostat.config.defaults import LENGTHS
from heliostat.config.fields import LARGEST, Count, Filled, NonNegative, Positive, Seed, divisors
from heliostat.config.schedules import Schedule
from heliostat.optim.optimizers import AnyOptimizer
from heliostat.schema import Float, Strict, Was
from heliostat.text import brief


class Offload(Strict):
    optimizer: Literal["cpu"] | None = None
    """Masters and moments live in host memory."""
    param: Literal["cpu", "nvme"] | None = None
    """Weights live in host memory, or on NVMe. ZeRO stage 3 only."""
    nvme_path: str | None = None
    """A folder on the node's NVMe, for `param: nvme`."""


Group = Annotated[int, Field(ge=2, le=LARGEST)]
QUANTIZED_GRADIENTS = "DeepSpeed's kernels read gradients in bf16 and fp32 as if they were fp16, and round sums to 4 bits"


class Zero(Strict):
    stage: Literal[0, 1, 2, 3] = 1
    """What is divided among the workers. 0: nothing; 1: optimizer state; 2: gradients, too; 3: weights, too. Stage 0 needs
    `precision: fp32`."""
    offload: Offload = Offload()
    """What is moved out of GPU memory."""
    shard_group_size: Annotated[Group | None, Was("divide_within")] = None
    """Workers that divide the state among them, as those of a node; each such group has all of it, and groups average their
    gradients once a step. Stage 3 alone. Unset: all workers divide it. See docs/training/many-nodes.md"""
    hpz_partition_size: Annotated[Group | None, Was("copy_within")] = None
    """Workers that keep a second copy of the weights, divided among them, as those of a node: a layer that was gathered once in a
    step is gathered again from there (ZeRO++ hpZ). Stage 3 alone. Unset: no copy. See docs/training/many-nodes.md"""
    quantize_weights: bool = False
    """Sends weights in 8 bits when they are gathered (ZeRO++ qwZ). Stage 3 and GPUs alone. See docs/training/many-nodes.md"""

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, value: object) -> object:
        """Refuses ways to send less that are known elsewhere, with the reason."""
        if isinstance(value, dict) and "quantize_gradients" in value:
            raise ValueError(
                f"quantize_gradients is not supported: {QUANTIZED_GRADIENTS}; remove it, and use shard_group_size, which sends "
                "gradients between nodes once a step"
            )
        return value

    @field_validator("stage", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):  # equal to 0 or 1, and so to a choice
            raise ValueError(f"{value} is not a choice; valid: 0, 1, 2, 3")
        return value


NOT_OFFERED = {
    "pipeline": "models are not cut into stages; train.zero.stage 3 divides their layers over all workers",
    "context": "use sequence, which cuts samples over workers",
    "data": "it follows: workers.count over sequence or tensor",
}


class Parallel(Strict):
    auto: bool = False
    """Chooses the layout that the plan finds fastest, of all that fit: the degrees below and `zero.stage`, `zero.offload`,
    `micro_batch_size`, `activation_checkpointing`. Written as `parallel: auto`. See
    docs/training/parallelism.md#automatic-choice"""

    sequence: Count = 1
    """Workers that share each sample, a stretch of its tokens each. 1: every worker has samples of its own. See
    docs/training/long-context.md"""

    expert: Count = 1
    """Workers that divide the experts of each layer among them, and send each other tokens. 1: every worker computes all. See
    docs/training/mixture-of-experts.md#expert-parallelism"""

    tensor: Count = 1
    """Workers that divide the matrices of each layer among them, and compute each sample together. 1: every worker has whole
    matrices, or gathers them. See docs/training/parallelism.md#tensor-parallelism"""

    @property
    def sharing(self) -> int:
        """Returns how many workers compute each sample together."""
        return self.sequence * self.tensor

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, value: object) -> object:
        """Takes `auto`; refuses degrees that are known elsewhere, with the reason and what to use."""
        if value == "auto":
            return {"auto": True}
        if isinstance(value, str):
            raise ValueError(f"{brief(repr(value))} is no layout; write auto, or degrees such as {{tensor: 2}}")
        for key in (key for key in NOT_OFFERED if isinstance(value, dict) and key in value):
            page = "docs/training/parallelism.md#not-supported"
            raise ValueError(f"{key} is not supported: {NOT_OFFERED[key]}; remove it ({page})")
        return value


class Ema(Strict):
    decay: Annotated[Float, Field(gt=0, lt=1)] = 0.9999
    """Of the average, at most; at step t it is min(decay, (1 + t) / (10 + t))."""


class SdcCheck(Strict):
    every: Positive
    """Steps between two looks. The first step after every start is looked at, too."""

    def due(self, step: int, first: bool) -> bool:
        """Tells whether a step, counted from 0, is looked at; `first`: none was since the start."""
        return first or (step + 1) % self.every == 0


GROWING = dict.fromkeys(
    ("batch_warmup", "batch_size_warmup", "global_batch_warmup"), "every step has train.global_batch_size samples"
)
GROWING |= dict.fromkeys(("sequence_warmup", "sequence_length_warmup"), "every sample has data.sequence_length tokens")


NEWEST_RECIPES = 2  # what an unset `recipe_version` means in a new run
RETIRED = frozenset({"cpu_kernels"})  # keys of earlier versions, which recorded jobs hold; they have no effect
SELECTIVE = "selective"


def _layers(value: object) -> object:
    """Validates what of which layers is meant, with one message for all kinds of answers."""
    if isinstance(value, bool) or value == SELECTIVE or (isinstance(value, int) and 0 < value <= LARGEST):
        return value
    raise ValueError(f"{brief(repr(value))} should be true, false, {SELECTIVE}, or how many of the first layers (1 or more)")


DEEPCOMPILE = "DeepSpeed's passes begin at the optimizer's step 0, which a resumed run does not make"


def _compiled(value: object) -> object:
    """Validates what is compiled, with one message for both kinds of answers."""
    if isinstance(value, bool) or value == "blocks":
        return value
    if value == "deepcompile":
        raise ValueError(f"deepcompile is not supported: {DEEPCOMPILE}; use true or blocks")
    raise ValueError(f"{brief(repr(value))} should be true, false or blocks")


class Train(Strict):
    steps: Annotated[Count, Filled("from `epochs` or `tokens`")]
    """Optimizer steps of the whole run. They count from 1; the schedule ends at this one. Give `steps`, `epochs`, or `tokens`."""
    epochs: Annotated[Float | None, Field(gt=0, exclude=True)] = None
    """Passes over the training samples, in place of `steps`. They become steps when the dataset is known, rounded up."""
    tokens: Annotated[int | None, Field(gt=0, exclude=True)] = None
    """Tokens to train on, in place of `steps`. They become steps of `global_batch_size` x `data.sequence_length`, rounded up."""
    steps_from: str | None = None
    """In a run's record: what `steps` follows from, such as `epochs: 2`. Don't set it."""
    stop_after: Positive | None = None
    """Training ends after this step, for now; the schedule follows `steps` all the same. Unset: at `steps`."""
    global_batch_size: Annotated[Count, Was("global_batch"), Filled("64, or the next multiple that the workers can share")]
    """Samples of an optimizer step, whatever the number of workers."""
    micro_batch_size: Annotated[Count, Was("micro_batch"), Filled("up to 4")]
    """Samples that a worker plays at once; the number of accumulated micro-batches follows."""
    optimizer: Annotated[AnyOptimizer, Filled("AdamW with a rate by rule, see docs/reference/yaml.md#defaults")]
    """What makes a step of the gradients."""
    schedule: Schedule = Schedule()
    """The learning rate over the steps."""
    grad_clip: NonNegative = 1.0
    """Limit of the gradient's global norm; 0 for none."""
    ema: Ema | None = None
    """An average of the weights over the steps, which is evaluated, drawn from and exported in their place. Unset: no average."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of weights and computing; masters and moments are fp32 in all. `fp16` needs GPUs. See docs/training/precision.md"""
    zero: Zero = Zero()
    """DeepSpeed's ZeRO: how the state is divided among the workers."""
    parallel: Parallel = Parallel()
    """How the samples, experts and matrices are divided among the workers."""
    grad_accum_dtype: Annotated[Literal["fp32", "same"] | None, Was("accumulate")] = None
    """What a step's micro-batches are summed in: fp32, or the `same` as `train.precision`. Unset: fp32, but a resumed run
    keeps what it had. See docs/training/precision.md#sums-of-micro-batches"""
    recipe_version: Literal[1, 2] | None = None
    """Version of the rules by which an image recipe computes a sample's numbers. Unset: 2, but a resumed run keeps what it had.
    See docs/diffusion.md#versions"""
    deepspeed: dict[str, object] = {}
    """DeepSpeed's own settings of speed and memory, merged over what the keys above make. Which:
    docs/training/deepspeed-keys.md"""
    activation_checkpointing: Annotated[bool | Literal["selective"] | Count, BeforeValidator(_layers)] = False
    """Computes activations again in the backward pass, which trades time for memory. A number: those of the first so many layers.
    `selective`: of all layers, but for products and attention, whose outputs are kept. See
    docs/training/memory.md#activation-checkpointing"""
    activation_offload: bool = False
    """Keeps the inputs of checkpointed layers in host memory until the backward pass. See
    docs/training/memory.md#activation-offload"""
    tiled_loss: bool = False
    """Computes logits and their loss a tile of tokens at a time, so that never all logits exist. See
    docs/training/memory.md#tiled-loss"""
    tiled_mlp: bool = False
    """Computes the MLP of each layer a tile of tokens at a time, and again in the backward pass, so that never all of its inside
    exists. See docs/training/memory.md#tiled-mlp"""
    compile: Annotated[bool | Literal["blocks"], BeforeValidator(_compiled)] = False
    """Runs the model through `torch.compile`. `blocks`: layer by layer, so that one is compiled for all. See
    docs/training/kernels.md#compilation"""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    """What computes attention; flash and flex need GPUs. Unset: sdpa where the architecture has it. See
    docs/training/kernels.md#attention"""
    fp8: bool = False
    """Multiplies the linear layers of a language model in float8; needs GPUs, and `precision: bf16`. See
    docs/training/precision.md#float8"""
    sdc_check: Annotated[SdcCheck | None, Was("recheck")] = None
    """Looks for silent data corruption: all workers compute one micro-batch of the step, and compare its bits. Unset: never. See
    docs/reliability/corruption.md"""
    seed: Seed = 0
    """Of initial weights and dropout."""
    log_every: Positive = 10
    """Steps between two lines of progress; every step's loss is recorded all the same."""

    @property
    def rules(self) -> int:
        """Returns the version of the rules by which a recipe computes a sample's numbers, for a job that is settled or new."""
        return self.recipe_version or NEWEST_RECIPES

    def lr(self, step: int) -> float:
        """Computes the learning rate of a step, counted from 0."""
        return self.optimizer.lr * schedules.factor(self.schedule, step, self.steps)

    def log_due(self, done: int) -> bool:
        """Tells whether there is a line of progress after `done` steps."""
        return done % self.log_every == 0

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, value: object) -> object:
        """Drops keys of earlier versions. Refuses warm-ups that are known elsewhere, with the reason and what to use."""
        if not isinstance(value, dict):
            return value
        if len(given := [key for key in LENGTHS if value.get(key) is not None]) > 1:
            raise ValueError(f"{' and '.join(given)} are {len(given)} ways to give the length of the run. Keep one")
        for key in (key for key in GROWING if key in value):
            why = f"{GROWING[key]}, which the data order, resuming and the schedule count on"
            raise ValueError(f"{key} is not supported: {why}; remove it, and use train.schedule.warmup_steps")
        return {key: setting for key, setting in value.items() if key not in RETIRED}

    def worker_counts(self, lanes: int, least: int, most: int) -> list[int]:
        """Lists the numbers of workers in [least, most] that can play the lanes in whole micro-batches.

        The lanes are dealt to replicas: as many workers as share a sample. Workers that divide experts or state are whole groups.
        """
        batch, micro, each = self.global_batch_size, self.micro_batch_size, self.parallel.sharing
        replicas = divisors(math.gcd(lanes, batch))
        counts = [n * each for n in replicas if least <= n * each <= most and batch // n % micro == 0]
        groups = self.parallel.expert, self.zero.shard_group_size or 1, self.zero.hpz_partition_size or 1
        return [n for n in counts if not any(n % each for each in groups)]
