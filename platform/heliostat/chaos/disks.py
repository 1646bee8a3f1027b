"""Disks of a size of our own: a tmpfs, which Linux lets root mount."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from heliostat.chaos.process import ChaosError
from heliostat.config.spec import Job


def why_not(job: Job) -> str | None:
    """Explains why no small disk can be mounted here; None if one can."""
    if os.geteuid():
        return "mounts a small tmpfs, which needs root"
    with tempfile.TemporaryDirectory() as probe:
        try:
            mount(Path(probe), 1 << 20)
        except ChaosError as e:
            return str(e)
        unmount(Path(probe))
    return None


def mount(folder: Path, size: int) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as e:
        raise ChaosError("needs the command `mount`") from e
    if done.returncode:
        raise ChaosError(f"cannot mount a tmpfs ({done.stderr.strip()})")


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
