"""Tests renamed keys: old names work in files, settings, records, sweeps, and recipes, and each is logged once per file."""

import copy
import json

import heliostat
import pytest
import yaml
from heliostat import schema
from heliostat.config import file_kinds, spec
from heliostat.config.spec import Job
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.pairs.pipeline import PairPipeline
from heliostat.curation.prepare import sha256_json
from heliostat.curation.text.pipeline import TextPipeline
from heliostat.errors import ConfigError
from heliostat.tune import trial_record
from heliostat.tune.sweep import Sweep

from tests.unit.build_job import job, raw, write

OLD = {
    "train.global_batch": "train.global_batch_size", "train.micro_batch": "train.micro_batch_size",
    "train.accumulate": "train.grad_accum_dtype", "train.recheck": "train.sdc_check", "data.lanes": "data.virtual_ranks",
    "data.window": "data.shuffle_window", "train.zero.divide_within": "train.zero.shard_group_size",
    "train.zero.copy_within": "train.zero.hpz_partition_size",
}  # fmt: skip
VALUES = {
    "train.global_batch": 16, "train.micro_batch": 4, "train.accumulate": "same", "train.recheck": {"every": 5}, "data.lanes": 4,
    "data.window": 512,
}  # fmt: skip


def before() -> dict:
    """Returns a job as an earlier version wrote and recorded it."""
    old = raw(**{"train.global_batch_size": None, "train.micro_batch_size": None})
    for path, value in VALUES.items():
        section, _, key = path.partition(".")
        old[section][key] = value
    return old


def now() -> Job:
    return job(**{OLD[path]: value for path, value in VALUES.items()})


def test_a_file_of_an_earlier_version_is_the_same_job_and_each_old_key_is_logged_once(tmp_path, caplog):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(before()))
    assert schema.validate(Job, file_kinds.read(Job, "job", path), "job") == now()
    spec.load(path)
    said = [r.message for r in caplog.records if " is now " in r.message]
    assert said == [f"{path}: key {old} is now {OLD[old]}. Use the new name" for old in sorted(VALUES, key=said_order(said))]


def said_order(said):
    return lambda old: next(i for i, line in enumerate(said) if f" {old} is now" in line)


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_an_old_name_is_read_everywhere_and_both_names_at_once_are_an_error(old, new):
    assert schema.renamed_path(Job, old) == new
    value = VALUES.get(old, 2)
    section, _, key = old.rpartition(".")
    given = raw(**{new: value})
    target = given["train"]["zero"] if section == "train.zero" else given[section]
    target[key] = value
    with pytest.raises(ConfigError, match=f"{key} is the old name of {new.rpartition('.')[2]}, and both are given"):
        schema.validate(Job, given, "job.yaml")


def test_a_setting_changes_the_key_whichever_name_the_file_and_the_setting_use(tmp_path):
    new, old = write(tmp_path), tmp_path / "old.yaml"
    old.write_text(yaml.safe_dump(before()))
    for path in (new, old):
        for name in ("train.global_batch", "train.global_batch_size"):
            assert spec.load(path, [f"{name}=32"]).train.global_batch_size == 32


def test_what_is_written_has_the_new_names_alone():
    text = json.dumps(now().dump())
    assert not [old for old in OLD if f'"{old.rpartition(".")[2]}"' in text.replace('"spike": {"window"', "")]


def test_a_recorded_run_is_compared_resumed_and_read_by_its_new_names():
    recorded = before()
    assert spec.changed_keys({key: recorded[key] for key in ("train", "name")}, now().dump()) == []
    changed = spec.changed_keys({"train": recorded["train"]}, job(**{"train.global_batch_size": 32}).dump())
    assert "train.global_batch_size" in changed
    assert spec.renewed(recorded)["train"]["global_batch_size"] == 16
    assert spec.settle(job(), recorded).train.grad_accum_dtype == "same"
    assert spec.with_rules({"train": {"accumulate": "fp32"}})["train"]["grad_accum_dtype"] == "fp32"
    assert recorded == before(), "a record is not changed in place"


def test_a_recipe_of_an_earlier_version_reads_its_job():
    made = now()
    assert (made.train.global_batch, made.train.micro_batch, made.data.lanes, made.data.window) == (16, 4, 4, 512)
    assert made.train.recheck == made.train.sdc_check and made.train.zero.divide_within is None
    with pytest.raises(AttributeError):
        _ = made.train.globalbatch


def test_a_sweep_and_its_records_take_old_names():
    space = {
        "train.global_batch": {"choice": [8, 16]},
        "train.micro_batch": {"choice": [2, 4], "when": {"train.global_batch": [16]}},
    }
    keys = {"name": "s", "job": "j", "space": space, "set": {"data.lanes": 4}, "budget": {"trials": 2}}
    made = schema.validate(Sweep, copy.deepcopy(keys), "sweep")
    assert [*made.space] == ["train.global_batch_size", "train.micro_batch_size"] and made.set_ == {"data.virtual_ranks": 4}
    assert made.space["train.micro_batch_size"].when == {"train.global_batch_size": [16]}
    record = trial_record.TrialRecord(0, {"train.global_batch": 8}, clones=[{"old": {"data.lanes": 2}, "params": {}}])
    assert record.params == {"train.global_batch_size": 8} and record.clones[0]["old"] == {"data.virtual_ranks": 2}


def test_the_api_takes_the_old_keyword(tmp_path):
    with pytest.raises(ConfigError, match="old name of global_batch_size, and both"):
        heliostat.datasets({"sources": []}, folder=str(tmp_path), steps=1, global_batch=8, global_batch_size=8)
    with pytest.raises(ConfigError, match=r"data\.virtual_ranks: 3 doesn't divide train\.global_batch_size 8, .*Use 2"):
        heliostat.datasets({"sources": [{"path": "d"}], "lanes": 3}, folder=str(tmp_path), steps=1, global_batch=8)


PIPELINE = {"name": "a", "input": "in", "output": "out", "tokenizer": {"vocab_size": 300}}


def test_pipelines_agree_on_columns_and_their_digests_stay():
    """The version before computed the same digests from `text_column`, `columns: [...]`, and `query_column`."""
    old = TextPipeline(**PIPELINE, text_column="content", columns=["url"])
    new = TextPipeline(**PIPELINE, columns={"text": "content", "others": ["url"]})
    assert old == new and (old.identity()["text_column"], old.identity()["columns"]) == ("content", ["url"])
    assert "columns" not in TextPipeline(**PIPELINE).identity()
    assert sha256_json(new.identity())[:12] == "2c268a61c009"
    pairs = PairPipeline(**PIPELINE, query_column="q")
    assert pairs == PairPipeline(**PIPELINE, columns={"query": "q"})
    assert sha256_json(pairs.identity())[:12] == "7a92e71d56b7"
    images = {"name": "a", "input": "in", "output": "out", "resolution": 8}
    assert ImagePipeline(**images, columns=["url"]) == ImagePipeline(**images, columns={"others": ["url"]})
    with pytest.raises(ValueError, match=r"text_column is the old name of columns\.text, and both are given"):
        TextPipeline(**PIPELINE, text_column="a", columns={"text": "b"})
