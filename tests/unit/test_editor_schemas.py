"""Tests the JSON Schemas for editors: every shipped file is valid, mistakes aren't, keys complete, and the files are current."""

import json
import re
from pathlib import Path

import pytest
import yaml
from heliostat.config.spec import Job
from heliostat.curation import registry
from jsonschema import Draft7Validator

from docs.site import keys, schemas

ROOT = Path(__file__).parents[2]
MODELINE = re.compile(r"^# yaml-language-server: \$schema=(\S+)\n")
MADE = schemas.every()
FILES = [p for folder in ("jobs", "pipelines", "clusters") for p in sorted((ROOT / folder).rglob("*.yaml"))]
SHIPPED = [p for p in FILES if MODELINE.match(p.read_text())]


def errors(name: str, raw: object) -> list[str]:
    return [f"{list(e.path)}: {e.message}" for e in Draft7Validator(MADE[name]).iter_errors(raw)]


@pytest.mark.parametrize("name", MADE)
def test_the_schema_files_are_those_of_the_code(name):
    Draft7Validator.check_schema(MADE[name])
    file = schemas.FOLDER / f"{name}.json"
    assert file.read_text() == schemas.text(MADE[name]), "run: python -m docs.site.schemas"
    assert (ROOT / "jobs/schemas" / f"{name}.json").resolve() == file.resolve()


def test_every_job_sweep_and_pipeline_names_its_schema():
    unnamed = {str(p.relative_to(ROOT)) for p in FILES if p not in SHIPPED and p.parts[-2] != "clusters"}
    assert unnamed == {"jobs/examples/data/functions.yaml"}, "a pipeline of one's own has keys of its own"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_file_names_a_schema_that_exists_and_is_valid_by_it(path):
    schema = (path.parent / MODELINE.match(path.read_text())[1]).resolve()
    assert schema.parent == schemas.FOLDER and schema.is_file()
    assert not errors(schema.stem, yaml.safe_load(path.read_text()))


def test_keys_complete_with_their_meaning():
    """Each key of each section of a job has a description, at the place where an editor looks for it."""
    definitions = MADE["job"]["$defs"]
    for section in keys.sections(Job):
        properties = (MADE["job"] if section.model is Job else definitions[section.model.__name__])["properties"]
        for name, info in section.model.model_fields.items():
            assert properties[info.alias or name]["description"], f"{section.path}.{name}"
    assert "auto" in json.dumps(definitions["Workers"]["properties"]["gpus"])
    named = [s["properties"]["stage"]["const"] for s in MADE["text-pipeline"]["properties"]["stages"]["items"]["anyOf"]]
    assert named == registry.names()


def test_a_job_needs_five_keys():
    assert sorted(MADE["job"]["required"]) == ["data", "model", "name", "train"]
    five = {"name": "a", "model": {"arch": "llama"}, "data": {"path": "d", "sequence_length": 8}, "train": {"steps": 5}}
    assert not errors("job", five)
    assert not errors("job", five | {"workers": {"gpus": "auto", "count": [1, 4]}, "train": {"epochs": 2, "parallel": "auto"}})


@pytest.mark.parametrize(
    ("name", "raw", "where"),
    [
        ("job", {"train": {"stepz": 1}}, "stepz"),
        ("job", {"train": {"precision": "bf61"}}, "bf61"),
        ("job", {"train": {"steps": 0}}, "0"),
        ("job", {"checkpoint": {"every": "often"}}, "often"),
        ("sweep", {"searcher": {"name": "luck"}}, "luck"),
        ("text-pipeline", {"stages": [{"stage": "minhsh"}]}, "minhsh"),
        ("text-pipeline", {"stages": [{"stage": "minhash", "band": 3}]}, "band"),
        ("image-pipeline", {"resolution": "big"}, "big"),
        ("pairs-pipeline", {"columns": {"querry": "q"}}, "querry"),
        ("cluster", {"cluster_name": 3, "provider": {}}, "cluster_name"),
    ],
)
def test_a_mistake_is_marked(name, raw, where):
    assert any(where in line for line in errors(name, raw))


def test_old_names_are_valid_and_marked_as_old():
    old = MADE["job"]["$defs"]["Train"]["properties"]["global_batch"]
    assert old["deprecated"] and old["deprecationMessage"] == "Old name of global_batch_size."
    assert not errors("text-pipeline", {"name": "a", "pipeline": "heliostat.pipelines:TextPipeline", "input": "i", "output": "o",
                                        "tokenizer": {"vocab_size": 300}, "text_column": "c", "columns": ["url"]})  # fmt: skip
