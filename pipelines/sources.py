"""Finding the files of a text input: a file, a folder, a glob, an s3:// prefix, or `python:stdlib`.

The listing is the same wherever the input lies: paths are relative to the input's root, sorted. Pure but for `listing`.
"""

from __future__ import annotations

import re
import sysconfig

import pyarrow.fs as pafs
from heliostat.errors import ConfigError
from heliostat.prepare import InputFile, place
from heliostat.storage import Location

STDLIB = "python:stdlib"
SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# not the library itself: installed packages, tests (with data that is broken on purpose) and compiled files
STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def kind(path: str) -> tuple[str | None, str | None]:
    """(suffix, codec) of a path; the suffix is None if it is not a kind of text that we read."""
    lower = path.lower()
    codec = next((c for end, c in COMPRESSED.items() if lower.endswith(end)), None)
    if codec:
        lower = lower.rpartition(".")[0]
    return next((s for s in SUFFIXES if lower.endswith(s)), None), codec


def split_glob(uri: str) -> tuple[str, str | None]:
    """(root, pattern): `data/**/*.md` is (`data`, `**/*.md`); the pattern is None if there is no wildcard."""
    s3 = uri.startswith("s3://")
    base, mark, query = uri.partition("?") if s3 else (uri, "", "")  # on s3:// a question mark starts the query
    parts = base.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[*\[]" if s3 else r"[*?\[]", part)), None)
    if first is None:
        return uri, None
    root = "/".join(parts[:first]) or ("/" if base.startswith("/") else ".")
    return root + mark + query, "/".join(parts[first:])


def glob_regex(pattern: str) -> re.Pattern[str]:
    """`*`, `?` and `[...]` match within a folder's name; `**` matches any number of folders."""
    out = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]/]+\]|.", pattern, re.DOTALL):
        if token == "**/":
            out.append("(?:.*/)?")
        elif token == "**":
            out.append(".*")
        elif token == "*":
            out.append("[^/]*")
        elif token == "?":
            out.append("[^/]")
        elif len(token) > 1:
            inner = token[1:-1].replace("\\", "\\\\")
            out.append(f"[{'^' + inner[1:] if inner[0] == '!' else inner}]")
        else:
            out.append(re.escape(token))
    try:
        return re.compile("".join(out), re.DOTALL)
    except re.error as e:
        raise ConfigError(f"input: {pattern!r} is not a valid pattern ({e})") from e


def root(uri: str) -> Location:
    """The folder that document ids are relative to. A worker asks for itself: its Python may lie elsewhere."""
    return Location(sysconfig.get_paths()["stdlib"]) if uri == STDLIB else place(split_glob(uri)[0])


def find(uri: str) -> tuple[Location, list[tuple[str, pafs.FileInfo]]]:
    """The input's root, and every file of it that fits the pattern, by its path from there; the root itself if it is a file."""
    base, pattern = root(uri), split_glob(uri)[1]
    base.probe()
    info = base.fs.get_file_info(base.path)
    if info.type == pafs.FileType.File:
        return base, [("", info)]
    selector = pafs.FileSelector(base.path, recursive=True, allow_not_found=True)
    start = len(base.path.rstrip("/")) + 1
    found = [(i.path[start:], i) for i in base.fs.get_file_info(selector) if i.type == pafs.FileType.File]
    if pattern:
        matches = glob_regex(pattern).fullmatch
        found = [(path, i) for path, i in found if matches(path)]
    return base, found


def listing(uri: str) -> list[InputFile]:
    """Every file to read, sorted by path; ConfigError if there is none."""
    base, found = find(uri)
    if uri == STDLIB:
        found = [(p, i) for p, i in found if p.endswith(".py") and not STDLIB_SKIPS & set(p.split("/")[:-1])]
    files = [InputFile(p, i.size, i.mtime_ns or 0) for p, i in found if kind(p or base.path)[0]]
    if not files:
        seen = f"{len(found)} files, none" if found else "no file there"
        raise ConfigError(f"input: {uri!r}: {seen} that ends in {', '.join(SUFFIXES)} (or these with .gz, .zst)")
    return sorted(files, key=lambda f: f.path)


def pack(files: list[InputFile], bytes_per_task: int, files_per_task: int = 2000) -> list[list[str]]:
    """The paths in lists of about equal bytes, one per read task."""
    tasks: list[list[str]] = []
    size = 0
    for file in files:
        if not tasks or size + file.bytes > bytes_per_task or len(tasks[-1]) >= files_per_task:
            tasks.append([])
            size = 0
        tasks[-1].append(file.path)
        size += file.bytes
    return tasks
