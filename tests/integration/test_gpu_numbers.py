"""Tests `python -m tests.gpu` on a machine without a GPU, Ray, or Arrow: it runs to its end, and skips by name the parts that
need them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import __main__ as suite
from tests.gpu.absent import ASIDE
from tests.gpu.parts import PARTS

ROOT = Path(__file__).parents[2]
ON_THE_ENGINE = ("zero fp32", "ema", "replay", "attempts", "memory", "activation-offload", "train model=1B stage=2")
RUNS = ("profile", "kill-worker", "elastic")


def _parts(out: Path, *words: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Returns the results of a run of the suite, by name. The run must end without a failure."""
    command = [sys.executable, "-m", "tests.gpu", "--out", str(out), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {p["name"]: p for p in json.loads((out / "gpu.json").read_text())["parts"]}
    assert all(
        any(name in line and line.startswith(p["status"]) for line in done.stdout.splitlines()) for name, p in parts.items()
    )
    return parts


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_parts_on_the_engine_pass_on_a_cpu_without_ray_and_arrow(tmp_path: Path) -> None:
    """With tiny models: trained results are compared with plain torch, and a part that needs Arrow or Ray is skipped by name."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {ASIDE}: sys.modules[name] = None\n")
    names = [*ON_THE_ENGINE, "save", "flex", "profile"]
    parts = _parts(tmp_path / "out", "--device", "cpu", "--part", *names, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert {name for name, p in parts.items() if p["status"] == "pass"} == {*ON_THE_ENGINE}
    trained = parts["zero fp32"]["rows"]
    assert [row["what"] for row in trained] == [f"ZeRO-{stage}, fp32" for stage in (1, 2, 3)]
    assert all(row["last"] < row["first"] - 0.2 and row["difference"] < row["limit"] for row in trained), "it learns"
    fast = parts["train model=1B stage=2"]["rows"][0]
    assert fast["tokens_per_second"] > 0 < fast["plan_gib"]
    assert parts["save"]["cause"] == "needs pyarrow" and "ray" in parts["profile"]["cause"]
    assert parts["flex"]["cause"] == "runs on a GPU alone"
    page = (tmp_path / "out/gpu.md").read_text()
    assert "| ZeRO-3, fp32 |" in page and all(f"| {name} | " in page for name in parts)


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_parts_on_data_and_runs_pass_on_a_cpu(tmp_path: Path) -> None:
    """Runs the same commands, on Ray, with workers without a GPU."""
    names = [p.name for p in PARTS if p.small is not None and {"pyarrow", "ray"} & set(p.needs)]
    parts = _parts(tmp_path / "out", "--device", "cpu", "--budget", "800", "--part", *names)
    assert {name: p["status"] for name, p in parts.items()} == dict.fromkeys(names, "pass") and set(RUNS) <= parts.keys()


@pytest.mark.ci
def test_without_a_gpu_each_part_names_what_it_needs(tmp_path: Path) -> None:
    parts = _parts(tmp_path / "out")
    assert {p["status"] for p in parts.values()} == {"skip"} and len(parts) == len(PARTS)
    assert all(p["cause"].startswith("needs gpu") for p in parts.values())


def test_a_part_that_fails_or_hangs_says_so(tmp_path: Path) -> None:
    """Its process ends by itself, or at its deadline, and its output is in the log."""
    rows, failure = suite.run("no such part", 120, "cpu", tmp_path / "log")
    assert (rows, failure.partition(" ")[0]) == ([], "StopIteration:") and "Traceback" in (tmp_path / "log").read_text()
    assert suite.run("zero fp32", 0.2) == ([], "not done within 0 s")
