"""Tests the plan: its counts are exact, its estimates follow their formulas, and a job that can't fit is rejected with a
reason."""

import json
import math
import os
import re
import time
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from heliostat.cli.plan import lines
from heliostat.data import manifest
from heliostat.errors import ConfigError
from heliostat.plan import estimate, hardware, memory, planner, step_time, traffic, zero_layout
from heliostat.plan.counts import ALWAYS, AT_STAGE_3, OperationWork
from heliostat.plan.model_stats import Meter, activations, build, stats_of, work
from heliostat.storage.locations import Location

from tests.unit import build_images
from tests.unit.build_job import ROOT, job, write
from tests.unit.forked import run

GIB = 1 << 30


@pytest.fixture(autouse=True)
def workspace(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def recipe_of(j):
    from heliostat.recipes.text.causal_lm import CausalLM

    return CausalLM(j)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3"])
def test_parameters_are_those_of_the_model_that_is_trained(arch):
    """The count is exact, with tied weights counted once. The same modules are built with and without memory."""
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4} if arch == "gpt2" else {"hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}  # fmt: skip
    j = job(model={"arch": arch, "vocab_size": 96, **size})
    recipe = recipe_of(j)
    counted, real = stats_of(recipe, build(recipe)), recipe.build()
    assert counted.parameters == sum(p.numel() for p in real.parameters())
    assert counted.shapes == {n: tuple(p.shape) for n, p in real.named_parameters()}


@pytest.mark.parametrize(("precision", "length", "mask"), [("fp32", 64, False), ("bf16", 64, False),
                                                           ("fp32", 64, True)])  # fmt: skip
def test_activations_are_what_a_real_forward_pass_keeps(precision, length, mask):
    """Fake and real tensors give the same count. Packed documents need masks."""
    j = job(**{"train.precision": precision, "data.sequence_length": length, "data.document_mask": mask})
    recipe = recipe_of(j)
    recipe.end = 0
    counted = activations(j, recipe, build(recipe), planner.sample(j, recipe))
    model = recipe.build().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    with Meter(model) as meter:
        recipe.loss(model, recipe.batch(planner.sample(j, recipe)))
    assert counted.kept == pytest.approx(meter.result().kept, rel=0.02)
    assert counted.checkpointed == pytest.approx(meter.result().checkpointed, rel=0.02)
    assert counted.checkpointed < counted.kept


LAYERED: dict[str, dict[str, object]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 5, "n_head": 4},
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"] * 2,
                    "sliding_window": 16, "num_hidden_layers": 6},
}  # fmt: skip


@pytest.mark.parametrize("arch", LAYERED)
def test_work_of_a_few_layers_stands_for_that_of_all(arch, monkeypatch):
    """Equal layers are counted once and multiplied. The result equals a count of every layer."""
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    j = job(model={"arch": arch, "vocab_size": 96, **({} if arch == "gpt2" else size), **LAYERED[arch]}, **{"workers.gpus": 1})
    recipe = recipe_of(j)
    contents = (planner.sample(j, recipe, 2), planner.sample(j, recipe, 3))
    few = work(j, recipe, build(recipe), contents)
    monkeypatch.setattr("heliostat.plan.model_stats._stack", lambda model: None)
    assert sorted(map(astuple, few)) == sorted(map(astuple, work(j, recipe, build(recipe), contents)))


def test_work_is_what_the_model_multiplies():
    """Products have the FLOPs of Kaplan's formula, and attention has 7 products of half a square. Weights don't grow with the
    batch."""
    j = job(**{"workers.gpus": 1, "model.num_key_value_heads": 4})
    recipe = recipe_of(j)
    model = build(recipe)
    flops = recipe.flops_per_sample(model)
    found = work(j, recipe, model, (planner.sample(j, recipe, 2), planner.sample(j, recipe, 3)))
    total = {kind: sum(w.count * w.flops for w in found if w.kind == kind) for kind in ("matmul", "attention", "convolution")}
    square = 12 * 64 * 64 * 32 * 2  # forward and backward, of both layers, as flops_per_sample counts it
    assert total == {"matmul": flops - square, "attention": square * 7 / 6 / 2, "convolution": 0}
    products = [w for w in found if w.kind == "matmul"]
    assert sum(w.count * w.fixed for w in products) == 3 * 2 * (flops - square) / 6 / 64  # read twice, written once
    inside = sum(w.count * w.flops for w in products if w.replayed)
    assert inside == total["matmul"] / 3 - 2 * 64 * 32 * 96  # the forward pass, but for the head
    assert sum(w.count * w.flops for w in products if w.replayed == AT_STAGE_3) == 2 * 2 * 64 * 32 * 64  # behind what is kept
    assert all(w.dear == (w.kind in ("matmul", "attention")) for w in found if w.replayed)


@pytest.mark.parametrize("backbone", ["UNET", "PIXART", "SD3"])
def test_diffusion_models_are_counted_like_any_other(backbone, tmp_path):
    """Parameters are exact, and activations equal those of a real forward pass. The dataset determines the model's shape."""
    from heliostat.recipes.images.text_to_image import TextToImage

    data = build_images.digits(tmp_path / "data", 40)
    j = job(**build_images.job(data, backbone=getattr(build_images, backbone)))
    recipe = TextToImage(j)
    recipe.bind([manifest.read(Location(str(data)))])
    model, real = build(recipe), recipe.build()
    assert stats_of(recipe, model).parameters == sum(p.numel() for p in real.parameters())
    counted = activations(j, recipe, model, planner.sample(j, recipe))
    batch = recipe.batch(planner.sample(j, recipe), np.zeros(1, dtype=np.int64))
    with Meter(real) as meter:
        recipe.loss(real, batch)
    assert counted == replace(meter.result(), batch=sum(values.nbytes for values in batch.values())) and counted.kept > 0


def test_an_average_of_the_weights_is_one_more_fp32_copy_in_memory_and_in_checkpoints():
    shapes = {"w": (1024, 64)}
    plain, averaged = (memory.state(shapes, frozenset(), 4, 2, "bf16", ema=e) for e in (False, True))
    assert averaged.device - plain.device == 4 * 1024 * 64 // 4
    j = job(**{"train.ema": {"decay": 0.99}})
    recipe = recipe_of(j)
    assert planner.plan(j, recipe)["checkpoint"]["bytes"] == 16 * stats_of(recipe, build(recipe)).parameters


def test_an_elastic_job_is_planned_on_its_most_workers_and_must_fit_on_its_fewest():
    """A worker's share of the state is largest with the fewest workers."""
    elastic = {"workers.count": [1, 4], "workers.gpus": 1, "train.zero.stage": 3}
    j = job(**elastic)
    assert planner.plan(j, recipe_of(j))["workers"] == 4
    big = {"model.num_hidden_layers": 1, "model.hidden_size": 40960, "model.intermediate_size": 40960, "model.vocab_size": 64}
    j = job(**elastic, **big, **{"train.activation_checkpointing": False})
    with pytest.raises(ConfigError, match="each worker needs"):
        planner.plan(j, recipe_of(j))
    assert planner.plan(j.on(4), recipe_of(j))["memory"]["total"] < 80 * GIB


def test_checkpointed_activations_grow_by_one_input_a_layer():
    """Only one layer's inner activations exist at a time, so each layer adds only its input."""
    kept = []
    for layers in (2, 3, 4):
        j = job(**{"model.num_hidden_layers": layers, "train.precision": "fp32"})
        recipe = recipe_of(j)
        kept.append(activations(j, recipe, build(recipe), planner.sample(j, recipe)))
    assert kept[1].checkpointed - kept[0].checkpointed == kept[2].checkpointed - kept[1].checkpointed == 4 * 64 * 32
    assert kept[2].kept - kept[1].kept > 4 * (4 * 64 * 32)


def test_state_is_rajbhandaris_sixteen_bytes_a_parameter():
    """Mixed-precision Adam (arXiv 1910.02054, figure 1): 7.5 billion parameters on 64 workers, with gradients in low
    precision."""
    shapes = {"w": (7_500_000_000,)}
    gb = {s: memory.state(shapes, frozenset(), 64, s, "bf16", persistence=0, accumulates=False).device / 1e9 for s in (1, 2, 3)}
    assert gb == pytest.approx({1: 31.4, 2: 16.6, 3: 1.88}, abs=0.05)  # the paper's numbers
    one = memory.state(shapes, frozenset(), 1, 2, "bf16", sums_fp32=False)
    assert one.device == 16 * 7_500_000_000


def test_offload_moves_state_and_loses_none():
    """State that leaves the device is on the host (with the fp32 gradients of the master weights) or on disk."""
    shapes = {"w": (1024, 1024)}
    n = 1024 * 1024
    there = memory.state(shapes, frozenset(), 4, 2, "bf16", offload_optimizer=True)
    assert (there.weights, there.gradients, there.masters, there.moments, there.host) == (2 * n, 0, 0, 0, 16 * n // 4)
    disk = memory.state(shapes, frozenset(), 4, 3, "bf16", offload_param="nvme", persistence=0)
    assert (disk.weights, disk.disk) == (0, 2 * n // 4)


def test_sums_of_micro_batches_in_fp32_take_four_bytes_of_what_a_worker_sums():
    """At stage 1 for all parameters, in addition to the micro-batch's own gradients; above, for its share; with one micro-batch,
    none."""
    shapes = {"a": (1000,), "b": (3000,)}
    held = {s: memory.state(shapes, frozenset(), 4, s, "bf16", persistence=0).gradients for s in (1, 2, 3)}
    assert held == {1: 6 * 4000, 2: 4 * 1000, 3: 4 * 1000}
    once = [memory.state(shapes, frozenset(), 4, s, "bf16", persistence=0, accumulates=False).gradients for s in (1, 2, 3)]
    assert once == [2 * 4000, 2 * 1000, 2 * 1000]


def test_frozen_parameters_have_weights_alone():
    state = memory.state({"a": (100,), "b": (300,)}, frozenset("b"), 1, 1, "bf16", sums_fp32=False)
    assert (state.weights, state.gradients, state.masters, state.moments) == (800, 200, 400, 800)


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 5), (3, 12)])
def test_a_step_moves_what_ring_collectives_move(stage, times):
    """With four micro-batches, stages 0 and 1 reduce once, stage 2 reduces each time, and stage 3 also gathers twice each
    time."""
    assert traffic.volume(1000, 2, 4, stage, accumulation=4) == times * 1000 * 2 * 3 // 4


EFFICIENCY = hardware.Efficiency(0.5, 0.25, 0.2, 0.5, 0.4, 1e-5)
DEVICE = hardware.Device("H100", 80 * GIB, 1e15, 700, 8, 450e9, 400e9, 0, 1, 2e12, EFFICIENCY)


def test_communication_hides_behind_the_computing_that_it_can_run_beside():
    """Stage 3 gathers and reduces during the whole computation. Stage 1 reduces after the last backward pass, and gathers
    afterwards."""
    network, moved = hardware.Network(0.5, 0.8), traffic.Traffic(int(400e9), 16)
    three, one = (step_time.Setting(16, stage, 1, 2) for stage in (3, 1))
    step = step_time.step(1.0, moved, 0.0, three, DEVICE, network)
    assert (step.computing, step.communicating) == (2.0, 2.0) and step.exposed == pytest.approx(0.4)
    step = step_time.step(1.0, moved, 0.0, one, DEVICE, network)
    assert step.exposed == pytest.approx(2.0 - 2 / 3)  # 0.8 s could, and a backward pass is two thirds of a second
    assert step_time.step(0.0, moved, 0.0, three, DEVICE, network).total == 2.0  # nothing to hide behind
    alone = step_time.Setting(1, 3, 1, 2)
    assert step_time.step(1.0, moved, 0.0, alone, DEVICE, network).total == 2.0  # nobody to send to


def test_an_operation_takes_its_arithmetic_and_its_bytes():
    """Each kind has its own rates, and memory bounds small products. A launch is the minimum, except if everything is
    compiled."""
    product = OperationWork("matmul", 1, 1e12, 1e9, 1e9, 0, True)
    assert step_time.operation(product, 2, DEVICE) == pytest.approx(2e12 / 0.5e15 + 3e9 / 1e12)
    assert step_time.operation(replace(product, kind="convolution"), 1, DEVICE) == pytest.approx(1e12 / 0.25e15 + 2e9 / 1e12)
    norm = OperationWork("memory", 1, 0.0, 1e9, 0.0, 0, False)
    assert step_time.operation(norm, 1, DEVICE) == pytest.approx(1e-3)
    assert step_time.operation(norm, 1, DEVICE, compiled=True) == pytest.approx(0.4e-3)
    tiny = replace(norm, moved=8.0)
    assert step_time.operation(tiny, 1, DEVICE) == 1e-5 > step_time.operation(tiny, 1, DEVICE, compiled=True)


def test_a_ring_takes_longer_the_more_ranks_it_has():
    """This holds for any amount of data: three passes over 33 messages add seconds for 1,024 GPUs, and a millisecond for 8 in a
    node."""
    network = hardware.Network(0.8, 1.0, hop=2e-5, hop_inside=3e-6)
    calls = traffic.calls(3, 1, 33, 1)
    waits = {}
    for ranks in (8, 64, 256, 1024):
        setting = step_time.Setting(ranks, 3, 1, 1)
        waits[ranks] = step_time.step(0.0, traffic.Traffic(0, ranks, calls=calls), 0.0, setting, DEVICE, network).exposed
    assert waits == pytest.approx({ranks: 99 * (ranks - 1) * (3e-6 if ranks == 8 else 2e-5) for ranks in waits})
    parts = step_time.hops(1024, DEVICE, network, 8)  # of matrices in eight parts, each part has a ring of its own
    assert parts == pytest.approx(127 * 2e-5)
    assert (traffic.calls(1, 4, 33, 2), traffic.calls(2, 4, 33, 2), traffic.calls(3, 4, 33, 2, copied=True)) == (4, 10, 165)


def test_an_optimizer_on_the_cpu_takes_its_share_of_the_hosts_memory():
    """30 bytes for each of a billion parameters, at 45 % of an eighth of 400 GB/s. On the device, it takes half a second less."""
    device = replace(DEVICE, host_bandwidth=50e9)
    assert step_time.updating(1e9, 2, device, on_host=True) == pytest.approx(30 / (0.45 * 50))
    assert step_time.updating(1e9, 2, device) == pytest.approx(30e9 / 1e12)


def test_float8_multiplies_faster_in_layers_and_not_in_the_head():
    device = replace(DEVICE, peaks={"fp8": 2e15})
    forward, head = (
        OperationWork("matmul", 1, 1e15, 0.0, fixed, replayed, True) for fixed, replayed in ((8.0, ALWAYS), (0.0, 0))
    )
    backward = replace(forward, count=2, replayed=0)
    plain = step_time.Setting(1, 1, 1, 1)
    took = [step_time.computing([forward, backward, head], replace(plain, fp8=fp8), device) for fp8 in (False, True)]
    assert took == pytest.approx([4 / 0.5, 3 / (2 * 0.8) + 1 / 0.5])


def test_checkpointing_plays_again_what_is_in_layers():
    inside, outside, last = (OperationWork("matmul", 3, 1e12, 0.0, 0.0, replayed, True) for replayed in (ALWAYS, 0, AT_STAGE_3))
    plain = step_time.Setting(1, 1, 1, 1)
    took = [step_time.computing([inside, outside], replace(plain, replayed=r), DEVICE) for r in (0.0, 0.5, 1.0)]
    assert took == pytest.approx([12e-3, 15e-3, 18e-3])
    took = [step_time.computing([last], replace(plain, replayed=1.0, stage=stage), DEVICE) for stage in (2, 3)]
    assert took == pytest.approx([6e-3, 12e-3])
    both = [inside, replace(inside, dear=False)]
    assert step_time.computing(both, replace(plain, replayed=1.0, selective=True), DEVICE) == pytest.approx(18e-3)


def test_young_dalys_interval_wastes_least():
    """No nearby interval is better, and it is never shorter than an upload."""
    between, blocked, restart = estimate.mean_time_between(50_700, 64), 5.0, 180.0
    best = estimate.best_interval(blocked, between)
    assert best == pytest.approx(math.sqrt(2 * 5 * 50_700 / 64 * 3600))
    least = estimate.waste(best, blocked, between, restart)
    assert all(estimate.waste(best * f, blocked, between, restart) > least for f in (0.5, 0.9, 1.1, 2.0))
    assert estimate.best_interval(1e-9, between, upload_s=60) == 60


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3, 7, 64])
def test_slices_are_every_element_once(stage, workers):
    """Sizes include those that no number of workers divides, and a single element."""
    shapes = {"a": (7, 13), "b": (13,), "c": (1,), "d": (11, 13), "e": (3,)}
    seen = {n: [0] * math.prod(s) for n, s in shapes.items()}
    for rank in zero_layout.slices(shapes, stage, workers):
        for name, start, numel in rank:
            for i in range(start, start + numel):
                seen[name][i] += 1
    assert all(set(counts) == {1} for counts in seen.values())


def test_networks_of_machine_types_are_those_of_their_cards():
    """Google's a3-highgpu-8g has four cards of 200 Gb/s for eight GPUs, a3-megagpu-8g has eight, and AWS's p5 has 3,200 Gb/s."""
    j = job(**{"workers.gpus": 1})
    rates = {name: hardware.resolve(j, hardware.table(), instance=name).network for name in hardware.table()["instances"]}
    gigabits = {name: round(rate * 8 / 1e9) for name, rate in rates.items()}
    assert (gigabits["a3-highgpu-8g"], gigabits["a3-megagpu-8g"], gigabits["p5.48xlarge"]) == (800, 1600, 3200)


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
        "gradients 44.9 (29.9 of them are sums in fp32)" in said
        and "To avoid the sums in fp32, set train.grad_accum_dtype: same" in said
    )
    assert re.search(r"with enough memory, a step would take \d+ s \(MFU \d\d\.\d%\)$", said)


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
