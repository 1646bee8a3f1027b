"""Tests archives of code and git clones through `prepare`: the record has their licenses, and a document's provenance is
complete."""

import tarfile
import zipfile
from pathlib import Path

import pytest
from heliostat.cli.main import app
from heliostat.curation import reasons
from heliostat.curation.prepare import dry_run, prepare
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from identify.vendor.licenses import LICENSES

from tests.integration.answers import ask
from tests.integration.pipelines import write_pipeline
from tests.unit.test_repositories import git

pytestmark = pytest.mark.usefixtures("ray_session")
TEXTS = dict(LICENSES)


def code(name: str) -> str:
    return "".join(f"def {name}_{i}(value):\n    return value + {i}\n\n\n" for i in range(30))


def fill(folder: Path, license: str, name: str) -> None:
    (folder / "src").mkdir(parents=True)
    (folder / "node_modules/x").mkdir(parents=True)
    (folder / "LICENSE").write_text(license)
    (folder / "src" / f"{name}.py").write_text(code(name))
    (folder / "src/same.py").write_text(code("same"))
    (folder / "src/app.min.js").write_text("var a = 1;\n")
    (folder / "src/api_pb2.py").write_text(code("api"))
    (folder / "node_modules/x/index.js").write_text("var b = 2;\n")
    (folder / "logo.bin").write_bytes(b"\0\1\2")
    (folder / "link").symlink_to("/etc/passwd")


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    """Writes a clone under MIT, an archive with an unknown license, one under GPL, and a broken one."""
    top = tmp_path / "in"
    for name, license in (("one", TEXTS["MIT"]), ("two", "Do what you like.\n"), ("three", TEXTS["GPL-3.0"])):
        fill(tmp_path / "made" / name, license, name)
    clone = top / "own/one"
    clone.parent.mkdir(parents=True)
    (tmp_path / "made/one").rename(clone)
    git(clone, "init", "-q")
    git(clone, "add", "-A", "-f")
    git(clone, "commit", "-q", "-m", "one")
    with tarfile.open(top / "two.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "made/two", "two")
    with zipfile.ZipFile(top / "three.zip", "w") as archive:
        for path in sorted(p for p in (tmp_path / "made/three").rglob("*") if p.is_file() and not p.is_symlink()):
            archive.write(path, path.relative_to(tmp_path / "made"))
    (top / "cut.tar.gz").write_bytes((top / "two.tar.gz").read_bytes()[:100])
    (top / "note.md").write_text("not looked at\n")
    stages = [{"stage": "code", "max_data_lines": 100}, {"stage": "license"}]
    return write_pipeline(tmp_path, file="code", name="code", repositories=True, tokenizer={"vocab_size": 300},
                          columns=["path", "license"], stages=stages)  # fmt: skip


def ends(folder: Path) -> dict[str, tuple[str, str]]:
    made = manifest.read(Location(str(folder / "out")))
    return {row["id"]: (row["reason"], row["detail"]) for table in reasons.ends(made) for row in table.to_pylist()}


def test_code_with_licences_from_archives_and_clones(yaml, tracking, capsys):
    folder = yaml.parent
    first = prepare(yaml, [])
    found = ends(folder)
    kept = {id for id, (reason, _) in found.items() if reason == "kept"}
    at = "own/one/.git#"
    assert kept == {f"{at}src/one.py", f"{at}src/same.py", f"{at}LICENSE"}
    assert [found[f"{at}{name}"][0] for name in ("src/app.min.js", "src/api_pb2.py", "node_modules/x/index.js")] == [
        "minified", "generated", "vendored"]  # fmt: skip
    assert found[f"{at}link"][0] == "link" and found[f"{at}logo.bin"][0] == "binary"
    assert found["two.tar.gz#two/src/two.py"] == ("unknown", "NOASSERTION")
    assert found["three.zip#three/src/three.py"] == ("not_allowed", "GPL-3.0")
    assert found["cut.tar.gz"][0] == "corrupt" and first["dropped"]["corrupt"] == 1
    assert first["dropped"]["1 license: unknown"] >= 2 and first["dropped"]["link"] == 2
    assert not any("note.md" in id for id in found)
    (document,) = ask(capsys, "data", "trace", str(folder / "out"), "--id", f"{at}src/one.py", "--mlflow", tracking)["documents"]
    assert document["read"] == {"file": "own/one/.git", "path": "src/one.py"} and document["columns"]["license"] == "MIT"
    assert [stage["did"] for stage in document["stages"]] == ["kept", "kept", "kept"], "read, code, license"
    app(["data", "trace", str(folder / "out"), "--id", "two.tar.gz#two/src/two.py", "--mlflow", tracking], standalone_mode=False)
    assert "read from two.tar.gz, path two/src/two.py" in capsys.readouterr().out

    assert prepare(yaml, [])["up_to_date"]
    git(folder / "in/own/one", "gc", "-q", "--aggressive")
    (folder / "in/own/one/later.py").write_text("not committed\n")
    assert prepare(yaml, [])["up_to_date"], "how git keeps it plays no part, nor what is not committed"
    git(folder / "in/own/one", "add", "later.py")
    git(folder / "in/own/one", "commit", "-q", "-m", "two")
    assert not prepare(yaml, [])["up_to_date"]


def test_a_dry_run_and_what_cannot_be(yaml):
    predicted = dry_run(yaml, [], 0.9)
    assert predicted["name"] == "code"
    with pytest.raises(ConfigError, match="python:stdlib isn't a repository"):
        prepare(yaml, ["input=python:stdlib"])
    with pytest.raises(ConfigError, match="no archive"):
        prepare(yaml, [f"input={yaml.parent / 'in/note.md'}"])
