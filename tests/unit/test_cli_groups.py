"""Tests that commands are in groups. Names of the version before still work, print the new name once, and are in no help."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from heliostat.cli import groups

from tests.unit.command_line import NAMES, ROOT, run

LEAVES = [name for name, command in NAMES.items() if not hasattr(command, "commands")]
OLD = [*groups.RENAMED, "sweep", "sweep --stop"]


def test_the_tree_is_what_the_documentation_promises():
    assert {name.partition(" ")[0] for name in LEAVES} == {*groups.FIRST, *groups.GROUPS} and len(LEAVES) == 48
    assert set(groups.RENAMED.values()) <= set(LEAVES) and set(groups.OPTIONS) <= set(LEAVES)


@pytest.mark.parametrize("old", groups.RENAMED)
def test_an_earlier_name_shows_the_help_of_the_new_one(monkeypatch, capsys, old):
    new = groups.RENAMED[old]
    before = run(monkeypatch, capsys, *old.split(), "--help")
    assert before == (0, run(monkeypatch, capsys, *new.split(), "--help")[1], f"heliostat {old} is now heliostat {new}\n")


@pytest.mark.parametrize(("words", "old", "new", "rest"), [
    (["sweep", "lr"], "sweep", "sweep show", ["lr"]),
    (["sweep", "--top", "3", "lr"], "sweep", "sweep show", ["--top", "3", "lr"]),
    (["sweep", "lr", "--stop"], "sweep --stop", "sweep stop", ["lr"]),
    (["sweep", "show", "lr"], "", "", ["sweep", "show", "lr"]),
    (["sweep", "stop", "lr"], "", "", ["sweep", "stop", "lr"]),
    (["sweep", "--help"], "", "", ["sweep", "--help"]),
    (["sweep"], "", "", ["sweep"]),
    (["sweep", "ls"], "", "", ["sweep", "ls"]),  # no sweep's name: `sweep list` is suggested
    (["curate", "report", "d"], "curate report", "data report", ["d"]),
    (["report", "r"], "report", "run report", ["r"]),
    (["train", "runs"], "", "", ["train", "runs"]),
])  # fmt: skip
def test_words_of_an_earlier_version_are_translated(words, old, new, rest):
    assert groups.current(words) == (old, new, rest)


def test_an_earlier_command_prints_the_same_object(monkeypatch, capsys, tmp_path):
    """A script that reads `--json` sees no difference, because the new name is on standard error."""
    monkeypatch.chdir(tmp_path)
    new = run(monkeypatch, capsys, "sweep", "list", "--json")
    assert run(monkeypatch, capsys, "sweeps", "--json")[:2] == new[:2] == (0, '{"sweeps": []}\n')


@pytest.mark.parametrize("words", [["--to", "x"], ["--to=x"], ["--out", "x"]])
def test_an_earlier_option_is_taken_by_its_new_name(words, capsys):
    command = NAMES["model export"]
    with command.make_context("heliostat model export", ["run", *words]) as context:
        assert context.params["to"] == Path("x")
    assert capsys.readouterr().err == ("" if "--out" in words else "--to is now --out\n")


def test_a_word_after_two_dashes_is_no_option(capsys):
    with NAMES["search ask"].make_context("heliostat search ask", ["index", "--", "--to"]) as context:
        assert context.params["question"] == "--to"
    assert not capsys.readouterr().err


def test_every_option_that_writes_a_file_or_a_folder_is_out():
    """Knowledge of one command applies to all commands."""
    for name in LEAVES:
        options = {option for parameter in NAMES[name].params for option in parameter.opts}
        assert not options & {"--to", "--output", "--write", "--dir"}, name
        assert not ("--cluster" in options and "-c" not in options), name


def completed(folder: Path, line: str, **more: str) -> list[str]:
    """Returns bash's completions of a line whose last word isn't finished, from the process that bash starts."""
    words = line.split(" ")
    variables = {"_HELIOSTAT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(
        [sys.executable, "-m", "heliostat"], cwd=folder, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), **variables, **more},
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.split()


def test_a_shell_completes_a_command_from_a_process(tmp_path):
    """Completion uses typer's environment variables, as the script of `--install-completion` sets them."""
    assert completed(tmp_path, "heliostat run ver") == ["verify"]


class Shell:
    """Completes lines in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.tools = monkeypatch, capsys

    def __call__(self, line: str) -> list[str]:
        monkeypatch, capsys = self.tools
        monkeypatch.setenv("_HELIOSTAT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        code, out, err = run(monkeypatch, capsys)
        assert (code, err) == (0, "")
        return out.split()


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path) -> Any:
    """Returns a shell in a workspace with a file of each kind, a dataset, a run, a registered model, a submitted job, and a local
    cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for path in ("jobs/a.yaml", "jobs/sweeps/s.yaml", "pipelines/p.yaml", "clusters/c.yaml", ".heliostat/data/d/manifest.parquet",
                 ".heliostat/runs/r/run.json", ".heliostat/jobs/j.json", ".heliostat/clusters/local/state.json"):  # fmt: skip
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("{}")
    with sqlite3.connect(".heliostat/mlflow.db") as store:
        store.execute("CREATE TABLE model_versions (name TEXT, version INTEGER)")
        store.execute("CREATE TABLE runs (run_uuid TEXT, status TEXT, start_time INTEGER)")
        store.execute("INSERT INTO model_versions VALUES ('lm', 1), ('lm', 2)")
        store.execute("INSERT INTO runs VALUES ('0123', 'FINISHED', 1), ('4567', 'RUNNING', 2)")
    return Shell(monkeypatch, capsys)


@pytest.mark.parametrize(("line", "words"), [
    ("heliostat ", [*groups.FIRST, *groups.GROUPS]),
    ("heliostat t", ["train"]),
    ("heliostat search ", ["index", "ask"]),
    ("heliostat train --over", ["--overwrite"]),
    ("heliostat check ", ["jobs/a.yaml"]),
    ("heliostat data prepare ", ["pipelines/p.yaml"]),
    ("heliostat sweep run ", ["jobs/sweeps/s.yaml"]),
    ("heliostat cluster up ", ["clusters/c.yaml"]),
    ("heliostat cluster down ", ["clusters/c.yaml", "local"]),
    ("heliostat data index ", [".heliostat/data/d"]),
    ("heliostat run verify ", [".heliostat/runs/r"]),
    ("heliostat job logs ", ["j"]),
    ("heliostat model generate ", ["models:/lm/2", "models:/lm/1", "0123"]),
    ("heliostat model promote ", ["lm/2", "lm/1"]),
    ("heliostat verify ", [".heliostat/runs/r"]),  # an earlier name completes too, and prints nothing
    ("heliostat run lineage nothing", []),
])  # fmt: skip
def test_a_shell_completes_commands_options_files_and_names(shell, line, words):
    assert shell(line) == words


def test_a_shell_completes_no_model_of_a_store_that_is_none(shell):
    Path(".heliostat/mlflow.db").write_text("no database")
    assert shell("heliostat model generate ") == []


def test_the_script_for_a_shell_is_printed_and_named_in_help(monkeypatch, capsys):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "")
    monkeypatch.setenv("_HELIOSTAT_COMPLETE", "source_bash")
    code, out, _ = run(monkeypatch, capsys)
    assert code == 0 and "complete -o default -F _heliostat_completion heliostat" in out
    monkeypatch.delenv("_HELIOSTAT_COMPLETE")
    assert "--install-completion" in run(monkeypatch, capsys, "--help")[1]


def test_json_before_a_command_is_as_after_it(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert json.loads(run(monkeypatch, capsys, "--json", "sweep", "list")[1]) == {"sweeps": []}
