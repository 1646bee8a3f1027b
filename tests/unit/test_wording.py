"""Names say what they hold; docstrings, messages, comments and pages use plain words, in short sentences."""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
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
# what people read: the words of the table in the style guide that have one meaning, and British spelling
PLAIN = re.compile(
    rf"{WORDS.pattern}|\b(but for|dear|dearest|seldom|go on|going on|gone on|(?<!there )(?:is|are) no (?!longer\b)\w+|"
    r"refuse[sd]?|lies|colours?|coloured|honour\w*|neighbours?|neighbouring|behaviour|favour\w*|licences?|centred?|centres|labelled|"
    r"(?:normal|initial|serial|util|summar|minim|maxim|general|optim|real|recogn|organ|custom)is(?:es|ed|e|ing|ation|ations))\b",
    re.IGNORECASE,
)
MOST_WORDS, LONGER = 30, 0.05  # of a sentence, and the share of sentences that may have more
# names of fields that files, reports or other modules of a user's have: these stay
FIELDS = {"held: np.ndarray", "found: str | None", "found: Mapping[str, object]"}
MEANINGS = {"no text that a language could be told from"}  # in the digests of datasets (test_curation_filters.py)
KEPT = {  # texts in records of datasets and of answers, which stay what they are: reasons and details of what was left out
    "curation/care.py", "curation/careful.py", "curation/html.py", "curation/images/fetching.py", "curation/images/pictures.py",
    "curation/images/sources.py", "curation/isolated.py", "curation/licenses.py", "curation/readers", "curation/stages",
    "curation/text/documents.py", "curation/top_level.py", "curation/web", "inference/batch/engines.py", "tasks/care.py",
}  # fmt: skip
PARAMETERS = {("curation/semantic/cells.py", "held")}  # of tasks, whose keys follow from the names
ROOMS = sorted({p.relative_to(PACKAGE).parts[0] for p in PACKAGE.rglob("*.py")})
DOCS = PACKAGE.parents[1] / "docs"
PAGES = sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md") if "site" not in p.parts)


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


def sentences(text: str) -> Iterator[str]:
    """Yields the sentences of a text: a colon, a semicolon, a line of a list and a cell of a table end one, too."""
    yield from (part for part in re.split(r"(?<=[.!?:;])\s+|\n\n|\n\s*(?:[-*]|\d+\.)\s|\|", text) if part.strip())


def share_of_long(texts: Iterable[str]) -> tuple[float, list[str]]:
    """Computes the share of sentences of more than MOST_WORDS words, and lists these."""
    plain = (re.sub(r"`[^`]*`|<[^>]*>|\]\([^)]*\)", " X ", text) for text in texts)
    counts = [(len(re.findall(r"[A-Za-z][\w'-]*", part)), part) for text in plain for part in sentences(text)]
    long = [part for count, part in counts if count > MOST_WORDS]
    return len(long) / max(1, len(counts)), long


@cache
def read_by_people(room: str) -> list[tuple[str, int, str]]:
    """Lists (file, line, text) of a room's messages that may be rewritten."""
    return [(path, line, text) for path, tree in trees(room) if not path.startswith(tuple(KEPT)) for line, text in messages(tree)]


def unclear(texts: Iterable[tuple[str, int, str]]) -> list[str]:
    texts = [(path, line, re.sub("`[^`]*`|<[^>]*>?", "", text)) for path, line, text in texts]
    return [f"{path}:{line}: {word[0]}: {text[:60]}" for path, line, text in texts for word in PLAIN.finditer(text)]


@pytest.mark.parametrize("room", ROOMS)
def test_sentences_in_messages_and_docstrings_are_short(room):
    docstrings = [text for _, tree in trees(room) for _, text in documented(tree)]
    for texts in ([text for _, _, text in read_by_people(room)], docstrings):
        share, long = share_of_long(texts)
        assert share <= LONGER, long


@pytest.mark.parametrize("room", ROOMS)
def test_messages_use_the_words_of_the_field(room):
    """No word that the style guide replaces, and American spelling."""
    assert unclear(read_by_people(room)) == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_use_plain_words_in_short_sentences(page):
    prose = re.sub(r"^(`{3,}|~~~).*?^\1", "", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    share, long = share_of_long([prose])
    faults = unclear([(page, 0, line) for line in prose.splitlines()]) + (long if share > LONGER else [])
    assert faults == []
