"""Records the traffic between the host and the simulated device, with the lines of code that cause it."""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import heliostat
import torch

HOUSE, TORCH = str(Path(heliostat.__file__).parent), str(Path(torch.__file__).parent)
HERE = Path(__file__).parent
DEEPSPEED = Path(TORCH).parent / "deepspeed"
THROUGH = ("accelerator", "comm", "utils/nvtx.py")  # parts of DeepSpeed that others call
OWN = (str(HERE / "traffic.py"), str(HERE / "cuda.py"), *(str(DEEPSPEED / name) for name in THROUGH))
INSIDE = re.compile(r"\.<locals>\.<\w+>$")  # a comprehension or lambda
RAISES = ("mixed devices", "unordered")
MEANING = {
    "read": "the host waits for a value of the device",
    "deferred read": "a copy to pinned memory, which the host waits for later or never",
    "synchronization": "the host waits for a stream, an event, or the device",
    "upload": "a copy from pinned memory that the host does not wait for",
    "blocking upload": "a copy from pinned memory that the host waits for",
    "unpinned upload": "a copy from memory that is not pinned, which the host waits for",
    "mixed devices": "an operation on tensors of several devices",
    "unordered": "an operation on memory that another stream uses, which this stream has not waited for",
    "fault": "memory that was freed or changed while the device used it",
}


class Crossing(NamedTuple):
    """Describes one kind of traffic at one place. `ours`: the innermost line of heliostat; `line`: the innermost outside torch,
    in `function`."""

    what: str
    operation: str
    ours: str
    line: str
    function: str

    def __str__(self) -> str:
        inside = f" ({self.line})" if self.ours not in ("", self.line) else ""
        return f"{self.what}: {self.operation} at {self.ours or self.line}{inside}"


@dataclass
class Traffic:
    """Holds the recorded traffic, with its counts."""

    crossings: Counter[Crossing] = field(default_factory=Counter)

    def count(self, *kinds: str) -> int:
        """Counts the traffic of these kinds."""
        return sum(n for crossing, n in self.crossings.items() if crossing.what in kinds)

    def places(self, *kinds: str) -> str:
        """Returns a line for each place with traffic of these kinds."""
        return "\n".join(f"{n} x {c}" for c, n in self.crossings.most_common() if c.what in kinds)


_open: list[Traffic] = []


@contextlib.contextmanager
def recorded() -> Iterator[Traffic]:
    """Records until the block's end. A `fault` that can't raise an error at its place raises it there."""
    traffic = Traffic()
    _open.append(traffic)
    try:
        yield traffic
    finally:
        _open.remove(traffic)
    assert not traffic.count("fault"), traffic.places("fault")


def listen(what: str, operation: str, number: int) -> None:
    """Receives all traffic from the device; raises RuntimeError for operations that no device can compute."""
    crossing = Crossing(what, operation, *_place())
    if what in RAISES:
        raise RuntimeError(f"{crossing}: {MEANING[what]}")
    for traffic in _open:
        traffic.crossings[crossing] += 1


def _place() -> tuple[str, str, str]:
    frame: FrameType | None = sys._getframe()
    line, ours, function = "", "", ""
    while frame and not ours:
        name = frame.f_code.co_filename
        if not name.startswith((TORCH, *OWN, "<")):
            here = f"{_short(name)}:{frame.f_lineno}"
            line, function = line or here, function or INSIDE.sub("", frame.f_code.co_qualname)
            if name.startswith(HOUSE):
                ours = here
        frame = frame.f_back
    return ours, line or "backward pass", function


def _short(name: str) -> str:
    for root in (str(Path(TORCH).parent), str(Path(HOUSE).parent), str(HERE.parents[1])):
        name = name.removeprefix(root + "/")
    return name
