"""Captures the code and environment of a run: the git commit, the changes since that commit, and the versions of Python and
packages.

A cluster has no `.git`, so `heliostat submit` sends this record in a file of the workspace (`workspace_package`). The difference
from the commit leaves out files and lines that may contain secrets, and only lists them (`difference`).
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

from heliostat import redact
from heliostat.cluster import workspace_package
from heliostat.cluster.workspace_package import CODE_FILE
from heliostat.config import workspace
from heliostat.storage.records import Format

DIFF_BYTES = 1 << 20  # maximum bytes of a difference; the rest is cut off
USER = "HELIOSTAT_USER"  # on a cluster: the user who submitted the job
UNTRACKED = 1000  # maximum number of untracked files that are listed


@dataclass(frozen=True)
class SourceCode:
    """Describes the source code of a run.

    `diff`: the changes from the commit to the files that ran, in the format of `git apply`. `untracked`: files that git doesn't
    track. `left_out`: changes that aren't in `diff`, because they may contain secrets, or because git failed.
    """

    commit: str = ""
    diff: str = ""
    untracked: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def dirty(self) -> bool:
        """Checks whether the code differs from its commit."""
        return bool(self.diff or self.untracked or self.left_out)

    @property
    def digest(self) -> str:
        """Returns 12 hex digits that identify the difference; empty if the code doesn't differ from its commit."""
        changes = f"{self.diff}\0{self.untracked}" + (f"\0{self.left_out}" if self.left_out else "")
        return hashlib.sha256(changes.encode()).hexdigest()[:12] if self.dirty else ""

    def text(self) -> str:
        """Formats the difference. Begins with a list of the files that the difference leaves out."""
        notes = [f"# not in git: {path}" for path in self.untracked] + [
            f"# left out, may be secret: {path}" for path in self.left_out
        ]
        return "".join(f"{note}\n" for note in notes) + self.diff

    def facts(self) -> dict[str, str]:
        """Returns the commit, and the digest of the difference from the commit."""
        return {"commit": self.commit, "diff": self.digest}

    def dump(self) -> str:
        return json.dumps(asdict(self))


SOURCE = Format(SourceCode, "record of the code that was submitted", fix="Submit the job again")


def source() -> SourceCode:
    """Captures the current source code of the workspace. On a cluster, reads the record that was sent with the job."""
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
    """Returns the name of the user who runs the command. On a cluster, returns the name of the user who submitted the job."""
    try:
        return os.environ.get(USER) or getpass.getuser()
    except (KeyError, OSError):  # for example in a container, the user may have no name
        return str(os.getuid())


def environment() -> dict[str, str]:
    """Maps Python, the operating system, and every installed package to its version."""
    versions = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
    system = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    return system | {name: versions[name] for name in sorted(versions) if name}


# the difference -------------------------------------------------------------------------------------------------------


GIT_S = 10
# these options override the user's own git settings
PLAIN = (
    "--literal-pathspecs",
    "-c",
    "diff.suppressBlankEmpty=false",
    "-c",
    "diff.noprefix=false",
    "-c",
    "diff.mnemonicPrefix=false",
)
DIFF = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames", "--relative", "--")
HUNK = re.compile(r"@@ -(\d+)(?:,\d+)? \+(\d+)(?:,\d+)? @@")


def git(root: Path, *command: str) -> str | None:
    """Runs git and returns its output unchanged; None if it fails, takes longer than 10 s, or isn't installed."""
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def difference(root: Path) -> tuple[str, list[str]]:
    """Computes the difference from HEAD without secrets. Returns the difference, and a readable list of the changes that the
    difference leaves out."""
    changed, parts, left_out = _changed(root), [], []
    if changed is None:
        return "", ["all of it: git didn't show the changes"]
    for path, origin in changed:
        if workspace_package.private(path) or workspace_package.private(origin):
            left_out.append(path)
            continue
        text = git(root, *PLAIN, *DIFF, path)
        if text is None:
            left_out.append(f"{path}: git didn't show its changes")
            continue
        hidden, lines = hide(text, *_secrets(root, path))
        parts.append(hidden)
        if lines:
            left_out.append(f"{path}: hid {lines} lines with secrets")
    return "".join(parts), left_out


def _changed(root: Path) -> list[tuple[str, str]] | None:
    """Lists (path, origin) of each changed file; None if git fails.

    The origin of a copied or renamed file is its old path. The origin of any other file is its own path. For a renamed file, the
    list has an entry for the old path too.
    """
    output = git(root, "diff", "HEAD", "--name-status", "-z", "-M", "-C", "--relative")
    if output is None:
        return None
    fields, changes = iter(output.split("\0")), list[tuple[str, str]]()
    for status in fields:
        if status[:1] in ("R", "C"):
            origin, path = next(fields), next(fields)
            changes += [(origin, origin)] * (status[0] == "R") + [(path, origin)]
        elif status:
            path = next(fields)
            changes.append((path, path))
    return changes


def _secrets(root: Path, path: str) -> tuple[set[int], set[int]]:
    """Returns the numbers of the lines with secrets, counted from 1: in the committed version of a file, and in its current
    version."""
    settings = Path(path).suffix.lower() in redact.SETTINGS
    try:
        new = (root / path).read_text(errors="replace")
    except OSError:  # the file was deleted, or is the folder of another repository
        new = ""
    versions = git(root, "show", f"HEAD:./{path}") or "", new
    was, now = ({i + 1 for i in redact.secret_lines(text.split("\n"), settings)} for text in versions)
    return was, now


def hide(text: str, was: set[int], now: set[int]) -> tuple[str, int]:
    """Hides the secrets in the given lines of a file's difference. Returns the difference and the number of hidden lines.

    `was`: line numbers in the committed version. `now`: line numbers in the current version.
    """
    lines, hidden, old, new = text.split("\n"), 0, 0, 0
    for i, line in enumerate(lines):
        if match := HUNK.match(line):
            old, new = int(match[1]), int(match[2])
            lines[i] = match[0]  # cuts off the earlier line of the file that git appends
        elif old or new:
            mark = line[:1]
            if (mark in ("-", " ") and old in was) or (mark in ("+", " ") and new in now):
                lines[i], hidden = mark + _without(line[1:]), hidden + 1
            old, new = old + (mark in ("-", " ")), new + (mark in ("+", " "))
    return "\n".join(lines), hidden


def _without(line: str) -> str:
    hidden = redact.hide(line, settings=True)
    return hidden if hidden != line else line[: len(line) - len(line.lstrip())] + redact.HIDDEN
