"""Tests `train.tiled_loss`: loss, gradients, and scores equal those of whole logits, which never exist. It is rejected where they
would differ."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from heliostat.config.spec import Job
from heliostat.errors import ConfigError
from heliostat.recipes.conformance import require_abilities
from heliostat.recipes.protocol import IGNORED
from heliostat.recipes.text import tiled_loss
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.validation.check import check_job
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.build_job import BASE, job
from tests.unit.build_recipe import Around
from tests.unit.test_causal_lm import recipe
from tests.unit.test_spec import faults

TILED = {"train.tiled_loss": True}
VOCABULARY, ROWS = 89, 7  # no other width of a model


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch) -> None:
    """Sets a tile size that doesn't divide the number of tokens."""
    monkeypatch.setattr(tiled_loss, "tile_rows", lambda hidden, vocabulary: ROWS)


class Largest(TorchDispatchMode):
    """Records the number of logits in the largest result with this number of columns."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == VOCABULARY:
            self.rows = max(self.rows, out.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(bias):
    """In fp64, with ignored targets and an upstream gradient."""
    torch.manual_seed(0)
    given = [torch.randn(2, 33, 16, dtype=torch.float64), torch.randn(VOCABULARY, 16, dtype=torch.float64)]
    given += [torch.randn(VOCABULARY, dtype=torch.float64)] if bias else []
    targets = torch.randint(0, VOCABULARY, (2, 33))
    targets[:, 5:9] = IGNORED
    results = []
    for tiled in (False, True):
        hidden, weight, *rest = [x.clone().requires_grad_() for x in given]
        offset = rest[0] if rest else None
        if tiled:
            loss = tiled_loss.TiledCrossEntropy.apply(hidden, weight, offset, targets)
        else:
            logits = F.linear(hidden, weight, offset).flatten(0, 1).float()
            loss = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        (loss * 0.25).backward()
        results.append([loss.detach().double(), hidden.grad, weight.grad, *(x.grad for x in rest)])
    for whole, mine in zip(*results, strict=True):
        assert mine.dtype == whole.dtype and (mine - whole).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_a_model_trains_and_is_scored_without_all_logits(arch, monkeypatch):
    """With tied and untied weights, and with experts and their router's loss. No tensor has more logits than a tile."""
    model = {"arch": arch, "vocab_size": VOCABULARY}
    model |= {**BASE["model"], **model} if arch != "gpt2" else {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model |= {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True} if arch == "mixtral" else {}
    monkeypatch.setattr(CausalLM, "_token_bytes", torch.ones(2, VOCABULARY, dtype=torch.int64))
    tokens, found = np.random.default_rng(0).integers(0, VOCABULARY, (2, 64)).astype(np.int32), []
    for changes in ({}, TILED):
        made = recipe(model, **changes)
        torch.manual_seed(0)
        built = made.build().eval()
        batch = made.batch(tokens)
        with Largest() as seen:
            loss = made.loss(built, batch)
            (loss.sum + sum(part.value for part in loss.parts.values())).backward()
            with torch.no_grad():
                scores = made.evaluate(built, batch)
        found.append((loss.sum.item(), {n: p.grad for n, p in built.named_parameters()}, scores))
        assert seen.rows <= 32 if changes else seen.rows == 128  # 32: a weight, transposed
    (loss, gradients, scores), (mine, my_gradients, my_scores) = found
    assert mine == pytest.approx(loss, rel=1e-6)
    assert all((my_gradients[n] - g).norm() <= 1e-5 * g.norm() for n, g in gradients.items() if g is not None)
    assert all(torch.allclose(my_scores[n], s, rtol=1e-5) for n, s in scores.items())


@pytest.mark.parametrize(("model", "right"), [
    ({"arch": "llama"}, True), ({"arch": "qwen3_moe"}, True), ({"arch": "granite"}, True),
    ({"arch": "granite", "logits_scaling": 8.0}, False), ({"arch": "gemma2"}, False), ({"arch": "cohere"}, False),
])  # fmt: skip
def test_an_architecture_that_changes_its_logits_afterwards_is_refused(model, right):
    """A scale or a cap after the last layer would have to apply to the loss."""
    made = recipe(model, **TILED)
    if right:
        made.probe()
        return
    with pytest.raises(ConfigError, match=rf"train\.tiled_loss: not supported for '{model['arch']}': .*") as e:
        made.probe()
    assert "\n" not in str(e.value)


def test_what_cannot_hold_it_is_refused_by_name():
    (line,) = faults(**TILED, **{"train.compile": True})
    assert line == "train.tiled_loss: true isn't supported with train.compile. Set one of them to false"
    with pytest.raises(ConfigError, match=re.escape("doesn't support a tiled loss. Set this key to false")):
        require_abilities(job(**TILED, evaluate=None), Around(torch.nn.Module))


def test_a_job_with_it_passes_the_check():
    made, found = check_job(job(**TILED))
    assert isinstance(made, Job) and isinstance(found, CausalLM) and found.tiled
