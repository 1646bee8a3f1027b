"""Tests mixtures of experts: tokens are counted by expert, routers are balanced by z-loss and bias, and unknown keys are rejected
by name."""

import logging

import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.parallel import experts
from heliostat.recipes.text import flops
from heliostat.runs.events import Steps
from heliostat.tracking.metrics import points
from heliostat.training.worker.objective import ExpertLoad, Objective, load

from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import LLAMA, recipe
from tests.unit.test_router_loss import MODELS, tokens

ROUTED = {**LLAMA, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {**ROUTED, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
          "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
          "v_head_dim": 16}  # fmt: skip
FAMILIES = {
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**ROUTED, "num_experts": 4, "decoder_sparse_step": 1},
    "qwen2_moe": {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "olmoe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 3, "pad_token_id": 0},
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "lfm2_moe": {**ROUTED, "num_experts": 4, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2,
                 "use_expert_bias": True},
}  # fmt: skip
WITH_BIAS = ("deepseek_v3", "lfm2_moe")


def made(arch: str, **changes):
    return recipe({**FAMILIES[arch], "arch": arch}, **changes)


def chosen(model, batch) -> torch.Tensor:
    """Returns the tokens of each expert, counted from the routers' results or the experts' inputs in each layer."""
    found = []

    def see(module, args, named):
        found.append((named.get("top_k_index", args[1] if len(args) > 1 else None), module.num_experts))

    handles = [m.register_forward_pre_hook(see, with_kwargs=True) for m in experts.layers(model)]
    with torch.no_grad():
        model(**{k: v for k, v in batch.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return torch.stack([torch.bincount(index.flatten(), minlength=size + 1) for index, size in found])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_every_token_is_counted_once_where_it_is_sent(arch, checkpointing):
    """In every layer with experts, the count is tokens times choices. Layers that checkpointing recomputes, evaluations, and
    other forward passes don't count."""
    one = made(arch, **{"train.activation_checkpointing": checkpointing})
    torch.manual_seed(0)
    model, batch = one.build(), one.batch(tokens())
    part = Objective(one).part(model, batch, 1, one.terms(batch))
    counted = part.routed.clone()
    part.objective.backward()
    assert torch.equal(part.routed, counted)
    each = one.config.num_experts_per_tok
    assert (counted.sum(1) == 4 * 64 * each).all() and (counted[:, -1] == 0).all()
    assert len(counted) == len(experts.layers(model)) > 0
    assert torch.equal(counted, chosen(model, batch))
    with torch.no_grad():
        again = one.loss(model, batch).routed
    assert torch.equal(again, counted)


def test_a_dense_model_counts_nothing():
    one = recipe()
    model, batch = one.build(), one.batch(tokens())
    assert one.loss(model, batch).routed is None and one.active_parameters(model) is None and one.exact(model) == []


def test_the_sums_are_the_same_in_any_micro_batches():
    """They are equal to the last token with one micro-batch of four samples, two of two, and four of one."""
    one = made("qwen3_moe")
    torch.manual_seed(0)
    model, content, sums = one.build(), tokens(), []
    for size in (4, 2, 1):
        micros = [one.batch(content[i : i + size]) for i in range(0, 4, size)]
        sums.append(torch.stack([one.loss(model, m).routed for m in micros]).sum(0))
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


def test_the_load_of_experts_is_described_by_four_numbers():
    even, skewed = [[6, 6, 6, 6, 0], [6, 6, 6, 6, 0]], [[24, 0, 0, 0, 0], [9, 9, 2, 2, 2]]
    found = load(torch.tensor([even, skewed]))
    assert {name: values.tolist() for name, values in found.items()} == {
        "imbalance": [1.0, pytest.approx((4 + 9 / 5.5) / 2)],
        "imbalance_worst": [1.0, 4.0],
        "unused": [0.0, 3 / 8],
        "dropped": [0.0, 2 / 48],
    }


def test_the_load_is_four_curves_in_mlflow():
    event = Steps(first=4, loss=[3.0, 2.0], grad_norm=[1.0, 1.0], lr=[0.1, 0.1], seconds=1.0, tokens_per_second=9.0,
                  data_wait=0.0, experts={"imbalance": [1.5, 1.25], "unused": [0.5, 0.0]})  # fmt: skip
    found = {(p.key, p.step): p.value for p in points(event)}
    assert found["train/experts/imbalance", 5] == 1.5 and found["train/experts/unused", 6] == 0.0
    assert not any("dropped" in key for key, _ in found)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", ["mixtral", "deepseek_v3", "granitemoe"])
def test_the_z_loss_is_that_of_the_routers_logits(arch, checkpointing):
    """The loss follows its formula, from the values that transformers records, and so does its gradient, also where layers are
    recomputed."""
    keys = {**FAMILIES[arch], "arch": arch, "router_z_loss_coef": 0.25}
    one = recipe(keys, **{"train.activation_checkpointing": checkpointing})
    torch.manual_seed(0)
    model, batch = one.build(), one.batch(tokens())
    part = Objective(one).part(model, batch, 1, one.terms(batch))
    part.objective.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model.model(input_ids=batch["input_ids"], output_router_logits=True).router_logits
    z = torch.stack([torch.logsumexp(each.reshape(4 * 64, -1).float(), -1).pow(2).mean() for each in logits]).mean()
    torch.testing.assert_close(part.added, z.detach().reshape(1))
    plain = recipe({**FAMILIES[arch], "arch": arch})
    (plain.loss(model, batch).sum / plain.terms(batch) + 0.25 * z).backward()
    torch.testing.assert_close(ours, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, rtol=1e-4, atol=1e-6)


def test_both_losses_of_a_router_are_told_apart():
    one = recipe({**MODELS["mixtral"], "router_z_loss_coef": 0.1})
    model, batch = one.build(), one.batch(tokens())
    found = one.loss(model, batch)
    assert list(found.parts) == ["router_loss", "router_z_loss"]
    assert [p.weight for p in found.parts.values()] == [0.3, 0.1]


@pytest.mark.parametrize("arch", WITH_BIAS)
def test_the_bias_that_balances_is_the_one_that_routers_choose_with(arch):
    """A large bias on the third expert sends it every token. A step of balancing lowers it and raises the others, by the rate."""
    one = recipe({**FAMILIES[arch], "arch": arch, "router_bias_update_rate": 0.01})
    torch.manual_seed(0)
    model, batch = one.build(), one.batch(tokens())
    found = experts.biases(model)
    assert one.balances and len(found) == len(experts.layers(model)) and one.exact(model) == [name for name, _ in found]
    for _, bias in found:
        bias.zero_()
        bias[2] = 50.0
    routed = one.loss(model, batch).routed
    assert (routed[:, 2] == 4 * 64).all()
    before = [bias.clone() for _, bias in found]
    one.balance(model, routed)
    given = routed[:, :-1]
    for layer, (old, (_, bias)) in enumerate(zip(before, experts.biases(model), strict=True)):
        signs = torch.sign(given[layer].double().mean() - given[layer].double())
        torch.testing.assert_close(bias - old, (0.01 * signs).float(), rtol=0, atol=1e-5)


def test_balancing_by_bias_evens_out_a_skewed_router():
    """There is no gradient. For a router that prefers one expert, the excess of the busiest expert over the mean falls to half or
    less."""
    one = recipe({**LATENT, "arch": "deepseek_v3", "router_bias_update_rate": 0.002})
    torch.manual_seed(0)
    model, batch = one.build().eval(), one.batch(tokens())
    experts.biases(model)[0][1][0] = 0.1
    measured = []
    for _ in range(80):
        with torch.no_grad():
            routed = one.loss(model, batch).routed
        one.balance(model, routed)
        measured.append(float(load(routed[None])["imbalance_worst"]))
    assert measured[0] > 1.9 and measured[-1] - 1 < (measured[0] - 1) / 2


@pytest.fixture
def alone():
    """Creates a process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_balancing_waits_for_a_step_that_changed_the_weights(alone):
    """It doesn't run after a step that fp16 skipped. The counts are still reported, once."""

    class Engine:
        module, applied = None, False

        def was_step_applied(self):
            return self.applied

    calls = []

    class Balancing(Around):
        balances = True

        def balance(self, model, routed):
            calls.append(routed.tolist())

    engine = Engine()
    kept = ExpertLoad(Balancing(torch.nn.Identity), engine)
    for engine.applied in (False, True):
        kept.add(torch.tensor([[3, 1, 0]]))
        kept.add(torch.tensor([[1, 1, 0]]))
        kept.end_step()
    assert calls == [[[4, 2, 0]]]
    assert kept.report()["imbalance"] == [4 / 3, 4 / 3] and kept.report() == {}


def test_experts_are_multiplied_as_the_job_says():
    """The default is grouped_mm. Both ways give the same loss, and an unknown name is rejected with the nearest one."""
    losses = {}
    for name in (None, "grouped_mm", "batched_mm", "eager"):
        one = recipe({**MODELS["qwen3_moe"], **({"experts_implementation": name} if name else {})})
        torch.manual_seed(0)
        model, batch = one.build(), one.batch(tokens())
        assert model.config._experts_implementation == (name or "grouped_mm")
        losses[name] = one.loss(model, batch).sum.item()
    assert losses[None] == losses["grouped_mm"]
    assert max(losses.values()) == pytest.approx(min(losses.values()), rel=1e-5)
    with pytest.raises(ConfigError, match=r"^model\.experts_implementation: 'grouped' isn't a choice. Did you mean 'grouped_mm'"):
        recipe({**MODELS["qwen3_moe"], "experts_implementation": "grouped"})


@pytest.mark.parametrize(
    ("model", "changes", "error"),
    [
        ({**LLAMA, "arch": "llama", "experts_implementation": "eager"}, {}, r"experts_implementation: 'llama' has no experts"),
        ({**LLAMA, "arch": "llama", "router_z_loss_coef": 0.1}, {}, r"router_z_loss_coef: 'llama' has no experts"),
        (
            {**MODELS["mixtral"], "router_bias_update_rate": 0.1},
            {},
            r"router_bias_update_rate: the routers of 'mixtral' have no bias",
        ),
        ({**MODELS["mixtral"], "router_z_loss_coef": -1}, {}, r"router_z_loss_coef: -1 is too small. Use 0 or more"),
        (
            {**MODELS["mixtral"], "router_z_loss_coef": 0.1},
            {"train.compile": True},
            r"router_z_loss_coef: not supported with train\.compile",
        ),
    ],
)
def test_a_key_that_the_model_has_no_use_for_is_refused(model, changes, error):
    with pytest.raises(ConfigError, match=rf"^model\.{error}"):
        recipe(model, **changes).probe()


def test_biases_that_nothing_changes_are_told_of(caplog):
    """The message appears once, but not if the job sets the rate, to 0 or more, and not for a model without biases."""
    for keys, told in (({}, True), ({"router_bias_update_rate": 0.0}, False), ({"router_bias_update_rate": 0.001}, False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            recipe({**LATENT, "arch": "deepseek_v3", **keys}).probe()
        assert ("router_bias_update_rate: not set" in caplog.text) == told


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_active_parameters_are_all_but_the_experts_that_a_token_is_not_sent_to(arch):
    one = made(arch)
    model = one.build()
    inside = sum(p.numel() for m in experts.layers(model) for p in m.parameters())
    share = one.config.num_experts_per_tok / 4
    total = sum(p.numel() for p in model.parameters())
    assert one.active_parameters(model) == flops.active(model, one.config) == total - round(inside * (1 - share))
