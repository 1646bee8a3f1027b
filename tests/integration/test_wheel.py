"""Tests that the wheel alone is enough: in an empty folder without a clone, it makes a workspace, prepares, trains, and
exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_platform_module import build

pytestmark = pytest.mark.slow  # three commands, each with all its imports: minutes
LIMIT_S = 300


@pytest.fixture
def heliostat(tmp_path) -> Callable[..., str]:
    """Runs the command of a bare environment: heliostat from its wheel, all other packages from here, and nothing of this
    clone."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    packages = next(home.glob("lib/python*/site-packages"))
    here = Path(sysconfig.get_path("purelib"))
    for entry in here.iterdir():
        if not entry.name.startswith(("heliostat", "__editable__", "_distutils_hack", "distutils-precedence")):
            (packages / entry.name).symlink_to(entry)
    (tmp_path / "wheel").mkdir()
    target = ["--no-deps", "--no-index", "--quiet", "--prefix", str(home), str(build(tmp_path / "wheel"))]
    subprocess.run([sys.executable, "-m", "pip", "install", "--ignore-installed", *target], check=True, timeout=120)
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    environment = {**inherited, "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}

    def run(*words: str, cwd: Path, program: str = "heliostat") -> str:
        script = home / "bin" / program
        command = [str(home / "bin" / "python"), *([] if program == "python" else [str(script)]), *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_in_an_empty_folder_with_no_clone_the_wheel_makes_prepares_trains_and_exports(heliostat, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    where = "import heliostat, heliostat.recipes; print(heliostat.__file__, heliostat.recipes.CausalLM.__module__)"
    file, module = heliostat("-c", where, cwd=work, program="python").split()
    assert Path(file).is_relative_to(tmp_path / "venv") and module == "heliostat.recipes.text.causal_lm"
    heliostat("init", ".", cwd=work)
    assert not list(work.rglob("*.py"))
    report = json.loads(heliostat("data", "prepare", "pipelines/quickstart.yaml", "--json", cwd=work).splitlines()[-1])
    assert report["tokens"] > 1_000_000
    short = {"train.steps": 4, "train.schedule.warmup_steps": 1, "checkpoint.every": 4, "evaluate.samples": 8, "workers.count": 1,
             "model.hidden_size": 64, "model.intermediate_size": 128, "mlflow.register": "null"}  # fmt: skip
    settings = [word for key, value in short.items() for word in ("--set", f"{key}={value}")]
    result = json.loads(heliostat("train", "jobs/quickstart.yaml", "--json", *settings, cwd=work).splitlines()[-1])
    assert result["steps"] == 4 and result["train_loss"] > 0
    heliostat("model", "export", ".heliostat/runs/quickstart", "--out", "../model", cwd=work)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    answer = json.loads(
        heliostat("model", "generate", "../model", "--prompt", "def ", "--max-tokens", "4", "--json", cwd=elsewhere).splitlines()[
            -1
        ]
    )
    assert answer["prompt"] == "def " and not list(elsewhere.iterdir())
    code = "from transformers import AutoModelForCausalLM as M; print(M.from_pretrained('../model').num_parameters())"
    assert int(heliostat("-c", code, cwd=elsewhere, program="python").splitlines()[-1]) > 0
