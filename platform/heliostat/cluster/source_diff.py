"""Computes the difference between a workspace and its commit, as `git apply` takes it, without the secrets that files hold.

Files that may hold secrets by their name (`workspace_package`) are left out, and so are files that were copied or renamed from
one. In the others each line with a secret is hidden (`redact`), in the old and in the new version. Both are reported.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from heliostat import redact
from heliostat.cluster import workspace_package

GIT_S = 10
# whatever the person's own settings are
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
    """Runs git and returns its output unchanged; None if it fails, or is not installed."""
    try:
        done = subprocess.run(["git", *command], cwd=root, capture_output=True, timeout=GIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def difference(root: Path) -> tuple[str, list[str]]:
    """Computes the difference from HEAD, and lists for a person what it leaves out."""
    changed, parts, left_out = _changed(root), [], []
    if changed is None:
        return "", ["all of it: git did not tell what has changed"]
    for path, origin in changed:
        if workspace_package.private(path) or workspace_package.private(origin):
            left_out.append(path)
            continue
        text = git(root, *PLAIN, *DIFF, path)
        if text is None:
            left_out.append(f"{path}: git did not tell how it has changed")
            continue
        hidden, lines = hide(text, *_secrets(root, path))
        parts.append(hidden)
        if lines:
            left_out.append(f"{path}: {lines} lines with secrets, which are hidden")
    return "".join(parts), left_out


def _changed(root: Path) -> list[tuple[str, str]] | None:
    """Lists (path, origin) of each changed file; None if git fails.

    The origin is the path that it was copied or renamed from, or its own; a renamed file's old path is listed, too.
    """
    told = git(root, "diff", "HEAD", "--name-status", "-z", "-M", "-C", "--relative")
    if told is None:
        return None
    fields, found = iter(told.split("\0")), list[tuple[str, str]]()
    for status in fields:
        if status[:1] in ("R", "C"):
            origin, path = next(fields), next(fields)
            found += [(origin, origin)] * (status[0] == "R") + [(path, origin)]
        elif status:
            path = next(fields)
            found.append((path, path))
    return found


def _secrets(root: Path, path: str) -> tuple[set[int], set[int]]:
    """Finds the numbers, from 1, of the lines that hold secrets: in the commit's version of a file, and in the current one."""
    settings = Path(path).suffix.lower() in redact.SETTINGS
    try:
        new = (root / path).read_text(errors="replace")
    except OSError:  # deleted, or a folder of another repository
        new = ""
    versions = git(root, "show", f"HEAD:./{path}") or "", new
    was, now = ({i + 1 for i in redact.secret_lines(text.split("\n"), settings)} for text in versions)
    return was, now


def hide(text: str, was: set[int], now: set[int]) -> tuple[str, int]:
    """Hides the secrets of these lines in a file's difference; returns it and how many lines were hidden.

    `was`: line numbers in the commit's version; `now`: in the current one.
    """
    lines, hidden, old, new = text.split("\n"), 0, 0, 0
    for i, line in enumerate(lines):
        if match := HUNK.match(line):
            old, new = int(match[1]), int(match[2])
            lines[i] = match[0]  # git puts some line from before behind it
        elif old or new:
            mark = line[:1]
            if (mark in ("-", " ") and old in was) or (mark in ("+", " ") and new in now):
                lines[i], hidden = mark + _without(line[1:]), hidden + 1
            old, new = old + (mark in ("-", " ")), new + (mark in ("+", " "))
    return "\n".join(lines), hidden


def _without(line: str) -> str:
    told = redact.hide(line, settings=True)
    return told if told != line else line[: len(line) - len(line.lstrip())] + redact.HIDDEN
