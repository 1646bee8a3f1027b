"""Tests that all code for private parts of DeepSpeed is in one module, and is guarded by DeepSpeed's version."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from heliostat.engine import patches, stream_patches  # noqa: F401 (registers its patches)
from heliostat.errors import ConfigError

from docs.site import rooms

NAMED = ".".join(map(str, patches.VERSION))
BY_NAME = {patch.__name__: patch for patch in patches.PATCHES}
HOME = rooms.PACKAGE / "engine" / "patches.py"
HOMES = {HOME, HOME.with_name("zero_state.py")}
OF_TORCH = {"_foreach_lerp_", "_abort_process_group", "_buffers", "_non_persistent_buffers_set", "_asdict", "_replace"}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_patch_names_its_version_and_what_fails_without_it(name):
    text = inspect.getdoc(BY_NAME[name]) or ""
    assert f"DeepSpeed {NAMED}" in text and "Without it " in text


def test_every_function_that_is_called_from_elsewhere_is_a_patch_or_the_guard():
    public = {node.name for node in ast.parse(HOME.read_text()).body if isinstance(node, ast.FunctionDef) if node.name[0] != "_"}
    assert public - BY_NAME.keys() == {"installed", "require_version", "guard"}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_patch_is_named_by_a_test_of_what_it_does(name):
    assert any(re.search(rf"patches\.{name}\b|`{name}`", path.read_text()) for path in rooms.ROOT.glob("tests/*/test_*.py"))


def test_the_version_is_that_which_is_pinned():
    needed = tomllib.loads((rooms.ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"deepspeed~={NAMED}" in needed


@pytest.mark.parametrize("version", ["0.19.7", "0.18.20", "0.20.0", "1.19.8", "0.20"])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_patch_touches_nothing_of_another_version(name, version, monkeypatch):
    monkeypatch.setattr(patches, "installed", lambda: version)
    with pytest.raises(ConfigError) as e:
        BY_NAME[name](*[None for _ in inspect.signature(BY_NAME[name]).parameters])
    assert str(e.value) == (
        f"deepspeed: heliostat doesn't support this version ({version}). Run: pip install 'deepspeed~={NAMED}'"
    )


@pytest.mark.parametrize("version", ["0.19.8", "0.19.12", "0.19.8+unknown", None])
def test_versions_of_the_pinned_series_are_taken(version, monkeypatch):
    monkeypatch.setattr(patches, "installed", lambda: version)
    patches.stop_input_check(SimpleNamespace(first_dataloader_check=None))


def test_a_part_that_is_missing_is_one_error_which_names_the_patch():
    with pytest.raises(
        ConfigError, match=r"^deepspeed: \S+ doesn't support heliostat's stop_input_check \(.*_check.*\)\. Run: pip"
    ):
        patches.stop_input_check(SimpleNamespace())


def test_a_name_that_is_gone_is_not_set(monkeypatch):
    """A version that has renamed it would continue as if nothing had been replaced."""
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "deepspeed.utils.groups", SimpleNamespace())
    with pytest.raises(ConfigError, match="set_model_parallel_unit"):
        patches.set_model_parallel_unit(None)


def reaches(text: str) -> list[str]:
    """Lists private names of other objects, and assignments to imports from DeepSpeed."""
    tree, found, theirs = ast.parse(text), list[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            theirs |= {alias.asname or alias.name for alias in node.names}
            found += [alias.name for alias in node.names if alias.name.startswith("_")]
        elif isinstance(node, ast.Import):
            theirs |= {alias.asname or "deepspeed" for alias in node.names if alias.name.split(".")[0] == "deepspeed"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root: ast.expr = node
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            base = root.id if isinstance(root, ast.Name) else ""
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and node.attr not in OF_TORCH and base not in ("self", "cls"):
                found.append(node.attr)
            if base in theirs and not isinstance(node.ctx, ast.Load):
                found.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "importlib.reload"):
            found += [ast.unparse(node)] if ast.unparse(node.args[0]) in theirs else []
    return found


@pytest.mark.parametrize(
    "line",
    [
        "zero._partition_all_parameters()",
        "from deepspeed.utils import groups\ngroups.mpu = None",
        "import deepspeed.comm.comm as communication\ncommunication.cdb = None",
        "from deepspeed.utils import groups\nimportlib.reload(groups)",
        "from deepspeed.runtime.zero.partition_parameters import Init\nInit.__init__ = None",
        "from deepspeed.runtime.utils import _private",
    ],
)
def test_every_reach_is_seen(line):
    assert reaches(line)


@pytest.mark.parametrize("path", sorted((rooms.PACKAGE / "engine").glob("*.py")), ids=lambda path: path.stem)
def test_no_other_module_of_the_engine_reaches_into_deepspeed(path: Path):
    assert (reaches(path.read_text()) == []) is (path not in HOMES)
