"""Tests the command line on bad input: one `error:` line that names the fault, exit code 2, without Ray or a traceback.

tests/benchmarks/cli.py measures the time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.build_job import BASE, write
from tests.unit.forked import OFFLINE, run

ROOT = Path(__file__).parents[2]
RUNNER = "import sys; from tests.unit.forked import command; sys.exit(command(sys.argv[1:]))"


BAD = {
    "unknown key": ({"train.stpes": 1}, "train.stpes: unknown key. Did you mean 'steps'?"),
    "wrong type": ({"train.steps": "many"}, "train.steps: expected an integer, got 'many'. Write train.steps: INTEGER"),
    "batch": (
        {"train.global_batch_size": 9},
        "train.global_batch_size: 9 isn't divisible by workers.count 1 x train.micro_batch_size 2",
    ),
    "recipe": ({"recipe": "jobs.casual_lm:CausalLM"}, "recipe: no module 'jobs.casual_lm'"),
    "model": ({"model": {**BASE["model"], "arch": "lama"}}, "model.arch: 'lama' isn't a causal language model"),
    "store": ({"storage": "gs://b/x"}, "storage: 'gs://b/x': scheme 'gs' isn't supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_job_is_one_error_line_and_exit_code_2(tmp_path, case):
    """Standard output is empty, there is no traceback, and Ray, DeepSpeed, and MLflow aren't imported."""
    changes, message = BAD[case]
    code, out, lines, imported = run("check", "--offline", str(write(tmp_path, **changes)))
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 2 and out == "" and len(errors) == 1 and message in "\n".join(lines)
    assert "Traceback" not in "\n".join(lines)
    assert imported == ""


def test_a_file_that_is_not_there_suggests_the_one_that_is(tmp_path):
    """This is the most common mistake. A setting that can't be applied is bad input, too."""
    write(tmp_path)
    code, _, lines, _ = run("check", str(tmp_path / "jop.yaml"))
    assert code == 2 and lines == [f"error: {tmp_path / 'jop.yaml'}: no such file. Did you mean 'job.yaml'?"]
    code, _, lines, _ = run("check", str(tmp_path / "job.yaml"), "--set", "train.steps")
    assert code == 2 and lines == ["error: --set 'train.steps': expected KEY=VALUE. Write --set train.steps=VALUE"]


def test_a_dataset_that_is_not_there_is_exit_code_2(tmp_path):
    """The user must fix it: one line has the key, and the command that makes the dataset."""
    path = write(
        tmp_path,
        **{"data.sources.0.path": str(tmp_path / "nothing"), "storage": str(tmp_path / "runs"), "train.precision": "fp32"},
    )
    code, out, lines, imported = run("check", str(path))
    assert code == 2 and out == "" and imported == ""
    assert len(lines) == 1 and lines[0].startswith("error: data.sources.0.path: ") and "heliostat data prepare" in lines[0]


def test_a_right_job_passes_offline(tmp_path):
    """Exit code 0, the answer on standard output, nothing on standard error: so the tests above don't fail for every job.

    Runs in a process without earlier imports.
    """
    words = [sys.executable, "-c", RUNNER, "check", "--offline", str(write(tmp_path, **{"train.precision": "fp32"}))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, **OFFLINE})
    assert (done.returncode, done.stderr) == (0, "imported: \n") and "the file and the model are right" in done.stdout


def test_the_result_is_the_last_line_whatever_a_library_says_behind_it(tmp_path):
    """At the end of the process, Ray reports dead workers on standard output."""
    script = "import atexit; atexit.register(print, '(raylet) a worker died')\n" + RUNNER
    command = [sys.executable, "-c", script, "cluster", "list", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == {"clusters": []} and "(raylet)" in done.stderr
