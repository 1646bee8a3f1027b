"""Captures the code and environment of a run: commit, difference from it, Python and packages.

On a cluster there is no `.git`: `heliostat submit` sends the record in a file of the workspace (`workspace_package`). Files and
lines that may hold secrets are not in the difference (`source_diff`), and only listed.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import distributions

from heliostat.cluster.source_diff import difference, git
from heliostat.cluster.workspace_package import CODE_FILE
from heliostat.config import workspace
from heliostat.storage.records import Format

DIFF_BYTES = 1 << 20  # of a difference that is kept
USER = "HELIOSTAT_USER"  # on a cluster: who submitted the job
UNTRACKED = 1000  # files that git does not know and that are named


@dataclass(frozen=True)
class SourceCode:
    """Describes the source code of a run.

    `diff`: from the commit to the files that ran, as `git apply` takes it; `untracked`: files that git does not track;
    `left_out`: what the difference lacks, because it may be secret.
    """

    commit: str = ""
    diff: str = ""
    untracked: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def dirty(self) -> bool:
        return bool(self.diff or self.untracked or self.left_out)

    @property
    def digest(self) -> str:
        """Identifies the difference by a hash; empty where there is none."""
        told = f"{self.diff}\0{self.untracked}" + (f"\0{self.left_out}" if self.left_out else "")
        return hashlib.sha256(told.encode()).hexdigest()[:12] if self.dirty else ""

    def text(self) -> str:
        """Formats the difference, after a list of what it lacks."""
        notes = [f"# not in git: {path}" for path in self.untracked] + [
            f"# left out, may be secret: {path}" for path in self.left_out
        ]
        return "".join(f"{note}\n" for note in notes) + self.diff

    def facts(self) -> dict[str, str]:
        return {"commit": self.commit, "diff": self.digest}

    def dump(self) -> str:
        return json.dumps(asdict(self))


SOURCE = Format(SourceCode, "record of the code that was submitted", fix="submit the job again")


def source() -> SourceCode:
    """Captures the source code of the workspace as it is now; on a cluster, reads the record sent with the job."""
    sent = workspace.root() / CODE_FILE
    if sent.is_file():
        return SOURCE.read(sent)
    root = workspace.root()
    commit = (git(root, "rev-parse", "HEAD") or "").strip()
    if not commit:
        return SourceCode()
    diff, left_out = difference(root)
    if len(diff.encode()) > DIFF_BYTES:
        diff = diff.encode()[:DIFF_BYTES].decode(errors="ignore") + f"\n# cut at {DIFF_BYTES} bytes\n"
    untracked = (git(root, "ls-files", "--others", "--exclude-standard", "-z") or "").split("\0")[:-1]
    return SourceCode(commit, diff, tuple(untracked[:UNTRACKED]), tuple(left_out))


def user() -> str:
    """Returns the name of the user who runs the command; on a cluster, of the user who submitted it."""
    try:
        return os.environ.get(USER) or getpass.getuser()
    except (KeyError, OSError):  # a container's process of a user without a name
        return str(os.getuid())


def environment() -> dict[str, str]:
    """Maps Python, the operating system and every installed package to its version."""
    found = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
    system = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    return system | {name: found[name] for name in sorted(found) if name}
