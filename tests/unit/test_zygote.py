"""Workers forked from a zygote: the launcher's command runs in a fork as it would run by itself, or by itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from heliostat.cluster import preloads, zygote, zygote_server

pytestmark = pytest.mark.skipif(not zygote.SUPPORTED, reason="forks are taken on Linux alone")

ENTRY = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "mine": os.environ.get("MINE"), "gone": os.environ.get("GONE"), "folder": os.getcwd(),
    "parent": os.getppid(), "loaded": "colorsys" in sys.modules, "leader": os.getpgid(0) == os.getpid()}), flush=True)
"""


@pytest.fixture
def made(tmp_path: Path) -> Iterator[zygote.Zygote]:
    (tmp_path / zygote.ENTRY).write_text(ENTRY)
    one = zygote.Zygote(tmp_path / "z", {**os.environ, "GONE": "1", "RAY_JOB_ID": "01000000"}, ["colorsys", "no.such.module"])
    deadline = time.monotonic() + 60
    while not (one.folder / "socket").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield one
    one.end()
    assert not one.folder.exists()


def ask(one: zygote.Zygote, folder: Path, **environment: str) -> dict[str, Any]:
    given = {"PATH": os.environ["PATH"], "MINE": "2", **environment}
    command = [str(one.launcher), str(folder / zygote.ENTRY), "--a", "b c"]
    done = subprocess.run(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_a_fork_has_the_request_s_arguments_environment_and_folder_and_what_the_zygote_imported(made, tmp_path):
    told = ask(made, tmp_path)
    assert told == {
        "argv": ["--a", "b c"], "mine": "2", "gone": None, "folder": str(tmp_path), "parent": made.process.pid, "loaded": True,
        "leader": True,
    }  # fmt: skip


def test_a_worker_of_another_job_and_one_whose_zygote_has_died_are_started_by_themselves(made, tmp_path):
    assert ask(made, tmp_path, RAY_JOB_ID="02000000")["loaded"] is False
    assert ask(made, tmp_path, RAY_JOB_ID="01000000")["loaded"] is True
    made.process.send_signal(signal.SIGKILL)
    made.process.wait(10)
    assert ask(made, tmp_path)["loaded"] is False


def test_whatever_else_the_launcher_is_asked_runs_with_python_itself(made):
    done = subprocess.run([str(made.launcher), "-c", "print('mine')"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "mine\n"


def test_a_runtime_environment_of_variables_is_applied_and_one_that_asks_for_more_is_ray_s_own_business(made, tmp_path):
    """As Ray starts a worker with a runtime environment: through a script of its own, which gets both in its arguments."""
    (tmp_path / "setup_worker.py").write_text("print('{\"set_up\": true}')")

    def told(**context: Any) -> dict[str, Any]:
        given = zygote_server.CONTEXT + json.dumps({"env_vars": {"MINE": "3"}, "command_prefix": [], **context})
        command = [
            str(made.launcher),
            str(tmp_path / "setup_worker.py"),
            str(tmp_path / zygote.ENTRY),
            "--language=PYTHON",
            given,
        ]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    assert told(py_executable=sys.executable)["mine"] == "3" and told()["argv"] == []
    assert told(command_prefix=["source env"]) == told(py_executable="/other/python") == {"set_up": True}


def test_half_a_request_is_refused_and_the_next_is_answered(made, tmp_path):
    with socket.socket(socket.AF_UNIX) as half:
        half.connect(str(made.folder / "socket"))
        half.sendall(b'{"arguments": [')
    assert ask(made, tmp_path)["loaded"] is True


def test_a_zygote_ends_with_whoever_has_started_it(made):
    assert made.process.stdin
    made.process.stdin.close()
    made.process.wait(30)
    assert not made.folder.exists()


def test_only_recipes_of_the_package_are_imported_ahead():
    assert "transformers.models.qwen3.modeling_qwen3" in preloads.modules("heliostat.recipes:CausalLM", {"arch": "qwen3"})
    assert preloads.modules("jobs.causal_lm:CausalLM", {}) != preloads.modules("jobs.mine:Recipe", {}) == [*preloads.TRAINING]
