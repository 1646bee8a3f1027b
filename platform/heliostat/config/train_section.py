"""Defines the section `train` of the job file: the optimizer's steps, and how workers compute them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from heliostat.config import schedules
from heliostat.config.averages import Ema
from heliostat.config.defaults import LENGTHS
from heliostat.config.fields import LARGEST, Count, Filled, NonNegative, Positive, Seed, divisors
from heliostat.config.schedules import Schedule
from heliostat.optim.optimizers import AnyOptimizer
from heliostat.schema import Float, Strict, Was
from heliostat.text import brief


class Offload(Strict):
    optimizer: Literal["cpu"] | None = None
    """Offloads fp32 master weights and optimizer state to host memory."""
    param: Literal["cpu", "nvme"] | None = None
    """Offloads weights to host memory, or to NVMe. ZeRO stage 3 only."""
    nvme_path: str | None = None
    """Folder on the node's NVMe, for `param: nvme`."""


Group = Annotated[int, Field(ge=2, le=LARGEST)]
QUANTIZED_GRADIENTS = "DeepSpeed's kernels read gradients in bf16 and fp32 as if they were fp16, and round sums to 4 bits"


class Zero(Strict):
    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage: what the workers shard. 0: nothing; 1: optimizer state; 2: optimizer state and gradients; 3: optimizer state,
    gradients, and weights. Stage 0 needs `precision: fp32`."""
    offload: Offload = Offload()
    """Offloads state from GPU memory."""
    shard_group_size: Annotated[Group | None, Was("divide_within")] = None
    """Number of workers that shard the state, for example the workers of a node. Each group of workers has the complete state,
    and the groups average their gradients once per step. Stage 3 only. Unset: all workers. See docs/training/many-nodes.md"""
    hpz_partition_size: Annotated[Group | None, Was("copy_within")] = None
    """Number of workers that shard a second copy of the weights, for example the workers of a node. If a step gathers a layer
    again, it uses this copy (ZeRO++ hpZ). Stage 3 only. Unset: no copy. See docs/training/many-nodes.md"""
    quantize_weights: bool = False
    """Gathers weights in 8 bits (ZeRO++ qwZ). Stage 3 and GPUs only. See docs/training/many-nodes.md"""

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, value: object) -> object:
        """Rejects `quantize_gradients`, a setting of ZeRO++, with the reason."""
        if isinstance(value, dict) and "quantize_gradients" in value:
            raise ValueError(
                f"quantize_gradients isn't supported: {QUANTIZED_GRADIENTS}. Remove this key, and use shard_group_size, "
                "which sends gradients between nodes once per step"
            )
        return value

    @field_validator("stage", mode="before")
    @classmethod
    def _no_bool(cls, value: object) -> object:
        if isinstance(value, bool):  # a boolean would be accepted as 0 or 1
            raise ValueError(f"{value} isn't a choice. Use one of: 0, 1, 2, 3")
        return value


NOT_OFFERED = {
    "pipeline": "heliostat doesn't split models into stages, but train.zero.stage 3 shards their layers over all workers",
    "context": "use sequence, which splits samples over workers",
    "data": "heliostat computes this number from workers.count and sequence or tensor",
}


class Parallel(Strict):
    auto: bool = False
    """Chooses the fastest parallelism configuration that fits, by the plan. This choice sets the degrees below, `zero.stage`,
    `zero.offload`, `micro_batch_size`, and `activation_checkpointing`. Write `parallel: auto`. See
    docs/training/parallelism.md#automatic-choice"""

    sequence: Count = 1
    """Sequence parallelism: number of workers that share each sample. Each worker has one range of tokens. 1: off. See
    docs/training/long-context.md"""

    expert: Count = 1
    """Expert parallelism: number of workers that partition the experts of each layer, and exchange tokens. 1: off. See
    docs/training/mixture-of-experts.md#expert-parallelism"""

    tensor: Count = 1
    """Tensor parallelism: number of workers that shard the matrices of each layer, and compute each sample together. 1: off. See
    docs/training/parallelism.md#tensor-parallelism"""

    @property
    def sharing(self) -> int:
        """Returns the number of workers that compute each sample together."""
        return self.sequence * self.tensor

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, value: object) -> object:
        """Converts the value `auto`. Rejects the names that other tools use for degrees of parallelism, with the reason and the
        alternative."""
        if value == "auto":
            return {"auto": True}
        if isinstance(value, str):
            raise ValueError(
                f"{brief(repr(value))} isn't a parallelism configuration. Write auto, or degrees such as {{tensor: 2}}"
            )
        for key in (key for key in NOT_OFFERED if isinstance(value, dict) and key in value):
            page = "docs/training/parallelism.md#not-supported"
            raise ValueError(f"{key} isn't supported: {NOT_OFFERED[key]}. Remove this key ({page})")
        return value


class SdcCheck(Strict):
    every: Positive
    """Steps between two corruption checks. heliostat also checks the first step after every start."""

    def due(self, step: int, first: bool) -> bool:
        """Returns whether heliostat checks a step, counted from 0. `first`: whether no step has been checked since the start."""
        return first or (step + 1) % self.every == 0


GROWING = dict.fromkeys(
    ("batch_warmup", "batch_size_warmup", "global_batch_warmup"), "every step has train.global_batch_size samples"
)
GROWING |= dict.fromkeys(("sequence_warmup", "sequence_length_warmup"), "every sample has data.sequence_length tokens")


NEWEST_RECIPES = 2  # value of an unset `recipe_version` in a new run
RETIRED = frozenset({"cpu_kernels"})  # keys of earlier versions that recorded jobs may have; they have no effect
SELECTIVE = "selective"


def _layers(value: object) -> object:
    """Validates the choice of layers. The message is the same for every wrong value."""
    if isinstance(value, bool) or value == SELECTIVE or (isinstance(value, int) and 0 < value <= LARGEST):
        return value
    raise ValueError(f"{brief(repr(value))} isn't a choice. Use true, false, {SELECTIVE}, or a number of layers (1 or more)")


DEEPCOMPILE = "DeepCompile's passes begin at the optimizer's step 0, but a resumed run begins at a later step"


def _compiled(value: object) -> object:
    """Validates the choice of compilation. The message is the same for every wrong value."""
    if isinstance(value, bool) or value == "blocks":
        return value
    if value == "deepcompile":
        raise ValueError(f"deepcompile isn't supported: {DEEPCOMPILE}. Use true or blocks")
    raise ValueError(f"{brief(repr(value))} isn't a choice. Use true, false, or blocks")


class Train(Strict):
    steps: Annotated[Count, Filled("from `epochs` or `tokens`")]
    """Optimizer steps of the whole run, counted from 1. The schedule ends at the last step. Set `steps`, `epochs`, or
    `tokens`."""
    epochs: Annotated[Float | None, Field(gt=0, exclude=True)] = None
    """Passes over the training samples, instead of `steps`. When the dataset is known, heliostat converts epochs to steps,
    rounded up."""
    tokens: Annotated[int | None, Field(gt=0, exclude=True)] = None
    """Tokens to train on, instead of `steps`. heliostat converts tokens to steps of `global_batch_size` x `data.sequence_length`,
    rounded up."""
    steps_from: str | None = None
    """In a run's record: the origin of `steps`, for example `epochs: 2`. Don't set this key."""
    stop_after: Positive | None = None
    """Step after which training stops early. The schedule still follows `steps`. Unset: training stops at `steps`."""
    global_batch_size: Annotated[Count, Was("global_batch"), Filled("64, or the next multiple that the workers can share")]
    """Samples per optimizer step, summed over all workers."""
    micro_batch_size: Annotated[Count, Was("micro_batch"), Filled("up to 4")]
    """Samples that a worker processes at once. The number of accumulated micro-batches follows from this value."""
    optimizer: Annotated[
        AnyOptimizer, Filled("AdamW, with a learning rate that depends on the model, see docs/reference/yaml.md#defaults")
    ]
    """Optimizer."""
    schedule: Schedule = Schedule()
    """Learning rate schedule."""
    grad_clip: NonNegative = 1.0
    """Maximum global norm of the gradient; 0 means no limit."""
    ema: Ema | None = None
    """Averages of the weights. Evaluation, generation, and export use the average instead of the weights. Unset: no average."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights and computation. Master weights and optimizer state are always fp32. `fp16` needs GPUs. See
    docs/training/precision.md"""
    zero: Zero = Zero()
    """DeepSpeed ZeRO: how the workers shard the state."""
    parallel: Parallel = Parallel()
    """How the workers split samples, experts, and matrices."""
    grad_accum_dtype: Annotated[Literal["fp32", "same"] | None, Was("accumulate")] = None
    """Precision in which a step's micro-batches are summed: `fp32`, or `same` for the precision in `train.precision`. Unset:
    fp32, but a resumed run keeps its value. See docs/training/precision.md#sums-of-micro-batches"""
    recipe_version: Literal[1, 2] | None = None
    """Version of an image recipe's rules for drawing a sample's random numbers. Unset: 2, but a resumed run keeps its value. See
    docs/diffusion.md#versions"""
    deepspeed: dict[str, object] = {}
    """DeepSpeed's settings for speed and memory. These settings override the settings that heliostat derives from other keys.
    Supported keys: docs/training/deepspeed-keys.md"""
    activation_checkpointing: Annotated[bool | Literal["selective"] | Count, BeforeValidator(_layers)] = False
    """Recomputes activations in the backward pass, which trades time for memory. A number N: only in the first N layers.
    `selective`: in all layers, but keeps the outputs of matrix multiplications and attention. See
    docs/training/memory.md#activation-checkpointing"""
    activation_offload: bool = False
    """Keeps the inputs of checkpointed layers in host memory until the backward pass. See
    docs/training/memory.md#activation-offload"""
    tiled_loss: bool = False
    """Saves memory: computes logits and their loss for one tile of tokens at a time. See docs/training/memory.md#tiled-loss"""
    tiled_mlp: bool = False
    """Saves memory: computes the MLP of each layer for one tile of tokens at a time, and recomputes the MLP in the backward pass.
    See docs/training/memory.md#tiled-mlp"""
    compile: Annotated[bool | Literal["blocks"], BeforeValidator(_compiled)] = False
    """Runs the model through `torch.compile`. `blocks`: compiles one layer, and uses it for all layers. See
    docs/training/kernels.md#compilation"""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    """Attention implementation; flash and flex need GPUs. Unset: sdpa if the architecture supports it. See
    docs/training/kernels.md#attention"""
    fp8: bool = False
    """Multiplies the linear layers of a language model in float8; needs GPUs, and `precision: bf16`. See
    docs/training/precision.md#float8"""
    sdc_check: Annotated[SdcCheck | None, Was("recheck")] = None
    """Checks for silent data corruption: all workers compute the same micro-batch, and compare whether the results are bitwise
    equal. Unset: no checks. See docs/reliability/corruption.md"""
    seed: Seed = 0
    """Random seed for initial weights and dropout."""
    log_every: Positive = 10
    """Steps between two progress lines. heliostat records the loss of every step."""

    @property
    def averages(self) -> list[str]:
        """Lists the kinds of tensors of the averages that the engine keeps. Evaluations and exports use the first kind."""
        return self.ema.kinds if self.ema else []

    @property
    def rules(self) -> int:
        """Returns the version of the recipe's rules for samples' random numbers and for the precision of frozen encoders."""
        return self.recipe_version or NEWEST_RECIPES

    def lr(self, step: int) -> float:
        """Computes the learning rate of a step, counted from 0."""
        return self.optimizer.lr * schedules.factor(self.schedule, step, self.steps)

    def log_due(self, done: int) -> bool:
        """Returns whether a progress line is logged after `done` steps."""
        return done % self.log_every == 0

    @model_validator(mode="before")
    @classmethod
    def _offered(cls, value: object) -> object:
        """Drops keys of earlier versions. Rejects more than one of `steps`, `epochs`, and `tokens`, and warm-ups of batch size or
        sequence length."""
        if not isinstance(value, dict):
            return value
        if len(lengths := [key for key in LENGTHS if value.get(key) is not None]) > 1:
            raise ValueError(f"{' and '.join(lengths)} each set the length of the run. Keep one of these keys")
        for key in (key for key in GROWING if key in value):
            why = f"{GROWING[key]}. The data order, resuming, and the schedule rely on this"
            raise ValueError(f"{key} isn't supported: {why}. Remove this key, and use train.schedule.warmup_steps")
        return {key: setting for key, setting in value.items() if key not in RETIRED}

    def worker_counts(self, virtual_ranks: int, least: int, most: int) -> list[int]:
        """Lists the numbers of workers in [least, most] that can process the virtual ranks in complete micro-batches.

        Each replica (the workers that share a sample) processes the same number of virtual ranks. Workers that shard experts or
        state form complete groups.
        """
        batch, micro, each = self.global_batch_size, self.micro_batch_size, self.parallel.sharing
        replicas = divisors(math.gcd(virtual_ranks, batch))
        counts = [n * each for n in replicas if least <= n * each <= most and batch // n % micro == 0]
        groups = self.parallel.expert, self.zero.shard_group_size or 1, self.zero.hpz_partition_size or 1
        return [n for n in counts if not any(n % each for each in groups)]
