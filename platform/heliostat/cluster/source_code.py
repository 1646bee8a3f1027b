"""Captures the code and environment of a run: the git commit, the changes since, and the versions of Python and packages.

A cluster has no `.git`, so `heliostat submit` sends the record in a file of the workspace (`workspace_package`). The difference
doesn't contain files and lines that may hold secrets; it only lists them (`difference`).
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

DIFF_BYTES = 1 << 20  # most bytes of a difference; the rest is cut off
USER = "HELIOSTAT_USER"  # on a cluster: the user who submitted the job
UNTRACKED = 1000  # most untracked files that are listed


@dataclass(frozen=True)
class SourceCode:
    """Describes the source code of a run.

    `diff`: the changes from the commit to the files that ran, in the format of `git apply`. `untracked`: files that git doesn't
    track. `left_out`: changes that `diff` lacks, because they may hold secrets, or because git failed.
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
        """Returns 12 hex digits that identify the difference; empty if there is none."""
        changes = f"{self.diff}\0{self.untracked}" + (f"\0{self.left_out}" if self.left_out else "")
        return hashlib.sha256(changes.encode()).hexdigest()[:12] if self.dirty else ""

    def text(self) -> str:
        """Formats the difference, after a list of the files that it lacks."""
        notes = [f"# not in git: {path}" for path in self.untracked] + [
            f"# left out, may be secret: {path}" for path in self.left_out
        ]
        return "".join(f"{note}\n" for note in notes) + self.diff

    def facts(self) -> dict[str, str]:
        """Returns the commit, and the digest of the difference from it."""
        return {"commit": self.commit, "diff": self.digest}

    def dump(self) -> str:
        return json.dumps(asdict(self))


SOURCE = Format(SourceCode, "record of the code that was submitted", fix="Submit the job again")


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
    """Returns the name of the user who runs the command, or on a cluster the name of the user who submitted it."""
    try:
        return os.environ.get(USER) or getpass.getuser()
    except (KeyError, OSError):  # in a container, for example, the user may have no name
        return str(os.getuid())


def environment() -> dict[str, str]:
    """Maps Python, the operating system, and every installed package to its version."""
    versions = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
    system = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    return system | {name: versions[name] for name in sorted(versions) if name}


# the difference -------------------------------------------------------------------------------------------------------


GIT_S = 10
# these override the user's own git settings
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
    """Computes the difference from HEAD without secrets. Returns it with a readable list of the changes that it lacks."""
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

    The origin is the path from which the file was copied or renamed, else its own path. A renamed file's old path is listed too.
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
    """Returns the numbers, from 1, of the lines with secrets: in the committed version of a file, and in the current one."""
    settings = Path(path).suffix.lower() in redact.SETTINGS
    try:
        new = (root / path).read_text(errors="replace")
    except OSError:  # deleted, or the folder of another repository
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
            lines[i] = match[0]  # git appends an earlier line of the file, which is cut off here
        elif old or new:
            mark = line[:1]
            if (mark in ("-", " ") and old in was) or (mark in ("+", " ") and new in now):
                lines[i], hidden = mark + _without(line[1:]), hidden + 1
            old, new = old + (mark in ("-", " ")), new + (mark in ("+", " "))
    return "\n".join(lines), hidden


def _without(line: str) -> str:
    hidden = redact.hide(line, settings=True)
    return hidden if hidden != line else line[: len(line) - len(line.lstrip())] + redact.HIDDEN
