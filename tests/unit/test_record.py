"""Tests the records of a run in addition to its curves: code, parents, and model card; and the comparisons of a reproduction."""

import math
import subprocess
from pathlib import Path

import pytest
from heliostat.cluster import source_code
from heliostat.cluster.workspace_package import CODE_FILE
from heliostat.config import spec
from heliostat.errors import ConfigError
from heliostat.recipes import exported
from heliostat.tracking import card, run_facts
from heliostat.tracking.card import parents
from heliostat.tracking.run_facts import flatten
from heliostat.training import reproduce

from tests.unit.build_job import job
from tests.unit.test_dataset import make_dataset


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / ".env").write_text("PASSWORD=one\n")
    git("add", "-f", "a.py", ".env")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    return tmp_path


def git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()


def test_the_difference_from_the_commit_is_kept_applies_again_and_never_holds_secrets(repository):
    clean = source_code.source()
    assert clean.commit == git("rev-parse", "HEAD") and not clean.dirty and clean.facts()["diff"] == ""
    (repository / "a.py").write_text("x = 2\n")
    (repository / ".env").write_text("PASSWORD=two\n")
    (repository / "new.py").write_text("y = 1\n")
    found = source_code.source()
    assert found.dirty and found.untracked == ("new.py",) and "PASSWORD" not in found.diff
    assert found.digest and found.digest != clean.digest and found == source_code.source()
    git("checkout", "-q", "a.py")
    subprocess.run(["git", "apply"], input=found.diff, text=True, check=True)
    assert (repository / "a.py").read_text() == "x = 2\n"


def test_what_may_be_secret_is_not_in_the_difference_and_is_listed(repository):
    """By name in any case, under a new name, and as a line of a file, also if only its neighbor was changed."""
    made = {"jobs.yaml": "a: 1\nuri: mysql://u:hunter2@h/d\nkeys:\n  private_key: |\n" + "    hunter2\n" * 9 + "b: 2\n",
            "Deploy.PEM": "hunter2\n", "infra/x.tfvars": "hunter2\n", "ümläut.yaml": "a: 1\n"}  # fmt: skip
    for name, text in made.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(text)
    git("add", "-f", *made)
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "second")
    for name, text in made.items():
        (repository / name).write_text(text.replace("a: 1", "a: 3").replace("b: 2", "b: 4").replace("hunter2\n", "hunter22\n"))
    git("mv", ".env", "settings.txt")
    (repository / "settings.txt").write_text("PASSWORD=one\nhunter2\n")
    git("add", "-A")
    found = source_code.source()
    assert "hunter2" not in found.text() and "PASSWORD" not in found.diff
    assert "+a: 3" in found.diff and "+b: 4" in found.diff and "+uri: mysql://u:***@h/d" not in found.diff
    assert " uri: mysql://u:***@h/d" in found.diff and found.diff.count("+a: 3") == 2
    (lines,) = set(found.left_out) - {".env", "settings.txt", "Deploy.PEM", "infra/x.tfvars"}
    assert lines.startswith("jobs.yaml: ") and "lines with secrets" in lines
    assert "# left out, may be secret: Deploy.PEM\n" in found.text()


def test_on_a_cluster_the_code_is_what_git_said_where_it_was_sent_from(repository, tmp_path, monkeypatch):
    (repository / "a.py").write_text("x = 2\n")
    sent = source_code.source()
    there = tmp_path / "there"
    there.mkdir()
    (there / CODE_FILE).write_text(sent.dump())
    monkeypatch.chdir(there)
    assert source_code.source() == sent


def test_outside_of_git_the_code_is_not_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert source_code.source() == source_code.SourceCode() and source_code.source().facts() == {"commit": "", "diff": ""}


def test_the_environment_has_python_and_every_package():
    found = source_code.environment()
    assert {"python", "system", "torch", "ray", "mlflow", "deepspeed"} <= found.keys()


def test_parents_are_every_pretrained_folder_however_deep_and_who_made_them(tmp_path):
    made, foreign = tmp_path / "made", tmp_path / "foreign"
    for folder in (made, foreign):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"12345678")
    exported.write(made, job(card={"license": "MIT"}), {"run_id": "f" * 32, "step": 70, "data_digest": "d"})
    found = parents(job(model={"text": {"pretrained": str(made)}, "pretrained": str(foreign)}))
    assert [(p["key"], p["run_id"], p["step"], p["name"], p["license"]) for p in found] == [
        ("model.text.pretrained", "f" * 32, 70, "small", "MIT"),
        ("model.pretrained", None, None, None, None),
    ]
    assert all(p["bytes"] == 8 and len(p["config"]) == 16 for p in found)
    assert parents(job()) == []


def test_the_card_says_what_the_job_says_and_where_the_model_comes_from(tmp_path):
    data = make_dataset(tmp_path / "a", 1)
    mine = job(card={"license": "MIT", "summary": "Writes.", "limitations": "Knows little."})
    parent = {"key": "model.pretrained", "folder": "/x", "name": "big", "run_id": "e" * 32, "license": "Apache-2.0"}
    text = card.text(mine, "a" * 32, 100, {"loss": 2.5}, [data], [parent])
    assert text.startswith('---\nlicense: "mit"\n') and "Writes." in text and "Knows little." in text and "Not stated." in text
    assert data.digest[:12] in text and "a" * 32 in text and "e" * 32 in text and "loss: 2.5" in text
    assert card.license_of(job(), [parent]) == "Apache-2.0" and card.license_of(mine, [parent]) == "MIT"
    assert card.license_of(job(), []) == card.license_of(job(), [parent, {**parent, "license": "MIT"}]) == "unknown"


def test_a_password_in_the_trackers_address_is_refused_and_so_is_an_alias_without_a_model():
    with pytest.raises(ConfigError, match=r"mlflow\.uri: must not contain a password\. Set MLFLOW_TRACKING_USERNAME"):
        job(**{"mlflow.uri": "http://me:secret@host:5000"})
    with pytest.raises(ConfigError, match=r"mlflow\.alias: 'candidate' needs a registered model\. Set mlflow\.register"):
        job(**{"mlflow.alias": "candidate"})


def recorded(**changes: object) -> reproduce.RecordedRun:
    start = {"code": {"commit": "c1", "diff": ""}, "environment": "e", "changes": {}, "workers": 4}
    made = {
        "run_id": "a" * 32, "plan": None, "end": 50,
        "job": job(**{"workers.count": [1, 4], "mlflow.register": "lm", "mlflow.alias": "x"}).dump(),
        "curve": {}, "starts": [start], "environment": {"torch": "2.9", "numpy": "2"},
        "attempts": [{"workers": 4}, {"workers": 2}],
    }  # fmt: skip
    return reproduce.RecordedRun(**{**made, **changes})


def test_a_run_is_made_again_on_the_workers_that_it_began_with_to_a_step_and_registers_nothing():
    made = reproduce.again(recorded(), 30)
    first = recorded().job
    assert (made["name"], made["workers"]["count"], made["train"]["stop_after"]) == ("small-again", 4, 30)
    assert made["mlflow"]["register"] is None and made["mlflow"]["alias"] is None
    same = {k for k in flatten(first) if not k.startswith(("workers.count", "mlflow.", "name", "train.stop_after"))}
    assert {k: flatten(first)[k] for k in same}.items() <= flatten(made).items()


def test_what_differs_is_told_and_only_that():
    here = {"torch": "2.10", "numpy": "2", "new": "1"}
    notes = reproduce.differences(recorded(), source_code.SourceCode("c2", "+x"), here)
    assert [n.split(":")[0] for n in notes] == ["code", "code", "environment", "environment", "workers"]
    assert "torch 2.9 then, 2.10 now" in notes[3] and "new absent then, 1 now" in notes[2] and "2, 4 workers" in notes[4]
    alone = recorded(attempts=[{"workers": 4}])
    assert reproduce.differences(alone, source_code.SourceCode("c1"), alone.environment) == []


def test_curves_are_compared_step_by_step_to_the_last_bit():
    curve = {1: 3.0, 2: 2.0, 3: 1.0}
    assert reproduce.compare(curve, curve | {4: 9.0}, 3) == {
        "steps": 3, "bitwise": True, "first_difference": None, "largest_difference": 0.0,
    }  # fmt: skip
    near = reproduce.compare(curve, curve | {2: math.nextafter(2.0, 3.0)}, 3)
    assert not near["bitwise"] and near["first_difference"] == 2 and 0 < near["largest_difference"] < 1e-15
    assert reproduce.compare(curve, curve | {3: math.nan}, 3)["first_difference"] == 3
    with pytest.raises(ConfigError, match="step 4: MLflow has no loss"):
        reproduce.compare(curve, curve, 4)


def test_the_changes_of_a_resumed_run_are_those_of_its_job_not_of_the_version(monkeypatch):
    now = job(**{"train.steps": 7})
    first = job().dump()
    first["train"]["cpu_kernels"] = True  # as jobs had before
    for key in spec.BEFORE_KEYS:  # which they lacked
        del first["train"][key]
    monkeypatch.setattr(run_facts, "read_json", lambda *_: first)
    record = object.__new__(run_facts.RunRecord)
    record.client, record.run_id, record.job = None, "", spec.settle(now, first)
    assert record._changes() == {"train.steps": (str(first["train"]["steps"]), "7")}
