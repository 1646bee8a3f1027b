"""Splits the text between white space into words, by the rules of spaCy's blank English pipeline.

The tokenizer first splits off punctuation marks at both ends, one at a time, then units after numbers. A URL stays one word. The
rest is split at hyphens, commas, slashes, and similar characters between letters. A table of exceptions, such as "don't" and
"e.g.", has precedence over all rules. The rules follow the documented algorithm
(https://spacy.io/usage/linguistic-features#how-tokenizer-works). A string with more than `LONGEST` characters stays one word. So
the time grows only linearly with the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

import regex


def _escaped(marks: str) -> str:
    """Returns marks as the content of a character class."""
    return regex.escape(marks, special_only=False)


LONGEST = 2000  # maximum characters of a string that is split
QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
_MARKS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_MONEY = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
# marks that are split off at the start and at the end, and characters before a period that is split off (also \p{So}, LOWER)
FIRST, LAST, BEFORE_STOP = "§%=—–" + _MARKS + QUOTES + _MONEY, "—–" + _MARKS + QUOTES, "0123456789%²+-|" + _MARKS + QUOTES
# scripts whose letters the rules know, with and without case
_SCRIPTS = "Han Hangul Hiragana Katakana Ethiopic Arabic Bengali Hebrew Sinhala Devanagari Kannada Tamil Telugu"
_CASELESS = "".join(rf"\p{{{script}}}" for script in _SCRIPTS.split()) + "ー"
_CASED = r"\p{Latin}\p{Greek}\p{Cyrillic}"
LOWER = rf"[[{_CASED}]&&\p{{Ll}}]{_CASELESS}"
UPPER = rf"[[{_CASED}]&&\p{{Lu}}]{_CASELESS}"
LETTER = rf"[[{_CASED}]&&\p{{L}}]{_CASELESS}"
_UNITS = """
    km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h kmh mph hPa Pa mbar mb
    MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм мм² мм³ нм кг г мг м/с км/ч кПа Па мбар Кб КБ
    кб Мб МБ мб Гб ГБ гб Тб ТБ
"""
UNITS = [*_UNITS.split(), *_MONEY, "+"]  # units and currencies, which are split from a number before them
LONGEST_UNIT = max(map(len, UNITS))

_PREFIX = regex.compile(rf"\.\.+|(?:US|C|A)\$|\+(?![0-9])|[{_escaped(FIRST)}]|\p{{So}}")
_SINGLE = frozenset(LAST)
_SYMBOL = regex.compile(r"\p{So}")
# a unit or currency after a number; searched only in the last characters
_MEASURE = regex.compile(rf"(?<=[0-9])(?:{'|'.join(map(regex.escape, sorted(UNITS, key=len, reverse=True)))}|(?:US|C|A)\$)\Z")
_FULL_STOP = regex.compile(
    rf"(?:(?<=°[FfCcKk])|(?<=[{LOWER}{_escaped(BEFORE_STOP)}])|(?<=[{UPPER}][{UPPER}]))\.\Z",
    regex.V1,
)


def _infix(lower: str, upper: str, letter: str, quote: str, symbols: str) -> str:
    """Builds the pattern of the marks between letters. All arguments are content of a character class, except `symbols`."""
    return (
        rf"\.\.+{symbols}|(?<=[0-9])[+\-*^](?=[0-9-])"
        rf"|(?<=[{lower}{quote}])\.(?=[{upper}{quote}])"
        rf"|(?<=[{letter}]),(?=[{letter}])|(?<=[{letter}0-9])(?:---?|——|[-–—~])(?=[{letter}])"
        rf"|(?<=[{letter}0-9])[:<>=/](?=[{letter}])"
    )


_INFIX = regex.compile(_infix(LOWER, UPPER, LETTER, _escaped(QUOTES), r"|…|\p{So}"), regex.V1)
_ASCII_QUOTE = re.escape("".join(filter(str.isascii, QUOTES)))
_ASCII_INFIX = re.compile(_infix("a-z", "A-Z", "A-Za-z", _ASCII_QUOTE, ""))  # finds the same in ASCII text, faster
_SCHEME = regex.compile(r"[\w+\-.]{2,}+://")
_LABEL = r"(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62}+\.)"
_HOST = regex.compile(rf"{_LABEL}++[{LOWER}]{{2,63}}(?::[0-9]{{2,5}})?(?:[/?#]\S*)?", regex.V1)
_ADDRESS = regex.compile(r"[1-9][0-9]{0,2}(?:\.[0-9]{1,3}){3}(?::[0-9]{2,5})?(?:[/?#]\S*)?")

# strings that spaCy splits in a special way: contractions, abbreviations, hours, emoticons
_NOT = "ai are ca could dare did does do had has have is may might must need ought sha should was were wo would"
_NOT_HAVE = "ca could did does do had may might must need ought sha should wo would"
_ENDINGS = {  # by word: the possible endings
    ("he", "she", "it"): ("d", "d ve", "ll", "ll ve", "s"),
    ("we", "you", "they"): ("d", "d ve", "ll", "ll ve", "re", "ve"),
    ("i",): ("d", "d ve", "ll", "ll ve", "m", "ve"),
    ("who", "what", "when", "where", "why", "how", "there"): ("d", "d ve", "ll", "ll ve", "re", "s", "ve"),
    ("that", "this"): ("d", "d ve", "ll", "ll ve", "s"),
    ("these", "those"): ("d", "d ve", "ll", "ll ve", "re", "ve"),
    ("could", "might", "must", "should", "would", "not"): ("ve",),
    ("let",): ("s",),
}
_PLAIN = {"ill", "hell", "shell", "shed", "were", "well", "its", "lets", "whore"}  # without the apostrophe, these are other words
_ODD = {"c'mon": "c'm on", "y'all": "y' all", "i'ma": "i 'm a", "how'd'y": "how 'd 'y"}
_ODD_PLAIN = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "ima": "i m a", "yall": "y all"}
_ABBREVIATIONS = """
    Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. Colo. Conn. Corp. D.C. Dec. Del. Dr. E.G. E.g. Feb. Fla. Ga. Gen. Gov.
    I.E. I.e. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. Messrs. Mich. Minn. Miss. Mo. Mont.
    Mr. Mrs. Ms. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. Ph.D. Prof. Rep. Rev. S.C. Sen. Sep.
    Sept. St. Tenn. Va. Wash. Wis. a.m. p.m. co. e.g. i.e. v.s. vs. ä. ö. ü. and/or w/o C++ <space> \\n \\t \\")
    'Cause 'Cos 'Coz 'Cuz 'S 'bout 'cause 'cos 'coz 'cuz 'd 'em 'll 'nuff 're 's em ll nuff Ma'am ma'am O'clock o'clock ' ''
"""
_DROPPED_G = "Doin Goin Havin Lovin Nothin Nuthin Ol Somethin doin goin havin lovin nothin nuthin ol somethin"
_EMOTICONS = r"""
    (*_*) (-8 (-: (-; (-_-) (._.) (: (; (= (>_<) (^_^) (o: (¬_¬) (ಠ_ಠ) (╯°□°）╯︵┻━┻ )-: ): -_- -__- ._. 0.0 0.o 0_0 0_o 8) 8-)
    8-D 8D :'( :') :'-( :'-) :( :(( :((( :() :) :)) :))) :* :-( :-(( :-((( :-) :-)) :-))) :-* :-/ :-0 :-3 :-> :-D :-O :-P :-X :-]
    :-o :-p :-x :-| :-} :/ :0 :1 :3 :> :D :O :P :X :] :o :o) :p :x :| :} ;) ;-) ;-D ;D ;_; <.< </3 <3 <33 <333 =( =) =/ =3 =D =[
    =] =| >.< >.> >:( >:o ><(((*> @_@ O.O O.o O_O O_o V.V V_V XD XDD [-: [: [= ]= ^_^ ^__^ ^___^ o.0 o.O o.o o_0 o_O o_o v.v v_v
    xD xDD ¯\(ツ)/¯ ಠ_ಠ ಠ︵ಠ
"""


def _contractions() -> Iterator[tuple[str, str]]:
    """Yields pairs: a contraction in lower case, such as `don't`, and the contraction's words, separated by spaces (`do n't`)."""
    yield from _ODD.items()
    yield from _ODD_PLAIN.items()
    forms = [(verb, "nt", "n't") for verb in _NOT.split()] + [(verb, "nt ve", "n't 've") for verb in _NOT_HAVE.split()]
    for words, endings in _ENDINGS.items():
        forms += [(word, end, " ".join(f"'{part}" for part in end.split())) for word in words for end in endings]
    for word, plain, marked in forms:
        yield f"{word}{marked.replace(' ', '')}", f"{word} {marked}"
        if (bare := f"{word}{plain.replace(' ', '')}") not in _PLAIN:
            yield bare, f"{word} {plain}"


def _all() -> Iterator[tuple[str, str]]:
    for whole, split in _contractions():
        yield whole, split
        if whole[0] != "y" or whole.startswith("you"):  # spaCy knows y'all only in lower case
            yield whole[0].upper() + whole[1:], split[0].upper() + split[1:]
    yield from ((word, word) for word in (_ABBREVIATIONS + _EMOTICONS).split())
    yield from ((f"{letter}.", f"{letter}.") for letter in "abcdefghijklmnopqrstuvwxyz")
    yield from ((word + mark, word + mark) for word in _DROPPED_G.split() for mark in ("", "'"))
    yield from ((f"{hour}{half}", f"{hour} {half}") for hour in range(1, 13) for half in ("am", "pm", "a.m.", "p.m."))
    yield from ((f"°{scale}.", f"° {scale} .") for scale in "CFKcfk")
    yield from ((mark, mark) for mark in ("—", "‘S", "‘s"))


def exceptions() -> dict[str, tuple[str, ...]]:
    """Builds the table of exceptions, which maps a string to its words. The table has each string with an apostrophe twice: with
    ' and with ’."""
    plain = {whole: tuple(split.split()) for whole, split in _all()}
    curly = {whole.replace("'", "’"): tuple(word.replace("'", "’") for word in words) for whole, words in plain.items()}
    return plain | curly


EXCEPTIONS = exceptions()


def tokens(text: str) -> tuple[str, ...]:
    """Splits a string without white space into words."""
    if (text.isalpha() and text not in EXCEPTIONS) or len(text) > LONGEST:
        return (text,)
    parts = EXCEPTIONS.get(text) or _split(text, EXCEPTIONS)
    return tuple(_joined(list(parts))) if len(parts) > 1 else tuple(parts)


def _split(text: str, known: dict[str, tuple[str, ...]]) -> list[str]:
    """Splits off punctuation marks at both ends of a string, each as a word. Stops when the rest is in `known` or has no marks at
    its ends. Then splits the rest."""
    before, behind = list[str](), list[str]()
    while text and text not in known:
        size, mark, last = len(text), _PREFIX.match(text), 0
        first = mark.end() if mark else 0
        if first and text[first:] in known:
            before.append(text[:first])
            text = text[first:]
            break
        last = _suffix(text[first:])
        if last and text[:-last] in known:
            behind.append(text[-last:])
            text = text[:-last]
            break
        if first:
            before.append(text[:first])
        if last:
            behind.append(text[size - last :])
        text = text[first : size - last]
        if len(text) == size:
            break
    return [*before, *(_middle(text, known) if text else ()), *reversed(behind)]


def _suffix(text: str) -> int:
    """Returns the length, in characters, of the longest suffix to split off; 0 if there is none."""
    last = text[-1:]
    if not last:
        return 0
    if last == ".":
        dots = len(text) - len(text.rstrip("."))
        return dots if dots > 1 else int(_FULL_STOP.search(text, len(text) - 3 if len(text) > 3 else 0) is not None)
    if last == "…":
        return 2 if text.endswith("……") else 1
    if last in "sS" and text[-2:-1] in ("'", "’"):
        return 2
    if last in _SINGLE or _SYMBOL.match(last):
        return 1
    match = _MEASURE.search(text, len(text) - 8 if len(text) > 8 else 0)
    return len(match[0]) if match else 0


def _middle(text: str, known: dict[str, tuple[str, ...]]) -> list[str]:
    if text in known:
        return list(known[text])
    return [text] if _is_url(text) else _infixes(text)


def _infixes(text: str) -> list[str]:
    """Splits a string at the marks between its letters."""
    out, start = list[str](), 0
    for match in (_ASCII_INFIX if text.isascii() else _INFIX).finditer(text):
        if match.start() == 0:
            continue
        if match.start() != start:
            out.append(text[start : match.start()])
        out.append(match[0])
        start = match.end()
    return [*out, text[start:]] if start < len(text) else out


def _is_url(text: str) -> bool:
    """Checks whether a string is a URL: a host with a top-level domain, or a public IP address, with the usual parts of a URL."""
    if "." not in text:
        return False
    starts = {0}
    if scheme := _SCHEME.match(text):
        starts.add(scheme.end())
    if (at := text.rfind("@")) > 0:
        starts.add(at + 1)
        starts.update(i + 1 for i in (text.find("@", start + 1) for start in tuple(starts)) if i > 0)
    return any(_HOST.fullmatch(text, start) or (_ADDRESS.fullmatch(text, start) and _public(text[start:])) for start in starts)


def _public(address: str) -> bool:
    """Checks whether the four numbers at the start of an IPv4 address are valid, and outside private networks."""
    first, second, third, last = (int(number) for number in regex.match(r"(\d+)\.(\d+)\.(\d+)\.(\d+)", address).groups())
    private = first in (10, 127) or (first, second) in ((169, 254), (192, 168)) or (first == 172 and 16 <= second <= 31)
    return not private and first <= 223 and max(second, third) <= 255 and 1 <= last <= 254


# The rules split some emoticons and abbreviations. These are joined again, in longer strings, too.
_SPLIT = {tuple(parts): whole for whole in EXCEPTIONS if len(parts := _split(whole, {})) > 1}
_FIRST, PAIRS = {parts[0] for parts in _SPLIT}, {parts[:2] for parts in _SPLIT}
_MOST = max(map(len, _SPLIT))
# a letter or digit at the ends of a string, and marks that are split off one at a time, without other rules
PLAIN_MARKS = frozenset({*_MARKS, *QUOTES} - {"…"})
ODD_CORES = {whole.strip("." + "".join(PLAIN_MARKS)) for whole in EXCEPTIONS} | set().union(*_SPLIT)


def _joined(parts: list[str]) -> list[str]:
    if PAIRS.isdisjoint(pairwise(parts)):
        return parts
    spans = [
        (stop - start, start)
        for start, word in enumerate(parts)
        if word in _FIRST
        for stop in range(start + 2, min(start + _MOST, len(parts)) + 1)
        if tuple(parts[start:stop]) in _SPLIT
    ]
    taken, chosen = set[int](), dict[int, int]()
    for length, start in sorted(spans, key=lambda span: (-span[0], span[1])):
        if start not in taken and start + length - 1 not in taken:
            chosen[start] = length
        taken.update(range(start, start + length))
    out, at = list[str](), 0
    while at < len(parts):
        length = chosen.get(at, 1)
        out += EXCEPTIONS[_SPLIT[tuple(parts[at : at + length])]] if length > 1 else parts[at : at + 1]
        at += length
    return out
