"""Tests that a model's folder brings no code that runs: names in its record come only from installed packages and the
workspace."""

import json
import sys
from pathlib import Path

import pytest
from heliostat.config import workspace
from heliostat.errors import ConfigError
from heliostat.evaluation.losses import evaluate
from heliostat.inference.generate import generate
from heliostat.recipes import exported
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit.build_job import job

EVIL = """from pathlib import Path
Path(__file__).with_name('ran').touch()
class Recipe:
    generator = exported = staticmethod(print)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Creates an empty workspace, and restores the imports afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def model(folder: Path, recipe: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heliostat.json").write_text(json.dumps({"recipe": recipe, "job": job().dump(), "origin": {}}))
    return folder


def code(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(EVIL)


def refused(folder: Path, home: Path) -> None:
    for command in (lambda: generate(folder, "x", {}, 0, None), lambda: evaluate(folder, "data", 8, None, None)):
        with pytest.raises(ConfigError, match=r"heliostat\.json: recipe: '[\w.]+' is code in the folder of a model or run") as e:
            command()
        assert "copy it to jobs/" in str(e.value) and "\n" not in str(e.value)
    assert not list(home.rglob("ran"))


CASES = {
    "in a folder of the workspace": ("my_model", "my_model.evil:Recipe", "my_model/evil.py"),
    "its package's init": ("my_model", "my_model.code.evil:Recipe", "my_model/code/__init__.py"),
    "deep": ("exports/my_model", "exports.my_model.evil:Recipe", "exports/my_model/evil.py"),
    "the workspace itself": (".", "evil:Recipe", "evil.py"),
}


@pytest.mark.parametrize("case", CASES)
def test_code_in_a_models_folder_is_refused_before_anything_of_it_runs(home, case):
    folder, recipe, file = CASES[case]
    code(home / file)
    code(home / Path(file).with_name("evil.py"))
    refused(model(home / folder, recipe), home)


def test_code_of_another_models_folder_and_by_a_link_is_refused_too(home, monkeypatch):
    code(model(home / "other", "x:Y") / "evil.py")
    refused(model(home / "mine", "other.evil:Recipe"), home)
    (home / "jobs").mkdir()
    (home / "jobs" / "linked.py").symlink_to(home / "other" / "evil.py")
    refused(model(home / "mine", "jobs.linked:Recipe"), home)
    code(home / "mine" / "shadow.py")
    monkeypatch.syspath_prepend(str(home / "mine"))
    refused(model(home / "mine", "shadow:Recipe"), home)


def test_the_workspaces_own_folders_and_installed_packages_are_imported_as_ever(home, monkeypatch):
    (home / "jobs2").mkdir()
    (home / "jobs2" / "mine.py").write_text("from heliostat.recipes import CausalLM\nclass Recipe(CausalLM):\n    mark = 1\n")
    assert exported.read(model(home / "my-model", "jobs2.mine:Recipe")).recipe.mark == 1
    assert exported.read(model(home / "my-model", "heliostat.recipes:CausalLM")).recipe is CausalLM  # installed, or on the path
    with pytest.raises(ConfigError, match=r"recipe: 'subprocess:Popen' isn't a recipe"):
        exported.read(model(home / "my-model", "subprocess:Popen"))
    with pytest.raises(ConfigError, match=r"no module 'jobs2\.other'"):
        exported.read(model(home / "my-model", "jobs2.other:Recipe"))


def test_a_runs_record_names_no_code_of_the_runs_own_folder(home):
    code(home / "runs" / "x" / "evil.py")
    with pytest.raises(ConfigError, match=r"recipe: 'runs\.x\.evil' is code in the folder of a model or run"):
        workspace.import_path("recipe", "runs.x.evil:Recipe", home / "runs" / "x")
    assert not list(home.rglob("ran"))
    assert workspace.import_path("recipe", "runs.x.evil:Recipe").__name__ == "Recipe"  # of a job that a person wrote


def test_a_language_models_own_classes_are_not_run(home):
    """transformers calls this remote code; the folder's config names it."""
    folder = home / "lm"
    folder.mkdir()
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Recipe", "AutoModelForCausalLM": "evil.Recipe"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Recipe", None]}}))
    code(folder / "evil.py")
    with pytest.raises(ConfigError, match="its own code"):
        generate(folder, "x", {}, 0, None)
    with pytest.raises(ConfigError, match=r"model\.pretrained: .* its own code"):
        CausalLM(job(model={"pretrained": str(folder)}))
    assert not list(home.rglob("ran"))


def test_a_recipe_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_written.py").write_text("def f(:\n")
    (tmp_path / "wants_more.py").write_text("from json import nothing_such\n")
    for name, why in (("half_written", "SyntaxError"), ("wants_more", "ImportError")):
        with pytest.raises(ConfigError, match=rf"^recipe: can't import {name} \({why}: "):
            workspace.import_path("recipe", f"{name}:Thing")
