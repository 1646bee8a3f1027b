"""Tests that `platform/` is a source root, never shadows the standard library's module of that name, and makes a complete
wheel."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE_BOTH = (
    "import platform, sys, heliostat.errors\n"
    "assert platform.python_version() == sys.version.split()[0].rstrip('+')\n"
    "print(platform.__file__, heliostat.errors.__file__, sep='\\n')\n"
)


def python(code: str, *flags: str, cwd: Path = ROOT, pythonpath: Path | None = None) -> list[str]:
    """Returns the lines that a fresh Python prints."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if pythonpath:
        env["PYTHONPATH"] = str(pythonpath)
    done = subprocess.run([sys.executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def is_standard(file: str) -> bool:
    return Path(file).is_file() and ROOT not in Path(file).parents and Path(file).name == "platform.py"


def build(folder: Path) -> Path:
    """Builds the wheel in the folder, from a copy of the source, with the installed packages."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "platform").rglob("*"):
        relative = path.relative_to(ROOT)
        if path.is_file() and not any(p == "__pycache__" or p.endswith(".egg-info") for p in relative.parts):
            (source / relative).parent.mkdir(parents=True, exist_ok=True)
            (source / relative).write_bytes(path.read_bytes())
    command = [
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        str(folder),
        str(source),
    ]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("heliostat-*.whl")
    return wheel


def test_the_source_root_is_no_package():
    """An __init__.py in platform/ would make it a package, which wins over the standard library's module."""
    assert (ROOT / "platform" / "heliostat" / "__init__.py").is_file()
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert [p.name for p in (ROOT / "platform").glob("*.py")] == []


def test_python_finds_its_own_platform_from_the_repository():
    """`python -c` puts the current folder first on sys.path, but still imports the standard library's module."""
    first, file, version = python(
        "import platform, sys; print(repr(sys.path[0]), platform.__file__, platform.python_version(), sep='\\n')"
    )
    assert first in ("''", repr(str(ROOT)))
    assert is_standard(file) and version


def test_the_installed_package_and_the_standard_module_live_together():
    """With the repository first on PYTHONPATH, both imports give the right module."""
    standard, ours = python(USE_BOTH, pythonpath=ROOT)
    assert is_standard(standard)
    assert Path(ours).name == "errors.py" and Path(ours).parent.name == "heliostat"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Returns the folder of this source's wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(build(folder)) as z:
        z.extractall(folder / "unpacked")
    return folder / "unpacked"


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__"}


def test_a_wheel_holds_only_heliostat_and_leaves_platform_alone(unpacked):
    """On PYTHONPATH, without an installed copy, the wheel has no `platform`, and both imports work."""
    names = {n.split("/")[0] for n in contents(unpacked)}
    assert "heliostat" in names and len(names) == 2 and any(re.fullmatch(r"heliostat-[\d.]+\.dist-info", n) for n in names)
    # -S: without site-packages, so that neither the editable install nor its import hook can help
    standard, ours = python(USE_BOTH, "-S", cwd=unpacked.parent, pythonpath=unpacked)
    assert is_standard(standard)
    assert Path(ours) == unpacked / "heliostat" / "errors.py"


def test_a_wheel_is_whole(unpacked):
    """It has every file of the package: code, types, tables, and the files of a workspace, so that it needs no clone."""
    assert contents(unpacked / "heliostat") == contents(ROOT / "platform" / "heliostat")
    needed = {"py.typed", "recipes/text/causal_lm.py", "recipes/images/text_to_image.py", "curation/text/pipeline.py"}
    needed |= {"curation/images/pipeline.py", "plan/prices.yaml", "cli/template/jobs/quickstart.yaml", "cli/template/gitignore"}
    assert needed <= contents(unpacked / "heliostat")
    (metadata,) = unpacked.glob("heliostat-*.dist-info/METADATA")
    extras = set(re.findall(r"^Provides-Extra: (\S+)$", metadata.read_text(), re.MULTILINE))
    assert {"images", "tune", "server", "gcp"} <= extras
    (scripts,) = unpacked.glob("heliostat-*.dist-info/entry_points.txt")
    module, _, function = re.search(r"^heliostat = (\S+)$", scripts.read_text(), re.MULTILINE)[1].partition(":")
    assert function in (unpacked / f"{module.replace('.', '/')}.py").read_text()


def test_what_code_takes_from_beside_it_is_in_the_wheel(unpacked):
    """A string names the files that an export or MLflow gets copies of, and no move of a module would change it."""
    named = [(path, name) for path in (unpacked / "heliostat").rglob("*.py")
             for name in re.findall(r'Path\(__file__\)\.with_name\("([^"]+)"\)', path.read_text())]  # fmt: skip
    assert named and not [(path, name) for path, name in named if not path.with_name(name).is_file()]


def test_what_a_file_names_is_in_the_wheel(unpacked):
    """The recipes and pipelines of a new workspace come from the wheel, not from a folder that only a clone has."""
    paths = [*(unpacked / "heliostat" / "cli" / "template").rglob("*.yaml")]
    rooms = {"recipe": "recipes", "pipeline": "curation"}
    found = set()
    for path in paths:
        for key, module, name in re.findall(r"^(recipe|pipeline): (\S+):(\S+)", path.read_text(), re.MULTILINE):
            code = f"import importlib.util, sys; from heliostat import {module.removeprefix('heliostat.')} as m\n"
            code += f"print(m.__file__, {name!r} in m.__all__)"
            (told,) = python(code, cwd=unpacked.parent, pythonpath=unpacked)
            assert told == f"{unpacked}/heliostat/{rooms[key]}/__init__.py True"
            found.add(key)
    assert found == rooms.keys()
