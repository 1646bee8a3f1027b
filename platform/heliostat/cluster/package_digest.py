"""Identifies the code of a package by what is in its files."""

from __future__ import annotations

import hashlib
from pathlib import Path


def package_digest(package: Path) -> str:
    """Computes the digest of a package's files and their names: 64 hex digits, the same wherever its folder is."""
    files = sorted(p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc")
    told = hashlib.sha256()
    for file in files:
        told.update(f"{file.relative_to(package)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return told.hexdigest()
