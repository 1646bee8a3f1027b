"""Defines the rules that split the text between white space into words, like spaCy's blank English pipeline.

The tokenizer first splits off punctuation marks at both ends, one at a time, then units after numbers. A URL stays one word. The
rest is split at hyphens, commas, slashes, and similar characters between letters. A table of exceptions, such as "don't" and
"e.g.", has precedence over all rules. The rules follow the documented algorithm
(https://spacy.io/usage/linguistic-features#how-tokenizer-works). A string with more than `LONGEST` characters stays one word. So
the time grows only linearly with the length of the text.
"""

from __future__ import annotations

from collections.abc import Iterator

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
UNITS = [*_UNITS.split(), *_MONEY, "+", "US$", "C$", "A$"]  # units and currencies, which are split from a number before them
LONGEST_UNIT = max(map(len, UNITS))

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
LONGEST_EXCEPTION = max(map(len, EXCEPTIONS))
