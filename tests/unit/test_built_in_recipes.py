"""Tests that each built-in recipe is one file. Its name, and the modules that a fork server imports for it, are read from there
without an import."""

import importlib
import subprocess
import sys

import pytest
from heliostat import recipes
from heliostat.config import workspace
from heliostat.errors import ConfigError
from heliostat.recipes import built_in
from heliostat.recipes.conformance import require_class

PUBLIC = {"Autoencoder", "CausalLM", "Embedder", "ImageEmbedder", "TextToImage"}  # job files and exported models name them


def test_the_names_that_job_files_have_are_recipes():
    assert set(recipes.__all__) >= PUBLIC
    for name, (module, _) in built_in.find().items():
        cls = getattr(recipes, name)
        assert cls.__module__ == module and require_class("recipe", f"heliostat.recipes:{name}", cls) is cls
    with pytest.raises(AttributeError):
        recipes.Nothing  # noqa: B018


def test_a_recipe_is_one_file(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "helper.py").write_text('raise AssertionError("imported")\n')
    (tmp_path / "text" / "mine.py").write_text(
        'raise AssertionError("imported")\nBUILT_IN = {\n    "Mine": ("diffusers", "lib"),\n}\n'
    )
    assert built_in.find(tmp_path) == {"Mine": ("heliostat.recipes.text.mine", ("diffusers", "lib"))}


def test_the_package_of_recipes_imports_none_for_its_names():
    code = "import sys, heliostat.recipes as r; assert r.__all__; assert not {'torch', 'pydantic'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("field", "package"), [("recipe", "heliostat.recipes"), ("a.yaml: pipeline", "heliostat.pipelines")])
def test_an_unknown_module_shows_each_name_of_today_once(field, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{package}:{name}" for name in importlib.import_module(package).__all__]
    for path in ("zzz.qqq:X", "qqq"):
        with pytest.raises(ConfigError) as raised:
            workspace.import_path(field, path)
        assert str(raised.value).partition(". Use one of: ")[2].split(", ") == sorted(names)
