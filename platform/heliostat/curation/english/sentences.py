"""Selects the lines of a text that are sentences, and counts their sentences, with compiled loops."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from heliostat.curation.compiled import compiled
from heliostat.curation.english import characters, words
from heliostat.curation.english.characters import DECIMAL, LINE, PUNCTUATION, SPACE, TERMINAL, WHITE, code_points
from heliostat.curation.english.parts import CODE_BITS, FACTOR, has, kind_of, scratch
from heliostat.curation.english.repetition import stripped
from heliostat.curation.english.rules import LONGEST
from heliostat.curation.english.splitting import split

_LINE_END, _RETURN, _SPACE, _STOP, _OPEN, _CLOSE, _CURLY, _LARGE_A, _LARGE_Z, _KELVIN, _SMALL_K = map(ord, "\n\r .[]{AZ\u212ak")
_ENDS = tuple(map(ord, ".?!\"'"))
LINES = KEPT, LONG_WORDS, NO_TERMINAL_MARK, SHORT, LOREM_IPSUM, JAVASCRIPT, CURLY_BRACKET, POLICY = tuple(range(8))
"""What becomes of a line. LOREM_IPSUM and CURLY_BRACKET drop the document."""
PHRASES = [("lorem ipsum", LOREM_IPSUM), ("javascript", JAVASCRIPT), *(
    (phrase, POLICY) for phrase in (
        "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies"
    )
)]  # fmt: skip


def _rows(phrases: list[str]) -> np.ndarray:
    """Returns ASCII phrases as rows of codes, with zeros after each phrase."""
    return np.array([[*phrase.encode().ljust(20, b"\0")] for phrase in phrases], np.uint8)


_PHRASES, _CITATIONS = _rows([phrase for phrase, _ in PHRASES]), _rows(["edit]", "citation needed]"])
_MEANINGS = np.array([1 << meaning for _, meaning in PHRASES])
_BEGINS = np.isin(np.arange(128), _PHRASES[:, 0])


class SelectedLines(NamedTuple):
    """Holds the kept lines as a text, the number of sentences in these lines, the number of lines by what becomes of them
    (LINES), and what drops the document: LOREM_IPSUM, CURLY_BRACKET, or KEPT."""

    text: str
    sentences: int
    counts: list[int]
    dropped: int


def selected_lines(
    text: str, max_word_chars: int, min_words: int, terminal_marks: bool, citations: bool, rules: set[int]
) -> SelectedLines:
    """Selects lines as in `c4`. `rules`: the rules from JAVASCRIPT, POLICY, CURLY_BRACKET, and LOREM_IPSUM that apply."""
    codes = code_points(text)
    out, counts = np.empty(len(codes) + 1, np.uint32), np.zeros(len(LINES), np.int64)
    size, sentences_kept, dropped = _selected(
        codes, characters.kinds(), words.powers(), words.rules(), out, counts, max_word_chars, min_words, terminal_marks,
        citations, sum(1 << rule for rule in rules),
    )  # fmt: skip
    return SelectedLines(out[:size].tobytes().decode("utf-32-le", "surrogatepass"), sentences_kept, counts.tolist(), dropped)


def sentences(text: str) -> int:
    """Counts the sentences of a text like spaCy's sentencizer. Returns 0 for a text that has only white space."""
    return int(_sentences_of(code_points(text), characters.kinds(), words.powers(), words.rules()))


@compiled
def _sentences_of(codes: np.ndarray, kinds: np.ndarray, powers: np.ndarray, table: np.ndarray) -> int:
    chars, sums, firsts = scratch(powers)
    return _sentences(codes, 0, len(codes), kinds, table, chars, sums, firsts)


@compiled
def _selected(
    codes: np.ndarray, kinds: np.ndarray, powers: np.ndarray, table: np.ndarray, out: np.ndarray, counts: np.ndarray,
    max_word_chars: int, min_words: int, terminal_marks: bool, citations: bool, rules: int,
) -> tuple[int, int, int]:  # fmt: skip
    """Writes the kept lines to `out`. Returns their size, their sentences, and what drops the document."""
    chars, sums, firsts = scratch(powers)
    size, kept, at = 0, 0, 0
    while at < len(codes):
        stop = at
        while stop < len(codes) and not kind_of(kinds, codes[stop]) & LINE:
            stop += 1
        first, last = stripped(codes, kinds, at, stop)
        at = stop + 2 if stop + 1 < len(codes) and codes[stop] == _RETURN and codes[stop + 1] == _LINE_END else stop + 1
        if last - first > max_word_chars and _longest_word(codes, kinds, first, last) > max_word_chars:
            counts[LONG_WORDS] += 1
            continue
        begin = size
        if counts[KEPT]:
            out[size] = _LINE_END
            begin += 1
        end = _without_citations(codes, kinds, first, last, out, begin, citations)
        if terminal_marks and not _is_ended(out, begin, end):
            counts[NO_TERMINAL_MARK] += 1
            continue
        if _is_short(codes, kinds, first, last, min_words):
            counts[SHORT] += 1
            continue
        line = _meaning(out, begin, end, rules)
        if line in (LOREM_IPSUM, CURLY_BRACKET):
            return size, kept, line
        counts[line] += 1
        if line == KEPT:
            kept += _sentences(out, begin, end, kinds, table, chars, sums, firsts)
            size = end
    return size, kept, KEPT


@compiled
def _longest_word(codes: np.ndarray, kinds: np.ndarray, begin: int, end: int) -> int:
    longest = 0
    for at in range(begin, end):
        if kind_of(kinds, codes[at]) & SPACE:
            begin = at + 1
        longest = max(longest, at + 1 - begin)
    return longest


@compiled
def _is_short(codes: np.ndarray, kinds: np.ndarray, begin: int, end: int, min_words: int) -> bool:
    """Checks whether a line has fewer words between white space than `min_words`."""
    count, inside = 0, False
    for at in range(begin, end):
        if count >= min_words:
            break
        space = kind_of(kinds, codes[at]) & SPACE != 0
        count += not space and not inside
        inside = not space
    return count < min_words


@compiled
def _without_citations(
    codes: np.ndarray, kinds: np.ndarray, begin: int, end: int, out: np.ndarray, size: int, citations: bool
) -> int:
    """Writes a line to `out`, without marks such as [1] and [edit] if `citations`. Returns the end of the written line."""
    at = begin
    while at < end:
        if citations and codes[at] == _OPEN:
            stop = at + 1
            while stop < end and kind_of(kinds, codes[stop]) & DECIMAL:
                stop += 1
            if stop < end and codes[stop] == _CLOSE:
                at = stop + 1
                continue
            length = 0
            for row in range(len(_CITATIONS)):
                length = max(length, _length_at(codes, at + 1, end, _CITATIONS, row))
            if length:
                at += 1 + length
                continue
        out[size] = codes[at]
        size += 1
        at += 1
    return size


@compiled
def _length_at(codes: np.ndarray, begin: int, end: int, phrases: np.ndarray, row: int) -> int:
    """Returns the length of a phrase if the codes begin with it, and otherwise 0."""
    length = 0
    while phrases[row, length]:
        if begin + length >= end or codes[begin + length] != phrases[row, length]:
            return 0
        length += 1
    return length


@compiled
def _is_ended(codes: np.ndarray, begin: int, end: int) -> bool:
    """Checks whether a line ends with a terminal mark, but not with an ellipsis."""
    if begin == end or codes[end - 1] not in _ENDS:
        return False
    return not (end - begin > 2 and codes[end - 1] == _STOP and codes[end - 2] == _STOP and codes[end - 3] == _STOP)


@compiled
def _lower(code: int) -> int:
    """Returns the lower case of a character if the lower case is one ASCII letter, and otherwise the character."""
    if _LARGE_A <= code <= _LARGE_Z:
        return code + 32
    return _SMALL_K if code == _KELVIN else code


@compiled
def _meaning(codes: np.ndarray, begin: int, end: int, rules: int) -> int:
    """Returns the first of `rules` that applies to a line, or KEPT."""
    seen = 0
    for at in range(begin, end):
        code = _lower(codes[at])
        if code == _CURLY:
            seen |= 1 << CURLY_BRACKET
        if code >= 128 or not _BEGINS[code]:
            continue
        for row in range(len(_PHRASES)):
            length = 0
            while _PHRASES[row, length] and at + length < end:
                if _lower(codes[at + length]) != _PHRASES[row, length]:
                    break
                length += 1
            if not _PHRASES[row, length]:
                seen |= _MEANINGS[row]
    for line in range(LOREM_IPSUM, POLICY + 1):
        if seen & rules & (1 << line):
            return line
    return KEPT


@compiled
def _sentences(
    codes: np.ndarray, at: int, end: int, kinds: np.ndarray, table: np.ndarray, chars: np.ndarray, sums: np.ndarray,
    firsts: np.ndarray,
) -> int:  # fmt: skip
    """Counts the sentences of a line. A sentence begins at the first word after a terminal that isn't punctuation. A space after
    another space is a word, and so is other white space."""
    count, blank, ended = 1, True, False
    while True:
        begin, total, every, some = at, np.uint64(0), PUNCTUATION, 0
        while at < end:
            kind = kind_of(kinds, codes[at])
            if kind & WHITE:
                break
            total = total * FACTOR + np.uint64(codes[at]) + np.uint64(1)
            if at - begin < LONGEST:
                chars[at - begin], sums[0, at - begin + 1] = kind << CODE_BITS | np.int64(codes[at]), total
            every &= kind
            some |= kind
            blank &= kind & SPACE != 0
            at += 1
        length = at - begin
        if some & TERMINAL and length <= LONGEST:
            for word in range(split(chars, sums, table, firsts, length)):
                if firsts[word + 1] - firsts[word] == 1 and has(chars, firsts[word], TERMINAL):
                    ended = True
                elif ended and not _is_punctuation(chars, firsts[word], firsts[word + 1]):
                    count += 1
                    ended = False
        elif ended and not (length and every):
            count += 1
            ended = False
        if at == end:
            return 0 if blank else count
        if codes[at] == _SPACE:
            at += 1
            continue
        while at < end and kind_of(kinds, codes[at]) & WHITE:
            at += 1
        if ended:
            count += 1
            ended = False


@compiled
def _is_punctuation(chars: np.ndarray, begin: int, end: int) -> bool:
    while begin < end and has(chars, begin, PUNCTUATION):
        begin += 1
    return begin == end
