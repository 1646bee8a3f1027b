"""Provides the common parts of the benchmarks: arguments, interleaved turns, tables, and processes with measured seconds.

python -m tests.benchmarks.NAME --help     # from the repository's root
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


def arguments(text: str | None, **options: Any) -> argparse.Namespace:
    """Parses the command line, which has an option for each name.

    A type makes a positional argument, and a dict has the arguments of `add_argument`. Any other value is the default: a list
    takes several values (for words, some of these), and False makes a flag.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, type):
            parser.add_argument(name, type=default)
        elif isinstance(default, dict):
            parser.add_argument(flag, **default)
        elif default is False:
            parser.add_argument(flag, action="store_true")
        elif isinstance(default, list):
            words = default if isinstance(default[0], str) else None
            parser.add_argument(flag, nargs="+", type=type(default[0]), default=default, choices=words)
        else:
            parser.add_argument(flag, type=type(default), default=default)
    return parser.parse_args()


def by_turns(ways: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Runs every way once per round, because a busy machine slows all of them."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


def cpu(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of a call, of all threads of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def head(*cells: object) -> None:
    """Prints the head of a table; `row` prints a row."""
    row(*cells)
    print("|" + "---|" * len(cells), flush=True)


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def spread(values: list[float], form: str = ".3f") -> str:
    """Returns the median, with the minimum and the maximum in brackets."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


class Ended(NamedTuple):
    """Holds a process's output, its wall-clock seconds, and its CPU seconds."""

    out: str
    wall: float
    cpu: float


def process(command: Iterable[object], may_fail: bool = False, **environment: str) -> Ended:
    """Runs a command in the repository's root; ends this program with its error if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    if done.returncode and not may_fail:
        sys.exit(done.stderr[-3000:])
    return Ended(done.stdout, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def heliostat(*words: object) -> dict[str, Any]:
    """Runs a command of heliostat; returns its output with --json."""
    return json.loads(process([sys.executable, "-m", "heliostat", *words, "--json"]).out.splitlines()[-1])


def sets(settings: Mapping[str, Any]) -> list[str]:
    """Returns the words that pass settings to a command."""
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return [word for key, value in plain.items() for word in ("--set", f"{key}={value}")]


APART = "import json, sys; from {module} import {name}; json.dump({name}(*json.loads(sys.argv[2])), open(sys.argv[1], 'w'))"


def apart(function: Callable[..., Any], *given: Any, python: str = sys.executable, **environment: Any) -> tuple[Any, float]:
    """Calls a function of a benchmark in a separate process, with another Python if one is named.

    Arguments and result are JSON values. Returns the result, and the CPU seconds of the process. Its output is printed.
    """
    spec = sys.modules["__main__"].__spec__
    module = spec.name if spec is not None and function.__module__ == "__main__" else function.__module__
    with tempfile.NamedTemporaryFile() as result:
        code = APART.format(module=module, name=function.__name__)
        ended = process([python, "-c", code, result.name, json.dumps(given)], **environment)
        print(ended.out, end="", flush=True)
        return json.loads(Path(result.name).read_text()), ended.cpu


def memory(name: str) -> float:
    """Returns a line of this process's status in MiB: VmRSS is the current memory, VmHWM the peak since `forget_peak`."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Resets the kernel's high-water mark of this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")
