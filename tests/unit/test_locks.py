"""The lock files hold what pyproject.toml asks for, of the versions that it takes, each by its hashes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {"clusters/requirements.lock": ("images", "tune", "gcp"), "tests/requirements.lock": ("dev",)}


def entries(name: str) -> dict[str, tuple[str, list[str]]]:
    """Version and hashes by distribution."""
    found = {}
    for text in re.split(r"\n(?=[a-z0-9])", re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE)):
        pin = re.match(r"([a-z0-9-]+)==([^\s;]+)", text)
        assert pin, text
        assert pin[1] not in found, pin[1]
        found[pin[1]] = pin[2], re.findall(r"--hash=(sha256:[0-9a-f]{64})\b", text)
    return found


def wanted(*extras: str) -> list[Requirement]:
    """What is asked for directly, by the core and the extras with those that they name."""
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
        if distribution == "torch" and name.startswith("tests/"):
            continue
        version, _ = locked[distribution]
        assert requirement.specifier.contains(version), f"{name}: {distribution}=={version} is outside {requirement}; make lock"
    assert all(hashes for _, hashes in locked.values())
    assert "://" not in (ROOT / name).read_text()  # whichever index has them


def test_ci_tests_the_versions_that_the_image_has():
    image, tests = entries("clusters/requirements.lock"), entries("tests/requirements.lock")
    assert "torch" in image and "torch" not in tests  # `make locked` takes the image's version, of the machine's own build
    assert not {d: (image[d], tests[d]) for d in image.keys() & tests.keys() if image[d] != tests[d]}


def test_ci_installs_by_the_lock_and_nothing_beside_it():
    make = (ROOT / "Makefile").read_text()
    target = make[make.index("\nlocked:") : make.index("\nlock:")]
    assert "make locked" in (ROOT / ".ci" / "run").read_text()
    assert "--no-deps --require-hashes --requirement tests/requirements.lock" in target and "clusters/requirements.lock" in target
    assert target.count("pip install") == target.count("--no-deps") + 1  # torch's own pins bring what its build needs
