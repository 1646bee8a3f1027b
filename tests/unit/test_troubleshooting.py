"""Tests that the page about symptoms quotes messages that heliostat prints: each is in the code, with its values left out."""

import ast
import difflib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
VALUE, LEAST = "…", 8  # letters of a piece between two values that say something
OTHERS = {"out of memory"}  # messages of torch
MESSAGES = [quoted for quoted in re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE) if quoted not in OTHERS]


@cache
def texts() -> tuple[str, ...]:
    """Lists all strings of the package; an f-string is one text, with a mark for every value."""
    found: list[str] = []
    for path in (ROOT / "platform" / "heliostat").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d+)?[sdfgr]", VALUE, node.value))
    return tuple(found)


def pieces(message: str) -> list[str]:
    return [piece for part in message.split(VALUE) if len(piece := part.strip(" :;()")) >= LEAST] or [message]


def printed(message: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, pieces(message))), re.DOTALL)
    return any(pattern.search(text) for text in texts())


def test_the_page_has_enough_symptoms():
    assert len(MESSAGES) >= 30


@pytest.mark.parametrize("message", MESSAGES)
def test_a_quoted_message_is_in_the_code(message):
    near = difflib.get_close_matches(message, texts(), 3, 0.3) if not printed(message) else []
    assert printed(message), f"no message of heliostat has {pieces(message)}; near: {near}"


def test_a_message_that_no_code_prints_is_found():
    assert not printed("…: no such lighthouse is lit here")
