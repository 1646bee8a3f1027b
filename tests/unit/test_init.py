"""Tests `heliostat init`: a workspace in any folder has the same files as heliostat's own, and overwrites none of a person's
files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from heliostat.cli.main import app
from heliostat.cli.workspace_template import create
from heliostat.errors import ConfigError
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "platform" / "heliostat" / "cli" / "template"


def written(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_files_are_those_of_heliostats_own_workspace():
    """One source is in two places: a change of jobs/quickstart.yaml must be copied to the template."""
    shipped = {path: (ROOT / path).read_bytes() for path in written(TEMPLATE) if path != "gitignore"}
    assert written(TEMPLATE).keys() - shipped.keys() == {"gitignore"}
    stale = [path for path, content in shipped.items() if (TEMPLATE / path).read_bytes() != content]
    assert not stale, f"cp {stale[0]} platform/heliostat/cli/template/{stale[0]}"
    quickstart = {str(p.relative_to(ROOT)) for f in ("jobs", "pipelines") for p in (ROOT / f).rglob("quickstart*.yaml")}
    schemas = {f"jobs/schemas/{p.name}" for p in (ROOT / "jobs/schemas").iterdir()}
    tuning = {f"pipelines/{name}.yaml" for name in ("conversations", "preferences", "references")}
    tuning |= {f"jobs/examples/{name}.yaml" for name in ("sft", "dpo")}
    assert shipped.keys() == quickstart | tuning | {"clusters/local.yaml"} | schemas


def test_a_workspace_is_made_in_a_new_folder_and_the_next_commands_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["init", "a/mine"])
    assert done.exit_code == 0, done.output
    told = done.stdout.split()
    assert "a/mine" in told and "cd a/mine heliostat data prepare pipelines/quickstart.yaml" in " ".join(told)
    made = written(tmp_path / "a" / "mine")
    assert made.pop(".gitignore").decode().splitlines() == [
        ".heliostat/",
        ".venv/",
        "__pycache__/",
        "/from-python-model/",
        "/my-model/",
        "/report.html",
        "/models/",
    ]
    assert made == {path: content for path, content in written(TEMPLATE).items() if path != "gitignore"}
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "other").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "other")
    report = json.loads(CliRunner().invoke(app, ["init", "--json"]).stdout)
    assert report == {"folder": ".", "files": sorted([*made, ".gitignore"])}


def test_what_is_there_is_never_overwritten_and_then_nothing_is_written(tmp_path):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "quickstart.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r": already has jobs/quickstart\.yaml, so nothing was written\. Pass another folder"):
        create(tmp_path)
    assert written(tmp_path) == {"jobs/quickstart.yaml": b"mine"}


def test_a_gitignore_that_is_there_gets_the_lines_that_it_lacks(tmp_path):
    (tmp_path / ".gitignore").write_text("*.log\n.venv/")
    create(tmp_path)
    assert (
        tmp_path / ".gitignore"
    ).read_text() == "*.log\n.venv/\n.heliostat/\n__pycache__/\n/from-python-model/\n/my-model/\n/report.html\n/models/\n"


@pytest.mark.parametrize("block", ["folder", "below"])
def test_a_file_where_a_folder_must_be_is_one_line(tmp_path, block):
    folder = tmp_path / "w"
    if block == "folder":
        folder.write_text("")
    else:
        folder.mkdir()
        (folder / "clusters").write_text("")
    with pytest.raises(ConfigError, match=r"w: (isn't a folder|can't become a workspace|already has clusters)") as e:
        create(folder)
    assert "\n" not in str(e.value)
    assert len(written(tmp_path)) == 1


def test_what_the_first_pages_export_is_ignored():
    """An exported model appeared as new files of the repository, and would be sent with a submitted job."""
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "docs/tour.md", "docs/python-api.md"))
    exported = set(
        re.findall(r"export \S+(?: \\\n)?\s+--out ([\w-]+)", pages) + re.findall(r'pathlib\.Path\("([\w-]+)"\)', pages)
    )
    assert exported == {"my-model", "from-python-model"}
    for ignored in (ROOT / ".gitignore", TEMPLATE / "gitignore"):
        assert {f"/{folder}/" for folder in exported} <= set(ignored.read_text().splitlines())
