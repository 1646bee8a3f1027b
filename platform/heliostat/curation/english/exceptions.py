"""Lists the strings of English that are split otherwise than by the rules: contractions, abbreviations, hours, emoticons.

They are what spaCy's English tokenizer makes of them, so that a count of words is the one that published thresholds were set
with.
"""

from __future__ import annotations

from collections.abc import Iterator

_NOT = "ai are ca could dare did does do had has have is may might must need ought sha should was were wo would"
_NOT_HAVE = "ca could did does do had may might must need ought sha should wo would"
_ENDINGS = {  # of which word: what may follow
    ("he", "she", "it"): ("d", "d ve", "ll", "ll ve", "s"),
    ("we", "you", "they"): ("d", "d ve", "ll", "ll ve", "re", "ve"),
    ("i",): ("d", "d ve", "ll", "ll ve", "m", "ve"),
    ("who", "what", "when", "where", "why", "how", "there"): ("d", "d ve", "ll", "ll ve", "re", "s", "ve"),
    ("that", "this"): ("d", "d ve", "ll", "ll ve", "s"),
    ("these", "those"): ("d", "d ve", "ll", "ll ve", "re", "ve"),
    ("could", "might", "must", "should", "would", "not"): ("ve",),
    ("let",): ("s",),
}
_PLAIN = {"ill", "hell", "shell", "shed", "were", "well", "its", "lets", "whore"}  # words of their own without the apostrophe
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
    """Yields contractions in small letters, and what they are split into at the spaces."""
    yield from _ODD.items()
    yield from _ODD_PLAIN.items()
    found = [(verb, "nt", "n't") for verb in _NOT.split()] + [(verb, "nt ve", "n't 've") for verb in _NOT_HAVE.split()]
    for words, endings in _ENDINGS.items():
        found += [(word, end, " ".join(f"'{part}" for part in end.split())) for word in words for end in endings]
    for word, plain, marked in found:
        yield f"{word}{marked.replace(' ', '')}", f"{word} {marked}"
        if (bare := f"{word}{plain.replace(' ', '')}") not in _PLAIN:
            yield bare, f"{word} {plain}"


def _all() -> Iterator[tuple[str, str]]:
    for whole, split in _contractions():
        yield whole, split
        if whole[0] != "y" or whole.startswith("you"):  # y'all is known in small letters only
            yield whole[0].upper() + whole[1:], split[0].upper() + split[1:]
    yield from ((word, word) for word in (_ABBREVIATIONS + _EMOTICONS).split())
    yield from ((f"{letter}.", f"{letter}.") for letter in "abcdefghijklmnopqrstuvwxyz")
    yield from ((word + mark, word + mark) for word in _DROPPED_G.split() for mark in ("", "'"))
    yield from ((f"{hour}{half}", f"{hour} {half}") for hour in range(1, 13) for half in ("am", "pm", "a.m.", "p.m."))
    yield from ((f"°{scale}.", f"° {scale} .") for scale in "CFKcfk")
    yield from ((mark, mark) for mark in ("—", "‘S", "‘s"))


def exceptions() -> dict[str, tuple[str, ...]]:
    """Builds the table of exceptions, each with either apostrophe (' and ’): the string, and its words."""
    plain = {whole: tuple(split.split()) for whole, split in _all()}
    curly = {whole.replace("'", "’"): tuple(word.replace("'", "’") for word in words) for whole, words in plain.items()}
    return plain | curly
