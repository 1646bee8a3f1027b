"""Tests that the lock files hold the packages of pyproject.toml, in versions that it accepts, each with its hashes."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {"requirements.lock": (), "clusters/requirements.lock": ("images", "tune", "gcp"), "tests/requirements.lock": ("dev",)}


def entries(name: str) -> dict[str, tuple[str, list[str]]]:
    """Maps each distribution to its version and hashes."""
    found = {}
    for text in re.split(r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)):
        pin = re.match(r"([a-z0-9-]+)==([^\s;]+)", text)
        assert pin, text
        assert pin[1] not in found, pin[1]
        found[pin[1]] = pin[2], re.findall(r"--hash=(sha256:[0-9a-f]{64})\b", text)
    return found


def wanted(*extras: str) -> list[Requirement]:
    """Returns the direct requirements of the core and of the extras, including the extras that these name."""
    asked = [
        Requirement(t) for t in [*PROJECT["dependencies"], *(t for e in extras for t in PROJECT["optional-dependencies"][e])]
    ]
    inner = {e for r in asked if r.name == "heliostat" for e in r.extras} - set(extras)
    return [r for r in asked if r.name != "heliostat"] + (wanted(*inner) if inner else [])


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_file_has_everything_of_a_version_that_pyproject_takes_and_with_hashes(name):
    locked = entries(name)
    for requirement in wanted(*LOCKS[name]):
        distribution = canonicalize_name(requirement.name)
        if distribution == "torch" and not name.startswith("clusters/"):
            continue
        version, _ = locked[distribution]
        assert requirement.specifier.contains(version), f"{name}: {distribution}=={version} is outside {requirement}; make lock"
    assert all(hashes for _, hashes in locked.values())
    assert "://" not in (ROOT / name).read_text()  # whichever index has them


def test_ci_tests_the_versions_that_the_image_and_the_core_have():
    image, tests, core = (entries(f) for f in ("clusters/requirements.lock", "tests/requirements.lock", "requirements.lock"))
    assert "torch" in image and "torch" not in tests | core  # .ci/install takes the image's version, of the machine's own build
    for other in (image, core):
        assert not {d: (other[d], tests[d]) for d in other.keys() & tests.keys() if other[d] != tests[d]}
    assert core.keys() < tests.keys()


def test_make_installs_by_the_lock_files_alone():
    """`make run` installs the core, and `make locked`, which CI calls, installs everything, each package by its hash."""
    make, script = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "install").read_text()
    assert "make locked" in (ROOT / ".ci" / "run").read_text()
    assert re.search(r"^\.venv/\.core: .*\n\t\.ci/install requirements\.lock$", make, re.MULTILINE)
    assert re.search(r"^\.venv/\.installed: .*\n\t\.ci/install tests/requirements\.lock$", make, re.MULTILINE)
    installs = re.findall(r"^ *install (.*)$", script, re.MULTILINE)
    assert "pip install" not in make and len(installs) == 5
    assert "with_pip --require-hashes --requirement .ci/uv.lock" in script and entries(".ci/uv.lock")["uv"][1]
    for line in installs:
        torch, extra = '"$torch"' in line, line.startswith("--constraint .venv/versions.txt ")
        assert torch or extra or ("--no-deps" in line and ("--require-hashes" in line or "--editable ." in line)), line


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_the_installer_uses_what_is_there_and_takes_a_folder_of_wheels_for_the_index(tool, tmp_path):
    """Uses programs that only record their calls."""
    for folder in (".ci", "clusters", "bin", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for name in (".ci/install", "clusters/requirements.lock", "requirements.lock"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    record = f'#!/bin/sh\necho "$PIP_NO_INDEX $UV_FIND_LINKS $PIP_FIND_LINKS $@" >> {tmp_path}/calls\n'
    for program in (".venv/bin/python", *(["bin/uv"] if tool == "uv" else [])):
        (tmp_path / program).write_text(record)
        (tmp_path / program).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "PYTHON": sys.executable,
        "WHEELS": "wheels",
        "UV": {"uv": "uv", "pip": ""}[tool],
    }
    done = subprocess.run(
        ["bash", ".ci/install", "requirements.lock"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert re.match(rf"Installing \d+ packages into \.venv with {tool} \(requirements\.lock\)", done.stdout)
    calls = (tmp_path / "calls").read_text().splitlines()
    front = "1 wheels wheels " + {"uv": "pip install --quiet --no-index", "pip": "-m pip install --quiet --no-compile"}[tool]
    assert len(calls) == 4 and all(call.startswith(front) for call in calls)  # setuptools, the lock, torch, heliostat
    assert not any("download.pytorch.org" in call for call in calls)


def test_the_installer_needs_no_pip_in_the_python_that_it_starts_from(tmp_path):
    """Debian's and Ubuntu's python3 has no pip unless it is installed. A virtual environment gets its own."""
    (tmp_path / "python").write_text(f'#!/bin/sh\n[ "$2" != pip ] && exec {sys.executable} "$@"\necho no pip >&2; exit 1\n')
    (tmp_path / "python").chmod(0o755)
    script = (ROOT / ".ci/install").read_text().partition("# --no-compile")[0].partition('cd "$(dirname')
    begun = script[0] + script[2].partition("\n")[2] + "\necho begun\n"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "python")}
    command = ["bash", "-c", begun, "install", "requirements.lock"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "begun\n"), done.stderr
