"""Tests suites and task files: an error in one is one line, and heliostat doesn't run anything that they name."""

import json
from pathlib import Path

import pytest
import yaml
from heliostat import extras
from heliostat.errors import ConfigError, MissingExtraError
from heliostat.evaluation import suite, task_files
from heliostat.evaluation.run import Benchmark
from heliostat.storage.locations import Location

TASK = {"task": "colours", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "colours.jsonl"}}}


def write(folder: Path, name: str = "colours.yaml", **changes) -> Path:
    made = {k: v for k, v in (TASK | changes).items() if v is not None}
    (folder / name).write_text(yaml.safe_dump(made))
    return folder / name


SUITE = {"name": "small", "tasks": ["colours", {"task": "others", "fewshot": 2, "metric": "acc_norm"}]}


def test_a_missing_compiler_is_one_line_before_any_task_is_built(tmp_path, monkeypatch):
    """The contamination of the tasks needs Numba. Earlier, `heliostat[benchmark]` lacked it, so the command failed
    after it had built the tasks."""
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    find = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "numba" else find(name))
    with pytest.raises(MissingExtraError, match=r"^heliostat model benchmark needs the extra 'benchmark' \(no module 'numba'\)"):
        Benchmark(*suite.load(tmp_path / "suite.yaml"))


def test_a_suite_names_its_tasks_alone_or_with_what_it_sets(tmp_path):
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE))
    made, folder = suite.load(tmp_path / "suite.yaml")
    assert [(one.task, one.fewshot, one.metric) for one in made.tasks] == [("colours", None, None), ("others", 2, "acc_norm")]
    assert Path(folder.path).resolve() == tmp_path.resolve()
    assert (made.seed, made.contamination.n, made.examples) == (1234, 13, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": []}, "tasks"),
        ({"tasks": ["a", "a"]}, "'a' is listed twice"),
        ({"tasks": [{"task": "a", "few": 1}]}, r"tasks\.0\.few: unknown key. Did you mean 'fewshot'"),
        ({"tasks": ["../a"]}, r"tasks\.0"),
        ({"exampels": 3}, "exampels: unknown key. Did you mean 'examples'"),
        ({"dtype": "bf15"}, "Did you mean 'bf16'"),
        ({"examples": 0}, "examples: 0 is too small. Use a number above 0"),
        ({"name": None}, "name: required key missing. Write name: TEXT"),
        ({"contamination": {"n": 1}}, r"contamination\.n: 1 is too small"),
        ({"recipe": "x", "tasks": None}, r"suite\.yaml: is a job, not a suite\. Use `heliostat train .*suite\.yaml`$"),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path, changes, said):
    made = {k: v for k, v in (SUITE | changes).items() if v is not None}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(ConfigError, match=said) as e:
        suite.load(tmp_path / "suite.yaml")
    assert "\n" not in str(e.value)


def test_a_task_is_found_by_its_name_wherever_it_lies_and_hidden_folders_are_left_out(tmp_path):
    for place in ("deep/er", ".venv"):
        (tmp_path / place).mkdir(parents=True)
        write(tmp_path / place)
    (tmp_path / "broken.yaml").write_text("a: [")
    assert task_files.find(tmp_path, "colours") == tmp_path / "deep/er/colours.yaml"
    assert task_files.find(tmp_path, "colour") is None
    assert task_files.names(tmp_path) == ["colours"]
    write(tmp_path, "again.yml")
    with pytest.raises(ConfigError, match="'colours' is in two files"):
        task_files.find(tmp_path, "colours")


def test_an_included_file_gives_what_the_task_does_not_say(tmp_path):
    write(tmp_path, "_base.yaml", task=None, test_split="test", doc_to_text="{{a}}")
    write(tmp_path, "mine.yaml", include="_base.yaml", doc_to_text="{{b}}", dataset_path=None, dataset_kwargs=None)
    found = task_files.read(tmp_path, tmp_path / "mine.yaml")
    assert found == TASK | {"test_split": "test", "doc_to_text": "{{b}}"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "task: colours\nprocess_docs: !function evil.run\n",
            "colours.yaml: contains a `!function`, .*doesn't run code",
        ),
        ("task: colours\nmetric_list:\n  - metric: !function evil.run\n", "contains a `!function`"),
        ("task: colours\nx: !!python/object/apply:os.system ['touch ran']\n", "colours.yaml: not valid YAML"),
        ("task: colours\ninclude: ../outside.yaml\n", "outside.yaml is outside"),
        ("task: colours\ninclude: colours.yaml\n", "includes itself"),
        ("task: colours\ninclude: 3\n", "include: 3 isn't a path"),
        ("task: colours\ninclude: gone.yaml\n", "gone.yaml: no such file"),
        ("task: colours\nx: [\n", "colours.yaml: not valid YAML"),
    ],
)
def test_a_task_file_that_is_wrong_or_would_run_code_is_one_line(tmp_path, text, said):
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "outside.yaml").write_text("a: 1")
    (folder / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef run(x): return x\n")
    (folder / "colours.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said) as e:
        task_files.read(folder, task_files.find(folder, "colours"))
    assert "\n" not in str(e.value) and not list(tmp_path.rglob("ran"))


def test_code_in_a_file_that_is_included_is_refused_too(tmp_path):
    (tmp_path / "base.yaml").write_text("process_docs: !function evil.run\n")
    write(tmp_path, include="base.yaml")
    with pytest.raises(ConfigError, match=r"base\.yaml: contains a `!function`"):
        task_files.read(tmp_path, tmp_path / "colours.yaml")


def placed(folder: Path, **changes):
    return task_files.placed(TASK | changes, Location(str(folder)), folder / "cache", "colours.yaml")


def test_files_are_of_the_task_files_folder_and_a_folder_gives_a_split_a_file(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("colours.jsonl", "data/test.jsonl", "data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"):
        (tmp_path / name).write_text(json.dumps({"a": 1}) + "\n")
    kwargs = placed(tmp_path)["dataset_kwargs"]
    assert kwargs["data_files"] == {"test": str(tmp_path / "colours.jsonl")} and kwargs["cache_dir"].startswith(str(tmp_path))
    found = placed(tmp_path, dataset_path="data", dataset_kwargs=None)
    assert found["dataset_path"] == "json"
    assert {split: len(files) for split, files in found["dataset_kwargs"]["data_files"].items()} == {"test": 1, "train": 2}
    hub = placed(tmp_path, dataset_path="allenai/ai2_arc", dataset_kwargs=None)
    assert hub["dataset_path"] == "allenai/ai2_arc" and not hub["dataset_kwargs"]  # left to a network


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "data_files: .*colours.jsonl: no such file"),
        ({"dataset_kwargs": {}}, "data_files is required"),
        ({"dataset_kwargs": {"data_files": {"test": 3}}}, "data_files: 3 isn't a path"),
        ({"dataset_kwargs": {"data_files": "x.jsonl", "script": "y.py"}}, "'script' isn't supported"),
        ({"dataset_path": "pandas"}, "'pandas' is neither a folder with a data set nor a reader"),
        ({"dataset_path": "./gone"}, "is neither a folder with a data set"),
        ({"dataset_path": None}, "None isn't a data set"),
        ({"dataset_path": "mixed"}, "files of several kinds"),
        ({"dataset_path": "empty"}, "no file of"),
    ],
)
def test_a_data_set_that_is_not_there_is_one_line(tmp_path, changes, said):
    for name in ("mixed/test.jsonl", "mixed/train.parquet", "empty/README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=said) as e:
        placed(tmp_path, **changes)
    assert "\n" not in str(e.value) and str(e.value).startswith("colours.yaml: ")
