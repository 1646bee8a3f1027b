"""Scores code that a model generates: runs unit tests that the model hasn't seen. The tests are in a task file, under the key
`unit_tests`.

    task: functions
    unit_tests: "{{tests}}"                     # Python, run after the question and the answer; a template like doc_to_text
    doc_to_text: "{{prompt}}"
    generation_kwargs: {until: ["\\ndef ", "\\nclass "], max_gen_toks: 256}

lm-eval sends the questions to the model, and each answer runs in a sandbox (`run_program`). The score is pass@1: the share of
answers that pass.

The sandbox uses Linux namespaces, resource limits, and a filter of system calls (`heliostat.tasks.sandbox`). It isn't a virtual
machine: a program that exploits a kernel bug can escape. The limits apply to each program, not to all programs together.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from heliostat.errors import ConfigError, HeliostatError
from heliostat.evaluation.suite import Row
from heliostat.recipes.intervals import wilson
from heliostat.tasks import sandbox
from heliostat.text import brief

KEY, KIND, METRIC = "unit_tests", "unit_tests", "pass@1"
LAST = "take_first"  # the filter that takes one answer from a list
ITS_OWN = ("output_type", "metric_list", "doc_to_target", "doc_to_choice", "num_fewshot")
SIDE_BY_SIDE = 4  # maximum number of programs in parallel; each may use memory up to its limit


def arranged(config: dict[str, object], allowed: bool, where: object) -> dict[str, object]:
    """Returns the task that lm-eval runs for a task file with unit tests.

    Raises ConfigError if the suite doesn't allow code, if this machine can't isolate programs, or if the file has keys that unit
    tests don't support.
    """
    template = config[KEY]
    if not isinstance(template, str) or not template.strip():
        raise ConfigError(f"{where}: {KEY}: expected a template of tests, such as '{{{{tests}}}}', got {template!r}")
    if unfit := [key for key in ITS_OWN if key in config]:
        raise ConfigError(
            f"{where}: {unfit[0]}: not supported with {KEY}, where the model generates code and {METRIC} is the score. "
            "Remove this key"
        )
    if not allowed:
        raise ConfigError(
            f"{where}: {KEY}: runs the model's code, and the suite doesn't allow it. Read "
            "docs/benchmark.md#unit-tests, then set run_code: true"
        )
    try:
        require_sandbox()
    except ConfigError as e:
        raise ConfigError(f"{where}: {KEY}: {e}") from e
    keys = {key: value for key, value in config.items() if key != KEY}
    return keys | {"output_type": "generate_until", "doc_to_target": template, "num_fewshot": 0,
                    "metric_list": [{"metric": "exact_match"}]}  # fmt: skip


def require_one_answer(config: dict[str, Any], where: object) -> None:
    """Raises ConfigError if a chain of filters returns several answers to a question, because only one answer can run."""
    for chain in config.get("filter_list") or []:
        if [step["function"] for step in chain["filter"] or []][-1:] != [LAST]:
            raise ConfigError(
                f"{where}: filter_list: {chain['name']}: returns several answers, but only one can run. Add {LAST} at the end"
            )


def verdicts(programs: Sequence[tuple[str, str]]) -> list[str]:
    """Runs programs, each with its tests, up to SIDE_BY_SIDE in parallel. Returns how each program ended: `passed`, `failed`,
    `timed_out`, or `too_much_output`."""
    with ThreadPoolExecutor(min(SIDE_BY_SIDE, os.cpu_count() or 1)) as pool:
        return [outcome.verdict for outcome in pool.map(lambda one: run_program(*one), programs)]


def row(facts: Row, ended: Sequence[str]) -> Row:
    """Adds the score of the unit tests to a task's row. The row's key `programs` gets the number of programs for each way to
    end (`passed`, `failed`, ...)."""
    values, counts = passed(ended), Counter(ended)
    score = sum(values) / len(values)
    low, high = wilson(score, len(values))
    return facts | {
        "kind": KIND, "metric": METRIC, "higher_is_better": True, "score": score,
        "stderr": math.sqrt(score * (1 - score) / max(1, len(values) - 1)), "low": low, "high": high, "chance": 0.0,
        "centred": score, "metrics": {f"{METRIC},{facts['filter']}": score}, "edit_similarity": None,
        "programs": {verdict: counts[verdict] for verdict in VERDICTS},
    }  # fmt: skip


def passed(ended: Sequence[str]) -> list[int]:
    """Returns the value of each example: 1 if its program passed, else 0."""
    return [int(one == PASSED) for one in ended]


LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
PASSED, FAILED, TIMED_OUT, TOO_MUCH = "passed", "failed", "timed_out", "too_much_output"
VERDICTS = (PASSED, FAILED, TIMED_OUT, TOO_MUCH)
BLOCK = 1 << 16
KILLING_S = 5.0


@dataclass(frozen=True)
class ProgramLimits:
    """Contains a program's limits: elapsed seconds, processor seconds, and bytes of memory, files, and output."""

    seconds: float = 10.0
    cpu_s: int = 5
    memory: int = 512 << 20
    files: int = 16 << 20
    output: int = 64 << 10


@dataclass(frozen=True)
class ProgramResult:
    """Describes how a program ended (`verdict`, for example `passed` or `timed_out`), with the beginning of its output."""

    verdict: str
    output: str


@cache
def require_sandbox() -> None:
    """Raises ConfigError if this machine can't isolate programs. To test this, runs one program, once per process."""
    if not sys.platform.startswith("linux") or platform.machine() not in sandbox.CALLS:
        known = ", ".join(sandbox.CALLS)
        raise ConfigError(f"the sandbox needs Linux on {known}, and this is {sys.platform} on {platform.machine()}")
    try:
        outcome = run_program("x = 1", "assert x == 1")
    except HeliostatError as e:
        raise ConfigError(
            f"{brief(e)}. The sandbox needs Linux 5.12 or later, and user namespaces, which containers often forbid"
        ) from e
    if outcome.verdict != PASSED:
        raise ConfigError(f"Python doesn't run in the sandbox ({outcome.verdict}: {brief(outcome.output)}). Use another machine")


def run_program(program: str, tests: str, limits: ProgramLimits = ProgramLimits()) -> ProgramResult:
    """Runs a program and then its tests, in one isolated process. Raises HeliostatError if the program can't be isolated.

    The program passes if it reaches the end of its tests.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="heliostat-program-") as root:
        task = {"root": root, "program": program, "tests": tests, "token": token, "parent": os.getpid(), **_python(),
                "cpu_s": limits.cpu_s, "memory": limits.memory, "files": limits.files}  # fmt: skip
        said, result, code, ended = _ran(json.dumps(task).encode(), limits)
    if code == sandbox.REFUSED:
        raise HeliostatError(f"can't isolate a program on this machine ({brief(result)})")
    verdict = ended or (PASSED if result == token else TIMED_OUT if code == sandbox.OVER_TIME else FAILED)
    return ProgramResult(verdict, said[: limits.output].decode(errors="replace"))


def _python() -> dict[str, object]:
    """Lists the files that Python needs to run. Leaves out the virtual environment's files and the installed packages."""
    own = (str(Path(prefix) / "lib") for prefix in (sys.base_prefix, sys.base_exec_prefix))
    libraries = [place for place in dict.fromkeys((*LIBRARIES, *own)) if Path(place).is_dir()]
    return {"libraries": libraries, "executable": os.path.realpath(sys.executable)}


def _ran(task: bytes, limits: ProgramLimits) -> tuple[bytes, str, int, str]:
    """Returns the program's output, its result, its exit code, and the reason why it was stopped ("" if it wasn't stopped)."""
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as result:
        try:
            process = subprocess.Popen(
                [os.path.realpath(sys.executable), "-I", "-S", "-B", sandbox.__file__, str(writing)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}, cwd="/", pass_fds=(writing,), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(writing)
        try:
            end = time.monotonic() + limits.seconds
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(task)
            said, ended = _read(process.stdout, end, limits.output)
            if not ended and not _waited(process, end):
                ended = TIMED_OUT
        finally:
            _kill(process)
        return said, result.read(4096).decode(errors="replace"), process.returncode, ended


def _read(output: IO[bytes], end: float, most: int) -> tuple[bytes, str]:
    """Reads up to `most` bytes, until no process can write any more. Returns the bytes, and the reason if reading stopped earlier
    ("" if it didn't stop earlier)."""
    written = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, end - time.monotonic())):
                return bytes(written), TIMED_OUT
            block = os.read(output.fileno(), BLOCK)
            if not block:
                return bytes(written), ""
            written += block
            if len(written) > most:
                return bytes(written), TOO_MUCH


def _waited(process: subprocess.Popen[bytes], end: float) -> bool:
    try:
        process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a program's first process. With this process, all other processes of its namespace end."""
    process.terminate()
    if not _waited(process, time.monotonic() + KILLING_S):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
