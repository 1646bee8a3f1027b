"""Scores a model on tasks with lm-eval's requests, batches, and metrics. So the scores equal the scores that lm-eval's own
command computes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from heliostat.errors import ConfigError, HeliostatError
from heliostat.evaluation import measures, unit_tests
from heliostat.evaluation.suite import Row, Suite
from heliostat.evaluation.tasks import EvalTask
from heliostat.recipes import exported
from heliostat.recipes.conformance import is_language_model
from heliostat.recipes.precision import compute_dtype, dtype_of
from heliostat.recipes.pretrained import from_folder
from heliostat.recipes.text.generator import whole
from heliostat.text import brief

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

Sample = dict[str, Any]  # lm-eval's record of an example and the model's answer
RESAMPLES = 1000  # bootstrap samples, for metrics whose standard error has no formula (perplexity, BLEU)


def require_language_model(folder: Path) -> None:
    """Raises ConfigError unless the folder contains a language model."""
    if not is_language_model(exported.read(folder).recipe):
        raise ConfigError(
            f"{folder}: isn't a language model, but benchmarks need a language model. Score the model on its dataset: heliostat "
            "model evaluate"
        )


def load(folder: Path, suite: Suite) -> HFLM:
    """Loads a model as an object of lm-eval's class `HFLM`. Raises ConfigError if a weight is missing, or if the model needs
    code from its folder."""
    from lm_eval.models.huggingface import HFLM

    with exported.using(folder):
        dtype = compute_dtype(folder) if suite.dtype == "auto" else dtype_of(suite.dtype)
        model = whole("model", folder, dtype=dtype).eval().to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = from_folder("model", transformers.AutoTokenizer, folder)
        if suite.chat and tokenizer.chat_template is None:
            raise ConfigError(f"chat: the tokenizer in {folder} has no chat template. Remove this key from the suite")
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=suite.batch)


def score(model: HFLM, task: EvalTask, suite: Suite) -> tuple[Row, Sequence[float]]:
    """Scores a model on a task. Returns the task's row in the result, and each example's own value.

    Raises HeliostatError if lm-eval fails.
    """
    from lm_eval.evaluator import evaluate

    random.seed(suite.seed)
    np.random.seed(suite.seed)
    torch.manual_seed(suite.seed)
    try:
        evaluated = evaluate(
            model,
            {"tasks": {task.name: task.task}},
            limit=suite.examples,
            bootstrap_iters=RESAMPLES,
            apply_chat_template=suite.chat,
        )
    except HeliostatError:
        raise
    except Exception as e:
        raise HeliostatError(
            f"tasks: {task.name}: lm-eval can't score this task ({type(e).__name__}: {brief(e) or 'no reason given'}). "
            f"The model reads at most {model.max_length} tokens"
        ) from e
    samples = [one for one in evaluated["samples"][task.name] if one["filter"] == task.filter]
    row, values = _row(task, evaluated, samples, truncated(model, task)), [one[task.metric] for one in samples]
    if task.runs_code:
        written = [(task.task.doc_to_text(one["doc"]) + one["filtered_resps"][0], one["target"]) for one in samples]
        ended = unit_tests.verdicts(written)
        row, values = unit_tests.row(row, ended), unit_tests.passed(ended)
    return row | {"values": measures.averaged(row["score"], values)}, values


def _row(task: EvalTask, evaluated: Sample, samples: list[Sample], cut: int) -> Row:
    scores, name = evaluated["results"][task.name], task.name
    value, stderr = float(scores[f"{task.metric},{task.filter}"]), scores.get(f"{task.metric}_stderr,{task.filter}")
    stderr = float(stderr) if isinstance(stderr, int | float) else None
    kind = str(task.task.OUTPUT_TYPE)
    guessing = (
        task.entry.chance if task.entry.chance is not None else measures.chance(kind, task.metric, list(choices(task, samples)))
    )
    bounds = measures.interval(value, stderr, [one[task.metric] for one in samples])
    return {
        "task": name, "source": task.source, "kind": kind, "metric": task.metric, "filter": task.filter,
        "higher_is_better": evaluated["higher_is_better"][name].get(task.metric), "fewshot": evaluated["n-shot"][name],
        "score": value, "stderr": stderr, "low": bounds and bounds[0], "high": bounds and bounds[1],
        "chance": guessing, "centred": measures.centred(value, guessing),
        "examples": len(samples), "of": evaluated["n-samples"][name]["original"], "truncated": cut,
        "version": str(evaluated["versions"][name]),
        "metrics": {key: v for key, v in scores.items() if isinstance(v, int | float) and "," in key},
        "edit_similarity": similarity(samples) if kind == "generate_until" and not task.runs_code else None,
    }  # fmt: skip


def similarity(samples: list[Sample]) -> float | None:
    """Computes the mean edit similarity of the model's answers to the right answers. Returns None if the answers aren't texts."""
    pairs = [(one["filtered_resps"][0], one["target"]) for one in samples]
    if not pairs or not all(isinstance(text, str) for pair in pairs for text in pair):
        return None
    return sum(measures.edit_similarity(*pair) for pair in pairs) / len(pairs)


def choices(task: EvalTask, samples: list[Sample]) -> Iterator[tuple[int, int]]:
    """Yields (number of right choices, number of all choices) for each example of a multiple-choice task."""
    if task.task.OUTPUT_TYPE != "multiple_choice":
        return
    for one in samples:
        right = one["target"] if isinstance(one["target"], list) else [one["target"]]
        yield len(set(right)), len(task.task.doc_to_choice(one["doc"]))


def truncated(model: HFLM, task: EvalTask) -> int:
    """Counts the examples of which the model read only the end, because they are longer than the model's maximum length."""
    return len({one.doc_id for one in task.task.instances if _cut(model, one.request_type, one.args)})


def _cut(model: HFLM, kind: str, args: tuple[object, ...]) -> bool:
    if kind == "loglikelihood":
        before, behind = model._encode_pair(*args) if args[0] else ([0], model.tok_encode(args[1], add_special_tokens=False))
        return len(before) + len(behind) > model.max_length + 1
    if kind == "generate_until":
        from lm_eval.models.utils import normalize_gen_kwargs

        room = model.max_length - normalize_gen_kwargs(args[1], model.max_gen_toks)["max_gen_toks"]
        return len(model.tok_encode(args[0])) > room
    return False  # loglikelihood_rolling scores all tokens, in windows


def texts(task: EvalTask, suite: Suite) -> Iterator[str]:
    """Yields the text of each example: its question and its right answer. Few-shot examples before the question aren't
    included."""
    for doc in itertools.islice(task.task.eval_docs, suite.examples):
        question, target = task.task.doc_to_text(doc), task.task.doc_to_target(doc)
        known = task.task.doc_to_choice(doc) if task.task.config.doc_to_choice is not None else None
        question = known[question] if isinstance(question, int) and known else question
        target = target[0] if isinstance(target, list) and target else target
        target = known[target] if isinstance(target, int) and known and target < len(known) else target
        yield f"{question} {target}"
