"""Defines the functions of `import heliostat`: load, check, and train a job, read a run, generate with a model, and plan exact
data.

Each function does the same as the command with the same name. Where the command prints an error, the function raises a
HeliostatError with one line. docs/python-api.md is the reference.
"""

from __future__ import annotations

import itertools
import json
import operator
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import overload

from heliostat import schema
from heliostat.api.exact_stream import ExactStream
from heliostat.api.run_handle import Run
from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.errors import ConfigError, HeliostatError
from heliostat.recipes.protocol import Generated
from heliostat.text import brief
from heliostat.validation import check as checks
from heliostat.validation.check import Checked

__all__ = ["Checked", "ExactStream", "Generated", "Job", "Run", "check", "datasets", "generate", "load_job", "prepare", "train"]

PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"  # the complete package, because users also call objects that the API returns
Place = str | os.PathLike[str]
Overrides = Mapping[str, object] | Sequence[str]


def load_job(job: Place | Mapping[str, object], overrides: Overrides = ()) -> Job:
    """Loads a job from its YAML file, or from a mapping. Raises one ConfigError, which lists every wrong key.

    `overrides`: {"train.steps": 100}, or ["train.steps=100"] like `--set`. Relative paths are relative to the current folder.
    """
    if isinstance(job, Mapping):
        return checks.make_job(spec.apply(schema.renamed(Job, dict(job)), settings(overrides)), "job")
    return checks.load_job(_path("job", job, "a job file, its mapping, or a Job"), settings(overrides))


def check(job: Job | Place, cluster: Place | None = None) -> Checked:
    """Finds everything wrong with a job before anything starts: the model, the machine, the stores, the datasets.

    `cluster`: the file of the cluster that will run the job. The default is this machine, or the cluster in RAY_ADDRESS.
    """
    from heliostat.plan import auto

    cluster_file = Path(cluster) if cluster is not None else None
    wanted = _job(job, cluster=cluster_file)
    return checks.check(auto.settled(wanted, cluster_file), cluster_file)


def prepare(pipeline: Place, overrides: Overrides = (), force: bool = False) -> dict[str, object]:
    """Makes a dataset from a pipeline's YAML file. Does nothing if the dataset is up to date, unless `force` is set.

    Returns the report that `heliostat data prepare --json` prints: dataset, digest, tokens, dropped, and more.
    """
    from heliostat.curation.prepare import prepare as run

    return run(_path("pipeline", pipeline, "a pipeline file"), settings(overrides), force=force)


def train(
    job: Job | Place, *, resume: bool = False, overwrite: bool = False, allow_data_change: bool = False, verbose: bool = False
) -> Run:
    """Trains a job to the last step, exports and registers the trained model, and returns the run.

    `resume`: continues from the run's last checkpoint, if there is one. `overwrite`: first deletes the run with this name.
    `allow_data_change`: resumes with different data, as a new segment. The function blocks, and writes its progress to standard
    error. On Ctrl-C or SIGTERM, the function saves a checkpoint and raises StoppedError.
    """
    from heliostat.plan import auto
    from heliostat.training.run import train_job

    job = auto.settled(_job(job, resume=resume), resume=resume)
    train_job(job, resume, overwrite, allow_data_change, verbose)
    return Run(job.run_folder.uri, job.mlflow.uri)


@overload
def generate(  # type: ignore[overload-overlap]  # a string is a sequence of strings
    model: Place, prompts: str, *, seed: int = 0, out: str | None = None, tracking_uri: str | None = None, **options: object
) -> Generated: ...


@overload
def generate(
    model: Place,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    out: str | None = None,
    tracking_uri: str | None = None,
    **options: object,
) -> list[Generated]: ...


def generate(
    model: Place,
    prompts: str | Sequence[str],
    *,
    seed: int = 0,
    out: str | None = None,
    tracking_uri: str | None = None,
    **options: object,
) -> Generated | list[Generated]:
    """Generates text or images with a model in this process. Returns one answer for a prompt. For a list of prompts, returns a
    list of answers, the i-th with seed + i.

    `model`: an exported folder, models:/NAME/VERSION, or a run id. `out`: the file of an image (optional for text), or the
    folder for the images of several prompts. `options`: the command's options without dashes, for example `max_tokens=64` or
    `steps=20`.
    """
    from heliostat.inference.generate import answer
    from heliostat.storage.model_sources import default_uri
    from heliostat.tracking.models import resolve

    if not isinstance(prompts, str) and not (isinstance(prompts, Sequence) and all(isinstance(p, str) for p in prompts)):
        raise ConfigError(f"prompts: expected a text or a list of texts, got {brief(repr(prompts))}")
    try:
        first = operator.index(seed)  # accepts NumPy's integers, too
    except TypeError as e:
        raise ConfigError(f"seed: expected an integer, got {brief(repr(seed))}") from e
    place = model if isinstance(model, str) else str(_path("model", model, "a folder, models:/NAME/VERSION, or a run id"))
    return answer(resolve(place, tracking_uri or default_uri()), prompts, options, first, out)


def datasets(
    data: Mapping[str, object] | Job,
    *,
    folder: str,
    steps: int | None = None,
    global_batch_size: int | None = None,
    held_out: float = 0.0,
    global_batch: int | None = None,
) -> ExactStream:
    """Plans the exact, elastic order of samples for your own `TorchTrainer`. See `heliostat.api.exact_stream`.

    `data`: a complete Job, or the keys of a job's `data`. With keys, also pass `steps`, `global_batch_size` (samples per step,
    summed over all workers), and `held_out` (the fraction of samples to leave out). `folder`: the folder for the plan, the
    receipts, and the list of bad samples. If the folder has a plan, the stream continues with this plan. Raises ConfigError if
    the samples would differ from those of this plan.
    """
    from heliostat.api.exact_stream import data_job, plan_stream

    if global_batch is not None and global_batch_size is not None:
        raise ConfigError("heliostat.datasets: global_batch is the old name of global_batch_size, and both are set")
    global_batch_size = global_batch_size if global_batch is None else global_batch
    if not isinstance(data, Job | Mapping):
        raise ConfigError(f"data: expected the keys of a job's data, or a Job, got {brief(repr(data))}")
    if isinstance(data, Job):
        if steps is not None or global_batch_size is not None or held_out:
            raise ConfigError(
                "heliostat.datasets: steps, global_batch_size, and held_out come from the job. Leave out these arguments"
            )
        return plan_stream(data, folder)
    if steps is None or global_batch_size is None:
        raise ConfigError(
            "heliostat.datasets: steps and global_batch_size are required. global_batch_size counts the samples per step "
            "summed over all workers"
        )
    return plan_stream(data_job(data, steps, global_batch_size, held_out), folder)


def settings(overrides: Overrides) -> list[str]:
    """Converts the overrides to settings in the form of `--set`."""
    if isinstance(overrides, Mapping):
        return [f"{key}={_json(key, value)}" for key, value in overrides.items()]
    lines = [overrides] if isinstance(overrides, str) else overrides
    if not (isinstance(lines, Sequence) and all(isinstance(one, str) for one in lines)):
        raise ConfigError(f'overrides: expected a mapping, or a list of "key.path=value", got {brief(repr(overrides))}')
    return list(lines)


def _json(key: str, value: object) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"overrides: {key}: YAML can't represent {brief(repr(value))} ({e})") from e


def _path(key: str, value: object, wanted: str) -> Path:
    """Returns a path argument as a Path. If the argument has a different type, raises a ConfigError that begins with the
    argument's name."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{key}: expected {wanted}, got {brief(repr(value))}")
    return Path(value)


def _job(job: Job | Place | Mapping[str, object], cluster: Path | None = None, resume: bool = False) -> Job:
    if isinstance(job, Job):
        return job
    if isinstance(job, Mapping):
        return checks.make_job(spec.apply(schema.renamed(Job, dict(job)), []), "job", cluster, resume)
    return checks.load_job(_path("job", job, "a job file, its mapping, or a Job"), cluster=cluster, resume=resume)


def install() -> None:
    """Installs a hook that prints an uncaught error in one line if the user can fix the error. The previous hook handles all
    other errors.

    The error keeps its traceback and its cause.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, HeliostatError) and error.exit_code == 2:
            sys.stderr.write(shown(error, trace))
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def shown(error: HeliostatError, trace: TracebackType | None) -> str:
    """Formats an error: first the traceback's frames in the user's code, then the error's message."""
    theirs = list(itertools.takewhile(lambda frame: not frame.filename.startswith(PACKAGE), traceback.extract_tb(trace)))
    head = ["Traceback (most recent call last):\n", *traceback.format_list(theirs)] if theirs else []
    return "".join([*head, f"{type(error).__module__}.{type(error).__qualname__}: {error}\n"])


install()
