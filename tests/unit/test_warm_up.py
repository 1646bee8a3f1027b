"""Tests that modules for the end of a run are imported during its last evaluation, without delaying the run."""

from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.training.driver.finalize import WarmUp

from tests.unit.build_job import job


def test_what_the_export_builds_has_been_built_before():
    recipe = CausalLM(job(**{"model": {**job().model, "arch": "llama"}}))
    warm = WarmUp(recipe)
    warm.wait()  # nothing has begun: there is nothing to wait for
    warm.begin()
    warm.begin()
    warm.wait()
    assert "config" in vars(recipe) and not warm._thread.is_alive()


def test_a_recipe_that_fails_is_left_to_the_export(caplog):
    class Broken(CausalLM):
        def build(self):
            raise RuntimeError("no model")

    warm = WarmUp(Broken(job()))
    warm.begin()
    warm.wait()
    assert not warm._thread.is_alive() and not caplog.messages


def test_nothing_is_imported_for_a_recipe_that_exports_nothing():
    warm = WarmUp(object())  # type: ignore[arg-type]
    warm.begin()
    assert not warm._thread.ident
