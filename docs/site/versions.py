"""Writes the versions that every test runs with, from the lock file that continuous integration installs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCKS = ("tests/requirements.lock", "clusters/requirements.lock")  # the second has torch, whose build is the machine's own
SHOWN = ("torch", "ray", "deepspeed", "transformers", "diffusers", "mlflow", "pyarrow", "numpy", "pydantic")


def locked() -> dict[str, str]:
    """Reads the version of each distribution that a lock file pins; the first file that has it counts."""
    versions: dict[str, str] = {}
    for lock in LOCKS:
        for name, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE):
            versions.setdefault(name, version)
    return versions


def table() -> str:
    """Writes the versions of the packages that matter most as a Markdown table."""
    versions = locked()
    return "\n".join(["| package | version |", "|---|---|", *(f"| {name} | {versions[name]} |" for name in SHOWN)])
