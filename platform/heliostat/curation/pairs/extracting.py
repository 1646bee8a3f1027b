"""Finds matching pairs of texts in a document: a docstring and its function, or a title and its section. All functions are pure.

The line number of a pair is the line of the pair's function or title.
"""

from __future__ import annotations

import ast
import io
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import NamedTuple

SENTENCE = re.compile(r"(?<=[.!?])\s|\n\s*\n")
FENCE = re.compile(r" {0,3}(`{3,}(?=[^`\n]*$)|~{3,})")  # a line with more backticks is inline code
TITLE = re.compile(r" {0,3}#{1,6}[ \t]+")
VERSION = 2  # increase it when the same files give different pairs
HEADINGS = {f"h{level}" for level in range(1, 7)}
UNSEEN = {"script", "style", "template", "noscript", "nav", "head", "svg"}  # elements without text of the page
INLINE = {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "dfn", "em", "font", "i", "kbd", "mark", "q", "s", "samp",
          "small", "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr"}  # fmt: skip


class Pair(NamedTuple):
    """Holds a pair: a query, the text that the query is about, and the line of the function or title in the document."""

    line: int
    query: str
    text: str


def docstrings(source: str) -> Iterator[Pair]:
    """Yields pairs from Python source: the first sentence of a function's docstring, and the function without the docstring.
    Invalid Python raises SyntaxError, ValueError, or RecursionError."""
    lines = _lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node)):
            begin = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            text = _without(lines, node.body[0], begin, node.end_lineno or node.lineno)
            yield Pair(begin, " ".join(SENTENCE.split(docstring.strip())[0].split()), text)


def _lines(source: str) -> list[str]:
    """Splits a text into lines at the line ends that Python's parser uses. A form feed doesn't end a line."""
    return list(io.StringIO(source, newline=""))


def _without(lines: list[str], docstring: ast.stmt, begin: int, end: int) -> str:
    """Joins the lines `begin` to `end` (counted from 1) without the docstring. Also removes a line that contains nothing except
    the docstring."""
    last = docstring.end_lineno or docstring.lineno
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
    behind = lines[last - 1].encode()[docstring.end_col_offset :].decode().lstrip("; ")
    beside = before + behind if (before + behind).strip() else ""
    return "".join([*lines[begin - 1 : docstring.lineno - 1], beside, *lines[last:end]])


def markdown(source: str) -> Iterator[Pair]:
    """Yields pairs from Markdown: each title (`# ...`), and the text up to the next title. A line in fenced code is never a
    title."""
    title, begin, section, fence = "", 0, list[str](), ""
    for number, line in enumerate(_lines(source), 1):
        if mark := FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        match = None if fence else TITLE.match(line)
        if match is None:
            section.append(line)
            continue
        if title:
            yield Pair(begin, title, "".join(section).strip("\n"))
        title, begin, section = _titled(line[match.end() :]), number, []
    if title:
        yield Pair(begin, title, "".join(section).strip("\n"))


def _titled(rest: str) -> str:
    """Returns a title without spaces at both ends, and without a closing sequence of `#` after a space."""
    rest = rest.strip(" \t\r\n")
    bare = rest.rstrip("#")
    return (bare if bare.endswith((" ", "\t")) else rest).strip()


def html(page: str) -> Iterator[Pair]:
    """Yields pairs from an HTML page: each heading (`h1` to `h6`), and the text up to the next heading."""
    parser = _Sections()
    parser.feed(page)
    parser.close()
    parser.end()
    yield from parser.pairs


class _Sections(HTMLParser):
    """Parses an HTML page. Collects pairs: a heading, and the text between this heading and the next."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pairs: list[Pair] = []
        self.title: list[str] | None = None
        self.text: list[str] = []
        self.line, self.unseen, self.inside = 0, list[str](), ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "body" or (tag in HEADINGS and set(self.unseen) == {"head"}):  # `</head>` may be missing
            self.unseen = [name for name in self.unseen if name != "head"]
        if tag in UNSEEN:
            self.unseen.append(tag)
        if tag in HEADINGS and not self.unseen:
            self.end()
            self.title, self.line, self.inside = [], self.getpos()[0], tag
        self._breaks(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.unseen:
            del self.unseen[len(self.unseen) - 1 - self.unseen[::-1].index(tag) :]
        if tag == self.inside:
            self.inside = ""
        self._breaks(tag)

    def _breaks(self, tag: str) -> None:
        """Adds a line end to the text if `tag` is a block element, such as `p`."""
        if tag not in INLINE:
            (self.title if self.inside and self.title is not None else self.text).append("\n")

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            (self.title if self.inside and self.title is not None else self.text).append(data)

    def end(self) -> None:
        """Ends the current section, and adds the section's title and text to the pairs."""
        title = " ".join("".join(self.title or ()).split())
        if title:
            lines = (" ".join(line.split()) for line in "".join(self.text).split("\n"))
            self.pairs.append(Pair(self.line, title, "\n".join(line for line in lines if line)))
        self.title, self.text = None, []
