"""Makes a suite of a prepared dataset's held-out text: `heliostat make-suite DATASET --out FOLDER`.

    FOLDER/suite.yaml            what `heliostat benchmark` takes
    FOLDER/tasks/*.yaml          task files of lm-eval, which its own command takes too, run in FOLDER
    FOLDER/data/*.jsonl          the questions
    FOLDER/made.json             what they were made of

A model whose job holds out at least the same fraction of the dataset has not been trained on any of it.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from heliostat.config.fields import Json
from heliostat.data.infilling import FACT
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import documents
from heliostat.evaluation.held_out import questions
from heliostat.evaluation.held_out.questions import Ask, Question, WordedDocument
from heliostat.evaluation.suite import Result
from heliostat.storage.locations import Location

DOCUMENTS = 8  # that are read for each question that is asked for
MIDDLE_TOKENS = 48  # that a model may write for a middle
CHARS = 100_000  # of a document that is looked at
GREEDY = {"do_sample": False, "until": ["\n\n"], "max_gen_toks": 24}
FIRST_TWO = {"function": "regex", "regex_pattern": r"^\s*(\S+\s+\S+)"}
TWO_WORDS = {"name": "two_words", "filter": [FIRST_TWO, {"function": "take_first"}]}
Shape = dict[str, Json]  # keys of a task file
TASKS: dict[str, tuple[Ask, Shape]] = {  # `metric_list`: by what their values are put together
    "held_out_choice": (
        questions.choice,
        {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": {"acc": "mean", "acc_norm": "mean"}},
    ),
    "held_out_cloze": (
        questions.cloze,
        {"output_type": "loglikelihood", "metric_list": {"acc": "mean", "perplexity": "perplexity"}},
    ),
    "held_out_recall": (
        questions.recall,
        {"output_type": "generate_until", "generation_kwargs": GREEDY, "filter_list": [TWO_WORDS],
         "metric_list": {"exact_match": "mean"}},
    ),
}  # fmt: skip


def make(dataset: str, to: Path, count: int, fraction: float, seed: int) -> Result:
    """Writes the suite; ConfigError if too little is held out to ask anything about."""
    prepared = documents.open_text(Location(dataset))
    texts = _texts(prepared, fraction, DOCUMENTS * count, seed)
    if len(texts) < questions.CHOICES:
        raise ConfigError(
            f"--fraction: {fraction:g} of {dataset} holds out {len(texts)} documents of text, too few; give a larger one"
        )
    counts = {}
    for name, (ask, shape) in {**TASKS, **_of_middles(prepared)}.items():
        asked = list(questions.questions(ask, texts, count, seed))
        if asked:
            _write(to, name, shape, asked)
        counts[name] = len(asked)
    if not any(counts.values()):
        raise ConfigError(
            f"{dataset}: its held-out documents are too short to ask about; give a larger --fraction, or another dataset"
        )
    facts = {"dataset": dataset, "digest": prepared.digest, "fraction": fraction, "seed": seed, "documents": len(texts),
             "tasks": counts}  # fmt: skip
    (to / "made.json").write_text(json.dumps(facts, indent=1) + "\n")
    suite = {"name": "held-out", "folder": ".", "tasks": [name for name, asked in counts.items() if asked]}
    (to / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return {**facts, "suite": str(to / "suite.yaml")}


def _of_middles(prepared: Manifest) -> dict[str, tuple[Ask, Shape]]:
    """Makes the task of a dataset that is rearranged for filling in the middle: the model writes it, to the document's end."""
    if FACT not in prepared.meta:
        return {}
    end = documents.Documents(prepared).token(prepared.fact("end_of_document"))
    ask = questions.asking_for_middles(prepared.meta[FACT]["names"], prepared.meta[FACT]["spm_rate"] == 1)
    greedy = {"do_sample": False, "until": [end], "max_gen_toks": MIDDLE_TOKENS}
    shape = {"output_type": "generate_until", "generation_kwargs": greedy, "metric_list": {"exact_match": "mean"}}
    return {"held_out_middle": (ask, shape)}


def _texts(prepared: Manifest, fraction: float, most: int, seed: int) -> list[WordedDocument]:
    """Reads held-out documents, chunks in an order of the seed's, until there are enough; DataError if a chunk is damaged."""
    chunks, reader, kept = documents.held_out(prepared, fraction).tolist(), documents.Documents(prepared), list[WordedDocument]()
    random.Random(seed).shuffle(chunks)
    for texts in reader.texts(chunks):
        kept += [WordedDocument.of(text[:CHARS]) for text in texts]
        if len(kept) >= most:
            break
    if reader.damaged:
        raise DataError(reader.damaged[0])
    return [text for text in kept if len(text.words) >= questions.LEAST][:most]


def _write(to: Path, name: str, shape: Shape, asked: list[Question]) -> None:
    """Writes a task: its questions, and its file."""
    for folder in ("tasks", "data"):
        (to / folder).mkdir(parents=True, exist_ok=True)
    (to / "data" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    metrics = [
        {"metric": one, "aggregation": way, "higher_is_better": way == "mean"} for one, way in shape["metric_list"].items()
    ]
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"data/{name}.jsonl"}},
            "test_split": "test", "doc_to_text": "context", "doc_to_target": "answer", "target_delimiter": "", "num_fewshot": 0,
            **shape, "metric_list": metrics, "metadata": {"version": 1}}  # fmt: skip
    (to / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
