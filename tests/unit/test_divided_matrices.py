"""Tests that `train.parallel.tensor` is rejected where matrices can't be sharded, with the reason and an alternative.

The plan also knows what workers with sharded matrices hold and send.
"""

import math

import pytest
from heliostat.engine import tensor_group
from heliostat.errors import ConfigError
from heliostat.parallel import divided_matrices, tiny
from heliostat.plan import dryrun, hardware, layouts, planner
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.text.causal_lm import CausalLM

from tests.integration import selection
from tests.unit.build_job import job
from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import LLAMA, recipe
from tests.unit.test_experts import MODELS
from tests.unit.test_spec import faults

KEY = "train.parallel.tensor"
TWO = {KEY: 2, "workers.count": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma2": {"head_dim": 8},
    "gpt_neox": {"num_key_value_heads": None},
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"workers.count": 3, "train.global_batch_size": 12}, "doesn't divide workers.count 3. Use 2 or 4 workers"),
        (
            {"train.zero.stage": 3},
            "isn't supported with train.zero.stage 3, which shards every matrix over all workers. Use stage 1 or 2",
        ),
        ({"train.compile": True}, "isn't supported with train.compile. Remove one of them"),
        ({"train.tiled_mlp": True}, "isn't supported with train.tiled_mlp. Remove one of them"),
        ({"train.sdc_check": {"every": 5}}, "isn't supported with train.sdc_check. Remove one of them"),
        ({"train.zero.offload": {"optimizer": "cpu"}}, "isn't supported with train.zero.offload. Remove one of them"),
        ({"train.optimizer.name": "muon"}, "isn't supported with train.optimizer.name: muon. Remove one of them"),
    ],
)
def test_what_matrices_cannot_be_divided_with_is_refused(changes, line):
    assert faults(**{**TWO, **changes}) == [f"{KEY}: 2 {line}"]


def test_workers_that_divide_matrices_compute_each_sample_together():
    """Virtual ranks are distributed over groups, an elastic run has complete groups, and the error about batches counts
    groups."""
    made = job(**{KEY: 2, "workers.count": 4})
    assert (made.replicas, made.accumulation) == (2, 2)
    assert job(**{KEY: 2, "workers.count": [1, 8]}).worker_counts() == [2, 4, 8]
    (line,) = faults(**{KEY: 2, "workers.count": 6})
    assert line.startswith(
        "train.global_batch_size: 8 isn't divisible by workers.count 6 / train.parallel.tensor 2 x train.micro_batch_size 2"
    )


@pytest.mark.parametrize(
    ("model", "degree", "error"),
    [
        ({**LLAMA, "num_key_value_heads": 1}, 2, r"2 doesn't divide model\.num_key_value_heads 1\. Set this key to 1"),
        ({**LLAMA, "intermediate_size": 65}, 2, r"2 doesn't divide model\.intermediate_size 65\. Set this key to 1"),
        (LLAMA, 4, r"4 doesn't divide model\.num_key_value_heads 2\. Use 2"),
        ({"arch": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}, 2,
         r"transformers has no tensor-parallel plan for 'gpt2'\. Set this key to 1"),
        (MODELS["mixtral"], 2, r"not supported for the experts of 'mixtral'\. Use train\.parallel\.expert"),
        ({**LLAMA, "arch": "olmo2"}, 2,
         r"not supported: transformers shards '.*q_proj' of 'olmo2' by 'colwise_gather_output'\. Set this key to 1"),
    ],
)  # fmt: skip
def test_a_model_whose_matrices_cannot_be_divided_is_refused(model, degree, error):
    with pytest.raises(ConfigError, match=rf"^train\.parallel\.tensor: {error}$"):
        recipe(model, **{KEY: degree, "workers.count": degree}).probe()


@pytest.mark.parametrize("arch", selection.kept(FAMILIES, "qwen3", "gpt_neox"))
def test_parts_of_a_model_compute_what_the_whole_does(arch):
    """This was tried for these architectures. DeepSpeed's configuration names each matrix once."""
    keys = {**LLAMA, "arch": arch, **FAMILIES[arch]}
    made = recipe({key: value for key, value in keys.items() if value is not None}, **TWO)
    made.probe()
    named = made.divided_matrices(made.build())
    told = tensor_group.settings(made, made.build(), 2)["tensor_parallel"]["partition_config"]["layer_specs"]
    assert set(named.values()) - {"summed"} == {"column", "row"} and len(told) == len(set(named.values()))
    assert sum(len(spec["patterns"]) for spec in told) == len({name.replace("layers.1.", "layers.0.") for name in named})


def test_the_heads_of_large_models_are_divided_to_rounding():
    """At a head_dim of 128, random weights saturate the softmax: in fp32, the logits differed by 1e-3 with 8 layers, and by 8e-5
    with 3."""
    wide = {**LLAMA, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    made = recipe({**wide, "num_hidden_layers": 3}, **TWO)
    off, narrowed = tiny.attempt(made, divided_matrices.played, 2 * divided_matrices.PARTS)
    assert off < 1e-7 and not narrowed


def test_a_part_that_would_compute_something_else_is_found(monkeypatch):
    """For example, a part that doesn't sum a row of products."""
    monkeypatch.setattr(divided_matrices._Meeting, "_sum", lambda self, number, made: made)
    monkeypatch.setattr(divided_matrices, "_known", {})
    with pytest.raises(ConfigError, match=r"^train\.parallel\.tensor: not supported for 'llama': the shards' logits differ"):
        recipe(LLAMA, **TWO).probe()


def test_a_norm_of_each_workers_own_heads_is_found():
    """The logits of each part are right, but the gradient would cover only some of the heads."""
    phi = {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "arch": "phi", "qk_layernorm": True}
    with pytest.raises(ConfigError, match=r"not supported for 'phi': every worker would have all of '.*q_layernorm'"):
        recipe(phi, **TWO).probe()
    recipe({**phi, "qk_layernorm": False}, **TWO).probe()


def test_biases_of_what_is_summed_are_summed_too():
    patterns = tensor_group._patterns({"model.layers.3.norm": "summed", "model.layers.3.q": "column"})
    assert patterns == {
        "summed": [r"^model\.layers\.\d+\.norm\.(weight|bias)$"],
        "column": [r"^model\.layers\.\d+\.q\.weight$"],
    }


def test_a_recipe_that_divides_no_matrices_is_refused():
    with pytest.raises(ConfigError, match=r"^train\.parallel\.tensor: .* doesn't support tensor parallelism\. Set this key to 1"):
        made = job(**TWO, evaluate=None)
        require_abilities(made, Around(made))


def test_the_plan_knows_what_a_worker_has_of_each_matrix():
    """The plan has the state, activations, and operations of its part, and two all-reduces per layer: one for each matrix in the
    forward pass, one for each matrix of inputs in the backward pass."""
    four = {"workers.count": 4, "workers.gpus": 1, "model": {**LLAMA, "vocab_size": 96}}
    made = [job(**four, **{"train.parallel": {"tensor": t}}) for t in (1, 2)]
    whole, half = (planner.planners(one, CausalLM(one), None, "H100", hardware.table())[-1] for one in made)
    divided = sum(math.prod(half.model.shapes[n]) for n in half.model.divided)
    assert 0.3 < divided / half.model.parameters < 0.9
    assert sum(map(math.prod, half.shapes.values())) == half.model.parameters - divided // 2
    assert half.model.flops == whole.model.flops and half.replicas == 2
    mine, all_ = half.chosen(), whole.chosen()
    assert mine.memory["weights"] == 2 * (half.model.parameters - divided // 2) < all_.memory["weights"]
    assert mine.memory["activations"] < all_.memory["activations"]
    assert sum(w.flops * w.count for w in half.work) < 0.8 * sum(w.flops * w.count for w in whole.work)
    rows, columns = half.model.added()
    assert (rows, columns) == (2 * 2 * 32, 2 * 5 * 32)
    assert mine.communication["bytes_per_step"] > 0 and {one.stage for one in layouts.candidates(half.job, 4)} == {1, 2}
    two_nodes = job(**{**four, "workers.count": 16}, **{"train.parallel": {"tensor": 2}, "train.global_batch_size": 16})
    moved = planner.planners(two_nodes, CausalLM(two_nodes), None, "H100", hardware.table())[-1]._traffic(
        layouts.of(two_nodes), 1
    )
    assert moved.between_nodes(8) == 2 * moved.around > 0 == moved.between_nodes(16)  # a ring for each part leaves a node
    saved, _ = dryrun.checkpoint_index(half.job, half.model, dryrun._owned(half.job, half.model))  # every element once
    assert saved.tensors["master.model.layers.0.mlp.down_proj.weight"].columns == (2, 64)
