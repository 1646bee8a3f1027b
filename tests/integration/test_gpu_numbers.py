"""`python -m tests.gpu` on a machine without a GPU, Ray or Arrow: it runs to its end, and skips by name what it lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.gpu import __main__ as numbers
from tests.gpu.absent import ASIDE
from tests.gpu.pieces import PIECES

ROOT = Path(__file__).parents[2]
ONLY = ["zero fp32", "save", "attention", "fp8", "train on a CPU", "train model=1B"]


def test_every_piece_is_a_function_with_a_name_of_its_own() -> None:
    assert len({p.name for p in PIECES}) == len(PIECES)
    for piece in PIECES:
        module, _, name = piece.function.partition(":")
        assert callable(getattr(import_module(f"tests.gpu.{module}"), name))


def test_pieces_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tests.gpu", "--only", "zreo"])
    with pytest.raises(SystemExit) as e:
        numbers.main()
    assert e.value.code == 2 and "--only: no piece begins so; there are: zero fp32, " in capsys.readouterr().err


@pytest.mark.ci
def test_without_a_gpu_ray_and_arrow_it_runs_to_its_end(tmp_path: Path) -> None:
    """What trains is compared with its twin; what needs a GPU or Arrow is skipped by name, and both files say so."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nfor name in {ASIDE}: sys.modules[name] = None\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path / "out"), "--budget", "400", "--only", *ONLY]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=450, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/gpu.json").read_text())
    pieces = {p["name"]: p for p in found["pieces"]}
    trained = pieces.pop("zero fp32")
    assert trained["status"] == "passed", trained["reason"]
    assert [row["what"] for row in trained["rows"]] == [f"ZeRO-{stage}, fp32" for stage in (1, 2, 3)]
    assert all(row["last"] < row["first"] - 0.2 and row["difference"] < row["limit"] for row in trained["rows"]), "it learns"
    fast = pieces.pop("train on a CPU")
    assert fast["status"] == "passed" and fast["rows"][0]["tokens_per_second"] > 0 < fast["rows"][0]["plan_gib"], fast["reason"]
    assert pieces.pop("save")["reason"] == "needs pyarrow"
    assert {p["reason"] for p in pieces.values()} <= {"needs gpu", "needs gpu, float8", "needs gpu, flash_attn"} and len(
        pieces
    ) > 5
    page = (tmp_path / "out/gpu.md").read_text()
    assert "| ZeRO-3, fp32 |" in page and all(f"| {name} | skipped | needs " in page for name in pieces)


def test_a_piece_that_fails_or_hangs_says_so() -> None:
    """Its process ends by itself, or at its deadline."""
    wrote, failure, _ = numbers.run("no such piece", 120)
    assert (wrote, failure) == ("", "exit code 1")
    assert numbers.run("zero fp32", 0.2)[:2] == ("", "not done within 0 s")
