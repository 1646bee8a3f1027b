"""Generates a suite from a prepared dataset's held-out text: `heliostat model make-suite DATASET --out FOLDER`.

    FOLDER/suite.yaml            the suite, for `heliostat model benchmark`
    FOLDER/tasks/*.yaml          task files of lm-eval; its own command can run them too, in FOLDER
    FOLDER/data/*.jsonl          the questions
    FOLDER/made.json             the dataset and settings that they were generated from

A model wasn't trained on any of this text if its job holds out the suite's fraction of the dataset, or a larger fraction.

A word is a sequence of characters without white space. White space stays unchanged, because white space has a meaning in code.
All choices come from the given random generator, so the same seed generates the same questions.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import yaml

from heliostat.data.infilling import FACT
from heliostat.data.manifest import Manifest
from heliostat.errors import ConfigError, DataError
from heliostat.evaluation import documents
from heliostat.evaluation.suite import Result
from heliostat.storage.locations import Location

WORD = re.compile(r"\S+")
BEFORE, LEAST = 64, 24  # maximum and minimum number of words before the answer
GOES_ON, CHOICES = 12, 4  # words of a continuation; number of continuations to choose from
LETTERS = re.compile(r"[^\W\d_]{4,}")  # an answer contains at least four letters in a row
AROUND, MIDDLE = 32, 4  # maximum number of words before and after a middle; number of words in a middle
TRIES = 3  # maximum attempts per document


@dataclass(frozen=True)
class WordedDocument:
    """Contains a document, and the positions (begin, end) of its words, in characters."""

    text: str
    words: list[tuple[int, int]]

    @staticmethod
    def of(text: str) -> WordedDocument:
        return WordedDocument(text, [match.span() for match in WORD.finditer(text)])

    def between(self, first: int, last: int) -> str:
        """Returns the text from the word `first` up to, but not including, the word `last`."""
        return self.text[self.words[first][0] : self.words[last - 1][1]]

    def gap(self, word: int) -> str:
        """Returns the white space before a word."""
        return self.text[self.words[word - 1][1] : self.words[word][0]]

    def before(self, word: int) -> str:
        """Returns the text of up to BEFORE words before a word."""
        return self.between(max(0, word - BEFORE), word)


Question = dict[str, str | int | list[str]]
Ask = Callable[[WordedDocument, random.Random, Sequence[WordedDocument]], Question | None]


def choice(text: WordedDocument, rng: random.Random, others: Sequence[WordedDocument]) -> Question | None:
    """Makes a multiple-choice question: the right continuation of a passage among four continuations. Returns None if the
    document is too short.

    The wrong continuations are from other documents, after the same white space.
    """
    long = [one for one in others if one is not text and len(one.words) >= LEAST + GOES_ON]
    if len(text.words) < LEAST + GOES_ON or len(long) < CHOICES - 1:
        return None
    at = rng.randrange(LEAST, len(text.words) - GOES_ON + 1)
    right = text.between(at, at + GOES_ON)
    wrong = []
    for one in rng.sample(long, CHOICES - 1):
        begin = rng.randrange(LEAST, len(one.words) - GOES_ON + 1)
        wrong.append(one.between(begin, begin + GOES_ON))
    if len({right, *wrong}) < CHOICES:
        return None
    place = rng.randrange(CHOICES)
    all_ = [*wrong[:place], right, *wrong[place:]]
    return {"context": text.before(at), "choices": [text.gap(at) + one for one in all_], "answer": place}


def cloze(text: WordedDocument, rng: random.Random, others: Sequence[WordedDocument]) -> Question | None:
    """Makes a question that asks for the word after a passage. The passage already contains this word (like LAMBADA, Paperno et
    al. 2016). Returns None if no word of the text fits."""
    begins = [letters[0] if (letters := LETTERS.match(text.text, begin)) else "" for begin, _ in text.words]
    places = [(at, word) for at, word in enumerate(begins) if at >= LEAST and word and word in begins[max(0, at - BEFORE) : at]]
    if not places:
        return None
    at, answer = rng.choice(places)
    return {"context": text.before(at), "answer": text.gap(at) + answer}


def recall(text: WordedDocument, rng: random.Random, others: Sequence[WordedDocument]) -> Question | None:
    """Makes a question in which the model generates the two words after a passage. Earlier in the passage, the same two words
    already followed the word that now ends the passage. Returns None if the text has no such place."""
    words, last, places = [text.text[a:b] for a, b in text.words], dict[tuple[str, ...], int](), list[int]()
    for at in range(1, len(words) - 1):
        said = (words[at - 1], words[at], words[at + 1])
        before = last.get(said, -BEFORE) - 1  # position of the first of the three words
        if (
            at >= LEAST
            and at - BEFORE <= before < at - 3
            and text.gap(at + 1) == " "
            and LETTERS.search(words[at] + words[at + 1])
        ):
            places.append(at)
        last[said] = at
    if not places:
        return None
    at = rng.choice(places)
    return {"context": text.before(at), "answer": text.between(at, at + 2)}


def asking_for_middles(markers: Sequence[str], suffix_first: bool) -> Ask:
    """Returns a function (`Ask`) that makes questions for the text between a prefix and a suffix. `markers`: the tokens before
    prefix, suffix, and middle.

    `suffix_first`: whether the suffix comes before the prefix (SPM).
    """

    before, behind, middle = markers

    def middles(text: WordedDocument, rng: random.Random, others: Sequence[WordedDocument]) -> Question | None:
        if len(text.words) < LEAST + MIDDLE + LEAST or any(marker in text.text for marker in markers):
            return None
        at = rng.randrange(LEAST, len(text.words) - MIDDLE - LEAST + 1)
        answer, end = text.between(at, at + MIDDLE), at + MIDDLE
        if not LETTERS.search(answer):
            return None
        prefix = text.between(at - min(at, AROUND), at) + text.gap(at)
        suffix = text.gap(end) + text.between(end, min(end + AROUND, len(text.words)))
        context = f"{before}{behind}{suffix}{middle}{prefix}" if suffix_first else f"{before}{prefix}{behind}{suffix}{middle}"
        return {"context": context, "answer": answer, "prefix": prefix, "suffix": suffix}

    return middles


def questions(ask: Ask, texts: Sequence[WordedDocument], count: int, seed: int) -> Iterator[Question]:
    """Yields up to `count` questions. In each of at most TRIES rounds, tries once per document to make a question."""
    rng, count_asked, known = random.Random(f"{ask.__name__} {seed}"), 0, set[object]()
    for _ in range(TRIES):
        for number in rng.sample(range(len(texts)), len(texts)):
            if count_asked == count:
                return
            others = [texts[i] for i in rng.sample(range(len(texts)), min(len(texts), 4 * CHOICES))]
            question = ask(texts[number], rng, others)
            if question is not None and question["context"] not in known:
                known.add(question["context"])
                count_asked += 1
                yield question


DOCUMENTS = 8  # documents to read per question
MIDDLE_TOKENS = 48  # maximum generated tokens for a middle
CHARS = 100_000  # characters of a document that are used
GREEDY: dict[str, object] = {"do_sample": False, "until": ["\n\n"], "max_gen_toks": 24}
FIRST_TWO = {"function": "regex", "regex_pattern": r"^\s*(\S+\s+\S+)"}
TWO_WORDS: dict[str, object] = {"name": "two_words", "filter": [FIRST_TWO, {"function": "take_first"}]}


class TaskShape(TypedDict):
    """Describes some keys of a task file. `metric_list`: name of a metric -> its aggregation over the examples."""

    output_type: str
    metric_list: dict[str, str]
    doc_to_choice: NotRequired[str]
    generation_kwargs: NotRequired[dict[str, object]]
    filter_list: NotRequired[list[dict[str, object]]]


TASKS: dict[str, tuple[Ask, TaskShape]] = {
    "held_out_choice": (
        choice,
        {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": {"acc": "mean", "acc_norm": "mean"}},
    ),
    "held_out_cloze": (
        cloze,
        {"output_type": "loglikelihood", "metric_list": {"acc": "mean", "perplexity": "perplexity"}},
    ),
    "held_out_recall": (
        recall,
        {"output_type": "generate_until", "generation_kwargs": GREEDY, "filter_list": [TWO_WORDS],
         "metric_list": {"exact_match": "mean"}},
    ),
}  # fmt: skip


def make(dataset: str, to: Path, count: int, fraction: float, seed: int) -> Result:
    """Writes the suite to the folder `to`, with up to `count` questions per task. Returns the content of `made.json`, and the
    suite's path.

    Raises ConfigError if too little text is held out.
    """
    prepared = documents.open_text(Location(dataset))
    texts = _texts(prepared, fraction, DOCUMENTS * count, seed)
    if len(texts) < CHOICES:
        raise ConfigError(
            f"--fraction: {fraction:g} of {dataset} holds out only {len(texts)} documents of text. Pass a larger fraction"
        )
    counts = {}
    for name, (ask, shape) in {**TASKS, **_of_middles(prepared)}.items():
        written = list(questions(ask, texts, count, seed))
        if written:
            _write(to, name, shape, written)
        counts[name] = len(written)
    if not any(counts.values()):
        raise ConfigError(
            f"{dataset}: its held-out documents are too short for questions. Pass a larger --fraction, or another dataset"
        )
    facts = {"dataset": dataset, "digest": prepared.digest, "fraction": fraction, "seed": seed, "documents": len(texts),
             "tasks": counts}  # fmt: skip
    (to / "made.json").write_text(json.dumps(facts, indent=1) + "\n")
    suite = {"name": "held-out", "folder": ".", "tasks": [name for name, written in counts.items() if written]}
    (to / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return {**facts, "suite": str(to / "suite.yaml")}


def _of_middles(prepared: Manifest) -> dict[str, tuple[Ask, TaskShape]]:
    """Returns a task by name if the dataset is rearranged for filling in the middle, else {}. In this task, the model generates
    the middle, up to an end token."""
    if FACT not in prepared.meta:
        return {}
    end = documents.Documents(prepared).token(prepared.fact("end_of_document"))
    ask = asking_for_middles(prepared.meta[FACT]["names"], prepared.meta[FACT]["spm_rate"] == 1)
    greedy = {"do_sample": False, "until": [end], "max_gen_toks": MIDDLE_TOKENS}
    shape: TaskShape = {"output_type": "generate_until", "generation_kwargs": greedy, "metric_list": {"exact_match": "mean"}}
    return {"held_out_middle": (ask, shape)}


def _texts(prepared: Manifest, fraction: float, most: int, seed: int) -> list[WordedDocument]:
    """Reads up to `most` held-out documents, from chunks in random order. Raises DataError if a chunk is damaged."""
    chunks, reader, kept = documents.held_out(prepared, fraction).tolist(), documents.Documents(prepared), list[WordedDocument]()
    random.Random(seed).shuffle(chunks)
    for texts in reader.texts(chunks):
        kept += [WordedDocument.of(text[:CHARS]) for text in texts]
        if len(kept) >= most:
            break
    if reader.damaged:
        raise DataError(reader.damaged[0])
    return [text for text in kept if len(text.words) >= LEAST][:most]


def _write(to: Path, name: str, shape: TaskShape, questions: list[Question]) -> None:
    """Writes a task's questions and its task file."""
    for folder in ("tasks", "data"):
        (to / folder).mkdir(parents=True, exist_ok=True)
    (to / "data" / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")
    metrics = [
        {"metric": one, "aggregation": way, "higher_is_better": way == "mean"} for one, way in shape["metric_list"].items()
    ]
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"data/{name}.jsonl"}},
            "test_split": "test", "doc_to_text": "context", "doc_to_target": "answer", "target_delimiter": "", "num_fewshot": 0,
            **shape, "metric_list": metrics, "metadata": {"version": 1}}  # fmt: skip
    (to / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
