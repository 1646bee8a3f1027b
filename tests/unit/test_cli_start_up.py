"""Tests that the command line starts fast: a command imports only what it needs, and checks nothing twice."""

import ast
import os
import subprocess
import sys

import pytest
import yaml
from heliostat.config import spec

from tests.unit.build_job import write
from tests.unit.command_line import FILES, ROOT
from tests.unit.test_samples import make_text

HEAVY = ("ray", "torch", "deepspeed", "mlflow", "transformers", "diffusers", "pyarrow", "numpy", "boto3", "matplotlib")


CHILD = """
import sys
from heliostat.cli.main import main
if sys.argv[1] == "train":  # ends where Ray would start
    from heliostat.training import run
    run.DrivenRun.run = lambda self: sys.exit()
sys.argv = ["heliostat", *sys.argv[1:]]
try:
    main()
except SystemExit as e:
    print("\\n", e.code or 0, *sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "code", "more", "seconds"),
    [
        (["--help"], 0, ("pydantic", "yaml", "psutil"), 2.0),
        (["--json"], 0, ("pydantic", "psutil"), 2.0),
        (["check", "jobs/quickstart.yaml", "--set", "train.stpes=1"], 2, (), 4.0),
    ],
    ids=["help", "nothing", "check"],
)
def test_what_needs_no_library_imports_none(arguments, code, more, seconds):
    """For `--help`, no command, and `check` of a file with a wrong key. The bound of CPU time is generous;
    tests/benchmarks/cli.py measures it."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    ended, *modules = process.stdout.read().decode().splitlines()[-1].split()
    usage = os.wait4(process.pid, 0)[2]
    process.returncode = 0
    process.stdout.close()
    found = {name.partition(".")[0] for name in modules}
    allowed = {"pyarrow", "numpy"} if code else set()  # `storage` reaches places with them
    assert int(ended) == code and not found & {*HEAVY, *more} - allowed
    assert usage.ru_utime + usage.ru_stime < seconds


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_right_job_is_checked_without_the_libraries_that_train_it(tmp_path, command):
    """The check covers the quickstart's model, keys, stores, datasets, and order of samples; for `train`, everything before Ray
    starts."""
    raw = spec.load(ROOT / FILES["job"]).dump()
    make_text(tmp_path / "data")
    raw["data"] |= {"sources": [{"path": str(tmp_path / "data")}], "sequence_length": 16}
    raw |= {"storage": str(tmp_path / "runs"), "mlflow": raw["mlflow"] | {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    raw["evaluate"]["fraction"] = 0.3
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(raw))
    call = [sys.executable, "-c", CHILD, command, str(tmp_path / "job.yaml")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    ended, *modules = done.stdout.splitlines()[-1].split()
    found = {name.partition(".")[0] for name in modules}
    assert ended == "0" and "heliostat.data.order" in modules, done.stderr
    assert not found & {*HEAVY} - {"pyarrow", "numpy"}


def test_no_module_of_the_command_line_imports_the_one_that_starts_it():
    """`main` imports the commands, and these import shared modules, without a circle. Late imports only make the start faster."""
    for path in sorted((ROOT / "platform" / "heliostat" / "cli").glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        assert path.name == "main.py" or not any(name.startswith("heliostat.cli.main") for name in names), path
        if path.name in ("common.py", "options.py", "groups.py", "completion.py", "usage.py", "__init__.py"):
            shared = {f"heliostat.cli.{name}" for name in ("common", "options", "groups", "completion")}
            ours = {name for name in names if name.startswith("heliostat.cli")}
            assert all(any(name.startswith(one) for one in shared) for name in ours), path


def test_training_checks_each_thing_once_on_its_way_to_the_first_attempt(tmp_path, monkeypatch):
    """First the file, then everything that doesn't depend on the run, then, after claiming the run, its data."""
    from heliostat.storage import lease
    from heliostat.training import run as running
    from heliostat.validation import check

    make_text(tmp_path / "data")
    changes = {
        "data.sources.0.path": str(tmp_path / "data"),
        "data.sequence_length": 16,
        "evaluate": None,
        "model.vocab_size": None,
    }
    path = write(tmp_path, storage=str(tmp_path / "runs"), **changes, **{"mlflow.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    calls: list[str] = []
    for module, name in ((check, "load_job"), (check, "_check_job"), (check, "check_devices"), (check, "check_services"),
                         (lease, "take"), (check, "check_data"), (running.DrivenRun, "run")):  # fmt: skip
        act = (lambda self: {}) if name == "run" else getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _act=act, _name=name, **k: (calls.append(_name), _act(*a, **k))[1])
    assert running.train(path) == {}
    assert calls == ["load_job", "_check_job", "check_devices", "check_services", "take", "check_data", "run"]
