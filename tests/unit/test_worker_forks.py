"""Tests workers that are forked from a fork server: the launcher's command runs in a fork as in a process of its own, or in such
a process."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from heliostat import recipes, training, tune
from heliostat.cluster import private_ray
from heliostat.cluster.fork_server import server, start
from heliostat.recipes import built_in

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are taken on Linux alone")

ENTRY = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "mine": os.environ.get("MINE"), "gone": os.environ.get("GONE"), "folder": os.getcwd(),
    "parent": os.getppid(), "loaded": "colorsys" in sys.modules, "leader": os.getpgid(0) == os.getpid()}), flush=True)
"""
STUBBORN = """
import os, signal, subprocess, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
helper = subprocess.Popen(["sleep", "600"])
print(os.getpid(), helper.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[start.ForkServer]:
    (tmp_path / start.ENTRY).write_text(ENTRY)
    one = start.ForkServer(tmp_path / "z", {**os.environ, "GONE": "1", "RAY_JOB_ID": "01000000"}, ["colorsys", "no.such.module"])
    deadline = time.monotonic() + 60
    while not (one.folder / "socket").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield one
    one.end()
    assert not one.folder.exists()


def ask(one: start.ForkServer, folder: Path, **environment: str) -> dict[str, Any]:
    given = {"PATH": os.environ["PATH"], "MINE": "2", **environment}
    command = [str(one.launcher), str(folder / start.ENTRY), "--a", "b c"]
    done = subprocess.run(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_a_fork_has_the_request_s_arguments_environment_and_folder_and_what_the_server_imported(forks, tmp_path):
    assert ask(forks, tmp_path) == {
        "argv": ["--a", "b c"], "mine": "2", "gone": None, "folder": str(tmp_path), "parent": forks.process.pid, "loaded": True,
        "leader": True,
    }  # fmt: skip


def test_a_worker_of_another_job_and_one_whose_server_has_died_are_started_by_themselves(forks, tmp_path):
    with socket.socket(socket.AF_UNIX) as half:  # half a request changes nothing
        half.connect(str(forks.folder / "socket"))
        half.sendall(b'{"arguments": [')
    assert ask(forks, tmp_path, RAY_JOB_ID="02000000")["loaded"] is False
    assert ask(forks, tmp_path, RAY_JOB_ID="01000000")["loaded"] is True
    forks.process.kill()
    forks.process.wait(60)
    assert ask(forks, tmp_path)["loaded"] is False


def test_all_other_commands_of_the_launcher_run_with_python_itself(forks):
    done = subprocess.run([str(forks.launcher), "-c", "print('mine')"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "mine\n"


def test_a_runtime_environment_of_variables_is_applied_and_one_that_asks_for_more_is_ray_s_own_business(forks, tmp_path):
    """Ray starts a worker with a runtime environment through its own script, which gets both in its arguments."""
    (tmp_path / "setup_worker.py").write_text("print('{\"set_up\": true}')")

    def answer(**context: Any) -> dict[str, Any]:
        given = server.CONTEXT + json.dumps({"env_vars": {"MINE": "3"}, "command_prefix": [], **context})
        command = [
            str(forks.launcher),
            str(tmp_path / "setup_worker.py"),
            str(tmp_path / start.ENTRY),
            "--language=PYTHON",
            given,
        ]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=60, check=True)
        return json.loads(done.stdout)

    assert answer(py_executable=sys.executable)["mine"] == "3" and answer()["argv"] == []
    assert answer(command_prefix=["cd", str(forks.folder), "&&"])["folder"] == str(forks.folder)
    assert answer(command_prefix=["source env"]) == answer(py_executable="/other/python") == {"set_up": True}


@pytest.mark.parametrize("killed", [True, False])
def test_a_worker_ends_with_its_server_whatever_it_does_and_leaves_no_process(forks, tmp_path, killed):
    """The server ends with the process that started it, for any end of that process: its standard input is a pipe from there."""
    (tmp_path / start.ENTRY).write_text(STUBBORN)
    command = [str(forks.launcher), str(tmp_path / start.ENTRY)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout and forks.process.stdin
        worker, helper = (psutil.Process(int(pid)) for pid in asking.stdout.readline().split())
        if killed:
            forks.process.send_signal(signal.SIGKILL)
            worker.wait(60)
            helper.kill()  # an orderly end leaves none
        else:
            forks.process.stdin.close()
            assert not psutil.wait_procs([worker, helper], timeout=60)[1]
            forks.process.wait(60)
            assert not forks.folder.exists()


@pytest.mark.parametrize("version, switch, forked", [("2.60.3", "1", True), ("2.60.3", "0", False), ("2.61.0", "1", False)])
def test_the_fork_server_is_used_with_tested_versions_of_ray_unless_switched_off(version, switch, forked, monkeypatch, caplog):
    start.supported.cache_clear()
    monkeypatch.setattr(start.metadata, "version", lambda _: version)
    monkeypatch.setenv(start.SWITCH, switch)
    monkeypatch.setattr(private_ray, "_servers", [])  # a command that another test ran in this process may have one
    with caplog.at_level(logging.WARNING):
        assert (start.supported(), start.supported()) == (forked, forked)
        if not forked:
            assert private_ray.ahead(0) is None
    assert [record.message.split(" starts")[0] for record in caplog.records] == (["Ray 2.61.0"] if version == "2.61.0" else [])
    start.supported.cache_clear()


def test_all_modules_that_are_imported_ahead_are_there():
    """Otherwise each worker would import a moved module again."""
    archs = {"CausalLM": "llama", "SFT": "llama", "DPO": "llama", "Embedder": "bert", "ImageEmbedder": "clip"}
    of_recipes = (built_in.modules(f"heliostat.recipes:{name}", {"arch": archs.get(name)}) for name in recipes.__all__)
    names = {*training.AHEAD, *tune.AHEAD}.union(*of_recipes)
    assert [name for name in sorted(names) if importlib.util.find_spec(name) is None] == []


def test_only_recipes_of_the_package_are_imported_ahead():
    assert all(built_in.modules(f"heliostat.recipes:{name}", {}) for name in recipes.__all__)
    assert "transformers.models.qwen3.modeling_qwen3" in built_in.modules("heliostat.recipes:CausalLM", {"arch": "qwen3"})
    assert built_in.modules("jobs.causal_lm:CausalLM", {}) and not built_in.modules("jobs.mine:Recipe", {})
