"""Tests `python -m tests.gpu` without a GPU: its parts, their arguments and jobs, its lines, and the causes of failures."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from heliostat.validation import check

from tests.gpu import __main__ as suite
from tests.gpu import report, runs, setting, speed
from tests.gpu.parts import PARTS, Part

NAMES = [p.name for p in PARTS]
BY_NAME = {p.name: p for p in PARTS}


@pytest.mark.parametrize("name", NAMES)
def test_a_part_calls_a_function_that_takes_its_arguments(name: str) -> None:
    part = BY_NAME[name]
    signature = inspect.signature(part.resolve())
    signature.bind(**part.given)
    signature.bind(**part.given | (part.small or {}))
    assert NAMES.count(name) == 1 and "gpu" in part.needs


@pytest.mark.parametrize("workers", [1, 2])
def test_the_job_of_parts_that_train_runs_is_right(workers: int, tmp_path: Path) -> None:
    """By the real check, including datasets and stores, as without a GPU."""
    checked = check.check(check.load_job(runs.job_file(tmp_path, workers), ["train.schedule={name: constant}"]))
    assert checked.job.workers.count == workers and checked.job.train.steps >= 4 * checked.job.checkpoint.every


def _judged(monkeypatch: pytest.MonkeyPatch, has: list[str], rows: list[dict[str, Any]], failure: str = "") -> Any:
    part = Part("one", "steady:ema", needs=("gpu", "2 gpus", "pyarrow"))
    monkeypatch.setattr(suite, "run", lambda *given: (rows, failure))
    return suite.judged(part, has, 100.0, "cuda", Path("log"))


RIGHT = {"kind": "correctness", "what": "losses", "difference": 0.01, "limit": 0.02, "ok": True}
WRONG = {**RIGHT, "difference": 0.03, "ok": False}


def test_a_part_fails_in_one_line_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    has = ["gpu", "2 gpus", "pyarrow"]
    right = _judged(monkeypatch, has, [RIGHT])
    assert (right["status"], right["number"], right["cause"]) == ("pass", "0.01, limit 0.02", "")
    wrong = _judged(monkeypatch, has, [RIGHT, WRONG])
    assert (wrong["status"], wrong["cause"]) == ("fail", "losses: 0.03, limit 0.02")
    assert _judged(monkeypatch, has, [RIGHT], "OutOfMemoryError: none")["cause"] == "OutOfMemoryError: none"
    assert _judged(monkeypatch, has, [])["cause"] == "no result"


def test_a_part_that_needs_more_gpus_is_skipped_with_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = _judged(monkeypatch, ["gpu"], [RIGHT])
    assert (skipped["status"], skipped["cause"]) == ("skip", "needs 2 gpus, pyarrow") and not skipped["rows"]


@pytest.mark.parametrize(
    ("row", "number", "wrong"),
    [
        ({"kind": "speed", "mfu": 0.43, "goal": 0.5, "tokens_per_second": 41000.0}, "MFU 43.0%, 41,000 tokens/s",
         "x: MFU 43.0%, goal 50%"),
        ({"kind": "memory", "difference": 0.12, "limit": 0.1}, "plan off by 12.0% at most", "x: 0.12, limit 0.1"),
        ({"kind": "overlap", "overlap": 0.4}, "40% of copies hidden", "x: 40% of the copies are hidden"),
        ({"kind": "run", "value": 1.5, "unit": "s", "problem": "no new step"}, "1.5 s", "x: no new step"),
        ({"kind": "checkpoint", "blocked_s": 0.25}, "0.25 s blocked", None),
    ],
)  # fmt: skip
def test_every_kind_of_row_has_a_number_and_a_cause(row: dict[str, Any], number: str, wrong: str | None) -> None:
    given = {"what": "x", "ok": False, **row}
    assert report.number([given]) == number
    assert wrong is None or report.wrong(given) == wrong
    page = report.markdown({"machine": {}, "parts": [{"name": "p", "status": "fail", "seconds": 1.0, "rows": [given],
                                                      "cause": "a|b\nc"}], "date": "today", "seconds": 1.0})  # fmt: skip
    assert "| p | fail | 1 |  | a/b c |" in page and f"## {row['kind'].capitalize()}" in page


def test_the_cause_of_an_error_is_one_line_with_its_place() -> None:
    try:
        json.loads(suite._code(-9))
    except ValueError as e:
        error = e
    assert suite.cause(error).startswith("JSONDecodeError: Expecting value") and "(tests/unit/test_gpu_suite.py:" in suite.cause(
        error
    )
    assert "\n" not in suite.cause(RuntimeError("CUDA error:\nout of memory\n\nCompile with ..."))
    assert suite._code(-9) == "SIGKILL" and suite._code(3) == "exit code 3"


def test_parts_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tests.gpu", "--part", "zreo"])
    with pytest.raises(SystemExit) as e:
        suite.main()
    assert e.value.code == 2 and "--part: no part begins with zreo. Parts: save, " in capsys.readouterr().err


class Reached(Exception):
    """Replaces the engine that a part builds first, by raising."""


OTHERS = {
    "attention",
    "flex",
    "fp8",
    "ahead",
    "draws",
    "recipes",
    "sync",
    "attempts",
    "profile",
    "kill_worker",
    "elastic",
    "pytest",
}
ON_ENGINES = [p.name for p in PARTS if p.function.partition(":")[2] not in OTHERS]


@pytest.mark.parametrize("name", ON_ENGINES)
def test_the_job_of_a_part_on_an_engine_is_right_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its full size, up to the engine, as with a GPU."""

    def engine(made: Any, its: Any) -> None:
        assert made.workers.gpus == 1
        raise Reached

    monkeypatch.setattr(setting, "GPU", True)
    monkeypatch.setattr(setting, "start", lambda: None)
    monkeypatch.setattr(setting, "plain", lambda *given: [1.0] * 8)
    monkeypatch.setattr(setting, "engine", engine)
    with pytest.raises(Reached):
        list(BY_NAME[name].call())


@pytest.mark.parametrize(("model", "micro", "keys"), speed.MEMORY)
def test_a_job_whose_memory_is_planned_is_right(
    model: str, micro: int, keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting, "GPU", True)
    made = setting.job(speed.MODELS[model], speed.LENGTH, micro, 2 * micro, **{"train.precision": "bf16", **keys})
    assert made.accumulation == 2 and setting.recipe(made)
