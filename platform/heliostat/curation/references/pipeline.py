"""Adds the log-probabilities of a reference model to a dataset of preferences, on Ray. Run: `heliostat data prepare
pipelines/references.yaml`.

Training then needs neither the reference's memory nor its forward passes. The rows, their order, and their hold-out positions
stay the same. The dataset follows from the input's digest, the model's digest, and the precision. The last bits of a
log-probability also depend on the machine and the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr
from tokenizers import Tokenizer

from heliostat.config.fields import ActorGpus
from heliostat.curation import scoring
from heliostat.curation.prepare import InputFile, Pipeline, place
from heliostat.curation.references import computing
from heliostat.curation.references.computing import KIND, ReferenceModel, SourceShard
from heliostat.curation.watching import PipelineWatch
from heliostat.data import manifest, versions
from heliostat.data.ancestry import FOLDERS, MADE_FROM, PIPELINE, REFERENCE, made_from
from heliostat.data.conversations import CONTENTS, FACT, Reference
from heliostat.data.manifest import FILES, SHARDS, Manifest, kept_path
from heliostat.data.manifest_table import Rows
from heliostat.data.row_groups import ShardCollector
from heliostat.errors import ConfigError, MissingDataError
from heliostat.recipes import model_origins
from heliostat.recipes.folder_digests import weights_digest
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, shipping
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.progress import Progress
from heliostat.tasks.work import Work, key

OF_INPUT = ("digest", "name", "config", "listing", "hub", "files")  # metadata that a new dataset doesn't have


class ReferencePipeline(Pipeline):
    """Defines the keys of a pipeline's YAML for the log-probabilities of a reference. `input` is a dataset of preferences."""

    beside = frozenset({"batch_tokens", "workers", "gpus"})
    ray_data: ClassVar[bool] = False

    input: str = Field(min_length=1)
    """Dataset of preferences: a folder, or an `s3://` prefix."""
    model: str = Field(min_length=1)
    """Reference model, from which the training starts: a folder, or `ORG/NAME` of the Hugging Face Hub (docs/guides/hub.md)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the model. Use the precision of the training."""
    batch_tokens: int = Field(4096, gt=0)
    """Maximum tokens of a batch, with padding. A longer pair is a batch of its own."""
    workers: int = Field(1, gt=0)
    """Number of actors, each of which loads the model."""
    gpus: ActorGpus = 0.0
    """GPUs per actor; 0 computes on CPUs."""

    _watch: PipelineWatch | None = PrivateAttr(default=None)

    @cached_property
    def dataset(self) -> Manifest:
        """Reads the input's manifest. Raises ConfigError if the input isn't a dataset of preferences without a reference."""
        try:
            dataset = manifest.read(place(self.input, "input"))
        except MissingDataError as e:
            raise ConfigError(f"input: {e}") from e
        facts = dataset.meta.get(FACT)
        if facts is None or facts["form"] != "preferences":
            contents = f"a dataset of {CONTENTS[facts['form']]}" if facts else "no dataset of conversations"
            raise ConfigError(
                f"input: {self.input!r} contains {contents}. Prepare a dataset with heliostat.pipelines:PreferencePipeline"
            )
        if facts["reference"]:
            raise ConfigError(f"input: {self.input!r} has a reference already. Set this key to the dataset without a reference")
        return dataset

    def check(self) -> None:
        config, longest = scoring.describe(self.model), self.dataset.meta[FACT]["sequence_length"]
        most = config.get("max_position_embeddings")
        if isinstance(most, int) and 0 < most < longest:
            raise ConfigError(
                f"model: {self.model!r} has {most} positions, but the rows of {self.input!r} have up to {longest} tokens. "
                f"Prepare the preferences with sequence_length: {most}"
            )
        self._check_tokenizer()
        if place(self.output, "output").path == place(self.input, "input").path:
            raise ConfigError(f"output: {self.output!r} is also the input. Set output to another folder")

    def _check_tokenizer(self) -> None:
        """Raises ConfigError if the model's tokenizer differs from the dataset's."""
        from heliostat.recipes import tokenizing
        from heliostat.recipes.text import vocabulary

        own = Tokenizer.from_str(tokenizing.definition([self.dataset]).decode())
        its = vocabulary.load(vocabulary.of_folder(Path(self.model)), f"model: {self.model!r}")
        if what := vocabulary.difference(own, its, [self.dataset.fact("end_of_document")]):
            raise ConfigError(
                f"model: {self.model!r}: the model's tokenizer differs from the tokenizer of {self.input!r} ({what}). Prepare "
                "the preferences with this model"
            )

    def inputs(self) -> list[InputFile]:
        return [InputFile(path, size, 0) for path, size in sorted(self.dataset.sizes.items())]

    @cached_property
    def reference(self) -> Reference:
        return {"digest": weights_digest(Path(self.model)), "precision": self.precision}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"model": self.reference["digest"], "input": self.dataset.digest}

    def write(self, output: Location, inputs: list[InputFile]) -> tuple[Rows, dict[str, Any]]:
        facts, collected = self.dataset.meta, ShardCollector()
        with self.flow() as flow:
            for record in self._written(flow, output, inputs):
                for shard in record["shards"]:
                    collected.add(shard)
        kept = {name: value for name, value in facts.items() if name not in OF_INPUT}
        copied = {name: self._copied(name, output) for name in facts.get(FILES, {}) or ("tokenizer.json", "chat_template.jinja")}
        for path in facts.get("also", []):  # the record of each pair's shard, which has the same number in the new dataset
            output.join(path).write(self.dataset.location.join(path).read())
        referenced = {FACT: {**facts[FACT], "reference": self.reference}, FILES: copied, MADE_FROM: made_from(self.dataset)}
        return collected.rows(), kept | referenced

    def _written(self, flow: Flow, output: Location, inputs: list[InputFile]) -> list[dict[str, Any]]:
        """Runs the tasks. Returns the records of the shards."""
        chunks = self.dataset.chunks.select(["path", "footer"]).to_pylist()
        footers = {one["path"]: one["footer"] for one in chunks}
        shards = [SourceShard(self.dataset.location.uri, file.path, footers[file.path]) for file in inputs]
        uses = libraries.versions(libraries.MODELS)
        of_model = [self.reference, self.batch_tokens, self.gpus > 0, uses]
        tasks = (
            Task(key(KIND, shard.footer, of_model), {"shard": shard, "model": self.described}, bytes=file.bytes)
            for shard, file in zip(shards, inputs, strict=True)
        )
        values = self._values(flow, tasks)
        present = dict(output.files())

        def whole(record: dict[str, Any]) -> bool:
            return all(present.get(shard["path"]) == shard["file_bytes"] for shard in record["shards"])

        def writing() -> Iterator[Task]:
            for number, (shard, names, file) in enumerate(zip(shards, values, inputs, strict=True)):
                prefix = f"{folder}/" if (folder := shard.path.rpartition("/")[0]) != SHARDS else f"{SHARDS}/{number:05d}/"
                arguments = {"shard": shard, "values": names, "prefix": prefix, "output": output.uri}
                yield Task(key("referenced", shard.footer, *names, prefix), arguments, bytes=file.bytes)

        return flow.all("shards", computing.write_shard, writing(), valid=whole)

    @cached_property
    def described(self) -> ReferenceModel:
        """Describes how the tasks compute."""
        shipment, longest = shipping.describe("model", self.model), self.dataset.meta[FACT]["sequence_length"]
        return ReferenceModel(shipment, self.precision, self.gpus > 0, longest, self.batch_tokens)

    def _values(self, flow: Flow, tasks: Iterator[Task]) -> list[list[str]]:
        """Computes log-probabilities. Returns the names of each task's temporary files."""
        from heliostat.curation import gpus
        from heliostat.curation.references import stream

        plan = stream.ReferenceStream(self.workers, self.gpus, self.described)
        return gpus.taken(flow, plan, "gpus", computing.compute, tasks, stream.values)

    def _copied(self, name: str, output: Location) -> str:
        """Copies a file of the input to the output. Returns its path."""
        stem, _, suffix = name.rpartition(".")
        return versions.store(output, f"{FILES}/{stem}-", self.dataset.file(name).read(), f".{suffix}")

    # running -----------------------------------------------------------------------------------------------------------

    @property
    def worked(self) -> Work:
        return Work(place(self.output, "output").ending(".work"))

    def flow(self) -> Flow:
        return Flow(self.worked, self.labels, progress=Progress(self._watch.show) if self._watch else Progress())

    def watched(self, watch: PipelineWatch) -> None:
        self._watch = watch

    def begin_anew(self) -> None:
        self.worked.clear()

    def finish(self, dataset: Manifest) -> None:
        record = self.dataset.uncovered(PIPELINE)
        folders = [self.dataset.location.uri, *record.get(FOLDERS, [])]
        record |= {FOLDERS: folders, REFERENCE: model_origins.of(self.model, Path(self.model))}
        dataset.location.join(kept_path(dataset.digest, PIPELINE)).write(json.dumps(record).encode())
        self.worked.clear()
