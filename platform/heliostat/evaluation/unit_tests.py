"""Scores the code that a model writes by unit tests that it has not seen: a task file with the key `unit_tests`.

    task: functions
    unit_tests: "{{tests}}"                     # Python, run behind the question and the answer; a template as doc_to_text
    doc_to_text: "{{prompt}}"
    generation_kwargs: {until: ["\\ndef ", "\\nclass "], max_gen_toks: 256}

lm-eval asks the model, and the answer is run in a sandbox (`box`). Its score is pass@1: the share of answers that pass.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from heliostat.config.fields import Json
from heliostat.errors import ConfigError
from heliostat.evaluation import measures
from heliostat.evaluation.programs import box
from heliostat.evaluation.suite import Row

KEY, KIND, METRIC = "unit_tests", "unit_tests", "pass@1"
LAST = "take_first"  # the filter that makes one answer of a list
ITS_OWN = ("output_type", "metric_list", "doc_to_target", "doc_to_choice", "num_fewshot")
SIDE_BY_SIDE = 4  # programs, at most: each may take as much memory as its limit


def arranged(config: dict[str, object], allowed: bool, where: object) -> dict[str, object]:
    """Returns the task that lm-eval is to ask for a task file with unit tests.

    ConfigError if the suite does not allow them, this machine cannot shut programs in, or the file says more than can be meant.
    """
    template = config[KEY]
    if not isinstance(template, str) or not template.strip():
        raise ConfigError(f"{where}: {KEY}: {template!r} is no template of tests, such as '{{{{tests}}}}'")
    if unfit := [key for key in ITS_OWN if key in config]:
        raise ConfigError(f"{where}: {unfit[0]}: does not go with {KEY}; the model writes, and {METRIC} is the score")
    if not allowed:
        raise ConfigError(
            f"{where}: {KEY}: runs what the model writes, and the suite does not allow it; "
            "read docs/benchmark.md#unit-tests, then set run_code: true"
        )
    try:
        box.require()
    except ConfigError as e:
        raise ConfigError(f"{where}: {KEY}: {e}") from e
    asked = {key: value for key, value in config.items() if key != KEY}
    return asked | {"output_type": "generate_until", "doc_to_target": template, "num_fewshot": 0,
                    "metric_list": [{"metric": "exact_match"}]}  # fmt: skip


def require_one_answer(config: dict[str, Json], where: object) -> None:
    """Raises ConfigError if a chain of filters leaves a list of answers to each question: one of them is run."""
    for chain in config.get("filter_list") or []:
        if [step["function"] for step in chain["filter"] or []][-1:] != [LAST]:
            raise ConfigError(
                f"{where}: filter_list: {chain['name']}: leaves a list of answers, and one is run; end it with {LAST}"
            )


def verdicts(programs: Sequence[tuple[str, str]]) -> list[str]:
    """Runs programs, each with its tests, a few at a time; returns how each ended."""
    with ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        return [outcome.verdict for outcome in pool.map(lambda one: box.run(*one), programs)]


def row(facts: Row, ended: Sequence[str]) -> Row:
    """Puts the score of the tests into the row of a task. `programs`: how many ended how."""
    values, counts = passed(ended), Counter(ended)
    score = sum(values) / len(values)
    low, high = measures.wilson(score, len(values))
    return facts | {
        "kind": KIND, "metric": METRIC, "higher_is_better": True, "score": score,
        "stderr": math.sqrt(score * (1 - score) / max(1, len(values) - 1)), "low": low, "high": high, "chance": 0.0,
        "centred": score, "metrics": {f"{METRIC},{facts['filter']}": score}, "edit_similarity": None,
        "programs": {verdict: counts[verdict] for verdict in box.VERDICTS},
    }  # fmt: skip


def passed(ended: Sequence[str]) -> list[int]:
    """Returns the value of each example: 1 if its program passed, else 0."""
    return [int(one == box.PASSED) for one in ended]
