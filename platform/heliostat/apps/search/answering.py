"""Answers a question with a language model, from passages. The prompt contains as many passages as fit into the model's
context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat.apps.search.search import Passage
from heliostat.errors import ConfigError, HeliostatError

HEAD = "Answer the question from the passages, and name the numbers of those that the answer is from.\n"
Count = Callable[[str], int]  # returns a text's number of tokens


@dataclass(frozen=True)
class PassagePrompt:
    """Holds a prompt that contains the first `used` passages. `cut`: whether the prompt has only one passage, and this passage is
    shortened. `tokens`: length of the prompt."""

    text: str
    tokens: int
    used: int
    cut: bool


def prompt(question: str, passages: Sequence[Passage], room: int | None, count: Count) -> PassagePrompt:
    """Returns a prompt with as many complete passages as fit into `room` tokens. If even the first passage doesn't fit, shortens
    this passage.

    `room`: maximum tokens of the prompt; None means no limit. Raises ConfigError if the question alone doesn't fit.
    """
    texts = [passage["text"] for passage in passages]

    def fits(some: Sequence[str]) -> bool:
        return room is None or count(_write(question, passages, some)) <= room

    if not fits([]):
        needed = count(_write(question, passages, []))
        raise ConfigError(
            f"question: the prompt has {needed:,} tokens without any passage, but the model has room for {room:,}. "
            "Ask a shorter question"
        )
    used = next(n for n in range(len(texts), -1, -1) if fits(texts[:n]))
    chosen, cut = texts[:used], False
    if texts and not used:
        chosen = [_beginning(texts[0], lambda text: fits([text]))]
        cut = used = bool(chosen[0])
    written = _write(question, passages, chosen[: int(used)])
    return PassagePrompt(written, count(written), int(used), bool(cut))


def _beginning(text: str, fits: Callable[[str], bool]) -> str:
    """Returns the longest prefix of a text for which `fits` returns True. Finds this prefix by bisection."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(text[:middle]) else (low, middle - 1)
    return text[:low]


def _write(question: str, passages: Sequence[Passage], texts: Sequence[str]) -> str:
    numbered = [f"\n[{n}] {p['document']}\n{text.strip()}\n" for n, (p, text) in enumerate(zip(passages, texts, strict=False), 1)]
    return f"{HEAD}{''.join(numbered)}\nQuestion: {question}\nAnswer:"


def answer(model: Path, question: str, passages: Sequence[Passage], max_tokens: int) -> dict[str, object]:
    """Answers a question with a model, by greedy decoding. Returns a mapping with the answer's text, the answer's number of
    tokens, and the number of passages in the prompt.

    Raises ConfigError if the question doesn't fit into the model's context. Raises HeliostatError if the model fails.
    """
    from heliostat.inference.batch.engines import Continue, Input

    engine = Continue(model, 1, {"max_tokens": max_tokens, "temperature": 0})
    room = None if engine.longest is None else engine.longest - max_tokens
    filled = prompt(question, passages, room, lambda text: len(engine.encode(text)))
    (written,) = engine([Input(filled.text, 0)])
    if written.bad:
        raise HeliostatError(f"{model}: the model can't answer the question ({written.bad}: {written.detail})")
    facts = {"prompt_tokens": filled.tokens, "passages_used": filled.used, "cut": filled.cut}
    values = written.values
    return {"text": values["answer"].strip(), "tokens": values["tokens"], "finish": values["finish"], **facts}
