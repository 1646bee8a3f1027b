"""Tests that rarely run tests call current code. mypy doesn't read tests, and a grid of CI called functions with old
signatures."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RARE = [path for folder in ("integration", "gpu", "golden") for path in sorted((ROOT / "tests" / folder).glob("*.py"))]


def names(tree: ast.Module) -> dict[str, Any]:
    """Returns everything that a file imports from heliostat, at any place in the file; ModuleNotFoundError if a module doesn't
    exist."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "heliostat":
            continue
        module = importlib.import_module(node.module or "")
        for one in node.names:
            if not hasattr(module, one.name):
                importlib.import_module(f"{node.module}.{one.name}")
            found[one.asname or one.name] = getattr(module, one.name)
    return found


def called(node: ast.expr, known: dict[str, Any]) -> Callable[..., object] | None:
    """Returns the function or class that an expression names through an import: `function`, `module.function`, or
    `Class.method`."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := called(node.value, known)) is not None:
        if isinstance(owner, ModuleType):
            assert hasattr(owner, node.attr), f"{owner.__name__} has no {node.attr}"
        if isinstance(owner, ModuleType | type):
            return getattr(owner, node.attr, None)
    return None


def faults(path: Path) -> Iterator[str]:
    """Yields the first calls of a file that current functions don't accept."""
    tree = ast.parse(path.read_text())
    known = names(tree)
    own = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    known = {name: value for name, value in known.items() if name not in own}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = called(node.func, known)
        if not (inspect.isroutine(function) or inspect.isclass(function)) or not (function.__module__ or "").startswith(
            "heliostat"
        ):
            continue
        if any(isinstance(one, ast.Starred) for one in node.args) or any(one.arg is None for one in node.keywords):
            continue
        try:
            inspect.signature(function).bind(*node.args, **{one.arg: one.value for one in node.keywords if one.arg})
        except TypeError as e:
            yield f"{path.name}:{node.lineno}: {function.__qualname__}: {e}"
        except ValueError:  # a class of C has no signature
            continue


def test_calls_in_tests_that_run_rarely_fit_the_functions():
    assert [fault for path in RARE for fault in faults(path)] == []


def test_a_call_by_an_old_signature_is_a_fault(tmp_path):
    lines = ["from heliostat import text", "from heliostat.text import plural", "plural(1, 'step')", "plural()",
             "text.plural(1, 'step', of=2)", "plural(*given)", "text.printable('a', lines=True)"]  # fmt: skip
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert [fault.split(": ")[0] for fault in faults(tmp_path / "a.py")] == ["a.py:4", "a.py:5"]
    (tmp_path / "a.py").write_text("from heliostat import text\ntext.gone()")
    with pytest.raises(AssertionError, match=r"heliostat\.text has no gone"):
        list(faults(tmp_path / "a.py"))
