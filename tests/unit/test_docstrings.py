"""Tests that docstrings start with a verb in the third person. Those of commands are help texts, in the imperative."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "heliostat"
NOUNS = {
    "This",
    "Its",
    "Samples",
    "Steps",
    "Names",
    "Seconds",
    "Bytes",
    "Rows",
    "Numbers",
    "Positions",
    "Tokens",
    "Weights",
    "Values",
    "Keys",
}


def documented(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yields (name, docstring) of the module and its definitions, except for help texts: docstrings of commands, and a module's
    `__doc__` in use."""
    shown = any(isinstance(node, ast.Name) and node.id == "__doc__" for node in ast.walk(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        decorated = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
        if isinstance(node, ast.Module) and shown:
            continue
        if (text := ast.get_docstring(node)) and not any("command(" in d or "callback(" in d for d in decorated):
            yield getattr(node, "name", "module"), text


@pytest.mark.parametrize("room", sorted({p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py")}))
def test_docstrings_start_with_a_verb(room):
    paths = (PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / room]
    found = [(path, name, text) for path in paths for name, text in documented(ast.parse(path.read_text()))]
    wrong = [f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0][:60]}" for path, name, text in found
             if not re.match(r"[A-Z][a-z]+s\b", text) or text.split()[0].strip(":,.") in NOUNS]  # fmt: skip
    assert wrong == []
