"""Mutates files that heliostat reads, and classifies each result: read without an error, rejected in one line, or a traceback.

`run(target, seed, rounds)` returns a report. A `Target` is one kind of file and its reader. A reader may only raise errors that a
person can use: a HeliostatError of one line that names the file (or, for a schema, the key) and the fault.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from heliostat.errors import HeliostatError
from heliostat.text import printable

ROOT = Path(__file__).parents[2]
CPU_S = 10.0  # of one reading: more is a hang
ROOM = 6 << 30  # bytes that one reading may ask for: more is a bomb
LONGEST = 1000  # characters of a line
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 10**9, 10**12, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "0", "../../x", "/", "s3://", "s3://b/k?", "file://", "http://[", "http://x:y:z", "\x1b[31mred\x1b[0m",
    "a\nb", "\u202eevil", "\x00", "\x9b2J", "é" * 50, "x" * 10_000, [], {}, [[]], [None], [1, 2, 3], {"": None}, {"a": {"b": 1}},
    {"a": "\x1b[2J"},
]  # fmt: skip
PIECES = [
    b"", b"\x00", b"\xff\xfe", b"\x1b[2J", b"[" * 3000, b"{" * 3000, b'"', b"&a [*a, *a]",
    b"!!python/object/apply:os.system ['true']",
    b"1e999", b"NaN", b"-", b": ", b"\n---\n", b"\t", b"9" * 5000, "\u202e".encode(), b"\\u0000",
]  # fmt: skip


# mutations -----------------------------------------------------------------------------------------------------------


def _places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _places(value, (*path, key))


def _at(tree: Any, path: tuple) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """Returns the tree with one to three values replaced, removed, exchanged, wrapped, renamed, or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return rng.choice(VALUES)
        path = rng.choice(places)
        owner, key = _at(tree, path[:-1]), path[-1]
        what = rng.randrange(10)
        if what < 5:
            owner[key] = copy.deepcopy(rng.choice(VALUES))
        elif what == 5:
            del owner[key]
        elif what == 6:
            owner[key] = copy.deepcopy(_at(tree, rng.choice(places)))
        elif what == 7:
            owner[key] = rng.choice([[owner[key]], {"x": owner[key]}, str(owner[key]), [owner[key]] * 3])
        elif what == 8 and isinstance(owner, dict):
            owner[rng.choice([f"{key}x", "x", "", str(key).upper()])] = owner.pop(key)
        elif isinstance(owner, list):
            owner.insert(key, copy.deepcopy(owner[key]))
        elif isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
            owner[key] = rng.choice([-owner[key], owner[key] + 1, owner[key] * 1000, owner[key] / 3])
        else:
            owner[f"{key} "] = owner[key]
    return tree


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Returns the bytes cut, flipped, doubled, or with inserted bytes."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 4, 16, 200]))
        what = rng.randrange(6)
        if what == 0:
            data = data[:at]
        elif what == 1 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif what == 2:
            data = data[:at] + rng.randbytes(end - at) + data[end:]
        elif what == 3:
            data = data[:at] + data[end:]
        elif what == 4:
            data = data[:end] + data[at:]
        else:
            data = data[:at] + rng.choice(PIECES) + data[at:]
    return data


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """Mutates the tree or the bytes of a JSON file, or of a file with one JSON object per line."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    lines = data.splitlines() if data.count(b"\n") and not data.rstrip().endswith(b"\n}") else [data]
    at = rng.randrange(len(lines))
    try:
        lines[at] = json.dumps(mutate_tree(rng, json.loads(lines[at]))).encode()
    except ValueError:  # several lines are one object
        return json.dumps(mutate_tree(rng, json.loads(data))).encode()
    return b"\n".join(lines)


def mutated_yaml(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(rng, data)
    documents = list(yaml.safe_load_all(data))
    at = rng.randrange(len(documents))
    documents[at] = mutate_tree(rng, documents[at])
    return yaml.safe_dump_all(documents, allow_unicode=rng.random() < 0.5).encode()


# what became of it ---------------------------------------------------------------------------------------------------


class TooLongError(BaseException):
    pass


@contextmanager
def limits() -> Iterator[None]:
    """Raises TooLongError after CPU_S seconds of this process's CPU time, and MemoryError above ROOM bytes."""

    def late(*_: Any) -> None:
        raise TooLongError

    before, (soft, hard) = signal.signal(signal.SIGVTALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, before)


def unclear(message: str, names: list[str]) -> str:
    """Returns the part of an error's message that a person can't use; empty if there is none."""
    first, *more = message.split("\n")
    if any(not line.startswith("  ") for line in more):
        return "more than one line"
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E for c in message.replace("\n", "")):
        return "control characters"
    if max(map(len, [first, *more])) > LONGEST:
        return "a long line"
    return "" if any(name in message for name in names) else "does not name the file"


@dataclass
class Target:
    """Describes a target. `folder` holds valid files, and is copied for every round. `mutate` changes a file in the copy, and
    returns the names by which an error may call it. `read` reads the copy."""

    folder: Path
    mutate: Callable[[random.Random, Path], list[str]]
    read: Callable[[Path], object]


@dataclass
class Report:
    rounds: int = 0
    read: int = 0
    refused: int = 0
    bad: Counter = field(default_factory=Counter)  # by what it was and where
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, seed: str, more: str) -> None:
        self.bad[what] += 1
        self.examples.setdefault(what, f"seed {seed}: {more[:300]!r}")

    def __str__(self) -> str:
        lines = [f"{self.rounds} rounds: {self.read} read, {self.refused} refused in a line, {sum(self.bad.values())} not so"]
        return "\n".join([*lines, *(f"  {n:4d} x {what}  ({self.examples[what]})" for what, n in self.bad.most_common())])


def fresh(target: Target, scratch: Path) -> Path:
    """Returns a copy of the valid files, and restores the workspace."""
    os.chdir(ROOT)
    copied = scratch / "fuzzed"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(target.folder, copied)
    return copied


def run(target: Target, seed: int, rounds: int, scratch: Path) -> Report:
    report = Report()
    for number in range(rounds):
        name, copied = f"{seed}/{number}", fresh(target, scratch)
        names = target.mutate(random.Random(name), copied)
        report.rounds += 1
        try:
            with limits():
                target.read(copied)
        except HeliostatError as e:
            if fault := unclear(printable(str(e), lines=True), names):  # as the command line shows it
                report.add(f"{type(e).__name__}, {fault} ({where(e)})", name, str(e))
            else:
                report.refused += 1
        except TooLongError as e:
            report.add(f"hangs ({where(e)})", name, "")
        except Exception as e:  # noqa: BLE001 (any is a finding)
            report.add(f"{type(e).__name__} ({where(e)})", name, str(e))
        else:
            report.read += 1
    return report


def where(error: BaseException) -> str:
    """Returns the innermost line of heliostat's code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/platform/heliostat/" in f.filename or "/jobs/" in f.filename or "/pipelines/" in f.filename]
    found = ours[-1] if ours else frames[-1]
    return f"{Path(found.filename).name}:{found.name}"
