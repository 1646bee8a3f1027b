"""The code that a run is made by: commit, what differs from it, Python and packages.

On a cluster there is no `.git`: `heliostat submit` sends what it knew in a file of the workspace (`pack`). Files that may hold
secrets (those that never travel to a cluster either) are left out of the difference, and only named.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import distributions

from heliostat import workspace
from heliostat.cluster.pack import CODE_FILE, NEVER
from heliostat.records import Format

DIFF_BYTES = 1 << 20  # of a difference that is kept


@dataclass(frozen=True)
class Source:
    """`diff`: from the commit to the files that ran, as `git apply` takes it; `untracked`: files that git does not know."""

    commit: str = ""
    diff: str = ""
    untracked: tuple[str, ...] = ()

    @property
    def dirty(self) -> bool:
        return bool(self.diff or self.untracked)

    @property
    def digest(self) -> str:
        """Names the difference; empty where there is none."""
        return hashlib.sha256(f"{self.diff}\0{self.untracked}".encode()).hexdigest()[:12] if self.dirty else ""

    def facts(self) -> dict[str, str]:
        return {"commit": self.commit, "diff": self.digest}

    def dump(self) -> str:
        return json.dumps(asdict(self))


SOURCE = Format(Source, "record of the code that was submitted", fix="submit the job again")


def source() -> Source:
    """The workspace as it is now."""
    sent = workspace.root() / CODE_FILE
    if sent.is_file():
        return SOURCE.read(sent)
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return Source()
    changed = [path for path in _git("diff", "HEAD", "--name-only", "--relative").splitlines() if not NEVER.match_file(path)]
    diff = _git("diff", "HEAD", "--no-color", "--relative", "--", *changed) + "\n" if changed else ""
    if len(diff.encode()) > DIFF_BYTES:
        diff = diff.encode()[:DIFF_BYTES].decode(errors="ignore") + f"\n# cut at {DIFF_BYTES} bytes\n"
    untracked = _git("ls-files", "--others", "--exclude-standard").splitlines()
    return Source(commit, diff, tuple(untracked[:1000]))


def environment() -> dict[str, str]:
    """Python, the system, and every installed package's version, by name."""
    found = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
    system = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    return system | {name: found[name] for name in sorted(found) if name}


def _git(*command: str) -> str:
    try:
        done = subprocess.run(["git", *command], cwd=workspace.root(), capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
