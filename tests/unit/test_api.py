"""Tests the Python API: the names in `import heliostat`, the cost of the import, and the errors for bad input."""

from __future__ import annotations

import ast
import inspect
import json
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import heliostat
import numpy as np
import pytest
from heliostat.api import functions as api
from heliostat.errors import AccessError, ConfigError, MissingDataError
from heliostat.validation import check as checks

from tests.unit.build_job import raw, write

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python-api.md").read_text()
NAMES = ["Checked", "ExactStream", "Generated", "Job", "Run", "check", "datasets", "generate", "load_job", "prepare", "train"]


def test_importing_heliostat_imports_nothing_else_and_shows_every_name():
    code = "import sys; before = set(sys.modules); import heliostat; names = dir(heliostat)\n"
    code += "import json; print(json.dumps([names, sorted(set(sys.modules) - before)]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    names, modules = json.loads(done.stdout)
    assert set(NAMES) <= set(names) and heliostat.__all__ == NAMES == api.__all__
    assert not {m.partition(".")[0] for m in modules} - set(sys.stdlib_module_names) - {"heliostat"}
    assert [m for m in modules if m.startswith("heliostat")] == ["heliostat"]
    assert not {m for m in modules if m.startswith("importlib.resources")}  # as long as the rest, for each command


def test_a_job_is_loaded_without_torch_ray_or_mlflow():
    code = "import heliostat, sys; heliostat.load_job('jobs/quickstart.yaml')\n"
    code += "print({'torch', 'ray', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_an_uncaught_mistake_of_the_persons_is_one_line_below_the_persons_own_frames(tmp_path):
    """The traceback has no frame of heliostat's and no chain of its libraries' errors; any other error keeps its whole
    traceback."""
    write(tmp_path, **{"train.stepz": 5})
    code = "import heliostat\ndef mine():\n    heliostat.{}\nmine()\n"

    def ended(call: str) -> str:
        (tmp_path / "mine.py").write_text(code.format(call))
        done = subprocess.run([sys.executable, "mine.py"], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
        assert done.returncode == 1
        return done.stderr

    for call, last in (
        ("train('job.yaml')", "heliostat.errors.ConfigError: job.yaml: train.stepz: unknown key"),
        ("load_job('none.yaml')", "heliostat.errors.ConfigError: none.yaml: "),
    ):
        head, *frames, line = ended(call).splitlines()
        assert head == "Traceback (most recent call last):" and line.startswith(last)
        assert [f for f in frames if "File" in f and "mine.py" not in f] == [] and "direct cause" not in "".join(frames)
    told = ended("load_job(type('Path', (), {'__fspath__': lambda self: 1 / 0})())")  # no mistake that heliostat knows
    assert "heliostat/api/functions.py" in told


def test_the_frames_of_a_folder_whose_name_begins_as_the_packages_are_the_persons():
    package = Path(heliostat.__file__).parent
    mine = package.with_name("heliostat_jobs") / "mine.py"
    for place, theirs in ((mine, True), (package / "validation" / "check.py", False), (package / "api" / "run_handle.py", False)):
        try:
            exec(compile("raise error", str(place), "exec"), {"error": ConfigError("no")})
        except ConfigError as e:
            assert (f'"{place}", line 1' in api.shown(e, e.__traceback__.tb_next)) is theirs


@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_is_typed_and_is_explained(name):
    found = getattr(heliostat, name)
    assert callable(found) and f"`{name}" in PAGE
    if isinstance(found, type):
        members = [(n, m) for n, m in vars(found).items() if not n.startswith("_")] if name == "Run" else []
    else:
        members = [(name, getattr(api, name))]
        assert str(inspect.signature(found)) == str(inspect.signature(getattr(api, name)))
    for member, value in members:
        assert member in PAGE, f"docs/python-api.md does not tell of {member}"
        function = value.fget if isinstance(value, property) else value
        missing = [p for p in [*inspect.signature(function).parameters, "return"] if p not in function.__annotations__]
        assert (missing in ([], ["self"]) and function.__doc__) or member in ("folder", "name")


def test_type_checkers_see_the_names_that_python_sees():
    """The package ships `py.typed`, and the names under TYPE_CHECKING equal those of `dir`."""
    tree = ast.parse((ROOT / "platform/heliostat/__init__.py").read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If)]
    lines = [line for line in block.body if isinstance(line, ast.ImportFrom) and line.module == "heliostat.api.functions"]
    seen = [alias.asname for line in lines for alias in line.names]
    assert seen == NAMES and (ROOT / "platform/heliostat/py.typed").is_file()
    hints = typing.get_type_hints(api.train, vars(api))
    assert hints["return"] is heliostat.Run


EARLIER = {
    "heliostat.pipelines.text.pipeline": "heliostat.curation.text.pipeline",
    "heliostat.pipelines.prepare": "heliostat.curation.prepare",
    "heliostat.config.schema": "heliostat.schema",
    "heliostat.benchmark.suite": "heliostat.evaluation.suite",
    "heliostat.exact_stream": "heliostat.api.exact_stream",
    "heliostat.pipelines": "heliostat.curation",
    "heliostat.curation.files": "heliostat.tasks.files",
}


def test_public_modules_import_under_their_earlier_paths():
    """A user's older recipe or pipeline still imports, and gets the same classes; workers get the new path.

    The example of an own pipeline imported `Location` from `heliostat.storage`, which was a module.
    """
    code = f"import importlib\nfor path, now in {EARLIER!r}.items():\n"
    code += "    old, new = importlib.import_module(path), importlib.import_module(now)\n"
    code += "    assert old is new and new.__name__ == new.__spec__.name, path\n"
    code += "from heliostat.storage import Location; print(Location.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["heliostat.storage.locations"]


def test_a_module_that_is_run_under_its_earlier_path_names_the_new_one():
    """`python -m` prints the new name in one line. It was an AttributeError of the import system."""
    with pytest.raises(ImportError, match=r"pipelines\.prepare has moved\. Run python -m heliostat\.curation\.prepare\."):
        runpy.run_module("heliostat.pipelines.prepare", run_name="__main__")


def test_overrides_are_keys_and_values_or_what_set_takes(tmp_path):
    path = write(tmp_path)
    by_dict = heliostat.load_job(path, {"train.steps": 7, "train.optimizer.lr": 1e-5, "name": "7", "data.labels": {"a": "b"}})
    by_text = heliostat.load_job(str(path), ["train.steps=7", "train.optimizer.lr=1e-5", "name='7'", "data.labels={a: b}"])
    assert by_dict == by_text and (by_dict.train.steps, by_dict.name) == (7, "7")
    assert heliostat.load_job(raw(), "train.steps=7").train.steps == 7
    assert (
        heliostat.load_job(raw(**{"train.steps": 7}), {"name": "7", "train.optimizer.lr": 1e-5, "data.labels.a": "b"}) == by_dict
    )


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: heliostat.load_job("nowhere.yaml"), r"nowhere\.yaml: no such file"),
        (lambda: heliostat.load_job(raw(**{"train.stepz": 1})), r"job: train\.stepz: unknown key. Did you mean 'steps'\?"),
        (
            lambda: checks.check_job(heliostat.load_job(raw(recipe="heliostat.recipes:Nothing"))),
            r"recipe: heliostat\.recipes has no 'Nothing'",
        ),
        (lambda: heliostat.Run("runs/none"), r"none: isn't a run"),
        (lambda: heliostat.generate("0" * 31, "x"), r"no such folder, and not a run id. Pass models:/NAME/VERSION"),
        (
            lambda: heliostat.datasets({"sources": []}, folder="f"),
            r"heliostat\.datasets: steps and global_batch_size are required",
        ),
        (
            lambda: heliostat.datasets(
                {"sources": [{"path": "d"}], "virtual_ranks": 3}, steps=1, global_batch_size=8, folder="f"
            ),
            r"heliostat\.datasets: data\.virtual_ranks: 3 doesn't divide train\.global_batch_size 8, .* Use 2",
        ),
        (
            lambda: heliostat.datasets({"sources": [{"path": "d"}], "virtual_rank": 3}, steps=1, global_batch_size=8, folder="f"),
            r"heliostat\.datasets: data\.virtual_rank: unknown key. Did you mean 'virtual_ranks'\?",
        ),
        (
            lambda: heliostat.datasets(heliostat.load_job(raw()), steps=1, folder="f"),
            r"heliostat\.datasets: steps, global_batch_size, and held_out come from the job",
        ),
        (lambda: heliostat.train(None), "job: expected a job file, its mapping, or a Job, got None"),
        (lambda: heliostat.prepare(3), "pipeline: expected a pipeline file, got 3"),
        (lambda: heliostat.load_job(raw(), None), "overrides: expected a mapping, or a list of .*, got None"),
        (lambda: heliostat.load_job(raw(), [3]), r"overrides: expected a mapping, or a list of .*, got \[3\]"),
        (lambda: heliostat.load_job(raw(), {"train.steps": {1}}), r"overrides: train\.steps: YAML can't represent \{1\}"),
        (lambda: heliostat.generate("m", 3), "prompts: expected a text or a list of texts, got 3"),
        (lambda: heliostat.generate("m", "x", seed="a"), "seed: expected an integer, got 'a'"),
        (lambda: heliostat.generate("0" * 31, "x", seed=np.int64(1)), r"no such folder, and not a run id"),
        (lambda: heliostat.generate(None, "x"), "model: expected a folder, models:/NAME/VERSION, or a run id, got None"),
        (lambda: heliostat.datasets(None, steps=1, global_batch_size=8, folder="f"), "data: expected the keys"),
    ],
)
def test_bad_input_is_one_line_that_names_it(call, line, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=line) as e:
        call()
    assert "\n" not in str(e.value)


def test_a_dataset_that_is_missing_says_so_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingDataError, match=r"data\.sources\.0\.path: "):
        heliostat.datasets({"sources": [{"path": "d"}], "sequence_length": 8}, steps=1, global_batch_size=8, folder="f")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux has it")
def test_a_folder_that_takes_no_receipts_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AccessError, match=r"^folder: /proc/x: can't write to the folder /proc\. Use another location$"):
        heliostat.datasets({"sources": [{"path": "d"}], "sequence_length": 8}, steps=1, global_batch_size=8, folder="/proc/x")


def test_the_page_tells_of_no_name_that_there_is_not():
    for name in re.findall(r"heliostat\.([A-Za-z_]+)\(", PAGE):
        assert name in NAMES, name
