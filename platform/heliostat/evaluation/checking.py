"""Checks a task file against what lm-eval knows, before it is built: keys, kind, metrics, filters, options of generation."""

from __future__ import annotations

import dataclasses
from typing import Any

from heliostat.errors import ConfigError
from heliostat.schema import nearest

KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
REFUSED = {  # keys by which a task file would run code, or that are of other models than of text
    "class": "a task written in Python is not run; write it as a task file",
    "custom_dataset": "a data set that code makes is not taken; write it as JSON lines or Parquet",
    "process_results": "code that scores is not run; take metrics of lm-eval's",
    "use_prompt": "write the prompt as doc_to_text and doc_to_target",
    "unsafe_code": "what a model writes is run for `unit_tests` alone; write the task with them",
    "doc_to_image": "the model is of text",
    "doc_to_audio": "the model is of text",
}
GENERATION = ("until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens", "max_tokens", "max_length",
              "repetition_penalty", "num_beams")  # fmt: skip
STRUCTURE = ("tag", "group", "task_list", "task")


def check(config: dict[str, Any], where: object) -> None:
    """Raises ConfigError that names the key, the value and the fix, if lm-eval would refuse the task, or run code for it."""
    from lm_eval.config.task import TaskConfig

    known = [field.name for field in dataclasses.fields(TaskConfig)]
    for key, why in REFUSED.items():
        if config.get(key):
            raise ConfigError(f"{where}: {key}: {why}")
    if isinstance(config.get("group"), str) or not isinstance(config.get("task"), str):
        raise ConfigError(f"{where}: is a group of tasks; name its tasks in the suite")
    if unknown := [key for key in config if key not in known and key not in STRUCTURE]:
        raise ConfigError(f"{where}: {unknown[0]}: unknown key{nearest(str(unknown[0]), known)}")
    kind = config.get("output_type", "generate_until")
    if kind not in KINDS:
        raise ConfigError(f"{where}: output_type: {kind!r} is not a choice{nearest(str(kind), list(KINDS))}")
    if not (config.get("test_split") or config.get("validation_split")):
        raise ConfigError(f"{where}: test_split is required; name the split of the data set that is scored")
    _metrics(config.get("metric_list"), where)
    _filters(config.get("filter_list"), where)
    _generation(config.get("generation_kwargs"), where)


def _metrics(listed: Any, where: object) -> None:
    from lm_eval.api import metrics, registry

    assert metrics  # registers them
    known, ways = list(registry.metric_registry.keys()), list(registry.aggregation_registry.keys())
    for entry in _entries(listed, "metric_list", "metric", where):
        name, way = entry["metric"], entry.get("aggregation")
        if name not in known or entry.get("hf_evaluate"):
            raise ConfigError(f"{where}: metric_list: {name!r} is no metric of lm-eval's{nearest(str(name), known)}")
        if way is not None and way not in ways:
            raise ConfigError(f"{where}: metric_list: {name}: aggregation: {way!r} is not a choice{nearest(str(way), ways)}")


def _filters(listed: Any, where: object) -> None:
    from lm_eval import filters
    from lm_eval.api import registry

    assert filters  # registers them
    known = [name for name in registry.filter_registry.keys() if name != "custom"]  # noqa: SIM118 (it is no dictionary)
    for chain in _entries(listed, "filter_list", "name", where):
        for step in _entries(chain.get("filter"), "filter_list: filter", "function", where):
            if step["function"] not in known:
                raise ConfigError(
                    f"{where}: filter_list: {step['function']!r} is no filter{nearest(str(step['function']), known)}"
                )


def _generation(options: Any, where: object) -> None:
    if options is None:
        return
    if not isinstance(options, dict):
        raise ConfigError(f"{where}: generation_kwargs: {options!r} is no mapping")
    if unknown := [key for key in options if key not in GENERATION]:  # one of transformers' would fetch code
        raise ConfigError(f"{where}: generation_kwargs: {unknown[0]!r} is not taken{nearest(str(unknown[0]), list(GENERATION))}")


def _entries(listed: Any, key: str, name: str, where: object) -> list[dict[str, Any]]:
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(one, dict) and isinstance(one.get(name), str) for one in listed):
        raise ConfigError(f"{where}: {key}: must be a list of mappings, each with {name!r}, a text")
    return listed
