"""Tests a job of five keys: the filled-in values and their reasons, the length of a run by epochs or tokens, and all faults in
one round."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import yaml
from heliostat.config import defaults, spec
from heliostat.config.defaults import Devices
from heliostat.config.spec import Job
from heliostat.config.synonyms import KEYS, NOT_OFFERED, SYNONYMS
from heliostat.errors import ConfigError
from heliostat.validation import check

from tests.seeds import every_seed
from tests.unit.build_job import ROOT
from tests.unit.test_dataset import make_dataset

LLAMA = {"arch": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "vocab_size": 96}  # fmt: skip
CPU, GPU = (lambda: Devices(0, "none")), (lambda: Devices(1, "one"))


def five(**train) -> dict:
    return {
        "name": "five",
        "model": dict(LLAMA),
        "data": {"path": "data", "sequence_length": 16},
        "train": train or {"steps": 100},
    }


def made(raw: dict, samples=None, devices=CPU) -> Job:
    return spec.make(raw, "job.yaml", samples, devices)


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_five_keys_are_a_job(workspace):
    """The filled-in values follow the papers and the table of docs/reference/yaml.md."""
    job = made(five())
    assert job.recipe == "heliostat.recipes:CausalLM" and [s.path for s in job.data.sources] == [str(workspace / "data")]
    assert (job.train.global_batch_size, job.train.micro_batch_size, job.workers.gpus) == (64, 4, 0)
    assert job.train.optimizer.name == "adamw" and job.train.optimizer.weight_decay == 0.1
    assert job.train.optimizer.lr == pytest.approx(0.003239 - 0.0001395 * math.log(12 * 2 * 32**2), abs=5e-5)
    assert (job.train.schedule.name, job.train.schedule.warmup_steps, job.checkpoint.every) == ("cosine", 10, 10)
    assert job.storage == str(workspace / ".heliostat/runs") and job.mlflow.experiment == "five"
    assert job.mlflow.uri == f"sqlite:///{workspace}/.heliostat/mlflow.db"


def test_what_is_filled_in_is_all_that_the_dump_has_and_is_listed_with_its_reason():
    whole, filled = spec.complete(five(), "job.yaml", devices=CPU)
    assert {d.key for d in filled} == {
        "recipe", "workers.gpus", "train.global_batch_size", "train.micro_batch_size", "train.optimizer.lr", "train.schedule",
        "checkpoint.every", "storage", "mlflow.uri", "mlflow.experiment",
    }  # fmt: skip
    assert all(d.why for d in filled)
    again = made(whole)
    assert spec.complete(again.dump(), "job.yaml", devices=GPU) == (again.dump(), []), "a recorded job is whole"


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"model": {"pretrained": "m"}}, "train.optimizer.lr", 2e-5),
        ({"model": {"arch": "llama"}}, "train.optimizer.lr", 3e-4),
        ({"model": {"arch": "llama", "n_embd": 8192, "n_layer": 80}}, "train.optimizer.lr", 1e-4),
        ({"model": {"backbone": {}}}, "recipe", "heliostat.recipes:TextToImage"),
        ({"model": {"backbone": {}}}, "train.optimizer.lr", 1e-4),
        ({"model": {"pooling": "mean"}}, "recipe", "heliostat.recipes:Embedder"),
        ({"workers": {"count": 48}}, "train.global_batch_size", 96),
        ({"workers": {"count": [1, 8]}}, "train.global_batch_size", 64),
        ({"workers": {"count": 8}, "train": {"steps": 5, "parallel": {"tensor": 4}}}, "train.global_batch_size", 64),
        ({"train": {"steps": 5, "micro_batch_size": 3}}, "train.global_batch_size", 66),
        ({"train": {"steps": 5, "global_batch_size": 6}}, "train.micro_batch_size", 2),
        ({"train": {"steps": 5}}, "checkpoint.every", 1),
        ({"train": {"steps": 10**6}}, "checkpoint.every", 1000),
        ({"train": {"steps": 10**6}}, "train.schedule", {"name": "cosine", "warmup_steps": 2000}),
        ({"workers": {"gpus": "auto"}}, "workers.gpus", 0),
    ],
)
def test_a_default_follows_from_the_rest(changes, key, value):
    _, filled = defaults.fill(five() | changes, CPU)
    assert {d.key: d.value for d in filled}[key] == value


@pytest.mark.parametrize(
    "own",
    [
        {"optimizer": {"lr": 1e-3}},
        {"optimizer": {"name": "sgd", "lr": 0.1}},
        {"optimizer": {"lr": 1e-3}, "schedule": {"name": "linear"}},
    ],
)
def test_a_job_with_a_rate_of_its_own_keeps_its_schedule(own):
    """As before the defaults existed, no warm-up is added."""
    job = made(five(steps=100, **own))
    assert job.train.schedule.warmup_steps == 0 and job.train.optimizer.lr == own["optimizer"]["lr"]


def test_a_rate_is_not_guessed_for_other_optimizers():
    with pytest.raises(ConfigError, match=r"train\.optimizer\.lr: required key missing"):
        made(five(steps=100, optimizer={"name": "muon"}))


def test_gpus_are_taken_where_the_machine_or_the_cluster_file_has_them(workspace):
    assert made(five(), devices=GPU).workers.gpus == 1
    assert made(five() | {"workers": {"gpus": 0}}, devices=GPU).workers.gpus == 0
    path = workspace / "job.yaml"
    path.write_text(yaml.safe_dump(five()))
    assert check.load_job(path, cluster=ROOT / "clusters/aws-h100.yaml").workers.gpus == 1
    assert check.load_job(path, cluster=ROOT / "clusters/local.yaml").workers.gpus == 0


@every_seed(100)
def test_any_job_of_five_keys_is_valid_on_any_workers(seed):
    """Every filled-in number passes the rules between the sections."""
    rng = random.Random(seed)
    raw = five(steps=rng.randrange(1, 10**6)) | {"workers": {"count": rng.randrange(1, 300)}}
    if rng.random() < 0.5:
        raw["train"]["micro_batch_size"] = rng.randrange(1, 20)
    made(raw, devices=rng.choice([CPU, GPU]))


def test_path_is_one_source_and_no_more():
    with pytest.raises(ConfigError, match="data: path and sources are both set"):
        made(five() | {"data": {"path": "a", "sources": [{"path": "b"}], "sequence_length": 16}})
    changed = spec.apply(five(), ["data.sources.0.weight=2.0", "data.seed=3"])
    assert made(changed).data.sources[0].weight == 2 and made(changed).data.seed == 3
    assert made(spec.apply(five(), ["data.path=other"])).data.sources[0].path.endswith("/other")
    two = ["data.sources=[{path: a}, {path: b}]"]
    assert [Path(source.path).name for source in made(spec.apply(five(), two)).data.sources] == ["a", "b"]
    assert [Path(source.path).name for source in made(spec.apply(spec.apply(five(), two), ["data.path=c"])).data.sources] == ["c"]
    with pytest.raises(ConfigError, match="path and sources are both set"):
        made(spec.apply(five(), [*two, "data.path=c"]))


# the length of a run -------------------------------------------------------------------------------------------------


def test_tokens_are_whole_steps_and_recorded():
    job = made(five(tokens=100_000))
    assert job.train.steps == math.ceil(100_000 / (64 * 16)) and job.train.steps_from == "tokens: 100000"
    assert made(job.dump()) == job


@every_seed(50)
def test_epochs_are_steps_that_see_each_sample_so_often(seed):
    rng = random.Random(seed)
    count, epochs, batch = rng.randrange(1, 10**5), rng.choice([0.5, 1, 2, 3.5]), rng.randrange(1, 200)
    job = made(five(epochs=epochs, global_batch_size=batch, micro_batch_size=1), samples=lambda job: count)
    assert (job.train.steps - 1) * batch < epochs * count <= job.train.steps * batch or job.train.steps == 1
    assert job.train.steps_from == f"epochs: {epochs:g}" and job.train.schedule.warmup_steps == min(2000, job.train.steps // 10)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        ({"steps": 5, "epochs": 2}, "train: steps and epochs each set the length of the run. Keep one of these keys"),
        (
            {"steps": 5, "epochs": 2, "tokens": 9},
            "train: steps and epochs and tokens each set the length of the run. Keep one of these keys",
        ),
        ({"seed": 1}, "train.steps: required key missing. Write train.steps: INTEGER, or train.epochs, or train.tokens"),
        ({"epochs": -1}, "train.epochs: expected a number above 0, got -1. Write train.epochs: 2"),
        ({"epochs": "many"}, "train.epochs: expected a number above 0, got 'many'. Write train.epochs: 2"),
    ],
)
def test_a_run_has_one_length(length, message):
    with pytest.raises(ConfigError, match=re.escape(f"job.yaml: {message}")):
        made(five(**length), samples=lambda job: 100)


def test_a_setting_takes_the_place_of_another_length():
    assert made(spec.apply(five(epochs=2), ["train.steps=7"])).train.steps == 7
    recorded = made(five(tokens=100_000)).dump()
    assert made(spec.apply(recorded, ["train.steps=50"])).train.steps_from is None


def test_the_dataset_gives_the_steps_of_an_epoch_without_what_is_held_out(workspace):
    make_dataset(workspace / "data", 1)
    path = workspace / "job.yaml"
    path.write_text(yaml.safe_dump(five(epochs=2, global_batch_size=8) | {"evaluate": {"every": 5, "fraction": 0.2}}))
    job = check.load_job(path)
    samples = check.training_samples(job)
    assert job.train.steps == math.ceil(2 * samples / 8) and samples > 0


def test_a_resumed_run_whose_steps_would_change_says_so(caplog):
    job = made(five(tokens=100_000))
    spec.settle(job, job.dump())
    assert not caplog.records
    recorded = job.dump()
    recorded["train"]["steps"] = 50
    spec.settle(job, recorded)
    assert caplog.messages == ["train.steps: changed from 50 to 98 (tokens: 100000)"]


# all faults in one round ---------------------------------------------------------------------------------------------


def faults(workspace: Path, raw: dict, **options) -> list[str]:
    (workspace / "job.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as e:
        check.check_path(Path("job.yaml"), **options)
    return [line.strip() for line in str(e.value).removeprefix("job.yaml:").strip().split("\n")]


def test_one_round_reports_keys_rules_model_machine_and_datasets(workspace):
    raw = five(steps="many", learning_rate=3, precision="fp16", deepspeed={"optimizer": {}})
    raw |= {"checkpoint": {"every": 10, "keep_every": 15}, "mlflow": {"uri": "foo:bar"}, "lora": {"r": 8}}
    raw["model"]["hidden_sise"] = 8
    raw["data"]["max_length"] = 8
    said = faults(workspace, raw)
    for start in (
        "data.max_length: unknown key. Use data.sequence_length",
        "train.steps: expected an integer, got 'many'. Write train.steps: INTEGER",
        "train.learning_rate: unknown key. Use train.optimizer.lr",
        "lora: unknown key. Use model.adapter",
        "train.precision: 'fp16' needs GPUs",
        "checkpoint.keep_every: 15 isn't a multiple",
        "mlflow.uri: 'foo:bar' isn't an MLflow store",
        "train.deepspeed.optimizer: ",
        "model.hidden_sise: ",
        "data.sources.0.path: ",
    ):
        assert [line for line in said if line.startswith(start)], start
    assert len(said) == len({line.partition(":")[0] for line in said}), "each key once"


def test_a_length_that_only_stands_in_for_epochs_is_no_fault(workspace, monkeypatch):
    monkeypatch.setattr("heliostat.recipes.CausalLM.bind", lambda *_: None)  # the dataset has no tokenizer
    make_dataset(workspace / "data", 1)
    raw = five(epochs=1, global_batch_size=8) | {"lora": 8}
    raw["data"] = {"sources": [{"path": "data", "max_epochs": 2}], "sequence_length": 16}
    assert [line.partition(":")[0] for line in faults(workspace, raw)] == ["lora"]


def test_a_batch_that_workers_cannot_share_is_one_fault(workspace, monkeypatch):
    """The data plan doesn't add a second line about virtual ranks, which follow from the batch."""
    monkeypatch.setattr("heliostat.recipes.CausalLM.bind", lambda *_: None)  # the dataset has no tokenizer
    make_dataset(workspace / "data", 1)
    said = faults(workspace, five(steps=10, global_batch_size=7, micro_batch_size=2))
    assert [line.partition(":")[0] for line in said] == ["train.global_batch_size"]


def test_every_source_and_every_store_is_reported(workspace):
    (workspace / "file").write_text("")
    raw = five() | {"storage": str(workspace / "file" / "runs")}
    raw["data"] = {"sources": [{"path": "a"}, {"path": "b"}], "sequence_length": 16}
    keys = {line.partition(":")[0] for line in faults(workspace, raw)}
    assert keys == {"data.sources.0.path", "data.sources.1.path", "storage"}


def test_a_file_without_a_model_or_data_reports_what_it_can(workspace):
    assert faults(workspace, {"train": {"steps": 5, "lr": 1}}) == [
        "name: required key missing. Write name: TEXT",
        "model: required key missing. Write model: ...",
        "data: required key missing. Write data: {path: FOLDER, sequence_length: INTEGER}",
        "train.lr: unknown key. Use train.optimizer.lr",
    ]


def test_a_job_without_faults_comes_with_its_defaults(workspace):
    (workspace / "job.yaml").write_text(json.dumps(five(steps=4, precision="fp32")))
    job, checked, filled = check.check_path(Path("job.yaml"), offline=True)
    assert checked is None and job.train.steps == 4 and "train.optimizer.lr" in {d.key for d in filled}


def test_a_mapping_of_tokens_without_a_length_of_samples_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"train\.tokens: needs data\.sequence_length"):
        made(five(tokens=100) | {"data": {"path": "images"}})


BAD = [None, 5, -1, 2.5, "x", [], {}, [1], {"a": 1}, True, 10**400, float("nan"), {"sequence": {}}, "auto"]


@every_seed(60)
def test_whatever_a_file_holds_is_a_job_or_a_config_error(seed):
    """Rules that fill in defaults run before the schema, so they receive values of any kind."""
    rng = random.Random(seed)
    raw = five(steps=5, optimizer={"name": "adamw"}, schedule={}, parallel={"tensor": 1}) | {"workers": {"count": [1, 2]}}
    for _ in range(rng.randrange(1, 4)):
        section = rng.choice([raw, *(part for part in raw.values() if isinstance(part, dict))])
        section[rng.choice([*section, "epochs", "tokens", "lanes", "global_batch", 3])] = rng.choice(BAD)
    for load in (lambda: made(raw, samples=lambda job: 100), lambda: spec.draft(raw, CPU)):
        try:
            load()
        except ConfigError:
            continue


# keys of other tools -------------------------------------------------------------------------------------------------


def known(model, path: str) -> bool:
    """Returns whether a path of keys exists in a job."""
    for key in path.split("."):
        fields = {f.alias or name: f for name, f in model.model_fields.items()}
        if model is Job and key == "model":
            return True
        if key not in fields:
            return key in ("betas", "eps") or model.__name__ == "NoneType"
        inner = spec.schema._below(model, key)
        if inner is None:
            return True
        model = inner
    return True


def test_what_stands_for_another_tools_key_exists():
    assert all(known(Job, key) for key in KEYS)
    assert not KEYS.keys() & NOT_OFFERED.keys()


@pytest.mark.parametrize("word", [
    "learning_rate", "lr", "epochs", "num_epochs", "max_steps", "lora", "peft", "gradient_checkpointing", "batch_size",
    "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "fp16", "warmup_ratio", "weight_decay", "output_dir",
    "dataset", "tokenizer", "Learning-Rate",
])  # fmt: skip
def test_a_key_of_another_tool_gets_one_line_that_names_heliostats(word):
    section = five(steps=5)
    section["train"][word] = 1
    with pytest.raises(ConfigError) as e:
        made(section)
    advice = SYNONYMS[word.lower().replace("-", "_")]
    assert str(e.value) in (
        f"job.yaml: train.{word}: unknown key. {advice}",
        f"job.yaml: train: steps and {word} each set the length of the run. Keep one of these keys",
    )
