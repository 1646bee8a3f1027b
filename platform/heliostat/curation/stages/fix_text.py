"""Repairs wrongly decoded text ("âœ” No problems"), with ftfy (Speer 2019), like FineWeb.

The stage repairs or removes mojibake, C1 control characters, surrogates, terminal escapes, and other control characters. The
stage also replaces HTML entities in the lines before the first `<`. Style rules are off, as in FineWeb: curly quotes, ligatures,
and full-width characters stay. Plain ASCII lines without an entity or a control character are skipped. Skipping these lines saves
most of the time, and doesn't change the result. The stage counts the repaired lines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from heliostat.curation.stage import Document, Outcome, Stage, text_of

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

_ODD = re.compile(r"[^\t\n\r -%'-~]")  # characters that ftfy may change, and the & of entities


class FixText(Stage):
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

        config = ftfy.TextFixerConfig(
            unescape_html="auto" if self.unescape_html else False, uncurl_quotes=self.uncurl_quotes,
            fix_latin_ligatures=self.fix_latin_ligatures, fix_character_width=self.fix_character_width, fix_line_breaks=False,
            normalization=None, explain=False,
        )  # fmt: skip

        def outcome(document: Document) -> Outcome:
            text = text_of(document)
            fixed, count = _fixed(text, config, ftfy.fix_text)
            document.text = fixed
            return Outcome(document, counts={"repaired_lines": count} if count else {})

        return outcome


def _fixed(text: str, config: TextFixerConfig, fix: Callable[[str, TextFixerConfig], str]) -> tuple[str, int]:
    """Repairs the lines that contain an unusual character. Returns the repaired text, and the number of changed lines.

    Replaces HTML entities only before the first `<` of the text, as ftfy does with a complete text.
    """
    out, at, count, angle = list[str](), 0, 0, text.find("<")
    while odd := _ODD.search(text, at):
        start = text.rfind("\n", at, odd.start()) + 1 or at
        end = text.find("\n", odd.start()) + 1 or len(text)
        line = text[start:end]
        fixed = fix(line, config._replace(unescape_html=False) if 0 <= angle < end else config)
        count += fixed != line
        out += (text[at:start], fixed)
        at = end
    return "".join([*out, text[at:]]), count
