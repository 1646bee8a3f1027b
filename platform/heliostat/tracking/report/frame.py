"""Builds the frame of a page: one self-contained HTML file that loads no other file.

Its content policy lets a browser run only the page's one script.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from importlib import resources

from heliostat.text import printable


def document(title: str, parts: list[str]) -> str:
    """Renders a whole page from its parts, which are HTML. Escapes the title."""
    body = f"{''.join(parts)}<script>{_file('hover.js')}</script>"
    return f"<!doctype html><html lang='en'>{_head(title)}<body>{body}</body></html>"


def side_by_side(figures: list[str]) -> str:
    return f"<div class='grid2'>{''.join(figures)}</div>"


def boxes(facts: dict[str, str]) -> str:
    """Renders facts by name, each in a box. Escapes the values."""
    return "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Renders a table from cells, which are HTML. A table that is wider than the screen gets its own scroll bar."""
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{cells}</table></div>"


def _head(title: str) -> str:
    script = base64.b64encode(hashlib.sha256(_file("hover.js").encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; "
    return (
        f"<head><meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{policy}form-action 'none'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(printable(title))}</title><style>{_file('style.css')}</style></head>"
    )


@cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
