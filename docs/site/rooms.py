"""Writes the table of rooms in docs/concepts.md and the layers in CONTRIBUTING.md: `python -m docs.site.rooms`.

A room is a folder of `platform/heliostat/`. The docstring of its `__init__` says what it does, where to start reading, and what
it may import. The layers are those of the import contract in `pyproject.toml`. `tests/unit/test_rooms.py` holds both to the code.
"""

from __future__ import annotations

import ast
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "heliostat"
FORM = re.compile(r"(?P<purpose>.+?)\n\nStart at `(?P<start>[\w/]+)`\.\s+May import: (?P<imports>[^.]+)\.", re.DOTALL)
PAGES = {"docs/concepts.md": "rooms", "CONTRIBUTING.md": "layers"}


@dataclass(frozen=True)
class Room:
    """Holds what the docstring of a room says: its purpose, the module to read first, and the rooms that it may import."""

    name: str
    purpose: str
    start: str
    imports: frozenset[str]


def rooms() -> list[Room]:
    """Reads the rooms' docstrings, in the order of the layers from the top; ValueError for one of another form."""
    return [_room(name) for layer in layers() for name in layer if (PACKAGE / name).is_dir()]


def _room(name: str) -> Room:
    text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8"))) or ""
    match = FORM.match(text)
    if match is None:
        raise ValueError(f"{name}/__init__.py: the docstring needs a purpose, `Start at`, and `May import`")
    return Room(name, " ".join(match["purpose"].split()), match["start"], frozenset(re.findall(r"`(\w+)`", match["imports"])))


def layers() -> list[list[str]]:
    """Reads the layers of the import contract, from the top."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return [[name.strip() for name in re.split(r"[|:]", layer)] for layer in contract["layers"]]


def table() -> str:
    """Writes the rooms as a Markdown table."""
    rows = [f"| `{room.name}/` | {room.purpose} | `{room.start}.py` |" for room in rooms()]
    return "\n".join(["| room | what it does | start reading at |", "|---|---|---|", *rows])


def numbered() -> str:
    """Writes the layers as a Markdown list."""
    return "\n".join(f"{n}. {', '.join(f'`{name}`' for name in layer)}" for n, layer in enumerate(layers(), 1))


def filled(text: str, name: str) -> str:
    """Returns a page's text with the part between its markers of this name written anew."""
    made = {"rooms": table, "layers": numbered}[name]()
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n\n{made}\n\n{end}", text, flags=re.DOTALL)


def main() -> None:
    """Writes both pages."""
    for page, name in PAGES.items():
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
