"""Tests parallelism configurations, ranked by time within memory, and efficiencies corrected by a run's measurements."""

import json
import time
from dataclasses import asdict

import pytest
import yaml
from heliostat.config import spec
from heliostat.errors import ConfigError
from heliostat.plan import hardware, layouts, plan_file, planner, ranking
from heliostat.plan.layouts import Candidate, Layout
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location

from tests.unit.build_job import job, write
from tests.unit.forked import run

pytestmark = pytest.mark.usefixtures("in_repository")


@pytest.fixture(scope="module")
def wide() -> dict:
    """Returns the ranking of a job of three wide layers on four GPUs: 12 billion parameters, which fit only in some of them."""
    sizes = {"hidden_size": 16384, "intermediate_size": 65536, "vocab_size": 4096, "num_hidden_layers": 3}
    changes = {"workers.gpus": 1, "workers.count": 4, "train.global_batch_size": 64, "data.sequence_length": 512}
    j = job(**changes, **{f"model.{k}": v for k, v in sizes.items()})
    return ranking.ranking(j, CausalLM(j)).dump()


def test_layouts_are_ranked_by_time_within_memory_and_each_says_why_it_loses(wide):
    fit = [one for one in wide["layouts"] if one["fits"]]
    rest = wide["layouts"][len(fit) :]
    assert fit and rest and not any(one["fits"] for one in rest)
    times = [one["speed"]["step_s"] for one in fit]
    assert times == pytest.approx(sorted(times), abs=1e-3)
    assert all(one["memory"]["total"] <= one["memory"]["device"] for one in fit)
    assert fit[0]["why"] == "the fastest that fits"
    assert all("GiB" in one["why"] for one in rest)
    copied = [one for one in fit if one["offload_optimizer"] and not one["activation_checkpointing"]]
    assert copied and all("copies to and from the host" in one["why"] for one in copied)
    replayed = [one for one in fit if one["activation_checkpointing"] and not one["offload_optimizer"]]
    assert replayed and any("recomputed" in one["why"] for one in replayed)


def test_a_layout_with_the_same_time_is_ranked_by_its_complexity():
    """No time per step separates these layouts, so the reason names the difference in one complete phrase."""
    facts = True, {"total": 1}, {}, {"forward_backward": 1.0}, {"step_s": 1.0}
    first, *others = (Candidate(Layout(stage, 1, False, False), *facts) for stage in (2, 3, 1))
    assert [layouts.why(one, first) for one in others] == [
        "as fast as the first, but more complex",
        "0.0 ms slower than the first, but simpler",
    ]


def test_one_layout_is_shown_of_those_that_differ_in_the_micro_batch_alone(wide):
    """It is the best of them. With a slower micro-batch, or one that doesn't fit, it would rank lower."""
    families = [
        tuple(v for k, v in one["layout"].items() if k != "train.micro_batch_size")
        for one in wide["layouts"]
        if isinstance(one["activation_checkpointing"], bool)  # of all layers, or of none
    ]
    assert len(set(families)) == len(families) == 6 + 6 + 2  # stages 1 to 3, with and without checkpointing and offload


def test_micro_batches_of_a_huge_batch_are_found_at_once():
    huge, began = job(**{"train.global_batch_size": 2**31, "train.micro_batch_size": 2**31}), time.process_time()
    assert {layout.micro_batch_size for layout in layouts.candidates(huge, 1)} == {2**n for n in range(32)}
    assert time.process_time() - began < 2


def degrees(**changes) -> list[int]:
    made = job(**changes)
    return list(ranking.degrees(made, CausalLM(made)))


def test_workers_share_samples_where_the_job_and_the_model_let_them():
    """Degrees divide workers, heads, and tokens, and keep the global batch. A model that can't split samples has none."""
    assert degrees(**{"workers.count": 8, "train.global_batch_size": 16}) == [1, 2, 4]  # of 4 heads
    assert degrees(**{"workers.count": 6, "train.global_batch_size": 12}) == [1, 2]
    assert degrees(**{"workers.count": [2, 4]}) == [1, 2]
    assert degrees(**{"workers.count": 4, "model.arch": "mistral", "model.sliding_window": 16}) == [1]
    assert degrees(**{"workers.count": 4, "train.compile": True}) == [1]


def test_a_shared_sample_takes_less_memory_and_waits_for_what_is_exchanged():
    """Each of eight workers has an eighth of the activations. They process the same tokens, with more communication that isn't
    hidden."""
    j = job(**{"workers.gpus": 1, "workers.count": 8, "train.global_batch_size": 64, "data.sequence_length": 4096,
               "model.head_dim": 8, "model.num_attention_heads": 32, "model.num_key_value_heads": 8,
               "model.hidden_size": 256})  # fmt: skip
    made = CausalLM(j)
    shared = ranking.degrees(j, made)
    estimates = planner.planners(j, made, None, None, hardware.table(), exchanged=shared)[-1]
    alone, eight = (estimates.candidate(Layout(3, 1, True, False, sequence=n)) for n in (1, 8))
    assert eight.memory["activations"] == pytest.approx(alone.memory["activations"] / 8, rel=1e-3)
    assert eight.memory["optimizer"] == alone.memory["optimizer"]
    assert eight.communication["exposed_s"] > alone.communication["exposed_s"]
    assert eight.communication["bytes_per_step"] > alone.communication["bytes_per_step"]
    assert eight.layout.settings()["train.parallel.sequence"] == 8


def test_what_is_printed_to_set_makes_the_job_the_best_layout(wide, tmp_path):
    settings = ["workers.gpus=1", "train.global_batch_size=64", "workers.count=4", *wide["set"]]
    made = spec.load(write(tmp_path), settings)
    assert layouts.of(made).settings() == wide["layouts"][0]["layout"]


def test_settings_say_only_what_changes():
    j = job(**{"workers.gpus": 1})
    same = layouts.of(j)
    assert layouts.changes(j, same) == []
    other = Layout(3, 4, True, True, "cpu")
    assert set(layouts.changes(j, other)) == {
        "train.zero.stage=3", "train.micro_batch_size=4", "train.activation_checkpointing=true",
        "train.zero.offload.optimizer=cpu", "train.zero.offload.param=cpu",
    }  # fmt: skip


def test_cpu_workers_are_offered_no_offload_and_bf16_no_stage_0():
    found = list(layouts.candidates(job(), 1))
    assert {c.stage for c in found} == {1, 2, 3} and not any(c.offload_optimizer for c in found)
    assert {c.stage for c in layouts.candidates(job(**{"train.precision": "fp32"}), 1)} == {0, 1, 2, 3}
    assert {c.micro_batch_size for c in found} == {1, 2, 4, 8}


@pytest.mark.ci
def test_the_command_prints_the_table_and_exits_2_if_nothing_fits(tmp_path):
    path = str(write(tmp_path, **{"data.sources.0.path": str(tmp_path / "nothing"), "workers.gpus": 1}))
    code, out, _, _ = run("plan", path, "--rank")
    assert code == 0 and "the fastest that fits" in out and "the best    " in out
    huge = ["--set", "model.hidden_size=131072", "--set", "model.intermediate_size=524288"]
    code, out, lines, _ = run("plan", path, "--rank", "--json", *huge)
    assert code == 2 and "no parallelism configuration fits on 1 workers. Raise workers.count" in lines[0]
    assert json.loads(out.splitlines()[-1])["set"] is None


# calibration ---------------------------------------------------------------------------------------------------------


def attempt(*marks: tuple[int, float]) -> RecordedAttempt:
    return RecordedAttempt("a", 0.0, 1.0, 1.0, 0, 1, marks=list(marks))


def test_pace_is_taken_between_marks_and_needs_steps():
    assert plan_file.pace(attempt((10, 30.0), (20, 40.0), (40, 60.0))) == (1.0, 30)  # the first ten warm up
    assert plan_file.pace(attempt((10, 30.0))) == (3.0, 10)
    assert plan_file.pace(attempt((1, 5.0))) is None and plan_file.pace(attempt()) is None


def test_a_corrected_device_takes_as_long_as_was_measured():
    """A plan of the same job with the measurements gives the measured time, and the time of a larger job follows."""
    j = job(**{"train.precision": "fp32", "model.hidden_size": 256, "model.intermediate_size": 512})
    prices = hardware.table()
    first = planner.planners(j, CausalLM(j), None, None, prices)[-1]
    before = first.chosen().speed["step_s"]
    found = plan_file.corrected(first.device.efficiency, first.chosen(), 3 * before)
    prices["efficiency"]["cpu"] = asdict(found)
    again = planner.planners(j, CausalLM(j), None, None, prices)[-1]
    assert again.chosen().speed["step_s"] == pytest.approx(3 * before, rel=1e-6)


def test_the_file_is_one_that_prices_takes(tmp_path):
    j, place = job(), Location(str(tmp_path))
    measured = hardware.Efficiency(0.123456, 0.2, 0.3, 0.4, 0.5, 1e-5)
    plan_file.write_efficiency(tmp_path / "cpu.yaml", "cpu", measured, place, plan_file.Measured(j, 0.5, 20))
    read = hardware.efficiency(hardware.table(tmp_path / "cpu.yaml"), "cpu")
    assert asdict(read) == pytest.approx(asdict(measured), rel=1e-3)
    assert yaml.safe_load((tmp_path / "cpu.yaml").read_text()).keys() == {"efficiency"}


def test_a_run_without_measurements_is_an_error_that_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"--calibrate: .*has no checkpoint"):
        plan_file.measured(Location(str(tmp_path)))
    path = str(write(tmp_path, **{"data.sources.0.path": str(tmp_path / "nothing")}))
    code, _, lines, _ = run("plan", path, "--out", "x.yaml")
    assert code == 2 and "--out: has an effect only with --calibrate (x.yaml). Add --calibrate RUN" in lines[0]
    code, _, lines, _ = run("plan", path, "--calibrate", str(tmp_path))
    assert code == 2 and "isn't a run" in lines[0]


def test_efficiencies_that_make_no_sense_are_refused(tmp_path):
    file = tmp_path / "prices.yaml"
    gpu = job(**{"workers.gpus": 1})
    for text, said in (("{matmul: 0}", r"efficiency\.H100\.matmul: expected a number above 0, got 0"),
                       ("{matmull: 0.5}", r"efficiency\.H100\.matmull: unknown key. Did you mean 'matmul'")):  # fmt: skip
        file.write_text(f"efficiency: {{H100: {text}}}")
        with pytest.raises(ConfigError, match=said):
            hardware.resolve(gpu, hardware.table(file), "H100")
