"""Makes questions of real text, by pure functions: what goes on, which word ends it, which phrase comes again.

A word is what stands between white space; white space is kept as it is, because in code it means something. All choices are by
the random generator that is given, so that the same seed makes the same questions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

WORD = re.compile(r"\S+")
BEFORE, LEAST = 64, 24  # words before what is asked: at most, and at least
GOES_ON, CHOICES = 12, 4  # words of a continuation; how many there are to choose from
LETTERS = re.compile(r"[^\W\d_]{4,}")  # of a word that is asked for
AROUND, MIDDLE = 32, 4  # words before and behind a middle, at most; words of it
TRIES = 3  # questions that are tried of a document


@dataclass(frozen=True)
class WordedDocument:
    """Holds a document and where its words are."""

    text: str
    words: list[tuple[int, int]]

    @staticmethod
    def of(text: str) -> WordedDocument:
        return WordedDocument(text, [match.span() for match in WORD.finditer(text)])

    def between(self, first: int, last: int) -> str:
        """Cuts out words from one to before another, with what stands between them."""
        return self.text[self.words[first][0] : self.words[last - 1][1]]

    def gap(self, word: int) -> str:
        """Returns the white space before a word."""
        return self.text[self.words[word - 1][1] : self.words[word][0]]

    def before(self, word: int) -> str:
        """Returns up to BEFORE words before a word."""
        return self.between(max(0, word - BEFORE), word)


Question = dict[str, str | int | list[str]]
Ask = Callable[[WordedDocument, random.Random, Sequence[WordedDocument]], Question | None]


def choice(text: WordedDocument, rng: random.Random, others: Sequence[WordedDocument]) -> Question | None:
    """Asks which of four continuations a passage has: the others go on in other documents, behind the same white space."""
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
    """Asks for the word that follows a passage, in which it has stood before (as LAMBADA does, Paperno et al. 2016)."""
    begins = [letters[0] if (letters := LETTERS.match(text.text, begin)) else "" for begin, _ in text.words]
    places = [(at, word) for at, word in enumerate(begins) if at >= LEAST and word and word in begins[max(0, at - BEFORE) : at]]
    if not places:
        return None
    at, answer = rng.choice(places)
    return {"context": text.before(at), "answer": text.gap(at) + answer}


def recall(text: WordedDocument, rng: random.Random, others: Sequence[WordedDocument]) -> Question | None:
    """Asks for two words that follow another, as they did before in the passage: the model writes them."""
    words, last, places = [text.text[a:b] for a, b in text.words], dict[tuple[str, ...], int](), list[int]()
    for at in range(1, len(words) - 1):
        said = (words[at - 1], words[at], words[at + 1])
        before = last.get(said, -BEFORE) - 1  # where it began
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
    """Makes an Ask for what stands between a prefix and a suffix, with the tokens that a model's data has before its pieces."""

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
    """Yields up to so many questions, at most TRIES of a document, documents by turns."""
    rng, asked, known = random.Random(f"{ask.__name__} {seed}"), 0, set[object]()
    for _ in range(TRIES):
        for number in rng.sample(range(len(texts)), len(texts)):
            if asked == count:
                return
            others = [texts[i] for i in rng.sample(range(len(texts)), min(len(texts), 4 * CHOICES))]
            question = ask(texts[number], rng, others)
            if question is not None and question["context"] not in known:
                known.add(question["context"])
                asked += 1
                yield question
