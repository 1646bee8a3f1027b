"""Repairs wrongly decoded text ("âœ” No problems"), with ftfy (Speer 2019), like FineWeb.

The stage repairs or removes mojibake, C1 control characters, surrogates, terminal escapes, and other control characters. The
stage also replaces HTML entities in the lines before the first `<`. Style rules are off, as in FineWeb: curly quotes,
ligatures, and full-width characters stay. Plain ASCII lines without an entity or a control character are skipped, and lines in
which ftfy finds no mojibake. Skipping these lines saves most of the time, and doesn't change the result. The stage counts the
repaired lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from heliostat.curation.stage import Document, Outcome, Stage, text_of

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

_ENTITY = "&#?[0-9A-Za-z]{1,24};"
_ODD = re.compile(rf"[^\t\n\r -~]|{_ENTITY}")  # characters that ftfy may change, and entities
# entities and characters that ftfy changes for themselves; other characters have to look like mojibake together
_SURE = re.compile(rf"{_ENTITY}|[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u206a-\u206f\ufeff\ufff9-\ufffc]")
_NEAR = 16  # characters around a character, in which ftfy looks for mojibake
# Possessive quantifiers use no memory for backtracking in a long match.
_FOREIGN = re.compile(rf"[^\x00-\x7f]++(?:[\x00-\x7f]{{1,{2 * _NEAR}}}+[^\x00-\x7f]++)*+")


class FixText(Stage):
    changes: ClassVar[bool] = True
    needs: ClassVar = ("curation", "ftfy")
    libraries: ClassVar[tuple[str, ...]] = ("ftfy",)

    uncurl_quotes: bool = False
    """Replaces curly quotes with straight quotes."""
    fix_latin_ligatures: bool = False
    """Replaces ligatures such as ﬁ with two letters."""
    fix_character_width: bool = False
    """Replaces full-width and half-width characters with characters of normal width."""
    unescape_html: bool = True
    """Replaces HTML entities, in lines before the first `<`."""

    def loaded(self) -> Callable[[Document], Outcome]:
        self.check()
        import ftfy

        styled = self.uncurl_quotes or self.fix_latin_ligatures or self.fix_character_width
        config = ftfy.TextFixerConfig(
            unescape_html="auto" if self.unescape_html else False, uncurl_quotes=self.uncurl_quotes,
            fix_latin_ligatures=self.fix_latin_ligatures, fix_character_width=self.fix_character_width, fix_line_breaks=False,
            normalization=None, explain=False,
        )  # fmt: skip

        def outcome(document: Document) -> Outcome:
            text = text_of(document)
            fixed, count = _fixed(text, config, ftfy.fix_text, (lambda line: True) if styled else _broken(ftfy.badness.is_bad))
            document.text = fixed
            return Outcome(document, counts={"repaired_lines": count} if count else {})

        return outcome


def _broken(is_bad: Callable[[str], bool]) -> Callable[[str], bool]:
    """Returns a function that checks whether ftfy may change a line. `is_bad` finds mojibake, slowly."""

    def broken(line: str) -> bool:
        if _SURE.search(line):
            return True
        return any(is_bad(line[max(0, part.start() - _NEAR) : part.end() + _NEAR]) for part in _FOREIGN.finditer(line))

    return broken


def _fixed(text: str, config: TextFixerConfig, fix: Callable[[str, TextFixerConfig], str],
           broken: Callable[[str], bool]) -> tuple[str, int]:  # fmt: skip
    """Fixes the broken lines with an unusual character; returns the text, and the number of changed lines.

    Replaces HTML entities only before the first `<` of the text, as ftfy does with a complete text.
    """
    out, at, kept, count, angle = list[str](), 0, 0, 0, text.find("<")
    while odd := _ODD.search(text, at):
        start = text.rfind("\n", at, odd.start()) + 1 or at
        at = text.find("\n", odd.start()) + 1 or len(text)
        line = text[start:at]
        if len(line) > config.max_decode_length or broken(line):  # ftfy splits longer lines, and checks each start
            fixed = fix(line, config._replace(unescape_html=False) if 0 <= angle < at else config)
            count += fixed != line
            out += (text[kept:start], fixed)
            kept = at
    return "".join([*out, text[kept:]]), count
