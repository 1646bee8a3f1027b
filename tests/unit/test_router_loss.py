"""Tests mixtures of experts: the objective has the router's loss as in transformers, logged apart from the loss."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from heliostat.errors import ConfigError
from heliostat.runs.events import Steps
from heliostat.tracking.metrics import points
from heliostat.training.driver.progress import ProgressReporter
from heliostat.training.worker.objective import Objective
from rich.console import Console

from tests.unit.test_causal_lm import LLAMA, recipe

EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.3}
MODELS = {
    "mixtral": {**LLAMA, "arch": "mixtral", "num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {
        **LLAMA,
        "arch": "qwen3_moe",
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        **EXPERTS,
    },
    "olmoe": {**LLAMA, "arch": "olmoe", "num_experts": 4, "pad_token_id": 0, **EXPERTS},
}


def tokens(samples: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 96, (samples, 64)).astype(np.int32)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("arch", sorted(MODELS))
def test_the_objective_and_its_gradient_are_those_of_transformers(arch, checkpointing):
    """The model's own loss with labels is cross-entropy plus the coefficient times the router's loss; also with recomputed
    layers."""
    made = recipe(MODELS[arch], **{"train.activation_checkpointing": checkpointing})
    torch.manual_seed(0)
    model = made.build()
    batch = made.batch(tokens())
    part = Objective(made).part(model, batch, 1, made.terms(batch))
    part.objective.backward()
    ours = gradients(model)
    theirs = model(input_ids=batch["input_ids"], labels=batch["input_ids"])
    theirs.loss.backward()
    torch.testing.assert_close(part.objective, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.added, theirs.aux_loss.detach().reshape(1))
    assert part.objective.item() == pytest.approx(part.loss.item() / made.terms(batch) + 0.3 * part.added.item(), rel=1e-6)
    torch.testing.assert_close(ours, gradients(model), rtol=1e-4, atol=1e-6)
    unbalanced = recipe({**MODELS[arch], "output_router_logits": False})
    Objective(unbalanced).part(model, batch, 1, made.terms(batch)).objective.backward()
    alone = gradients(model)
    gates = [name for name in ours if "gate.weight" in name or "router" in name]
    assert gates and all((alone[g] - ours[g]).abs().max() > 1e-6 for g in gates)


def test_micro_batches_count_alike_whatever_their_number_of_terms():
    """With document_mask, micro-batches have different numbers of terms. The router's loss is still the mean over micro-batches,
    and DeepSpeed's average over them gives the whole objective."""
    made = recipe(MODELS["mixtral"], **{"data.document_mask": True})
    torch.manual_seed(0)
    model = made.build()
    content = tokens()
    content[0, ::3] = 0  # many documents
    micros = [made.batch(content[i : i + 1]) for i in range(4)]
    terms = sum(made.terms(m) for m in micros)
    assert made.terms(micros[0]) < 0.8 * made.terms(micros[1])
    parts = [Objective(made).part(model, m, 4, terms) for m in micros]
    averaged = sum(p.objective.item() for p in parts) / 4
    routers = [model(**{k: v for k, v in m.items() if k != "labels"}).aux_loss.item() for m in micros]
    losses = [made.loss(model, m).sum.item() for m in micros]
    assert averaged == pytest.approx(sum(losses) / terms + 0.3 * np.mean(routers), rel=1e-5)
    assert sum(p.added.item() for p in parts) == pytest.approx(np.mean(routers), rel=1e-5)


def test_a_dense_models_objective_is_bitwise_its_loss():
    made = recipe()
    torch.manual_seed(0)
    model, batch = made.build(), made.batch(tokens())
    part = Objective(made).part(model, batch, 6, 252)
    summed = made.loss(model, batch).sum
    assert part.added is None
    assert torch.equal(part.objective, summed * (6 / 252)) and torch.equal(part.loss, summed)


def test_the_router_loss_is_a_curve_of_its_own_in_mlflow_and_at_the_terminal(caplog):
    event = Steps(first=4, loss=[3.0, 2.0], grad_norm=[1.0, 1.0], lr=[0.1, 0.1], seconds=1.0, tokens_per_second=9.0,
                  data_wait=0.0, added={"router_loss": [1.5, 1.25]})  # fmt: skip
    found = {(p.key, p.step): p.value for p in points(event)}
    assert (found["train/router_loss", 5], found["train/router_loss", 6], found["train/loss", 6]) == (1.5, 1.25, 2.0)
    assert not any(p.key == "train/router_loss" for p in points(replace(event, added={})))
    caplog.set_level(logging.INFO, logger="heliostat")
    ProgressReporter(Console(force_terminal=False), "run", 0, 10, "tokens").event(event)
    assert "loss 2.0000  router loss 1.2500  lr" in caplog.text


def test_a_pretrained_mixture_can_be_told_to_train_its_router(tmp_path):
    """It is the only key that a job may set in addition to `pretrained`. A model without a router rejects it."""
    transformers.MixtralConfig(**{k: v for k, v in MODELS["mixtral"].items() if k not in ("arch", "output_router_logits")},
                               ).save_pretrained(tmp_path / "moe")  # fmt: skip
    transformers.LlamaConfig().save_pretrained(tmp_path / "dense")
    assert recipe({"pretrained": str(tmp_path / "moe"), "output_router_logits": True}).config.output_router_logits is True
    assert not recipe({"pretrained": str(tmp_path / "moe")}).config.output_router_logits
    with pytest.raises(ConfigError, match=r"^model\.output_router_logits: .* has no router"):
        recipe({"pretrained": str(tmp_path / "dense"), "output_router_logits": True})


def test_experts_that_nothing_balances_are_told_of_and_a_loss_that_is_not_there_is_refused(caplog):
    """The configuration's coefficient has no effect while output_router_logits is unset. heliostat reports this, unless the job
    chose it."""
    model = {k: v for k, v in MODELS["mixtral"].items() if k != "output_router_logits"}
    for given, told in (
        (model, True),
        ({**model, "output_router_logits": False}, False),
        (MODELS["mixtral"], False),
        (LLAMA, False),
    ):
        caplog.clear()
        recipe(given).probe()
        assert ("leaves out the router's loss (coefficient 0.3)" in caplog.text) == told
    latent = {"arch": "deepseek_v3", "output_router_logits": True}
    with pytest.raises(ConfigError, match=r"model\.output_router_logits: 'deepseek_v3' returns no router loss"):
        recipe(latent).probe()
