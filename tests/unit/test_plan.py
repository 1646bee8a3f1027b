"""Tests the plan of a job: it fits its workers, a job that can't fit is rejected with a reason, and a dry run agrees."""

import json
import os
import re
import time

import pytest
import torch
from heliostat.cli.plan import lines
from heliostat.errors import ConfigError
from heliostat.plan import hardware, planner
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit.build_job import ROOT, job, write
from tests.unit.forked import run

pytestmark = pytest.mark.usefixtures("in_repository")
GIB = 1 << 30


def test_an_elastic_job_is_planned_on_its_most_workers_and_must_fit_on_its_fewest():
    """A worker's share of the state is largest with the fewest workers."""
    elastic = {"workers.count": [1, 4], "workers.gpus": 1, "train.zero.stage": 3}
    j = job(**elastic)
    assert planner.plan(j, CausalLM(j))["workers"] == 4
    big = {"model.num_hidden_layers": 1, "model.hidden_size": 40960, "model.intermediate_size": 40960, "model.vocab_size": 64}
    j = job(**elastic, **big, **{"train.activation_checkpointing": False})
    with pytest.raises(ConfigError, match="each worker needs"):
        planner.plan(j, CausalLM(j))
    assert planner.plan(j.on(4), CausalLM(j))["memory"]["total"] < 80 * GIB


def test_networks_of_machine_types_are_those_of_their_cards():
    """Google's a3-highgpu-8g has four cards of 200 Gb/s for eight GPUs, a3-megagpu-8g has eight, and AWS's p5 has 3,200 Gb/s."""
    j = job(**{"workers.gpus": 1})
    rates = {name: hardware.resolve(j, hardware.table(), instance=name).network for name in hardware.table()["instances"]}
    gigabits = {name: round(rate * 8 / 1e9) for name, rate in rates.items()}
    assert (gigabits["a3-highgpu-8g"], gigabits["a3-megagpu-8g"], gigabits["p5.48xlarge"]) == (800, 1600, 3200)


@pytest.mark.ci
def test_the_plan_of_the_8b_job_is_right_where_it_can_be_known():
    """Parameters, state, and checkpoint follow from arithmetic, and FLOPs from Kaplan's formula. One H100 is rejected with the
    reason, its fp32 sums, and the speed."""
    path = ROOT / "jobs" / "llama3-8b.yaml"
    j, recipe, _ = planner.prepare(path, ["data.path=nowhere"])
    p = planner.plan(j, recipe)
    n = 8_030_261_248
    assert p["parameters"]["total"] == n and p["checkpoint"]["bytes"] == 12 * n
    assert p["memory"]["optimizer"] == pytest.approx(12 * n / 64, rel=1e-3)
    norms = 65 * 4096
    assert p["flops"]["per_token"] == 6 * (n - 128256 * 4096 - norms) + 12 * 32 * 4096 * 8192
    assert p["memory"]["total"] < 80 * GIB and 0.2 < p["speed"]["mfu"] < 0.6
    assert p["run"]["tokens"] == 240_000 * 4_194_304
    alone = ["data.path=nowhere", "workers.count=1", "train.zero.stage=1", "train.micro_batch_size=1"]
    j, recipe, _ = planner.prepare(path, alone)
    with pytest.raises(ConfigError, match=r"each worker needs \d+\.\d GiB .*but H100 has 80 GiB; ") as refused:
        planner.plan(j, recipe)
    said = str(refused.value)
    assert (
        "gradients 29.9 (29.9 of them are sums in fp32)" in said
        and "To avoid the sums in fp32, set train.grad_accum_dtype: same" in said
    )
    assert re.search(r"with enough memory, a step would take \d+ s \(MFU \d\d\.\d%\)$", said)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "active"), [("moe-8x1b", 1_861_675_008), pytest.param("qwen3-30b-a3b", 3_353_032_704, marks=pytest.mark.ci)]
)
def test_the_plan_of_a_mixture_tells_what_is_active(name, active):
    """Its FLOPs are six for each active parameter in a product, plus attention. It fits, and has a dry run."""
    from heliostat.plan.dryrun import dry_run

    path = ROOT / "jobs" / f"{name}.yaml"
    j, recipe, _ = planner.prepare(path, ["data.path=nowhere"])
    p, c = planner.plan(j, recipe), recipe.config
    assert p["parameters"]["active"] == active < p["parameters"]["total"] / 3
    width = c.head_dim or c.hidden_size // c.num_attention_heads
    heads = c.num_hidden_layers * c.num_attention_heads * width * j.data.sequence_length
    multiplying = active - c.vocab_size * c.hidden_size
    assert p["flops"]["per_token"] == pytest.approx(6 * multiplying + 12 * heads, rel=1e-3)
    assert p["memory"]["total"] < 80 * GIB
    assert f"({active:,} active per token)" in lines(p)[0]
    assert p["memory"]["host"] > 0 and "host memory" not in lines(p)[1]  # batches of tokens: less than 0.05 GiB
    found = dry_run(path, ["data.path=nowhere"])
    assert found["shards"] == j.workers.most and found["checkpoint_bytes"] > 12 * p["parameters"]["total"]


def test_a_dry_run_for_gpus_prints_nothing_of_deepspeeds_where_there_is_none(monkeypatch):
    """DeepSpeed warns on standard output that it finds no GPU, unless the environment selects the CPU."""
    from heliostat.engine import deepspeed_engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DS_ACCELERATOR", "")
    deepspeed_engine.require_config(job(**{"workers.gpus": 1}))
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_prices_are_overridden_key_by_key_and_typing_errors_are_found(tmp_path):
    """A user's table changes only the keys that it names. A new device needs all keys that the plan reads."""
    file = tmp_path / "prices.yaml"
    file.write_text("{devices: {H100: {hour: 2.5}, B300: {memory_gib: 180}}, date: 2026-01-01}")
    table = hardware.table(file)
    assert table["devices"]["H100"]["hour"] == 2.5 and table["devices"]["H100"]["memory_gib"] == 80
    gpu = job(**{"workers.gpus": 1})
    assert hardware.resolve(gpu, table).hour == 2.5
    with pytest.raises(ConfigError, match=r"--prices: devices\.B300: 'tflops' is missing"):
        hardware.resolve(gpu, table, "B300")
    with pytest.raises(ConfigError, match=r"device 'H10' isn't in the price table. Did you mean 'H100'"):
        hardware.resolve(gpu, table, "H10")
    file.write_text("{storage: {nodes: 1}}")
    with pytest.raises(ConfigError, match=r"storage\.nodes: unknown key. Did you mean 'node'"):
        hardware.table(file)


@pytest.mark.ci
def test_the_command_prints_one_object_and_a_job_that_cannot_fit_is_exit_code_2(tmp_path):
    """Without the datasets, which a note states, and without Ray."""
    path = str(write(tmp_path, **{"data.sources.0.path": str(tmp_path / "nothing")}))
    code, out, _, imported = run("plan", path, "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 0 and "ray" not in imported.split(",") and found["memory"]["total"] < found["memory"]["device"]
    assert "planned without the datasets" in found["notes"][0]
    huge = [
        "--set",
        "train.micro_batch_size=16777216",
        "--set",
        "train.global_batch_size=16777216",
        "--set",
        "train.precision=fp32",
    ]
    code, _, lines, _ = run("plan", path, *huge)
    assert code == 2 and len(lines) == 1 and "each worker needs" in lines[0] and "the job fits with" in lines[0]


def test_without_the_datasets_plan_and_dry_run_say_which_vocabulary_they_assume(tmp_path):
    """The dataset's vocabulary replaces the default one, and changes the number of parameters. An explicit vocabulary stays."""
    from heliostat.plan.dryrun import dry_run

    missing = {"data.sources.0.path": str(tmp_path / "nothing")}
    given = write(tmp_path, **missing)
    assert "vocab" not in planner.prepare(given, [])[2] and "vocab" not in dry_run(given, [])["note"]
    assumed = write(tmp_path, **missing, **{"model.vocab_size": None})
    for note in (planner.prepare(assumed, [])[2], dry_run(assumed, [])["note"]):
        assert "vocabulary of 32,000 tokens" in note and "model.vocab_size" in note


@pytest.mark.ci
def test_a_dry_run_for_64_ranks_takes_seconds_and_finds_what_does_not_divide():
    """For the 8B job: 64 shards of 291 tensors with two moments, and the bytes of the whole state. 48 ranks are rejected."""
    from heliostat.plan.dryrun import dry_run

    path, began = ROOT / "jobs" / "llama3-8b.yaml", time.process_time()
    found = dry_run(path, ["data.path=nowhere"], 64)
    assert time.process_time() - began < 30
    assert (found["shards"], found["tensors"], found["chunks"]) == (64, 873, 873 * 64)
    assert found["checkpoint_bytes"] - found["index_bytes"] == 12 * 8_030_261_248
    assert (found["data"]["accumulation"], found["data"]["lanes_per_rank"]) == (8, 2)
    with pytest.raises(ConfigError, match=r"512 isn't divisible by workers\.count 48"):
        dry_run(path, [], 48)
    with pytest.raises(
        ConfigError, match=r"train\.deepspeed\.zero_optimization\.reduce_bucket_size: expected an integer, got 'big'"
    ):
        dry_run(path, ["train.deepspeed.zero_optimization.reduce_bucket_size=big"], 64)


def test_a_small_plan_shows_no_zeros():
    """A run of seconds and a checkpoint of megabytes have these units. One layer is singular."""
    from heliostat.cli.plan import _checkpointing, _length, _size

    assert (_length(21 / 86_400), _length(0.05), _length(30.4)) == ("21 s", "1 h 12 min", "30.40 days")
    assert (_size(9_680_000), _size(96_360_000_000)) == ("9.68 MB", "96.36 GB")
    assert [_checkpointing(n).split(" of ")[1] for n in (1, 2)] == ["1 layer", "2 layers"]
