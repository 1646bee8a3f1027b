"""Tests the keys that choose kernels: what is rejected before the start, and that each kernel matches its CPU reference
implementation."""

import importlib.util

import pytest
import torch
from heliostat.config import rules
from heliostat.errors import ConfigError, MissingExtraError
from heliostat.numerics import small
from heliostat.parallel import tiny
from heliostat.recipes import CausalLM
from heliostat.recipes.text import attention, checkpointing, float8
from heliostat.validation.check import check_devices, check_job

from tests.unit.build_job import job as build_job

MODEL = {"arch": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 128, "vocab_size": 96}  # fmt: skip
GPU = {"workers": {"count": 1, "gpus": 1}, "train.precision": "bf16"}
ATTENTION, FP8, COMPILE = "train.attention", "train.fp8", "train.compile"


def job(**changes):
    return build_job(**{"model": MODEL, "data.sequence_length": 48} | changes)


def refusals(**changes):
    """Returns the lines with which a job is rejected."""
    try:
        made = job(**changes)
    except ConfigError as e:
        return str(e)
    return "\n".join(rules.faults(made))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({ATTENTION: "flex_attention"}, "train.attention: 'flex_attention' needs GPUs (workers.gpus is 0). Use sdpa"),
        (GPU | {ATTENTION: "flash_attention_2", "train.precision": "fp32"}, "supports only bf16 and fp16"),
        (GPU | {ATTENTION: "flash_attention_2", "data.document_mask": True, "train.micro_batch_size": 2,
                "train.global_batch_size": 4},
         "needs micro-batches of one sample, and train.micro_batch_size is 2"),
        (GPU | {ATTENTION: "flex_attention", "workers": {"count": 2, "gpus": 1}, "train.parallel.sequence": 2}, "isn't supp"),
        ({ATTENTION: "flash"}, "train.attention"),
        ({FP8: True, "train.precision": "bf16"}, "train.fp8: true needs GPUs (workers.gpus is 0). Set train.fp8 to false"),
        (GPU | {FP8: True, "train.precision": "fp16"}, "with train.precision 'fp16'"),
        (GPU | {FP8: True, "train.tiled_mlp": True}, "isn't supported with train.tiled_mlp"),
        (GPU | {COMPILE: "blocks", "train.tiled_loss": True}, "train.tiled_loss: true isn't supported with train.compile"),
        ({COMPILE: "blocks", "train.zero.stage": 3}, "train.compile: blocks isn't supported with train.zero.stage 3"),
        ({COMPILE: "layers"}, "'layers' isn't a choice. Use true, false, or blocks"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(changes, line):
    assert line in refusals(**changes)


def test_what_can_be_is_not():
    assert not refusals(**GPU, **{ATTENTION: "flex_attention", "data.document_mask": True, FP8: True, COMPILE: "blocks"})
    masked = {"data.document_mask": True, "train.micro_batch_size": 1}
    assert not refusals(**GPU, **{ATTENTION: "flash_attention_2"}, **masked)
    assert not refusals(**{ATTENTION: "eager"})


@pytest.mark.parametrize(
    ("model", "changes", "line"),
    [
        ({"arch": "gpt_neo", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
         GPU | {ATTENTION: "flex_attention"}, "train.attention: 'gpt_neo' doesn't support 'flex_attention'"),
        ({"arch": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}, GPU | {FP8: True}, "has an nn.Linear with sides"),
        ({**MODEL, "arch": "mixtral", "num_local_experts": 4}, GPU | {FP8: True}, "not supported for 'mixtral'"),
    ],
)  # fmt: skip
def test_architectures_that_cannot_are_refused_by_the_check(model, changes, line):
    with pytest.raises(ConfigError, match=line):
        check_job(job(**{"model": model} | changes))


def test_recipes_without_a_choice_are_refused():
    other = {"recipe": "tests.unit.build_recipe:Around", "model": {}, "evaluate": None}
    for changes, line in (
        ({ATTENTION: "eager"}, "doesn't let you choose kernels"),
        ({COMPILE: "blocks"}, "doesn't list its `blocks`"),
    ):
        with pytest.raises(ConfigError, match=line):
            check_job(build_job(**other | changes))


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is here")
def test_a_kernel_whose_package_is_missing_is_never_fetched_from_a_hub():
    its = CausalLM(job(**GPU, **{ATTENTION: "flash_attention_2"}))
    with pytest.raises(MissingExtraError, match="needs the package flash-attn"):
        its.build()
    with torch.device("meta"):
        assert its.build().config._attn_implementation == "sdpa", "what the plan counts"
    assert its.plainly().build().config._attn_implementation == "sdpa", "what trials compute"
    assert its.config._attn_implementation in (None, "sdpa"), "and neither is left in the recipe"


def test_attention_as_named_computes_what_the_usual_does():
    losses = []
    for name in ("sdpa", "eager"):
        its = CausalLM(job(**{ATTENTION: name}))
        torch.manual_seed(0)
        model = its.build()
        assert model.config._attn_implementation == name
        losses.append(its.loss(model, its.batch(tiny.tokens(its))).sum)
    assert torch.allclose(*losses, rtol=1e-5)


def test_numerics_on_a_cpu_plays_the_twins(tmp_path):
    made = job(**GPU, **{ATTENTION: "flex_attention", FP8: True})
    played = small.small_job(made, tmp_path, gpus=False, longest=48).train
    assert (played.attention, played.fp8) == ("sdpa", False)
    plain = small.unaided(CausalLM(made))
    assert (plain.attention, plain.fp8) == ("sdpa", False)


def test_float8_changes_products_and_not_parameters():
    """It is within float8's rounding of bf16, and further away than bf16's own rounding. Gradients have the same names."""
    found = {}
    for how in (False, True):
        its = CausalLM(job(**{"train.precision": "bf16"}))
        its.fp8 = how
        torch.manual_seed(0)
        model = its.build().bfloat16()
        loss = its.loss(model, its.batch(tiny.tokens(its))).sum
        loss.backward()
        found[how] = float(loss.detach()), {name: p.grad.float() for name, p in model.named_parameters()}
    (loss, gradients), (plain, expected) = found[True], found[False]
    assert gradients.keys() == expected.keys()
    assert 1e-6 < abs(loss - plain) / plain < 1e-2
    away = [float((gradients[name] - expected[name]).norm() / expected[name].norm()) for name in expected if "proj" in name]
    assert 5e-3 < max(away) < 0.35, away


def test_products_in_float8_are_those_of_the_rounded_numbers():
    """Forward and backward, compared with autograd over the rounded numbers, also if the number of rows isn't a multiple of
    16."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias, back = (torch.randn(*size, generator=draw) for size in ((3, 7, 32), (48, 32), (48,), (3, 7, 48)))
    layer = torch.nn.Linear(32, 48)
    layer.__class__ = float8.Float8Linear
    layer.weight.data, layer.bias.data = weight, bias
    x.requires_grad_()
    made = layer(x)
    made.backward(back)

    def near(values, kind):
        low, scale = float8.rounded(values, kind)
        return low.float() * scale

    gradient, inputs, weights = near(back, float8.BACKWARD), near(x.detach(), float8.FORWARD), near(weight, float8.FORWARD)
    torch.testing.assert_close(made, inputs @ weights.T + bias)
    torch.testing.assert_close(x.grad, gradient @ weights)
    torch.testing.assert_close(layer.weight.grad, gradient.reshape(-1, 48).T @ inputs.reshape(-1, 32))
    torch.testing.assert_close(layer.bias.grad, back.sum((0, 1)))


def test_a_tensor_keeps_its_largest_number_and_zeros_stay_zeros():
    values = torch.tensor([3.0, -700.0, 0.01])
    for kind in (float8.FORWARD, float8.BACKWARD):
        low, scale = float8.rounded(values, kind)
        assert float(low[1].float() * scale) == pytest.approx(-700) and low.dtype == kind
    low, scale = float8.rounded(torch.zeros(3), float8.FORWARD)
    assert float(scale) > 0 and not low.float().any()


def test_float8_is_of_linear_layers_inside_layers_whose_sides_fit():
    its = CausalLM(job(model={**MODEL, "intermediate_size": 120}))
    its.fp8 = True
    named = {name for name, m in its.build().named_modules() if isinstance(m, float8.Float8Linear)}
    assert named == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}, "120 is no multiple of 16"


def test_a_gpu_that_is_too_old_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(
        ConfigError, match=r"train\.fp8: needs GPUs of compute capability 8\.9 or later, but NVIDIA A100 has 8\.0"
    ):
        float8.require_device()


def test_layers_are_known():
    its = CausalLM(job(**{COMPILE: "blocks"}))
    with torch.device("meta"):
        model = its.build()
    assert its.blocks(model) == checkpointing.layers(model) and len(its.blocks(model)) == 2
    assert attention.twin("flash_attention_3") == "sdpa" and attention.twin("eager") == "eager" and attention.twin(None) is None
    check_devices(job(), None)
