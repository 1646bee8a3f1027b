"""Reads the files of one commit from a git clone with the program `git`. The clone may be bare or have a working tree.

Clones are untrusted. So git ignores the machine's settings, runs no hook or monitor, contacts no remote, and uses no replacement
objects. A clone that reads objects from outside its own folder is rejected. Uncommitted files in the working tree aren't read.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from heliostat.curation.readers import repository
from heliostat.curation.readers.repository import MemberError, RepositoryFile, name_of
from heliostat.curation.readers.streams import LeftOutError, ReadLimits
from heliostat.curation.stage import Document, Dropped

SUFFIX = ".git"
SILENCE_S = 120.0  # maximum seconds without output from git
BLOCK = 1 << 16
LINE = 1 << 20  # maximum bytes of an entry of a git tree
ELSEWHERE = ("commondir", "objects/info/alternates", "objects/info/http-alternates")
SETTINGS = (
    "safe.directory=*",
    "core.fsmonitor=false",
    "core.hooksPath=/dev/null",
    "protocol.allow=never",
    "core.commitGraph=false",
)
ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1", "GIT_OPTIONAL_LOCKS": "0", "GIT_ALLOW_PROTOCOL": "none", "LC_ALL": "C",
}  # fmt: skip


def is_clone(path: str) -> bool:
    """Checks, by the folder's name, whether a folder is a git repository."""
    return path.rpartition("/")[2].endswith(SUFFIX)


def there_is_git() -> bool:
    return shutil.which("git") is not None


def facts(folder: Path) -> tuple[str, int]:
    """Returns the commit hash of HEAD, and the total bytes of the commit's files. Raises LeftOutError if the clone has no
    readable commit."""
    commit = _commit(folder, "HEAD")
    return commit, sum(size or 0 for _, _, size, _ in _tree(folder, commit))


def read(path: str, folder: Path, limits: ReadLimits, commit: str = "HEAD") -> Iterator[Document | Dropped]:
    """Yields the files of a clone's commit. An id is the clone's path, `#`, and the file's path."""
    try:
        commit = _commit(folder, commit)
        with _git(folder, "cat-file", "--batch", talks=True) as objects:
            about = {"repository": path[: -len(SUFFIX)].rstrip("/") or folder.parent.name, "commit": commit}
            yield from repository.documents(path, partial(_members, folder, commit, objects), limits, about)
    except LeftOutError as e:
        yield Dropped(path, e.reason, e.detail)


def _commit(folder: Path, name: str) -> str:
    """Returns the hash of the commit that `name` refers to. Raises LeftOutError if there is no such commit, or if the clone reads
    objects from outside its folder."""
    if folder.is_symlink() or not folder.is_dir() or not (folder / "objects").resolve().is_relative_to(folder.resolve()):
        raise LeftOutError("outside", "no folder of its own")
    for place in ELSEWHERE:
        if (folder / place).exists():
            raise LeftOutError("outside", f"takes objects from elsewhere ({place})")
    with _git(folder, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}") as out:
        return out.line(b"\n").decode("ascii", "replace")


def _members(folder: Path, commit: str, objects: _Output) -> Iterator[RepositoryFile]:
    for mode, id, size, name in _tree(folder, commit):
        kind = "file" if mode in (b"100644", b"100755", b"100664") else "link"  # a link, or a submodule
        yield RepositoryFile(name_of(name), size or 0, kind, partial(_object, objects, id, size))  # type: ignore[arg-type]


def _tree(folder: Path, commit: str) -> Iterator[tuple[bytes, bytes, int | None, bytes]]:
    """Yields (mode, object id, size in bytes, path) of each file of a commit, in git's order."""
    with _git(folder, "ls-tree", "-r", "-z", "--long", "--full-tree", commit) as out:
        while entry := out.line(b"\0"):
            about, _, name = entry.partition(b"\t")
            mode, _, id, size = about.split()
            yield mode, id, int(size) if size.isdigit() else None, name


def _object(objects: _Output, id: bytes, size: int | None) -> bytes:
    if size is None:
        raise MemberError("unreadable", "not in the clone")
    objects.ask(id + b"\n")
    answer = objects.line(b"\n").split()
    if len(answer) != 3 or answer[1] != b"blob" or int(answer[2]) != size:
        raise MemberError("unreadable", "not in the clone")
    data = objects.exactly(size)
    objects.exactly(1)
    return data


@contextmanager
def _git(folder: Path, *command: str, talks: bool = False) -> Iterator[_Output]:
    """Runs git on a clone; provides git's output. Raises LeftOutError if git fails, or prints nothing for SILENCE_S seconds."""
    settings = [word for setting in SETTINGS for word in ("-c", setting)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | ENVIRONMENT
    process = subprocess.Popen(["git", f"--git-dir={folder}", *settings, *command], env=environment, cwd="/", bufsize=0,
                               stdin=subprocess.PIPE if talks else subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    try:
        yield _Output(process)
    finally:
        if talks or process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


class _Output:
    """Reads git's output. Raises LeftOutError if a read takes more than SILENCE_S seconds."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout and process.stderr
        self._process, self._out = process, process.stdout.fileno()
        self._error: int | None = process.stderr.fileno()
        self._buffer, self._said = bytearray(), b""

    def ask(self, question: bytes) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(question)
        except BrokenPipeError:
            raise self._failed() from None

    def line(self, end: bytes) -> bytes:
        """Reads the output up to the delimiter `end`. Returns the bytes before the delimiter; b"" at the end of the output."""
        at = -1
        while (at := self._buffer.find(end, max(0, at))) < 0:
            at = len(self._buffer)
            if at > LINE or not self._more():
                if at:
                    raise LeftOutError("corrupt", "git broke off")
                return b""
        line_bytes = bytes(self._buffer[:at])
        del self._buffer[: at + len(end)]
        return line_bytes

    def exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            if not self._more():
                raise LeftOutError("corrupt", "git broke off")
        content = bytes(self._buffer[:size])
        del self._buffer[:size]
        return content

    def _more(self) -> bool:
        """Reads more output into the buffer. Returns False at the end of the output. Raises LeftOutError if git failed."""
        data = self._read()
        while data is None:
            data = self._read()
        self._buffer += data
        if not data and self._wait() != 0:
            raise self._failed()
        return bool(data)

    def _read(self) -> bytes | None:
        """Returns the next bytes of git's standard output; None if git wrote to standard error instead."""
        ready = select.select([self._out, *([self._error] if self._error is not None else [])], [], [], SILENCE_S)[0]
        if not ready:
            raise LeftOutError("corrupt", f"git said nothing for {SILENCE_S:.0f} s")
        if self._error in ready:
            said = os.read(self._error, BLOCK)
            self._said = (self._said + said)[-BLOCK:]
            self._error = self._error if said else None
            return None
        return os.read(self._out, BLOCK)

    def _wait(self) -> int:
        try:
            return self._process.wait(SILENCE_S)
        except subprocess.TimeoutExpired:
            raise LeftOutError("corrupt", "git does not end") from None

    def _failed(self) -> LeftOutError:
        if self._error is not None:
            self._said += os.read(self._error, BLOCK)
        lines = self._said.strip().splitlines()
        return LeftOutError("corrupt", name_of(lines[-1] if lines else b"git failed")[:200])
