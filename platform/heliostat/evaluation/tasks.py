"""Builds a suite's tasks as lm-eval's own: from task files below a folder, else from those that lm-eval brings."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError, HeliostatError
from heliostat.evaluation import checking, task_data, task_files
from heliostat.evaluation.programs import unit_tests
from heliostat.evaluation.suite import Entry, Suite
from heliostat.storage.locations import Location
from heliostat.text import brief


@dataclass(frozen=True)
class Task:
    """Holds a task of lm-eval's, with what the suite says of it. `metric`, `filter`: of what is its score; `runs_code`: it is by
    unit tests of what the model writes."""

    entry: Entry
    made: Any
    metric: str
    filter: str
    source: str  # its file below the folder, or "lm-eval"
    runs_code: bool = False

    @property
    def name(self) -> str:
        return self.entry.task


def build(suite: Suite, folder: Location, cache: Path) -> list[Task]:
    """Builds all tasks of a suite, data sets read; ConfigError for the first that is wrong. `cache`: where copies go."""
    root = task_files.download(folder, cache / "tasks")
    return [_build(suite, entry, folder, root, cache) for entry in suite.tasks]


def _build(suite: Suite, entry: Entry, folder: Location, root: Path, cache: Path) -> Task:
    file = task_files.find(root, entry.task)
    source, runs_code = "lm-eval" if file is None else str(file.relative_to(root)), False
    if file is None:
        made = _own(entry.task, root, folder)
    else:
        where = folder.join(*source.split("/"))
        config = task_files.read(root, file)
        if runs_code := unit_tests.KEY in config:
            config = unit_tests.arranged(config, suite.run_code, where)
        checking.check(config, where)
        if runs_code:
            unit_tests.require_one_answer(config, where)
        made = _made({k: v for k, v in config.items() if k not in ("tag", "group", "task_list")}, where, folder, cache)
    if runs_code and (entry.fewshot or entry.metric):
        raise ConfigError(
            f"tasks: {entry.task}: {'fewshot' if entry.fewshot else 'metric'}: does not go with unit tests; take it out"
        )
    _settle(made, suite, entry)
    metric, filter_ = _score(made, entry)
    return Task(entry, made, metric, filter_, source, runs_code)


def _made(config: dict[str, Any], where: Location, folder: Location, cache: Path) -> Any:
    from lm_eval.api.task import ConfigurableTask

    config = task_data.placed(config, folder, cache, where)
    try:
        return ConfigurableTask(config=config)
    except HeliostatError:
        raise
    except Exception as e:
        raise ConfigError(f"{where}: the task cannot be built: {_said(e, config)}") from e


def _own(name: str, root: Path, folder: Location) -> Any:
    """Builds a task that lm-eval brings; ConfigError if it has none of that name, or its data set cannot be had."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    brought = Path(tasks.__file__).parent
    files = task_files.naming(brought, "task", name)
    if not files:
        raise ConfigError(f"tasks: {name!r} {_unknown(name, root, folder, brought)}")
    try:  # by its file: to index all that lm-eval brings takes a minute
        made = tasks.TaskManager(include_defaults=False).load([str(files[0])])["tasks"][name]
    except Exception as e:
        raise ConfigError(f"tasks: {name!r}, lm-eval's own, cannot be built: {_said(e, {})}") from e
    if not isinstance(made, ConfigurableTask) or getattr(made, "UNSAFE_CODE", False):
        raise ConfigError(f"tasks: {name!r} is a task of its own code, or runs what the model writes; take another")
    return made


def _unknown(name: str, root: Path, folder: Location, brought: Path) -> str:
    """Says that there is no task of a name, and which is near."""
    if task_files.naming(brought, "group", name):
        return "is a group of lm-eval's; name its tasks"
    near = difflib.get_close_matches(name, [*task_files.names(root), *task_files.names(brought)], n=1)
    return f"is no task of {folder}, nor of lm-eval's" + (f"; did you mean {near[0]!r}?" if near else "")


def _said(error: Exception, config: dict[str, Any]) -> str:
    """Explains why a task was not built."""
    kind = type(error).__name__
    if kind in ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout"):
        return f"its data set {config.get('dataset_path', '')!r} is of the Hugging Face hub, which does not answer ({kind})"
    return f"{kind}: {brief(error)}"


def _settle(made: Any, suite: Suite, entry: Entry) -> None:
    """Sets the number of solved examples, and the seed of their choice, by lm-eval's rules."""
    own = made.get_config("num_fewshot")
    if entry.fewshot is not None:
        own = entry.fewshot
    elif suite.fewshot is not None and own != 0:
        own = suite.fewshot
    made.set_config(key="num_fewshot", value=own or 0)
    made.set_fewshot_seed(seed=suite.seed)


def _score(made: Any, entry: Entry) -> tuple[str, str]:
    """Finds the metric and the filter of a task's score; ConfigError if the suite names one that the task has not."""
    metrics = list(made.aggregation())
    filters = [ensemble.name for ensemble in made._filters]
    metric, _, filter_ = (entry.metric or metrics[0]).partition(",")
    if metric not in metrics:
        raise ConfigError(f"tasks: {entry.task}: metric: {metric!r} is none of the task's; there are {', '.join(metrics)}")
    if filter_ and filter_ not in filters:
        raise ConfigError(
            f"tasks: {entry.task}: metric: {filter_!r} is none of the task's filters; there are {', '.join(filters)}"
        )
    return metric, filter_ or filters[0]
