"""Tests that `train.parallel.expert` is rejected where experts can't be sharded, with the reason and an alternative.

The plan also knows what workers with sharded experts hold, gather, and send.
"""

import math

import pytest
from heliostat.errors import ConfigError
from heliostat.plan import hardware, layouts, planner, ranking, zero_layout
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.text.causal_lm import CausalLM

from tests.unit.build_job import job
from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import LLAMA, recipe
from tests.unit.test_experts import FAMILIES, MODELS
from tests.unit.test_spec import faults

KEY = "train.parallel.expert"
TWO = {KEY: 2, "workers.count": 2, "train.zero.stage": 3}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"workers.count": 3, "train.global_batch_size": 12}, "doesn't divide workers.count 3. Use 2 or 4 workers"),
        ({"train.zero.stage": 2}, "needs train.zero.stage 3, which shards the other weights. Set train.zero.stage to 3"),
        ({"train.compile": True}, "isn't supported with train.compile. Remove one of them"),
        ({"train.parallel.sequence": 2}, "isn't supported with train.parallel.sequence. Remove one of them"),
        ({"train.sdc_check": {"every": 5}}, "isn't supported with train.sdc_check. Remove one of them"),
        ({"train.optimizer.name": "muon"}, "isn't supported with train.optimizer.name: muon. Remove one of them"),
    ],
)
def test_what_experts_cannot_be_divided_with_is_refused(changes, line):
    assert faults(**{**TWO, **changes}) == [f"{KEY}: 2 {line}"]


def test_an_elastic_run_has_multiples_of_those_that_divide_experts():
    elastic = {KEY: 2, "train.zero.stage": 3}
    assert job(**elastic, **{"workers.count": [1, 8]}).worker_counts() == [2, 4]  # of 8 samples in micro-batches of 2
    (line,) = faults(**{**elastic, KEY: 4, "workers.count": [1, 3]})
    assert line == f"{KEY}: 4: no number from 1 to 3 (workers.count) is a multiple of this number. Change one of the two keys"


@pytest.mark.parametrize(
    ("model", "error"),
    [
        (LLAMA, r"'llama' has no experts\. Set this key to 1"),
        ({**MODELS["mixtral"], "num_local_experts": 9}, r"2 doesn't divide the model's 9 experts\. Use 3 or 9"),
        ({**MODELS["mixtral"], "num_local_experts": 5}, r"2 doesn't divide the model's 5 experts\. Use 5"),
    ],
)
def test_a_model_whose_experts_cannot_be_divided_is_refused(model, error):
    with pytest.raises(ConfigError, match=rf"^train\.parallel\.expert: {error}$"):
        recipe(model, **TWO).probe()


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_experts_of_an_architecture_can_be_divided_where_they_are_stacked(arch):
    recipe({**FAMILIES[arch], "arch": arch}, **TWO).probe()


def test_a_recipe_that_divides_no_experts_is_refused():
    made = job(**TWO, **{"evaluate": None})
    with pytest.raises(
        ConfigError, match=rf"^{KEY}: .* expert parallelism.*or derive the recipe from heliostat.recipes.protocol.Divides"
    ):
        require_abilities(made, Around(lambda: None))


@pytest.mark.parametrize(("workers", "parts"), [(2, 2), (4, 2), (4, 4), (6, 3), (12, 4)])
def test_slices_of_divided_experts_are_every_element_once(workers, parts):
    """Each worker has a slice of its own part of each layer's experts, in the order of the group's ranks."""
    shapes = {"a": (7, 13), "experts": (12, 5, 7), "c": (1,)}
    seen = {n: [0] * math.prod(s) for n, s in shapes.items()}
    for rank, owned in enumerate(zero_layout.slices(shapes, 3, workers, stacked=frozenset({"experts"}), parts=parts)):
        for name, start, numel in owned:
            for i in range(start, start + numel):
                seen[name][i] += 1
            part = math.prod(shapes["experts"]) // parts
            assert name != "experts" or rank % parts == start // part == (start + numel - 1) // part
    assert all(set(counts) == {1} for counts in seen.values())


def planned(**changes):
    """Returns the plan of a job on eight GPUs, most of whose parameters belong to experts."""
    sizes = {"num_local_experts": 16, "hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 4}
    layout = {
        "workers.gpus": 1,
        "workers.count": 8,
        "train.global_batch_size": 64,
        "train.zero.stage": 3,
        "train.precision": "bf16",
    }
    made = job(**{**layout, "model": {**MODELS["mixtral"], **sizes}, **changes})
    return planner.planners(made, CausalLM(made), None, None, hardware.table())[-1]


def test_divided_experts_are_not_gathered_and_tokens_travel():
    """Memory for state stays the same. The gathered and sent bytes fall by almost the degree."""
    whole, divided = planned().chosen(), planned(**{KEY: 8}).chosen()
    assert divided.memory["optimizer"] == whole.memory["optimizer"]
    assert divided.memory["working"] < whole.memory["working"] / 3
    assert divided.communication["bytes_per_step"] < whole.communication["bytes_per_step"] / 3


def test_layouts_that_are_ranked_keep_the_degree_and_its_stage():
    made = planned(**{KEY: 2})
    shared = ranking.degrees(made.job, CausalLM(made.job))
    assert list(shared) == [1]
    found = list(layouts.candidates(made.job, 8, shared))
    assert {one.stage for one in found} == {3} and not any(one.offload_optimizer or one.offload_param for one in found)
