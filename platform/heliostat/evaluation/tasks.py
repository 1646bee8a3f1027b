"""Builds a suite's tasks with lm-eval's classes, from the checked task files of a folder. Without a folder, uses lm-eval's own
task files."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heliostat.errors import ConfigError, HeliostatError
from heliostat.evaluation import task_files, unit_tests
from heliostat.evaluation.suite import Suite, SuiteEntry
from heliostat.schema import nearest
from heliostat.storage.locations import Location
from heliostat.text import brief

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask

KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
REFUSED = {  # keys of a task file that would run code, or that need other models than language models
    "class": "heliostat doesn't run tasks written in Python. Write a task file",
    "custom_dataset": "heliostat doesn't run code that makes data sets. Write the data set as JSON lines or Parquet",
    "process_results": "heliostat doesn't run scoring code. Use lm-eval's metrics",
    "use_prompt": "not supported. Write the prompt as doc_to_text and doc_to_target",
    "unsafe_code": "heliostat runs the model's code only for `unit_tests`. Write the tests under the key `unit_tests`",
    "doc_to_image": "the model reads text only",
    "doc_to_audio": "the model reads text only",
}
GENERATION = ("until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens", "max_tokens", "max_length",
              "repetition_penalty", "num_beams")  # fmt: skip
STRUCTURE = ("tag", "group", "task_list", "task")


@dataclass(frozen=True)
class EvalTask:
    """Contains a task of lm-eval, and the task's entry in the suite. `metric`, `filter`: the metric and the filter that give the
    task's score.

    `runs_code`: whether the score comes from unit tests of the generated code.
    """

    entry: SuiteEntry
    task: ConfigurableTask
    metric: str
    filter: str
    source: str  # the task's file, relative to the folder, or "lm-eval"
    runs_code: bool = False

    @property
    def name(self) -> str:
        return self.entry.task


def build(suite: Suite, folder: Location, cache: Path) -> list[EvalTask]:
    """Builds all tasks of a suite, and reads their data sets. `cache`: the folder for copies of files from S3. Raises
    ConfigError for the first invalid task."""
    root = task_files.download(folder, cache / "tasks")
    return [_build(suite, entry, folder, root, cache) for entry in suite.tasks]


def _build(suite: Suite, entry: SuiteEntry, folder: Location, root: Path, cache: Path) -> EvalTask:
    file = task_files.find(root, entry.task)
    source, runs_code = "lm-eval" if file is None else str(file.relative_to(root)), False
    if file is None:
        task = _own(entry.task, root, folder)
    else:
        where = folder.join(*source.split("/"))
        config = task_files.read(root, file)
        if runs_code := unit_tests.KEY in config:
            config = unit_tests.arranged(config, suite.run_code, where)
        check(config, where)
        if runs_code:
            unit_tests.require_one_answer(config, where)
        task = _made({k: v for k, v in config.items() if k not in ("tag", "group", "task_list")}, where, folder, cache)
    if runs_code and (entry.fewshot or entry.metric):
        raise ConfigError(
            f"tasks: {entry.task}: {'fewshot' if entry.fewshot else 'metric'}: not supported with unit tests. Remove this key"
        )
    _settle(task, suite, entry)
    metric, filter_ = _score(task, entry)
    return EvalTask(entry, task, metric, filter_, source, runs_code)


def _made(config: dict[str, object], where: Location, folder: Location, cache: Path) -> ConfigurableTask:
    from lm_eval.api.task import ConfigurableTask

    config = task_files.placed(config, folder, cache, where)
    try:
        return ConfigurableTask(config=config)
    except HeliostatError:
        raise
    except Exception as e:
        raise ConfigError(f"{where}: can't build the task: {_said(e, config)}") from e


def _own(name: str, root: Path, folder: Location) -> ConfigurableTask:
    """Builds one of lm-eval's own tasks. Raises ConfigError if lm-eval has no task with that name, or if the task's data set
    isn't available."""
    from lm_eval import tasks
    from lm_eval.api.task import ConfigurableTask

    brought = Path(tasks.__file__).parent
    files = task_files.naming(brought, "task", name)
    if not files:
        raise ConfigError(f"tasks: {name!r} {_unknown(name, root, folder, brought)}")
    try:  # loads only this task's file: indexing all tasks of lm-eval takes a minute
        task = tasks.TaskManager(include_defaults=False).load([str(files[0])])["tasks"][name]
    except Exception as e:
        raise ConfigError(f"tasks: {name!r}: can't build this task of lm-eval: {_said(e, {})}") from e
    if not isinstance(task, ConfigurableTask) or getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"tasks: {name!r} runs its own code, or the model's code. Use another task")
    return task


def _unknown(name: str, root: Path, folder: Location, brought: Path) -> str:
    """Returns the message for a name that no task has. The message suggests the most similar name."""
    if task_files.naming(brought, "group", name):
        return "is a group of tasks in lm-eval. List the group's tasks instead"
    near = difflib.get_close_matches(name, [*task_files.names(root), *task_files.names(brought)], n=1)
    return f"isn't a task of {folder} or of lm-eval" + (f". Did you mean {near[0]!r}?" if near else "")


def _said(error: Exception, config: dict[str, object]) -> str:
    """Returns a message with the reason why a task couldn't be built."""
    kind = type(error).__name__
    if kind in ("ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectTimeout"):
        return (
            f"its data set {config.get('dataset_path', '')!r} is on the Hugging Face Hub, which doesn't answer ({kind}). "
            "Connect this machine to the network, or use local files"
        )
    return f"{kind}: {brief(error)}"


def _settle(task: ConfigurableTask, suite: Suite, entry: SuiteEntry) -> None:
    """Sets the number of few-shot examples, and the random seed that selects these examples, by lm-eval's rules."""
    own = task.get_config("num_fewshot")
    if entry.fewshot is not None:
        own = entry.fewshot
    elif suite.fewshot is not None and own != 0:
        own = suite.fewshot
    task.set_config(key="num_fewshot", value=own or 0)
    task.set_fewshot_seed(seed=suite.seed)


def _score(task: ConfigurableTask, entry: SuiteEntry) -> tuple[str, str]:
    """Returns the metric and the filter of a task's score. Raises ConfigError if the suite names a metric or filter that the task
    doesn't have."""
    metrics = list(task.aggregation())
    filters = [ensemble.name for ensemble in task._filters]
    metric, _, filter_ = (entry.metric or metrics[0]).partition(",")
    if metric not in metrics:
        raise ConfigError(f"tasks: {entry.task}: metric: {metric!r} isn't a metric of the task. Metrics: {', '.join(metrics)}")
    if filter_ and filter_ not in filters:
        raise ConfigError(f"tasks: {entry.task}: metric: {filter_!r} isn't a filter of the task. Filters: {', '.join(filters)}")
    return metric, filter_ or filters[0]


def check(config: dict[str, object], where: object) -> None:
    """Raises ConfigError if lm-eval would reject the task, or run code for it. The error names the key, the value, and the
    fix."""
    from lm_eval.config.task import TaskConfig

    known = [field.name for field in dataclasses.fields(TaskConfig)]
    for key, why in REFUSED.items():
        if config.get(key):
            raise ConfigError(f"{where}: {key}: {why}")
    if isinstance(config.get("group"), str) or not isinstance(config.get("task"), str):
        raise ConfigError(f"{where}: is a group of tasks. List the group's tasks in the suite")
    if unknown := [key for key in config if key not in known and key not in STRUCTURE]:
        raise ConfigError(f"{where}: {unknown[0]}: unknown key{nearest(str(unknown[0]), known)}")
    kind = config.get("output_type", "generate_until")
    if kind not in KINDS:
        raise ConfigError(f"{where}: output_type: {kind!r} isn't a choice{nearest(str(kind), list(KINDS))}")
    if not (config.get("test_split") or config.get("validation_split")):
        raise ConfigError(f"{where}: test_split: required. Set it to the split of the data set to score")
    _metrics(config.get("metric_list"), where)
    _filters(config.get("filter_list"), where)
    _generation(config.get("generation_kwargs"), where)


def _metrics(listed: object, where: object) -> None:
    from lm_eval.api import metrics, registry

    assert metrics  # importing it registers lm-eval's metrics
    known, ways = list(registry.metric_registry.keys()), list(registry.aggregation_registry.keys())
    for entry in _entries(listed, "metric_list", "metric", where):
        name, way = entry["metric"], entry.get("aggregation")
        if name not in known or entry.get("hf_evaluate"):
            raise ConfigError(f"{where}: metric_list: {name!r} isn't a metric of lm-eval{nearest(str(name), known)}")
        if way is not None and way not in ways:
            raise ConfigError(f"{where}: metric_list: {name}: aggregation: {way!r} isn't a choice{nearest(str(way), ways)}")


def _filters(listed: object, where: object) -> None:
    from lm_eval import filters
    from lm_eval.api import registry

    assert filters  # importing it registers lm-eval's filters
    known = [name for name in registry.filter_registry.keys() if name != "custom"]  # noqa: SIM118 (not a dictionary)
    for chain in _entries(listed, "filter_list", "name", where):
        for step in _entries(chain.get("filter"), "filter_list: filter", "function", where):
            if step["function"] not in known:
                raise ConfigError(
                    f"{where}: filter_list: {step['function']!r} isn't a filter{nearest(str(step['function']), known)}"
                )


def _generation(options: object, where: object) -> None:
    if options is None:
        return
    if not isinstance(options, dict):
        raise ConfigError(
            f"{where}: generation_kwargs: expected a mapping, got {options!r}. Write for example {{max_gen_toks: 64}}"
        )
    if unknown := [key for key in options if key not in GENERATION]:  # transformers has an option that downloads code
        raise ConfigError(
            f"{where}: generation_kwargs: {unknown[0]!r} isn't supported{nearest(str(unknown[0]), list(GENERATION))}"
        )


def _entries(listed: object, key: str, name: str, where: object) -> list[dict[str, object]]:
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(one, dict) and isinstance(one.get(name), str) for one in listed):
        raise ConfigError(f"{where}: {key}: expected a list of mappings, each with the text {name!r}")
    return listed
