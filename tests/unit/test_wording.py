"""Names say what they hold; docstrings, messages and comments use plain words."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache

import pytest

from tests.unit.test_docstrings import PACKAGE, documented

VAGUE = {
    "found",
    "told",
    "made",
    "held",
    "there",
    "asked",
    "given",
    "whose",
    "tell",
    "alike",
    "play",
}  # how a value came, not what it is
WORDS = re.compile(r"\b(told|alike|beside|goes on|whoever|nobody|torn|anew|played)\b", re.IGNORECASE)
MESSAGE_WORDS = re.compile(rf"{WORDS.pattern}|\bbehind\b", re.IGNORECASE)
# names of fields that files, reports or other modules of a user's have: these stay
FIELDS = {"held: np.ndarray", "found: str | None", "found: Mapping[str, object]"}
MEANINGS = {"no text that a language could be told from"}  # in the digests of datasets (test_curation_filters.py)
PARAMETERS = {("curation/semantic/cells.py", "held")}  # of tasks, whose keys follow from the names
ROOMS = sorted({p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py")})


@cache
def trees(room: str) -> list[tuple[str, ast.Module]]:
    paths = (PACKAGE / room).rglob("*.py") if (PACKAGE / room).is_dir() else [PACKAGE / room]
    return [(str(path.relative_to(PACKAGE)), ast.parse(path.read_text())) for path in paths]


def vague(room: str) -> list[str]:
    faults = []
    for path, tree in trees(room):
        nodes = list(ast.walk(tree))
        kept = {n.target for n in nodes if isinstance(n, ast.AnnAssign) and ast.unparse(n).partition(" = ")[0] in FIELDS}
        names = [(n.lineno, n.arg) for n in nodes if isinstance(n, ast.arg)]
        names += [(n.lineno, n.id) for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n not in kept]
        faults += [f"{path}:{line}: {name}" for line, name in names if name in VAGUE and (path, name) not in PARAMETERS]
    return faults


def avoided_words(room: str) -> list[str]:
    texts = [(path, text) for path, tree in trees(room) for _, text in documented(tree)]
    return [f"{path}: {word[0]}: {text[:60]}" for path, text in texts for word in WORDS.finditer(re.sub("`[^`]*`", "", text))]


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of all strings of several words but docstrings: errors, log lines, descriptions of keys, and help."""
    defined = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    code = [n for n in defined if not any("command(" in ast.unparse(d) for d in getattr(n, "decorator_list", ()))]
    docstrings = {n.body[0].value for n in code if n.body and isinstance(n.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or node in docstrings:
            continue
        if " " in node.value and node.value not in MEANINGS:
            yield node.lineno, node.value


def comments(path: str) -> Iterator[tuple[int, str]]:
    """(line, text) of a file's comments; of a file in which none can be at fault nothing is read by token, which is slow."""
    text = (PACKAGE / path).read_text()
    if any("#" in line and MESSAGE_WORDS.search(line) for line in text.splitlines()):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        yield from ((t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT)


@cache
def avoided_in_messages(room: str) -> list[str]:
    texts = [
        (path, line, re.sub("`[^`]*`|<[^>]*>?", "", text))
        for path, tree in trees(room)
        for line, text in [*messages(tree), *comments(path)]
    ]
    return [f"{path}:{line}: {word[0]}: {text[:60]}" for path, line, text in texts for word in MESSAGE_WORDS.finditer(text)]


@pytest.mark.parametrize("room", ROOMS)
def test_variables_and_parameters_say_what_they_hold(room):
    assert vague(room) == []


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_use_plain_words(room):
    assert avoided_words(room) == []


@pytest.mark.parametrize("room", ROOMS)
def test_messages_and_comments_use_plain_words(room):
    """Those that people read: a word in back quotes is a name, and what is in a tag is markup."""
    assert avoided_in_messages(room) == []
