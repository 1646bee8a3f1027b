"""Defines the job file: one YAML file describes one run. `load` validates the file; `docs/job.md` explains every key.

`sections` and `train_section` define the sections, and `rules` checks them together. A `Job` object is always valid.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ValidationError, ValidationInfo, model_validator

from heliostat import schema
from heliostat.config import file_kinds, rules, workspace
from heliostat.config.defaults import LENGTHS, Default, Devices, fill, here, set_steps
from heliostat.config.fields import LARGEST, Filled, Name
from heliostat.config.rules import sums_on_host
from heliostat.config.sections import Card, Checkpoint, Data, Evaluate, Limits, Mlflow, Retries, Watchdog, Workers
from heliostat.config.spikes import Spike
from heliostat.config.synonyms import SYNONYMS
from heliostat.config.train_section import NEWEST_RECIPES, RETIRED, Train
from heliostat.errors import ConfigError
from heliostat.optim import optimizers
from heliostat.schema import Strict, explain
from heliostat.storage import model_sources
from heliostat.storage.hub import names
from heliostat.storage.locations import Location
from heliostat.text import brief

log = logging.getLogger(__name__)
FindDevices = Callable[[], Devices]

BEFORE_KEYS: dict[str, str | int] = {
    "grad_accum_dtype": "same",
    "recipe_version": 1,
}  # values of runs from before these keys existed


class Job(Strict):
    synonyms = SYNONYMS

    name: Name
    """Name of the run. The run's folder is `storage/name`. `--resume` continues the run."""
    recipe: Annotated[str, Filled("from the keys of `model`; else `heliostat.recipes:CausalLM`")]
    """Import path of the recipe: the class that defines the model, the batch, and the loss."""
    model: dict[str, Any]
    """Keys of the recipe. CausalLM: `arch`, any key of this architecture's `transformers` config, and `init`
    (docs/training/initial-weights.md). Or `pretrained`, and keys that change the model's configuration: `FOLDER`,
    `ORG/NAME[@REVISION]` of the Hugging Face Hub, `s3://BUCKET/PREFIX`, or `models:/NAME/VERSION`
    (docs/training/pretrained.md#where-a-model-can-be). The model's tokenizer must have the same content as the
    datasets' tokenizer. SFT: see docs/fine-tuning.md#keys. DPO: see docs/preferences.md. TextToImage and Autoencoder: see
    docs/diffusion.md#models"""
    data: Data
    """Datasets to train on, and the order of their samples."""
    train: Train
    """Training: length, optimizer, precision, parallelism."""
    evaluate: Evaluate | None = None
    """Evaluation on held-out samples. Unset: no evaluation."""
    checkpoint: Annotated[Checkpoint, Filled("`every`: a tenth of `train.steps`, at most 1,000")]
    """When to save checkpoints, and which checkpoints to keep."""
    workers: Workers = Workers()
    """Number, resources, and placement of the workers."""
    limits: Limits = Limits()
    """Limits of time and cost. Empty: no limit."""
    retries: Retries = Retries()
    """Automatic retries after failures."""
    watchdog: Watchdog = Watchdog()
    """Time without progress after which heliostat ends and retries the run."""
    spike: Spike | None = None
    """Action on loss spikes, see docs/reliability/spikes.md. Unset: none."""
    storage: Annotated[str, Filled("`.heliostat/runs`")]
    """Folder of all runs, or `s3://bucket/prefix`."""
    mlflow: Annotated[Mlflow, Filled("the store that commands use")]
    """Tracking of the run, see docs/mlflow.md"""
    card: Card = Card()
    """Model card, which accompanies the model."""

    @property
    def last_step(self) -> int:
        """Returns the step at which training ends: `train.steps`, or `train.stop_after` if that step is earlier."""
        return min(self.train.steps, self.train.stop_after or self.train.steps)

    @property
    def accumulation(self) -> int:
        """Returns the number of micro-batches per worker and step (gradient accumulation). The number of workers must be
        fixed."""
        return self.train.global_batch_size // (self.replicas * self.train.micro_batch_size)

    @property
    def replicas(self) -> int:
        """Returns the number of replicas: groups of workers that share their samples. The number of workers must be fixed."""
        assert isinstance(self.workers.count, int)
        return self.workers.count // self.train.parallel.sharing

    def worker_counts(self, virtual_ranks: int | None = None) -> list[int]:
        """Lists, in ascending order, the numbers of workers that the job allows and that can process the virtual ranks.

        `virtual_ranks`: the resumed run's number of virtual ranks; None for a new run.
        """
        return self.train.worker_counts(virtual_ranks or self.virtual_ranks, self.workers.least, self.workers.most)

    def on(self, workers: int) -> Job:
        """Copies the job with a fixed number of workers."""
        return self.model_copy(update={"workers": self.workers.model_copy(update={"count": workers})})

    @property
    def virtual_ranks(self) -> int:
        """Returns the number of virtual ranks of a new run."""
        return self.data.virtual_ranks or self.train.global_batch_size // self.train.micro_batch_size

    @property
    def run_folder(self) -> Location:
        return Location(self.storage).join(self.name)

    @property
    def sources(self) -> list[Location]:
        return [Location(s.path) for s in self.data.sources]

    def dump(self) -> dict[str, Any]:
        """Dumps the job as plain data, with the keys of the file."""
        return json.loads(self.model_dump_json(by_alias=True))

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Job:
        faults = rules.faults(self)
        if faults and info.context is not None:
            info.context.extend(faults)
        elif faults:
            raise ValueError("\n  ".join(faults))
        return self


Samples = Callable[[Job], int]


def load(path: Path, settings: list[str] | None = None, samples: Samples | None = None, devices: FindDevices = here) -> Job:
    """Loads the job in a YAML file, with `key.path=value` settings applied. Relative paths are relative to the workspace."""
    return make(read(path, settings), str(path), samples, devices)


def read(path: Path, settings: list[str] | None = None) -> dict[str, Any]:
    """Reads a job file, replaces old names of keys, and applies settings. Doesn't validate the content."""
    return apply(file_kinds.read(Job, "job", path), settings or [])


def apply(raw: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """Applies `key.path=value` settings to a job.

    A setting of `train.steps`, `train.epochs`, or `train.tokens` removes the other two keys. A setting of `data.path` removes
    `data.sources`, and a setting of `data.sources` removes `data.path`.
    """
    data = raw.get("data")
    if isinstance(data, dict):
        if "path" in data and any(one.startswith("data.sources.") for one in settings):
            data = {"sources": [{"path": data["path"]}]} | {key: part for key, part in data.items() if key != "path"}
        for key, other in (("path", "sources"), ("sources", "path")):
            if any(one.startswith(f"data.{key}=") for one in settings):
                data = {name: part for name, part in data.items() if name != other}
        raw = raw | {"data": data}
    raw = schema.apply(raw, settings, Job)
    set_ = [key for key in LENGTHS if any(one.startswith(f"train.{key}=") for one in settings)]
    if len(set_) == 1 and isinstance(raw.get("train"), dict):
        raw["train"] = {key: part for key, part in raw["train"].items() if key in set_ or key not in (*LENGTHS, "steps_from")}
    return raw


def make(raw: dict[str, Any], where: str, samples: Samples | None = None, devices: FindDevices = here) -> Job:
    """Makes a job from a file's content: fills in defaults, and makes paths absolute. One ConfigError lists all faults.

    `samples`: a function that counts the training samples of a job's datasets, which `train.epochs` needs.
    """
    return resolve(schema.validate(Job, complete(raw, where, samples, devices)[0], where))


def complete(
    raw: dict[str, Any], where: str, samples: Samples | None = None, devices: FindDevices = here
) -> tuple[dict[str, Any], list[Default]]:
    """Fills in the defaults of a job. Returns the complete job, and the list of the defaults."""
    raw = schema.renamed(Job, raw)
    if isinstance(raw.get("train"), dict):
        for key in RETIRED & raw["train"].keys():
            log.warning("train.%s: this key no longer has an effect. Remove it", key)
    raw, filled = fill(raw, devices)
    train = raw.get("train")
    lengths = [key for key in LENGTHS if train.get(key) is not None] if isinstance(train, dict) else []
    if lengths == ["tokens"] and isinstance(data := raw.get("data"), dict) and "sequence_length" not in data:
        raise ConfigError(f"{where}: train.tokens: needs data.sequence_length. Set data.sequence_length, or use train.steps")
    if not isinstance(train, dict) or lengths != ["epochs"]:
        return raw, filled
    epochs, length = train["epochs"], {"steps": LARGEST}
    if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not 0 < epochs <= LARGEST:
        raise ConfigError(f"{where}: train.epochs: expected a number above 0, got {brief(repr(epochs))}. Write train.epochs: 2")
    draft = fill(raw | {"train": {k: v for k, v in train.items() if k != "epochs"} | length}, devices)[0]
    job = resolve(schema.validate(Job, draft, where))
    if samples is None:
        raise ConfigError("train.epochs: needs the datasets, which aren't read here. Set train.steps")
    count = samples(job)
    steps = max(1, math.ceil(epochs * count / job.train.global_batch_size))
    set_steps(train, steps, f"epochs: {epochs:g}")
    raw, rest = fill(raw, devices)
    why = f"{epochs:g} epochs of {count:,} samples / {job.train.global_batch_size}"
    return raw, [*filled, Default("train.steps", steps, why), *rest]


@dataclass(frozen=True)
class Draft:
    """Describes a job file that may have faults. `job`: the job without the wrong keys, or None. `faults`: the faults, one line
    each."""

    job: Job | None
    faults: list[str]
    filled: list[Default]


def draft(raw: dict[str, Any], devices: FindDevices = here) -> Draft:
    """Makes a job from the valid part of a file, and lists the faults. So later checks can run even if the file has faults."""
    train, lines, filled = raw.get("train"), list[str](), list[Default]()
    if isinstance(train, dict) and [key for key in LENGTHS if key in train] == ["epochs"]:
        raw = raw | {"train": {k: v for k, v in train.items() if k != "epochs"} | {"steps": LARGEST}}
    for _ in range(ROUNDS):
        whole, filled = fill(raw, devices)
        broken_rules: list[str] = []
        try:
            job = Job.model_validate(whole, context=broken_rules)
        except ValidationError as e:
            known = {line.partition(":")[0] for line in lines}
            lines += [line for line in explain(e, Job) if line.partition(":")[0] not in known]
            if (repaired := _repaired(whole, e)) is None:
                break
            raw = repaired
        else:
            try:
                job = resolve(job, [])
            except ConfigError as e:
                broken_rules.append(str(e))
            return Draft(job, list(dict.fromkeys([*lines, *broken_rules])), filled)
    return Draft(None, list(dict.fromkeys(lines)), filled)


ROUNDS = 5  # maximum number of repairs of a draft
PLACEHOLDERS: dict[tuple[str, ...], object] = {("name",): "unnamed", ("train",): {"steps": LARGEST}, ("train", "steps"): LARGEST}


def _repaired(raw: dict[str, Any], error: ValidationError) -> dict[str, Any] | None:
    """Returns a job without the values that an error lists, and with placeholders for missing keys.

    None if a missing key has no placeholder.
    """
    raw = copy.deepcopy(raw)
    for fault in error.errors():
        *parents, last = schema.walk(Job, fault["loc"])[1] or [""]
        part: Any = raw
        for key in parents:
            part = part[int(key)] if isinstance(part, list) else part[key] if isinstance(part, dict) else None
        missing = fault["type"] == "missing"
        if not isinstance(part, dict) or (missing and (*parents, last) not in PLACEHOLDERS):
            return None
        part.pop(last, None)
        if missing:
            part[last] = PLACEHOLDERS[*map(str, parents), str(last)]
    return raw


def settle(job: Job, recorded: dict[str, Any] | None) -> Job:
    """Fills in `train.grad_accum_dtype` and `train.recipe_version` if the job leaves them open.

    A resumed run keeps its values. If the run is older than these keys, the keys get the values in `BEFORE_KEYS`. A new run gets
    the newest values. Raises ConfigError if the run can't resume with the job's optimizer.
    """
    if recorded is not None:
        before = with_rules(recorded)["train"]
        optimizers.require_resumable(job.train.optimizer, before.get("optimizer", {}))
        values = {key: before.get(key) or first for key, first in BEFORE_KEYS.items()}
        if job.train.steps_from and (steps := before.get("steps")) and steps != job.train.steps:
            log.warning("train.steps: changed from %s to %s (%s)", steps, job.train.steps, job.train.steps_from)
    else:
        values = {"grad_accum_dtype": "fp32", "recipe_version": NEWEST_RECIPES}
    if sums_on_host(job):
        values["grad_accum_dtype"] = "same"
    unset = {key: value for key, value in values.items() if getattr(job.train, key) is None}
    return job.model_copy(update={"train": job.train.model_copy(update=unset)}) if unset else job


def renewed(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns a recorded job with the keys of this version. New keys get the values in `BEFORE_KEYS`, or their defaults.

    A job that isn't valid in this version is returned unchanged.
    """
    try:
        return Job.model_validate(with_rules(recorded)).dump()
    except ValidationError:
        return recorded


def with_rules(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns a recorded job with the current names of keys. Missing keys that are in `BEFORE_KEYS` get the values there."""
    recorded = schema.renamed(Job, recorded)
    train = recorded.get("train")
    return recorded | {"train": BEFORE_KEYS | train} if isinstance(train, dict) else recorded


def changed_keys(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lists the keys whose values differ between a recorded job and the current job (`now`).

    If only one of the jobs has a key, the key counts only if it is in the section `model`. So the new keys of a newer version of
    heliostat don't count.
    """
    return _changed(schema.renamed(Job, recorded), now)


def _changed(recorded: object, now: object, key: str = "") -> list[str]:
    if not isinstance(recorded, dict) or not isinstance(now, dict):
        return [] if recorded == now else [key]
    names = recorded.keys() | now.keys() if key.startswith("model") else recorded.keys() & now.keys()
    below = ((name, f"{key}.{name}" if key else name) for name in sorted(names))
    return [changed for name, path in below for changed in _changed(recorded.get(name), now.get(name), path)]


def resolve(job: Job, broken_rules: list[str] | None = None) -> Job:
    """Makes every path absolute, because Ray's workers run in other folders. Raises ConfigError for a job that can't train.

    `broken_rules`: a list that gets the broken rules between sections; without this list, a broken rule is an error. Checks that
    newer versions of heliostat added are in this function and not in `Job`, so that heliostat can still read the recorded jobs of
    older versions.
    """
    if job.workers.gpus not in (0, 1):
        raise ConfigError(
            f"workers.gpus: a worker trains on one GPU or none, not {job.workers.gpus:g}. Set workers.gpus to 1 or 0, "
            "and workers.count to the number of GPUs"
        )
    root = workspace.root()
    raw = job.dump()
    for i, source in enumerate(raw["data"]["sources"]):
        source["path"] = _absolute(f"data.sources.{i}.path", source["path"], root)
    raw["storage"] = _absolute("storage", job.storage, root)
    if job.evaluate and job.evaluate.benchmarks:
        raw["evaluate"]["benchmarks"]["suite"] = str(root / job.evaluate.benchmarks.suite)
    raw["model"] = _pretrained(raw["model"], root)
    if isinstance(samples := raw["model"].get("samples"), dict) and isinstance(samples.get("held_out"), str):
        samples["held_out"] = _absolute("model.samples.held_out", samples["held_out"], root)
    uri = job.mlflow.uri
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raw["mlflow"]["uri"] = f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    require_store("mlflow.uri", uri)
    return schema.validate(Job, raw, job.name, broken_rules)  # validated again, because two different paths may now be the same


def require_store(key: str, uri: str) -> None:
    """Checks that heliostat supports the scheme of an MLflow store's URI. If not, raises a ConfigError that names the key."""
    if not uri.startswith(("sqlite:", "http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise ConfigError(f"{key}: {uri!r} isn't an MLflow store. Use sqlite:///FILE or http://HOST:PORT")


def _pretrained(model: object, root: Path) -> object:
    """Makes every `pretrained: FOLDER` in the recipe's keys absolute, at any depth, also in lists. The name of a model of
    the Hub, S3, or MLflow stays unchanged, unless there is a folder with this name."""
    if isinstance(model, list):
        return [_pretrained(one, root) for one in model]
    if not isinstance(model, dict):
        return model
    return {k: _folder(v, root) if k == "pretrained" and isinstance(v, str) else _pretrained(v, root) for k, v in model.items()}


def _folder(value: str, root: Path) -> str:
    folder = root / value
    if model_sources.is_source(value) and not folder.exists():
        return value
    return value if names.model(value) and not folder.exists() else str(folder)


def _absolute(key: str, path: str, root: Path) -> str:
    try:
        return str(Location(path).absolute(root))
    except ConfigError as e:
        raise ConfigError(f"{key}: {e}") from e
