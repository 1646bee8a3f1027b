"""A user's mistake is one line, one JSON object and exit code 2, and names the command that was meant."""

import json
import sys

import numpy as np
import pytest
from heliostat import schema
from heliostat.cli import common, main
from heliostat.cluster import local
from heliostat.curation.text import tokens
from heliostat.data import manifest
from heliostat.errors import AccessError, ConfigError, TrainingError
from heliostat.storage.locations import Location

from tests.unit.command_line import FILES, ROOT, run

BOTH = "--overwrite: deletes the checkpoints that --resume needs. Pass one of the two"


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["train", "--stpes", "--json"], "UsageError", "No such option: --stpes"),
        (["evaluate", "m", "--json"], "UsageError", "Missing option '--data'; see `heliostat evaluate --help`"),
        (["nonsense", "--json"], "UsageError", "No such command 'nonsense'"),
        (["cluster", "nonsense", "--json"], "UsageError", "see `heliostat cluster --help`"),
        (["samples", "r", "--step", "0", "--json"], "UsageError", "'--step'"),
        (["train", "nothing.yaml", "--json"], "ConfigError", "nothing.yaml: no such file"),
        (["check", "jobs", "--json"], "ConfigError", "jobs: is a folder; name a YAML file in it"),
        (["verify", "/nowhere", "--json"], "ConfigError", "/nowhere: isn't a run"),
        (["index", "/nowhere", "--json"], "MissingDataError", "heliostat prepare"),
        *[
            (["train", "jobs/quickstart.yaml", "--resume", "--overwrite", "--json"], "ConfigError", BOTH),
            (["tune", "jobs/sweeps/quickstart.yaml", "--retry-failed", "--overwrite", "--json"], "ConfigError", BOTH),
            (["submit", "jobs/quickstart.yaml", "--resume", "--overwrite", "--json"], "ConfigError", BOTH),
        ],
        (
            ["runs", "--mlflow", "sqlite:////nowhere/x.db", "--json"],
            "ConfigError",
            "x.db: there is no such file",
        ),
        (["benchmark", "m", "s.yaml", "--out", "jobs", "--json"], "AccessError", "--out: jobs: is a folder. Name a file in it"),
        (
            ["benchmark", "m", "s.yaml", "--out", "/proc/x/b.json", "--json"],
            "AccessError",
            "--out: /proc/x: can't write to the folder /proc",
        ),
        (["runs", "--mlflow", "foo://x", "--json"], "ConfigError", "--mlflow: 'foo://x' is no MLflow store; use sqlite:///FILE"),
        (["runs", "--mlflow", "sqlite:///README.md", "--json"], "ConfigError", "README.md isn't an SQLite database"),
        (["runs", "--mlflow", "sqlite:///jobs", "--json"], "ConfigError", "--mlflow: can't read jobs (Is a directory)"),
        (["jobs", "--cluster", "127.0.0.1:99999", "--json"], "ConfigError", "or an address (HOST:PORT"),
        (["runs", "--mlflow", "http://u:p@h", "--json"], "ConfigError", "--mlflow: carries a password"),
    ],
    ids=lambda a: " ".join(a[:2]) if isinstance(a, list) else None,
)
def test_a_users_mistake_is_one_line_one_object_and_exit_code_2(monkeypatch, capsys, arguments, kind, words):
    monkeypatch.chdir(ROOT)
    code, out, err = run(monkeypatch, capsys, *arguments)
    told = json.loads(out)
    assert code == 2 and set(told) == {"error"} and set(told["error"]) == {"type", "message", "exit_code"}
    assert told["error"]["type"] == kind and told["error"]["exit_code"] == 2 and words in told["error"]["message"]
    assert err == f"error: {told['error']['message']}\n" and out.count("\n") == 1


def test_a_dataset_without_stages_names_what_to_change(monkeypatch, capsys, tmp_path):
    """`trace`, `forget` and the report of the curation: exit code 2, because a person must prepare it differently."""
    location = Location(str(tmp_path))
    location.join("shards/00000/x.parquet").write(tokens.shard(["a"], [np.zeros(9, np.int32)], 100, np.zeros(1, np.int64)))
    manifest.write(location, manifest.read_footer(location, "shards/00000/x.parquet", "tokens"), {"kind": "tokens"})
    for words in (["trace", "--id", "a"], ["forget", "--id", "a", "--out", str(tmp_path / "b")], ["curate", "report"]):
        code, _, err = run(monkeypatch, capsys, *words, str(tmp_path))
        assert code == 2 and "its pipeline has no `stages`" in err and err.count("\n") == 1


def test_without_a_cluster_the_error_names_what_takes_one(monkeypatch, capsys, tmp_path):
    """An option of `jobs`, an argument of `cluster status`."""
    monkeypatch.setattr(local, "known", list)
    for words, field in ((["jobs"], "--cluster: "), (["cluster", "status"], "CLUSTER: ")):
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 2 and err.startswith(f"error: {field}no cluster given") and "heliostat cluster up" in err


def test_a_store_of_the_environment_that_is_no_database_is_one_line(monkeypatch, capsys, tmp_path):
    """For a run's id and for a model: both ended with a traceback of SQLAlchemy."""
    (tmp_path / "x.db").write_text("no database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/x.db")
    for words in (["checkpoints", "0" * 32], ["generate", "models:/a/1", "--prompt", "x"]):
        code, _, err = run(monkeypatch, capsys, *words)
        assert code == 1 and err.startswith("error: MLflow at sqlite:///") and err.count("\n") == 1


def test_without_json_nothing_of_an_error_is_on_standard_output(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "verify", "/nowhere")
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
    """A fault of heliostat's own as well, whose traceback follows."""
    from heliostat.data import index

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(index, "index", fail)
    if code is None:
        monkeypatch.setattr(sys, "argv", ["heliostat", "index", "d", "--json"])
        with pytest.raises(KeyError):
            main.main()
        out = capsys.readouterr().out
    else:
        ended, out, _ = run(monkeypatch, capsys, "index", "d", "--json")
        assert ended == code
    assert json.loads(out)["error"]["type"] == kind and json.loads(out)["error"]["exit_code"] == (code or 1)


def test_a_bucket_that_is_not_there_is_exit_code_2():
    assert Location("s3://nothing/x")._no_bucket().exit_code == 2


def test_what_was_found_before_an_error_is_in_the_object(monkeypatch, capsys):
    """A cluster file's faults, one by one, beside the error."""
    monkeypatch.chdir(ROOT)
    code, out, _ = run(monkeypatch, capsys, "cluster", "check", "clusters/aws-h100.yaml", "--json")
    told = json.loads(out)
    assert ("error" in told) == bool(told["errors"]) == (code == 2) and told["file"] == "clusters/aws-h100.yaml"
    fault = ConfigError("broken")
    with pytest.raises(ConfigError):
        common.finish({"errors": ["a"]}, fault)
    assert fault.found == {"errors": ["a"]} and ConfigError("another").found == {}


TAKES = {
    "job": (["train"], ["check"], ["check", "--offline"], ["plan"], ["chaos"], ["submit", "-c", "clusters/kuberay-h100.yaml"]),
    "pipeline": (["prepare"],),
    "sweep": (["tune"],),
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
        assert code == 2 and schema.KIND_COMMANDS[given].format(FILES[given]) in err, (words, err)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs").rglob("*.yaml")) + sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_file_of_the_workspace_is_of_its_kind(path):
    """By its folder: none is refused where it belongs."""
    from heliostat.schema import read_yaml

    wanted = "pipeline" if path.parent.name in ("pipelines", "data") else "sweep" if path.parent.name == "sweeps" else "job"
    assert schema.kind_of(read_yaml(path)) == wanted


def test_a_sweep_whose_job_is_no_job_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, _, err = run(monkeypatch, capsys, "tune", FILES["sweep"], "--set", f"job={FILES['pipeline']}")
    assert code == 2 and "heliostat prepare" in err
