"""Tests the job file: rules across fields have errors with working advice, paths become absolute, and dumps load again."""

import json
import random
import re
import time
from pathlib import Path

import pytest
import yaml
from heliostat import schema
from heliostat.config import spec
from heliostat.config.spec import Job
from heliostat.errors import ConfigError

from tests.seeds import every_seed
from tests.unit.build_job import job, raw, write


def faults(**changes) -> list[str]:
    """Returns the lines of the one error that the job raises."""
    with pytest.raises(ConfigError) as e:
        job(**changes)
    return [line.strip() for line in str(e.value).removeprefix("job.yaml:").strip().splitlines()]


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@every_seed(200)
def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_do(seed):
    """A job is valid exactly if micro_batch_size x workers divides the batch, and every number in the error works."""
    rng = random.Random(seed)
    batch, micro, count = rng.randrange(1, 200), rng.randrange(1, 12), rng.randrange(1, 12)
    changes = {"train.global_batch_size": batch, "train.micro_batch_size": micro, "workers.count": count}
    if batch % (micro * count) == 0:
        made = job(**changes)
        assert made.accumulation * micro * count == batch and made.virtual_ranks == batch // micro
        return
    (line,) = faults(**changes)
    assert line.startswith(
        f"train.global_batch_size: {batch} isn't divisible by workers.count {count} x train.micro_batch_size {micro}. "
    )
    offered = [int(n) for n in re.search(r"Use a global batch of ([\d or]+)", line)[1].split(" or ")]
    assert offered and all(abs(n - batch) < micro * count for n in offered)
    for n in offered:
        job(**{**changes, "train.global_batch_size": n})
    workers = re.search(r"or workers\.count (\d+)", line)
    assert bool(workers) == (batch % micro == 0)
    if workers:
        job(**{**changes, "workers.count": int(workers[1])})


@every_seed(200)
def test_lanes_divide_the_batch_and_are_divided_by_the_workers(seed):
    """Any other number of virtual ranks is rejected, with the nearest valid one."""
    rng = random.Random(seed)
    count, micro = rng.randrange(1, 5), rng.randrange(1, 4)
    batch, lanes = count * micro * rng.randrange(1, 20), rng.randrange(1, 60)
    changes = {
        "train.global_batch_size": batch,
        "train.micro_batch_size": micro,
        "workers.count": count,
        "data.virtual_ranks": lanes,
    }
    if batch % lanes == 0 and lanes % count == 0:
        assert job(**changes).virtual_ranks == lanes
        return
    (line,) = faults(**changes)
    assert line.startswith(
        f"data.virtual_ranks: {lanes} doesn't divide train.global_batch_size {batch}, or isn't a multiple of workers"
    )
    nearest = int(line.rpartition("Use ")[2])
    job(**{**changes, "data.virtual_ranks": nearest})
    valid = [c for c in range(1, batch + 1) if batch % c == 0 and c % count == 0]
    assert abs(nearest - lanes) == min(abs(c - lanes) for c in valid)


def test_a_huge_batch_is_checked_at_once(workspace):
    """A number with too many zeros is an error, without a search through all smaller numbers."""
    start = time.process_time()
    assert faults(**{"train.global_batch_size": 10**12 + 1, "train.micro_batch_size": 2})
    assert faults(**{"train.global_batch_size": 10**12, "train.micro_batch_size": 1, "data.virtual_ranks": 7})
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"train.precision": "bf16", "train.zero.stage": 0}, "train.zero.stage: 0 with train.precision 'bf16' trains wrongly"),
        ({"train.precision": "fp16"}, "train.precision: 'fp16' needs GPUs (workers.gpus is 0). Use bf16 or fp32"),
        (
            {"train.precision": "fp16", "workers.gpus": 1, "train.zero.stage": 0},
            "train.zero.stage: 0 with train.precision 'fp16'",
        ),
        (
            {"train.grad_accum_dtype": "fp32", "train.zero.offload.optimizer": "cpu", "train.zero.stage": 2},
            "train.grad_accum_dtype: fp32 isn't supported with train.zero.offload.optimizer at train.zero.stage 2",
        ),
        (
            {"train.zero.offload.param": "cpu", "train.zero.stage": 2},
            "train.zero.offload.param: needs train.zero.stage 3, not 2. Set train.zero.stage to 3",
        ),
        (
            {"train.zero.offload.optimizer": "cpu", "train.zero.stage": 0, "train.precision": "fp32"},
            "train.zero.offload.optimizer: needs train.zero.stage 1, 2, or 3. Set train.zero.stage",
        ),
        (
            {"train.zero.offload.param": "nvme", "train.zero.stage": 3},
            "train.zero.offload.nvme_path: needed with train.zero.offload.param",
        ),
        ({"train.zero.offload.nvme_path": "/nvme"}, "train.zero.offload.nvme_path: needed with train.zero.offload.param"),
        ({"data.sources": [{"path": "a"}, {"path": "b"}, {"path": "a"}]}, "data.sources: a path is listed twice"),
        ({"train.schedule.warmup_steps": 100}, "train.schedule.warmup_steps: 100 isn't below train.steps 100"),
        ({"train.schedule.warmup_steps": 5000}, "train.schedule.warmup_steps: 5000 isn't below train.steps 100"),
    ],
)
def test_a_combination_that_cannot_train_is_refused(changes, start):
    """One line has both keys and the fix."""
    (line,) = faults(**changes)
    assert line.startswith(start)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.precision": "fp32", "train.zero.stage": 0},
        {"train.precision": "fp16", "workers.gpus": 1},
        {"train.zero.stage": 3, "train.zero.offload.param": "cpu", "train.zero.offload.optimizer": "cpu"},
        {"train.zero.stage": 3, "train.zero.offload.param": "nvme", "train.zero.offload.nvme_path": "/nvme"},
        {"train.grad_accum_dtype": "fp32", "train.zero.offload.optimizer": "cpu", "train.zero.stage": 3},
        {"train.grad_accum_dtype": "same", "train.zero.offload.optimizer": "cpu", "train.zero.stage": 2},
        {"train.schedule.warmup_steps": 99},
        {"evaluate": None},
    ],
)
def test_the_neighbours_of_refused_combinations_are_valid(changes):
    """The rules reject no more than necessary."""
    assert isinstance(job(**changes), Job)


def test_all_cross_field_faults_are_listed_at_once():
    """Five faults give five lines in one error."""
    lines = faults(
        **{
            "train.global_batch_size": 9,
            "train.precision": "fp16",
            "train.zero.offload.param": "cpu",
            "data.sources": [{"path": "a"}, {"path": "a"}],
            "train.schedule.warmup_steps": 100,
        }
    )
    assert [line.split(": ")[0] for line in lines] == [
        "train.global_batch_size",
        "train.precision",
        "train.zero.offload.param",
        "data.sources",
        "train.schedule.warmup_steps",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlflow.register": "a-model", "evaluate": None},
        {"train.deepspeed": {"zero_optimization": {"overlap_comm": True}}, "train.optimizer.betas": [0.8, 0.99]},
        {"model": {"arch": "mamba2", "time_step_limit": [0.0, float("inf")], "nothing": None, "text": "1e-3"}},
        {"train.zero.stage": 3, "train.zero.offload.param": "cpu", "workers.gpus": 1.0, "train.optimizer.lr": 1e-9},
    ],
)
def test_a_dumped_job_loads_as_the_same_job(workspace, changes):
    """dump() returns plain data in the shape of the file. Through JSON and YAML, it makes an equal job."""
    made = spec.load(write(workspace, **changes))
    dumped = made.dump()
    assert made.model == raw(**changes)["model"], "the recipe is given what the file says"
    assert "register" in dumped["mlflow"]
    for again in (dumped, json.loads(json.dumps(dumped)), yaml.safe_load(yaml.safe_dump(dumped))):
        assert schema.validate(Job, again, "dump") == made
    assert spec.resolve(made) == made, "a resolved job resolves to itself"


@pytest.mark.parametrize("gpus", [0.5, 2, 1.5])
def test_a_worker_has_one_gpu_or_none(workspace, gpus):
    """Two workers on one GPU would see it twice, and a worker uses only one of two GPUs. A recorded job of this kind still
    opens."""
    with pytest.raises(
        ConfigError, match=rf"^workers\.gpus: a worker trains on one GPU or none, not {gpus}\. Set workers\.gpus to 1 or 0"
    ):
        spec.load(write(workspace, **{"workers.gpus": gpus}))
    assert schema.validate(Job, raw(**{"workers.gpus": gpus}), "recorded").workers.gpus == gpus


def test_paths_are_taken_from_the_workspace(workspace):
    """Workers run in other folders, so relative paths become absolute. URIs stay unchanged."""
    made = spec.load(write(workspace))
    assert (made.data.sources[0].path, made.storage) == (str(workspace / "data/a"), str(workspace / "runs"))
    assert made.mlflow.uri == f"sqlite:///{workspace}/mlflow.db"
    assert made.run_folder.path == str(workspace / "runs" / "small")
    kept = {"data.sources.0.path": "s3://b/a?region=x", "storage": "file:///runs", "mlflow.uri": "http://host:5000"}
    made = spec.load(write(workspace, **kept))
    assert (made.data.sources[0].path, made.storage, made.mlflow.uri) == tuple(kept.values())
    assert str(spec.load(write(workspace, storage="s3://b/r?region=x")).run_folder) == "s3://b/r/small?region=x"


@pytest.mark.parametrize("other", ["./data/a", "data//a", "data/a/", "{root}/data/a"])
def test_a_dataset_named_twice_in_two_ways_is_refused(workspace, other):
    """A folder that is listed in two spellings would be trained on twice as often as its weight says."""
    sources = [{"path": "data/a"}, {"path": other.format(root=workspace)}]
    with pytest.raises(ConfigError, match=r"data\.sources: a path is listed twice"):
        spec.load(write(workspace, **{"data.sources": sources}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("storage", "gs://b/x", "scheme 'gs' isn't supported. Use a path, file:// or s3://"),
        ("storage", "s3://key:secret@b/x", "must not contain credentials"),
        ("data.sources.0.path", "ftp://h/x", "scheme 'ftp' isn't supported"),
        ("data.sources.0.path", "", "has no path"),
        ("mlflow.uri", "file:///mlruns", "'file:///mlruns' isn't an MLflow store. Use sqlite:///FILE or http://HOST:PORT"),
        ("mlflow.uri", "mlruns", "'mlruns' isn't an MLflow store"),
    ],
)
def test_a_place_that_cannot_be_reached_that_way_is_named_with_its_key(workspace, key, value, message):
    """The error has the key first, then the supported places, and never the secret."""
    with pytest.raises(ConfigError) as e:
        spec.load(write(workspace, **{key: value}))
    assert f"{key}: " in str(e.value) and message in str(e.value) and "secret" not in str(e.value)


def test_a_job_cannot_be_changed_once_made():
    """The trained job is the validated one."""
    made = job()
    with pytest.raises(ValueError, match="frozen"):
        made.train.steps = 5
    assert raw() == raw(), "and the helper hands out copies"


@pytest.mark.parametrize(
    ("named", "made", "stays"), [("models/x", True, False), ("models/x", False, True), ("./models/x", False, False)]
)
def test_a_pretrained_folder_is_found_from_the_workspace(named, made, stays, workspace):
    """Workers run in other folders, so the path must not stay relative. A name of the Hub stays unchanged if there is no such
    folder."""
    if made:
        (workspace / named).mkdir(parents=True)
    resolved = spec.resolve(job(**{"model": {"pretrained": named}}))
    assert resolved.model["pretrained"] == (named if stays else str(workspace / named))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data.mix_schedule": [{"step": 5, "weights": [1.0, 2.0]}]},
         "data.mix_schedule.0.weights: expected one weight for each of the 1 sources, got 2. List one weight per source"),
        ({"data.mix_schedule": [{"step": 5, "weights": [1.0]}, {"step": 5, "weights": [2.0]}]},
         "data.mix_schedule.1.step: 5 isn't above 5. List the changes in the order of their steps"),
        ({"data.mix_schedule": [{"step": 5, "weights": [0.0]}]},
         "data.mix_schedule.0.weights: all weights are 0. Set one weight above 0"),
        ({"data.sources": [{"path": "a", "weight": 0}]}, "data.sources: all weights are 0. Set one weight above 0"),
        ({"data.sources": [{"path": "a"}, {"path": "b", "weight": 0}]},
         "data.sources.1.weight: is 0 at every step. Remove this source, or set a weight above 0"),
    ],
)  # fmt: skip
def test_a_mix_that_makes_no_sense_is_refused(changes, line):
    """One line has the entry, its value, and the fix."""
    assert faults(**changes) == [line]


def test_a_source_may_come_later():
    """Weight 0 at the start is valid if the schedule gives the source a weight later."""
    made = job(**{"data.sources": [{"path": "a"}, {"path": "b", "weight": 0}], "data.memory_limit": "512MiB",
                  "data.mix_schedule": [{"step": 5, "weights": [1.0, 1.0]}]})  # fmt: skip
    assert made.data.mix_schedule[0].weights == [1.0, 1.0] and made.data.memory_limit == 512 << 20


@pytest.mark.parametrize(
    ("changes", "recorded", "value"),
    [
        ({}, None, "fp32"),
        ({}, {"grad_accum_dtype": "same"}, "same"),
        ({}, {"grad_accum_dtype": "fp32"}, "fp32"),
        ({}, {}, "same"),  # a run from before there was the key
        ({"train.grad_accum_dtype": "fp32"}, {}, "fp32"),
        ({"train.grad_accum_dtype": "same"}, None, "same"),
        ({"train.zero.offload.optimizer": "cpu"}, None, "same"),
        ({"train.zero.offload.optimizer": "cpu"}, {"grad_accum_dtype": "fp32"}, "same"),
    ],
)
def test_a_resumed_run_sums_micro_batches_as_it_did(changes, recorded, value):
    """A new run uses fp32 if possible. The job file overrides both."""
    optimizer = {"optimizer": {"lr": 1e-3}}
    settled = spec.settle(job(**changes), None if recorded is None else {"train": {**optimizer, **recorded}})
    assert settled.train.grad_accum_dtype == value
    assert spec.settle(settled, {"train": optimizer}) == settled and schema.validate(Job, settled.dump(), "dump") == settled


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"train.precision": "bf16"}, {"grad_accum_dtype": "fp32"}),
        ({"train.precision": "bf16", "train.grad_accum_dtype": "same"}, None),
        ({"train.precision": "bf16", "workers.count": 4}, None),  # one micro-batch a step: nothing to sum
        ({"train.precision": "fp32", "train.zero.stage": 0}, None),
        ({"train.precision": "fp32"}, None),
    ],
)
def test_deepspeed_is_told_to_sum_in_fp32_only_where_there_is_something_to_sum(changes, wanted):
    """With fp32, sums are in fp32 anyway, and DeepSpeed fails at stage 0 with this setting."""
    from heliostat.engine.engine_config import engine_config

    config = engine_config(job(**changes))
    assert config.get("data_types") == wanted
    assert config.get("bf16", {}).get("immediate_grad_update", False) is (wanted is not None)


def test_a_finished_run_knows_what_a_job_now_says_otherwise():
    """This includes the model, whose keys are free. A key of a newer version isn't a change."""
    was = job(**{"model.hidden_size": 64}).dump()
    assert spec.changed_keys(was, job(**{"model.hidden_size": 64}).dump()) == []
    now = job(**{"model.hidden_size": 32, "model.rope_theta": 1e4, "train.steps": 7, "workers.count": 4}).dump()
    assert spec.changed_keys(was, now) == ["model.hidden_size", "model.rope_theta", "train.steps", "workers.count"]
    assert spec.changed_keys({"train": {"steps": 7}}, {"train": {"steps": 7, "new": 1}, "newer": {}}) == []


def test_keys_of_earlier_versions_are_taken_and_have_no_effect(workspace, caplog):
    path = write(workspace, **{"train.cpu_kernels": False})
    assert "cpu_kernels" not in spec.load(path).dump()["train"]
    assert [r.getMessage() for r in caplog.records] == ["train.cpu_kernels: this key no longer has an effect. Remove it"]
    assert "cpu_kernels" not in job(**{"train.cpu_kernels": True}).dump()["train"]  # as in every recorded job, without a word
    assert len(caplog.records) == 1


def test_what_an_earlier_version_recorded_is_no_change_of_the_job():
    """Removed and added keys aren't changes. A record that is no longer a valid job stays unchanged."""
    now = job(**{"train.steps": 7}).dump()
    then = {**now, "train": {k: v for k, v in now["train"].items() if k != "fp8"} | {"cpu_kernels": True}}
    assert spec.renewed(then) == now != then
    assert spec.renewed({"train": {}}) == {"train": {}}


def test_the_sections_say_what_is_due_after_which_step():
    """The loop asks the section that declares a key, so only that section reads a key for the time of an action."""
    made = job(**{
        "train.log_every": 4, "train.sdc_check": {"every": 5}, "evaluate.every": 10, "checkpoint.every": 20,
        "checkpoint.memory_every": 3,
    })  # fmt: skip
    assert made.evaluate and made.train.sdc_check
    train, checkpoint = made.train, made.checkpoint
    due = {
        "log": train.log_due, "evaluate": made.evaluate.due, "save": checkpoint.due, "copy": checkpoint.copy_due,
        "sdc_check": lambda done: made.train.sdc_check.due(done - 1, first=False),  # it looks before the step
    }  # fmt: skip
    steps = {name: [done for done in range(1, 21) if asked(done)] for name, asked in due.items()}
    assert steps == {
        "log": [4, 8, 12, 16, 20], "evaluate": [10, 20], "save": [20], "copy": [3, 6, 9, 12, 15, 18],
        "sdc_check": [5, 10, 15, 20],
    }  # fmt: skip
    assert train.sdc_check.due(0, first=True), "the first step after every start is looked at"
    assert not any(job().checkpoint.copy_due(done) for done in range(1, 21)), "no copies unless the job wants them"


def test_a_run_keeps_the_rules_that_its_numbers_were_computed_by():
    """Open keys have the values of the resumed run. A run from before a key existed has the value that all runs had then."""

    def settled(recorded: dict | None, **changes) -> tuple:
        train = spec.settle(job(**changes), recorded).train
        return train.recipe_version, train.grad_accum_dtype

    before = {key: value for key, value in job().dump()["train"].items() if key not in spec.BEFORE_KEYS}
    assert settled(None) == (2, "fp32") and settled({"train": before}) == (1, "same")
    assert settled({"train": before | {"recipe_version": 2, "grad_accum_dtype": "fp32"}}) == (2, "fp32")
    assert settled({"train": before | {"recipe_version": None, "grad_accum_dtype": None}}) == (1, "same")
    assert settled(None, **{"train.recipe_version": 1}) == (1, "fp32")
    assert settled({"train": before}, **{"train.recipe_version": 2}) == (2, "same"), "as the job asks for"
    assert spec.settle(settled_job := spec.settle(job(), None), {"train": before}) is settled_job
