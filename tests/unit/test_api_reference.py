"""Tests that the reference of the Python API has every public name, with the types of its source."""

import ast
import inspect
import itertools

import heliostat
import pytest
from heliostat.api import run_handle
from heliostat.recipes import protocol

from docs.site import api

PUBLIC, RECIPES = api.public(), api.recipes()


@pytest.mark.parametrize("name", [name for name in heliostat.__all__ if name != "Job"])  # its keys are in docs/job.md
def test_every_public_name_is_in_the_reference(name):
    assert f"### `heliostat.{name}`" in PUBLIC


@pytest.mark.parametrize("name", [name for name, member in vars(run_handle.Run).items() if not name.startswith("_")])
def test_every_member_of_a_run_is_in_the_reference_with_its_type(name):
    assert any(line.startswith((f"`{name}(", f"`{name}: ")) for line in PUBLIC.splitlines())


@pytest.mark.parametrize(
    "name", [name for name, cls in vars(protocol).items() if inspect.isclass(cls) and cls.__module__ == protocol.__name__]
)
def test_every_class_of_the_recipe_protocol_is_in_the_reference(name):
    assert f"### `{name}`" in RECIPES or f"### `heliostat.{name}`" in PUBLIC


def test_a_signature_shows_types_and_defaults_and_what_must_be_named():
    source = "def f(self, a: int, /, b: dict[str, int] = {}, *more: str, c: float = 1.0, **rest: object) -> list[int]: ..."
    function = ast.parse(source).body[0]
    assert api.signature(function, "f") == (
        "f(a: int, b: dict[str, int] = {}, *more: str, c: float = 1.0, **rest: object) -> list[int]"
    )
    long = ast.parse(f"def f({', '.join(f'argument_{i}: int = {i}' for i in range(9))}) -> None: ...").body[0]
    assert api.signature(long, "f").splitlines()[:2] == ["f(", "    argument_0: int = 0,"]


def test_methods_that_a_recipe_must_have_are_marked():
    lines = RECIPES.partition("### `Recipe`")[2].partition("\n### ")[0].splitlines()
    required = [line for line, below in itertools.pairwise(lines) if "**Required.**" in below]
    assert [line.strip("`").partition("(")[0] for line in required] == ["build", "batch", "loss"]
