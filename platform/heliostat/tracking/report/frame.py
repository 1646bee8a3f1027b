"""Builds the frame of a page. The page is one self-contained HTML file, which loads no other file.

The page's content policy allows the browser to run only the script that is part of the page.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from html import escape
from importlib import resources

from heliostat.text import printable


def document(title: str, parts: list[str]) -> str:
    """Renders a complete page from its parts, which are HTML text. Escapes the title."""
    body = f"{''.join(parts)}<script>{_script()}</script>"
    return f"<!doctype html><html lang='en'>{_head(title)}<body>{body}</body></html>"


def side_by_side(figures: list[str]) -> str:
    return f"<div class='grid2'>{''.join(figures)}</div>"


def boxes(facts: dict[str, str]) -> str:
    """Renders facts by name, each in a box. Escapes the values."""
    return "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Renders a table from cells, which are HTML text. A table that is wider than the screen gets its own scroll bar."""
    cells = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{cells}</table></div>"


def _head(title: str) -> str:
    script = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'; base-uri 'none'; "
    return (
        f"<head><meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{policy}form-action 'none'\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(printable(title))}</title><style>{_file('style.css')}</style></head>"
    )


def _script() -> str:
    return _file("hover.js") + _file("slider.js")


@cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
