"""Attention as this project computes it on CPUs: the numbers are those of torch's own, whatever the shapes and the mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from heliostat import cpu_kernels
from heliostat.cpu_kernels import attention, linear

from tests.unit.test_causal_lm import END, LLAMA, recipe


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [33, 64, 150, 512])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients_are_those_of_scaled_dot_product_attention(heads, groups, length, masked):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, length, 20), (2, groups, length, 20), (2, groups, length, 20)]
    inputs = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    mask = None
    if masked:
        mask = (torch.rand(2, 1, length, length, generator=generator) < 0.4).tril() | torch.eye(length, dtype=torch.bool)
    upstream = torch.randn(2, length, heads, 20, generator=generator)
    ours, _ = attention.attend(torch.nn.Identity(), *inputs, mask, scaling=0.3)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=not masked, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs.transpose(1, 2))
    gradients = [torch.autograd.grad(o, inputs, upstream) for o in (ours, theirs.transpose(1, 2))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("arch", attention.MODELS)
def test_a_model_that_uses_it_is_the_model_as_transformers_builds_it(arch, document_mask):
    """The same logits from the same weights, packed documents or not."""
    keys, data = {**LLAMA, "arch": arch}, {"data.document_mask": document_mask}
    made = [recipe(keys, **data, **{"train.cpu_kernels": on}) for on in (True, False)]
    content = np.random.default_rng(0).integers(0, 96, (3, 64)).astype(np.int32)
    content[0, [5, 40]] = END
    logits = []
    used = []
    for one in made:
        torch.manual_seed(0)
        model = one.build()
        cpu_kernels.use(model, one.job, one.causal)
        used.append(model.config._attn_implementation == attention.NAME)
        logits.append(model(**{k: v for k, v in one.batch(content).items() if k != "labels"}).logits)
    assert used == [True, False]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "attends", "multiplies"),
    [
        ({}, True, True),
        ({"train.cpu_kernels": False}, False, False),
        ({"workers.gpus": 1}, False, False),
        ({"train.precision": "bf16", "train.zero.stage": 1}, True, False),
        ({"train.compile": True}, True, False),
        ({"data.sequence_length": attention.LONGEST + 1}, False, True),
        ({"model": {"arch": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 96}}, False, True),
    ],
    ids=str,
)
def test_kernels_are_used_on_cpus_where_they_fit_and_the_job_does_not_switch_them_off(changes, attends, multiplies):
    """One switch for all of them; GPUs never meet them."""
    made = recipe(changes.get("model"), **{"train.precision": "fp32", **{k: v for k, v in changes.items() if k != "model"}})
    model = made.build()
    cpu_kernels.use(model, made.job, made.causal)
    assert (model.config._attn_implementation == attention.NAME) == attends
    assert isinstance(model.lm_head, linear.CpuLinear) == (multiplies and linear.SUPPORTED)


def test_a_model_that_does_not_say_that_it_is_causal_keeps_its_attention():
    """It may look ahead, or use masks of its own."""
    made = recipe()
    model = made.build()
    cpu_kernels.use(model, made.job, causal=False)
    assert model.config._attn_implementation != attention.NAME
