"""Tests that a user's mistake gives one line, one JSON object, and exit code 2, and names the intended command."""

import json
import logging
import re
import sys

import numpy as np
import pytest
from heliostat.cli import common, main
from heliostat.cli.workspace_template import create
from heliostat.cluster import local
from heliostat.config.file_kinds import KIND_COMMANDS, kind_of
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.errors import AccessError, ConfigError, TrainingError
from heliostat.storage.locations import Location

from tests.unit.cli_mistakes import MISTAKES, OPTIONS
from tests.unit.command_line import FILES, ROOT, run

FIX = re.compile(
    r"`heliostat|: heliostat |\b(Give|Use|Write|Set|Run|Add|Remove|Pass|Raise|See|Did you mean|Name|Quote|List|Lower)\b|"
    r"\b(Change|Close|Keep|Check|Correct|Start|Make)\b"
)
SILENT = ("serve", "ui", "logs")  # commands without --json


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Writes files with mistakes in a new workspace; returns their paths by name."""
    folder = tmp_path_factory.mktemp("workspace")
    create(folder)
    texts = {"empty": "", "list": "- 1\n", "broken": "a: [\n", "twice": "name: a\nname: b\n", "two": "a: 1\n---\nb: 2\n",
             "date": "a: 2024-13-45\n",
             "suite": "name: s\ntasks: [{name: arc_easy}]\n"}  # fmt: skip
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    return {"folder": str(folder), **{name: f"{name}.yaml" for name in (*texts, "binary")}}


def test_there_are_ninety_mistakes():
    assert len({tuple(words) for words, _, _ in MISTAKES}) >= 90


@pytest.mark.parametrize(("words", "field", "answer"), MISTAKES, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_a_mistake_is_one_line_that_names_the_field_the_problem_and_the_fix(
    monkeypatch, capsys, caplog, workspace, words, field, answer
):
    """Exit code 2, nothing on standard output, and no traceback. With `--json`, one object has the same line."""
    monkeypatch.chdir(workspace["folder"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    caplog.set_level(logging.ERROR, "mlflow")  # as the command sets it, which comes too late where MLflow is imported already
    words = [word.format(**workspace) if re.fullmatch(r"\{\w+\}", word) else word for word in words]
    reports = words not in [w for w, _, _ in OPTIONS] and not set(words) & set(SILENT)
    code, out, err = run(monkeypatch, capsys, *words, *(["--json"] if reports else []))
    line = err.removesuffix("\n")
    assert code == 2 and "\n" not in line and "Traceback" not in line, err
    assert re.search(rf": ['`]?{re.escape(field.format(**workspace))}(?!\w)", line), line
    assert answer in line and FIX.search(line), line
    if reports:
        error = json.loads(out)["error"]
        assert error["exit_code"] == 2 and line == f"error: {error['message']}"
    else:
        assert not out


def test_a_dataset_without_stages_names_what_to_change(monkeypatch, capsys, tmp_path):
    """For `trace`, `forget`, and the report of the curation: exit code 2, because a person must prepare the dataset
    differently."""
    location = Location(str(tmp_path / "set"))
    location.join("shards/00000/x.parquet").write(tokens.shard(["a"], [np.zeros(9, np.int32)], 100, np.zeros(1, np.int64)))
    manifest.write(location, manifest.read_footer(location, "shards/00000/x.parquet", "tokens"), {"kind": "tokens"})
    for words in (
        ["data", "trace", "--id", "a"],
        ["data", "forget", "--id", "a", "--out", str(tmp_path / "b")],
        ["data", "report"],
    ):
        code, _, err = run(monkeypatch, capsys, *words, str(tmp_path / "set"))
        assert code == 2 and "its pipeline has no `stages`" in err and err.count("\n") == 1


def test_without_a_cluster_the_error_names_what_takes_one(monkeypatch, capsys, tmp_path):
    """It names an option of `jobs`, or an argument of `cluster status`."""
    monkeypatch.setattr(local, "known", list)
    for words, field in ((["job", "list"], "--cluster: "), (["cluster", "status"], "CLUSTER: ")):
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 2 and err.startswith(f"error: {field}no cluster given") and "heliostat cluster up" in err


def test_a_store_of_the_environment_that_is_no_database_is_one_line(monkeypatch, capsys, tmp_path):
    """For a run's id and for a model. Both ended with a traceback of SQLAlchemy."""
    (tmp_path / "x.db").write_text("no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/x.db")
    for words in (["run", "checkpoints", "0" * 32], ["model", "generate", "models:/a/1", "--prompt", "x"]):
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 1 and err.startswith("error: MLflow at sqlite:///") and err.count("\n") == 1


def test_without_json_nothing_of_an_error_is_on_standard_output(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "run", "verify", "/nowhere")
    assert code == 2 and not out and err.startswith("error: /nowhere")


@pytest.mark.parametrize(
    ("raised", "code", "kind"),
    [
        (TrainingError("it failed"), 1, "TrainingError"),
        (AccessError("s3://b: there is no bucket 'b'"), 2, "AccessError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (KeyError("x"), None, "KeyError"),
    ],
    ids=lambda a: type(a).__name__,
)
def test_whatever_ends_a_command_is_an_object_too(monkeypatch, capsys, raised, code, kind):
    """This includes heliostat's own errors, followed by their traceback."""
    from heliostat.data import index

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(index, "index", fail)
    if code is None:
        monkeypatch.setattr(sys, "argv", ["heliostat", "data", "index", "d", "--json"])
        with pytest.raises(KeyError):
            main.main()
        out = capsys.readouterr().out
    else:
        ended, out, _ = run(monkeypatch, capsys, "data", "index", "d", "--json")
        assert ended == code
    assert json.loads(out)["error"]["type"] == kind and json.loads(out)["error"]["exit_code"] == (code or 1)


def test_a_bucket_that_is_not_there_is_exit_code_2():
    assert Location("s3://nothing/x")._no_bucket().exit_code == 2


def test_what_was_found_before_an_error_is_in_the_object(monkeypatch, capsys):
    """The object has the faults of a cluster file, one by one, in addition to the error."""
    monkeypatch.chdir(ROOT)
    code, out, _ = run(monkeypatch, capsys, "cluster", "check", "clusters/aws-h100.yaml", "--json")
    told = json.loads(out)
    assert ("error" in told) == bool(told["errors"]) == (code == 2) and told["file"] == "clusters/aws-h100.yaml"
    fault = ConfigError("broken")
    with pytest.raises(ConfigError):
        common.finish({"errors": ["a"]}, fault)
    assert fault.found == {"errors": ["a"]} and ConfigError("another").found == {}


TAKES = {
    "job": (
        ["train"],
        ["check"],
        ["check", "--offline"],
        ["plan"],
        ["debug", "chaos"],
        ["submit", "-c", "clusters/kuberay-h100.yaml"],
    ),
    "pipeline": (["data", "prepare"],),
    "sweep": (["sweep", "run"],),
    "cluster": (["cluster", "check"], ["cluster", "up"], ["check", "jobs/quickstart.yaml", "--offline", "--cluster"]),
}


@pytest.mark.parametrize("given", FILES)
@pytest.mark.parametrize("wanted", TAKES)
def test_a_file_of_another_kind_names_its_own_command(monkeypatch, capsys, wanted, given):
    if given == wanted:
        return
    monkeypatch.chdir(ROOT)
    for words in TAKES[wanted][:5]:
        if "--cluster" in words:
            continue
        code, _, err = run(monkeypatch, capsys, *words, FILES[given])
        assert code == 2 and KIND_COMMANDS[given].format(FILES[given]) in err, (words, err)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs").rglob("*.yaml")) + sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_file_of_the_workspace_is_of_its_kind(path):
    """Each file is accepted in its own folder."""
    from heliostat.schema import read_yaml

    wanted = "pipeline" if path.parent.name in ("pipelines", "data") else "sweep" if path.parent.name == "sweeps" else "job"
    assert kind_of(read_yaml(path)) == wanted


def test_a_sweep_whose_job_is_no_job_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, _, err = run(monkeypatch, capsys, "sweep", "run", FILES["sweep"], "--set", f"job={FILES['pipeline']}")
    assert code == 2 and "heliostat data prepare" in err
