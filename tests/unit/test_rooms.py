"""Tests that the map of the code is true: the rooms' docstrings, their imports, and the documentation agree."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from docs.site import rooms

PACKAGE = rooms.PACKAGE
ROOMS = {room.name: room for room in rooms.rooms()}
LOOSE = 6  # modules at the root that belong to no room
LAYERS = 16


@cache
def modules() -> dict[str, Path]:
    """Maps every module of the package to its file."""
    names = {path: ".".join(("heliostat", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Maps every module to the modules of the package that it imports: at the top, in functions, and for types only."""
    found = defaultdict(set)
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in modules()}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "heliostat":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found[name].add(full if full in modules() else node.module)
    return {name: frozenset(targets - {name, "heliostat"}) for name, targets in found.items() if name != "heliostat"}


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_what_its_docstring_says_and_nothing_else(name):
    """Imports for types and in functions count too."""
    seen = {room_of(t) for m, targets in imports().items() if room_of(m) == name for t in targets}
    assert (seen & ROOMS.keys()) - {name} == ROOMS[name].imports


def test_rooms_import_downwards_alone():
    """A docstring may only allow rooms of a lower layer of the contract, which has at most 16 layers."""
    layers = rooms.layers()
    height = {name: n for n, layer in enumerate(layers) for name in layer}
    assert [(a.name, b) for a in ROOMS.values() for b in a.imports if height[b] <= height[a.name]] == []
    assert len(layers) <= LAYERS


def test_every_folder_is_a_room_and_few_modules_are_in_none():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == ROOMS.keys()
    assert len([path for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]) <= LOOSE
    assert all((PACKAGE / room.name / f"{room.start}.py").is_file() for room in ROOMS.values())


def test_only_the_command_line_imports_applications():
    assert {room_of(m) for m, targets in imports().items() for t in targets if room_of(t) == "apps"} <= {"apps", "cli"}


def test_no_modules_import_each_other_in_a_circle():
    """Imports for types and in functions count too."""
    state, path, circles = dict[str, int](), list[str](), list[list[str]]()

    def visit(module: str) -> None:
        state[module] = 1
        path.append(module)
        for target in sorted(imports().get(module, ())):
            if state.get(target) == 1:
                circles.append([*path[path.index(target) :], target])
            elif target not in state:
                visit(target)
        path.pop()
        state[module] = 2

    for module in modules():
        if module not in state and module != "heliostat":
            visit(module)
    assert circles == []


def test_no_two_classes_have_one_name():
    homes = defaultdict(list)
    for name, path in modules().items():
        for class_name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            homes[class_name].append(name)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize(("page", "name"), rooms.PAGES.items())
def test_the_documentation_shows_the_rooms_and_layers_of_the_code(page, name):
    """If this fails: `python -m docs.site.rooms`."""
    text = (rooms.ROOT / page).read_text(encoding="utf-8")
    assert f"<!-- begin: {name} -->" in text and rooms.filled(text, name) == text


DEEPSPEED = re.compile(r"deepspeed(\.|$)|transformers\.integrations\.deepspeed$", re.IGNORECASE)
OF_TRANSFORMERS = re.compile(r"deepspeed", re.IGNORECASE)  # names that transformers exports for DeepSpeed's sake


def deepspeed_imports(path: Path) -> list[int]:
    """Lists the lines that import DeepSpeed, or transformers' modules for it: at the top, in functions, and by name."""
    lines, text = [], path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)) if "deepspeed" in text.lower() else ():  # to parse the complete package takes seconds
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("heliostat"):
            of_transformers = (node.module or "").startswith("transformers")
            names = [node.module or "", *("deepspeed" for a in node.names if of_transformers and OF_TRANSFORMERS.search(a.name))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        lines += [node.lineno for name in names if DEEPSPEED.match(name)]
    return lines


@pytest.mark.parametrize(
    "line",
    [
        "import deepspeed",
        "def f():\n    import deepspeed.comm.comm as communication",
        "from deepspeed.utils import groups",
        "from transformers.integrations import is_deepspeed_zero3_enabled",
        "from transformers.integrations import HfDeepSpeedConfig",
        "from transformers.integrations.deepspeed import deepspeed_config",
        "importlib.import_module('deepspeed.utils.numa')",
    ],
)
def test_every_way_to_import_deepspeed_is_seen(line, tmp_path):
    (tmp_path / "module.py").write_text(line)
    assert deepspeed_imports(tmp_path / "module.py")


def test_only_the_engine_imports_deepspeed():
    """There are no exceptions: other rooms call the engine, and lower rooms define the types that the engine passes to them."""
    found = {f"{path.relative_to(PACKAGE)}:{line}" for path in modules().values() for line in deepspeed_imports(path)}
    assert sorted(place for place in found if not place.startswith("engine/")) == [] and found


OTHER_REACHES = {  # each names one private part of Ray, where it is used
    "apps/serve/deployed.py": "replaces the call by which replicas of Serve open a port",
    "cluster/connect.py": "replaces parts of Ray while a private one starts",
    "data/stream.py": "is a policy of Ray Data; `data` may not import `cluster`",
    "tune/pb2.py": "is a scheduler of Ray Tune",
    "tune/searchers.py": "is a searcher of Ray Tune",
}


def ray_reaches(path: Path) -> list[int]:
    """Lists the lines that name a private module of Ray."""
    found, text = [], path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)) if re.search(r"\bray\b", text) else ():
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            names = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        found += [node.lineno for name in names if re.match(r"ray(\.\w+)*\._|ray\.dashboard", name)]
    return found


def test_private_parts_of_ray_are_reached_in_one_module():
    found = {str(path.relative_to(PACKAGE)) for path in modules().values() if ray_reaches(path)}
    assert found - {"cluster/ray_internals.py"} == OTHER_REACHES.keys()
