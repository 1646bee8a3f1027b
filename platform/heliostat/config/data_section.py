"""Defines the section `data` of the job file: what is trained on, and in which order."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from heliostat.config.fields import Count, Fraction, NonNegative, Positive, Seed
from heliostat.schema import Float, Strict


class Source(Strict):
    path: str
    """A prepared dataset, or a collection of them: a folder, or `s3://bucket/prefix`."""
    weight: NonNegative = 1.0
    """Its share of the samples, relative to the other sources'."""
    max_epochs: Annotated[Float, Field(gt=0)] | None = None
    """So many passes over it; then it is left out, and the other sources share its weight. Unset: no limit."""


class MixChange(Strict):
    step: Positive
    """The weights hold for all steps behind this one."""
    weights: list[NonNegative]
    """One for each source, in the order of `data.sources`."""


class Data(Strict):
    sources: Annotated[list[Source], Field(min_length=1)]
    """The datasets that are mixed, each path once."""
    sequence_length: Annotated[int, Field(gt=1)] | None = None
    """Tokens in a sample. Needed where the datasets hold tokens; images have none."""
    seed: Seed = 0
    """Of the order of samples."""
    lanes: Count | None = None
    """Canonical data-parallel ranks, fixed for the run: any number of workers that divides them can continue it. Unset: one
    for each micro-batch of a step (`train.global_batch` / `train.micro_batch`)."""
    window: Positive | None = None
    """Samples that are shuffled together, and fetched by one task. Unset: 32 MB of them."""
    mix_schedule: list[MixChange] = []
    """A curriculum: other weights behind a step, in ascending order of steps. A source may start with weight 0."""
    on_bad_sample: Literal["replace", "fail"] = "replace"
    """`replace`: a damaged chunk's samples are replaced by others of their window, counted and listed; `fail`: the run stops.
    See docs/data-order.md#bad-data"""
    max_bad_fraction: Fraction = 0.01
    """Replaced samples, as a share of an epoch's (or of all that were trained on, if more), beyond which the run stops."""
    memory_limit: ByteSize = ByteSize(2 << 30)
    """Bytes (`512MiB`) for samples on their way from storage to the workers, on the whole cluster."""
    one_source_batches: bool = False
    """A lane's samples of a step all come from one source. Set by itself where a source is a collection of buckets."""
    labels: dict[str, str] = {}
    """Only nodes that carry these Ray labels fetch samples. Empty: any node."""
    document_mask: bool = False
    """Packed documents do not see each other. Refused for models in which they do, see docs/job.md#what-the-check-tries"""
