"""Summarizes the trace of a profile: the operations that took the most time, and the longest gaps between operations."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

from heliostat.errors import DataError
from heliostat.storage.locations import Location

TOP, GAPS = 15, 5
NAME = 70  # maximum characters of a name in a table; names of kernels are longer
STEP = "heliostat step "  # the names of steps in the trace begin with this
GPU = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events on a GPU


class TracedOperation(TypedDict):
    """Describes all calls of an operation in a profile. `self_s`: the operation's seconds, without the seconds of operations
    that it calls."""

    name: str
    device: str
    calls: int
    total_s: float
    self_s: float


class Gap(TypedDict):
    """Describes a gap, which is a time without operations. The gap follows the operation `after` and precedes the operation
    `before`. `begin_s`: when the gap begins, in seconds since the begin of the profile."""

    begin_s: float
    seconds: float
    after: str
    before: str


class ProfileSummary(TypedDict):
    """Describes a profile: its duration in seconds, its device, and the device's longest gaps. `busy`: the share of the time in
    which the device is busy. `operations`: the operations with the most `self_s`."""

    seconds: float
    device: str
    busy: float
    operations: list[TracedOperation]
    gaps: list[Gap]


class Span(NamedTuple):
    """Describes an event of a trace; times are in microseconds."""

    begin: float
    end: float
    name: str
    thread: tuple[str, str]
    category: str


def read(trace: Location) -> ProfileSummary:
    """Summarizes a trace file (gzipped JSON in Chrome's format). Raises DataError if the file isn't a trace."""
    try:
        with trace.open() as raw, gzip.open(raw) as text:
            events = json.load(text)["traceEvents"]
            return summarize(spans(events))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(f"{trace}: isn't a trace of torch.profiler ({type(e).__name__}). Profile again") from e


def spans(events: Iterable[dict[str, object]]) -> list[Span]:
    """Collects the events of a trace that have a duration. In the result, a call comes before the calls inside it."""
    collected = [
        Span(begin := float(str(e["ts"])), begin + float(str(e["dur"])), str(e["name"]), (str(e["pid"]), str(e["tid"])),
             str(e.get("cat", "")))
        for e in events
        if e.get("ph") == "X" and "dur" in e
    ]  # fmt: skip
    return sorted(collected, key=lambda s: (s.begin, -s.end))


def summarize(events: Sequence[Span]) -> ProfileSummary:
    """Summarizes the events of a trace, which must be in the order of `spans`. Raises ValueError if no event is a step."""
    steps = [s for s in events if s.category == "user_annotation" and re.fullmatch(rf"{STEP}\d+", s.name)]
    if not steps:
        raise ValueError("no step")
    begin, end = steps[0].begin, max(s.end for s in steps)
    inside = [s for s in events if s.end > begin and s.begin < end]
    on_gpu = [s for s in inside if s.category in GPU]
    on_cpu = [s for s in inside if s.category == "cpu_op"]
    device = on_gpu or [s for s in on_cpu if s.thread == steps[0].thread]
    gaps = _gaps(device, begin, end)
    idle = sum(g["seconds"] for g in gaps)
    return {
        "seconds": (end - begin) / 1e6,
        "device": "gpu" if on_gpu else "cpu",
        "busy": 1.0 - idle * 1e6 / (end - begin) if end > begin else 0.0,
        "operations": sorted([*_operations(on_cpu, "cpu"), *_operations(on_gpu, "gpu")], key=lambda o: -o["self_s"])[:TOP],
        "gaps": sorted(gaps, key=lambda g: -g["seconds"])[:GAPS],
    }


def _operations(events: Sequence[Span], device: str) -> list[TracedOperation]:
    """Adds up the calls by name. Each moment counts only once, for the innermost operation of its thread."""
    own, total, calls = defaultdict[str, float](float), defaultdict[str, float](float), defaultdict[str, int](int)
    open_calls = defaultdict[tuple[str, str], list[Span]](list)
    for event in events:
        seconds, outer = (event.end - event.begin) / 1e6, open_calls[event.thread]
        while outer and outer[-1].end <= event.begin:
            outer.pop()
        if outer and device == "cpu":
            own[outer[-1].name] -= seconds
        if all(call.name != event.name for call in outer):  # the outer call includes the time of a recursive call
            total[event.name] += seconds
        own[event.name] += seconds
        calls[event.name] += 1
        outer.append(event)
    return [{"name": name, "device": device, "calls": calls[name], "total_s": total[name], "self_s": own[name]} for name in calls]


def _gaps(events: Sequence[Span], begin: float, end: float) -> list[Gap]:
    """Lists the times between `begin` and `end`, in microseconds, in which no event runs."""
    gaps, reached, last = list[Gap](), begin, "the begin"
    for event in [*events, Span(end, end, "the end", ("", ""), "")]:
        if event.begin > reached:
            gap = (event.begin - reached) / 1e6
            gaps.append({"begin_s": (reached - begin) / 1e6, "seconds": gap, "after": last, "before": event.name})
        if event.end > reached:
            reached, last = event.end, event.name
    return gaps


def operation_rows(summary: ProfileSummary) -> list[list[str]]:
    """Formats the top operations as rows of text. The first row is the header."""
    head = ["operation", "device", "calls", "total ms", "self ms", "share"]
    seconds = summary["seconds"] or 1.0
    return [head, *([o["name"][:NAME], o["device"], f"{o['calls']:,}", f"{o['total_s'] * 1e3:,.1f}", f"{o['self_s'] * 1e3:,.1f}",
                     f"{o['self_s'] / seconds:.1%}"] for o in summary["operations"])]  # fmt: skip


def gap_rows(summary: ProfileSummary) -> list[list[str]]:
    """Formats the longest gaps as rows of text. The first row is the header."""
    rows = [[f"{g['begin_s'] * 1e3:,.1f}", f"{g['seconds'] * 1e3:,.1f}", g["after"][:NAME], g["before"][:NAME]]
            for g in summary["gaps"]]  # fmt: skip
    return [["at ms", "gap ms", "after", "before"], *rows]
