"""Tests `model.adapter.base: nf4`: the numbers of 4-bit weights, their gradients, what the plan counts, and the errors."""

from pathlib import Path

import pytest
import torch
import transformers
from heliostat.errors import ConfigError
from heliostat.numerics import small
from heliostat.plan import layouts, model_stats
from heliostat.recipes import adapter_probe, adapters, building, quantized, weightless
from heliostat.recipes.text.causal_lm import CausalLM
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode

from tests.unit.build_job import job

SHAPES = [(96, 64), (33, 38), (7, 2), (256, 512)]  # the second and the third have a block that isn't full


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    made[0] = 0
    return made.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_each_weight_becomes_the_nearest_of_16_values(shape):
    made = weight(shape)
    flat, got = made.flatten(), quantized.rounded(made).flatten()
    for at in range(0, len(flat), quantized.BLOCK):
        block = flat[at : at + quantized.BLOCK]
        values = torch.tensor(quantized.LEVELS) * block.abs().max()
        nearest = values[(block.unsqueeze(1) - values).abs().argmin(1)]
        torch.testing.assert_close(got[at : at + quantized.BLOCK], nearest)
    again = quantized.rounded(got.view(shape))
    assert torch.equal(again.flatten(), got), "rounded weights stay the same"
    assert quantized.pack(made).numel() * 2 == made.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_products_and_gradients_equal_those_of_bitsandbytes(shape, dtype):
    bnb = pytest.importorskip("bitsandbytes")
    made, layer = weight(shape, dtype), torch.nn.Linear(shape[1], shape[0]).to(dtype)
    codes, state = bnb.functional.quantize_4bit(made, quant_type="nf4", blocksize=64, compress_statistics=False)
    assert torch.equal(quantized.pack(made).flatten(), codes.flatten()[: made.numel() // 2])
    assert torch.equal(quantized.scales(made).view(torch.float32), state.absmax)
    with torch.no_grad():
        layer.weight.copy_(made)
    theirs = bnb.nn.Linear4bit(shape[1], shape[0], compute_dtype=dtype, quant_type="nf4", compress_statistics=False)
    theirs.weight = bnb.nn.Params4bit(made.clone(), False, quant_type="nf4", compress_statistics=False)
    theirs.bias = layer.bias
    inputs = [torch.randn(3, 5, shape[1], generator=torch.Generator().manual_seed(2)).to(dtype) for _ in range(2)]
    outs = [one(x.requires_grad_()) for one, x in zip((theirs.to("cpu"), quantized.Nf4Linear(layer)), inputs, strict=True)]
    for out in outs:
        out.sum().backward()
    assert torch.equal(*outs) and torch.equal(inputs[0].grad, inputs[1].grad)


class HostCopies(TorchFunctionMode):
    """Records each call that copies values of the host to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        moved = func is torch.Tensor.to and made.device != args[0].device
        if func in (torch.tensor, torch.as_tensor) or moved:
            self.calls.append(func.__name__)
        return made


def test_a_step_with_4_bit_layers_copies_nothing_from_the_host():
    """A table that each layer copies from pageable memory would stop a GPU twice per layer and micro-batch. The first pass
    copies the table, and all layers use this copy."""
    with torch.device("meta"):
        layers = [quantized.Nf4Linear(torch.nn.Linear(64, 64).requires_grad_(False)) for _ in range(2)]
        inputs = torch.empty(3, 64, requires_grad=True)
    layers[0](inputs)
    with HostCopies() as copies:
        layers[1](layers[0](inputs)).sum().backward()
    assert copies.calls == []


def test_the_weight_has_the_type_of_the_model():
    """Code that casts inputs to `weight.dtype`, as T5's does, would otherwise compute in fp32, and fail at the next layer."""
    layer = quantized.Nf4Linear(torch.nn.Linear(64, 32).requires_grad_(False))
    exact = layer.weight
    assert exact.dtype == torch.float32
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, exact.bfloat16()), "a cast changes no code and no scale"
    inputs = torch.ones(3, 64).to(layer.weight.dtype)
    assert layer(inputs).dtype == torch.bfloat16
    assert quantized.Nf4Linear(torch.nn.Linear(64, 32).to(torch.float16)).weight.dtype == torch.float16


class Router(torch.nn.Linear):
    """Defines a layer that returns a tuple, like the routers of Llama 4 and Phi-3.5-MoE."""

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(inputs)
        return logits.sigmoid(), logits


class Apart(torch.nn.Linear):
    """Defines a layer that adds the bias in a step of its own, like Falcon's."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ self.weight.T + self.bias


class Mixed(torch.nn.Module):
    """Defines a model with one plain linear layer, and layers that don't suit 4 bits or adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.router, self.apart = Router(8, 4), Apart(8, 8)
        self.odd, self.even = torch.nn.Linear(8, 7), torch.nn.Linear(7, 8)
        self.unused = torch.nn.Linear(8, 8)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mixed = self.apart(self.attention(inputs, inputs, inputs)[0])
        return self.even(self.odd(mixed) * self.router(mixed)[0].sum(-1, keepdim=True)) @ self.unused.weight


def test_layers_that_4_bits_do_not_suit_stay_and_are_logged(caplog):
    """A router in 4 bits would lose its own computation. Unlogged layers would make the model larger than its plan."""
    torch.manual_seed(0)
    plain, inputs = Mixed(), torch.randn(2, 3, 8)
    wanted = plain(inputs)
    adapter = adapters.Adapter(rank=2, base="nf4")
    adapter_probe.require(adapter, Mixed, lambda model: model(torch.zeros(1, 2, 8)), 2)
    (kept,) = [record.getMessage() for record in caplog.records if "base" in record.getMessage()]
    assert kept == (
        "model.adapter.base: 4 of 6 linear layers stay in the precision of training: attention.out_proj (of class "
        "NonDynamicallyQuantizableLinear), router (of class Router), apart (of class Apart), even (an odd number of inputs, 7)"
    )
    adapters.add(adapter, plain, 0, "fp32")
    assert set(quantized.layers_of(plain)) == {"odd.base_layer", "unused.base_layer"}
    assert isinstance(plain.router, Router) and isinstance(plain.even.base_layer, torch.nn.Linear)
    assert (plain(inputs) - wanted).abs().max() < 0.2 * wanted.abs().max(), "the model computes as before, except for rounding"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    CausalLM(job()).build().to(torch.bfloat16).save_pretrained(folder)
    return folder


def recipe(base: Path, adapter: dict[str, object] | None = None, **changes: object) -> CausalLM:
    model = {"pretrained": str(base), "adapter": {"rank": 4, "alpha": 6.0, "base": "nf4", **(adapter or {})}}
    return CausalLM(job(**{"model": model, "train.precision": "fp32", **changes}))


def test_only_the_adapter_is_trained_and_its_gradients_equal_those_of_peft_on_the_rounded_base(base):
    own = building.build(recipe(base))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapters.round_base(recipe(base).adapter, plain)
    right = get_peft_model(plain, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"))
    theirs = {n.removeprefix("base_model.model."): p for n, p in right.named_parameters() if p.requires_grad}
    mine = {n: p for n, p in own.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys() and len(quantized.layers_of(own)) == 14
    tokens = torch.arange(24).view(2, 12) * 5 % 96
    with torch.no_grad():
        for name, p in theirs.items():
            mine[name].add_(0.1 if name.endswith(adapters.UP) else 0)
            p.copy_(mine[name])
    losses = [model(input_ids=tokens, labels=tokens).loss for model in (own, right)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for name, p in mine.items():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-5, atol=1e-8)
    assert not any(p.grad is not None for n, p in own.named_parameters() if n not in mine)


def test_a_model_that_is_built_without_weights_gets_the_same_bytes(base):
    from heliostat.recipes import folder_weights

    built = dict(building.build(recipe(base)).named_parameters())
    with weightless.building() as noted:
        empty = building.build(recipe(base))
    stored = folder_weights.find(empty, noted)
    packed = [name for name, p in empty.named_parameters() if p.dtype == torch.uint8]
    assert len(packed) == 28
    for name, p in empty.named_parameters():
        if name in packed:
            assert torch.equal(stored[id(p)].read().flatten(), built[name].flatten())


def test_the_plan_counts_the_weights_once_and_the_bytes_of_4_bits(base):
    full, small = (model_stats.stats_of(one, model_stats.build(one)) for one in (recipe(base, {"base": None}), recipe(base)))
    assert small.parameters == full.parameters and small.active == full.active and small.flops == full.flops
    assert small.trained == full.trained
    assert small.packed / 2 <= small.frozen_models[0] <= 0.6 * small.packed, "4 bits, and 32 bits per block of 64"


def test_what_4_bits_do_not_support_is_rejected(base):
    with pytest.raises(ConfigError, match=r"dora needs complete weights, so it isn't supported with base: nf4"):
        recipe(base, {"method": "dora"})
    with pytest.raises(ConfigError, match=r"^train\.zero\.stage: 3 isn't supported with model\.adapter\.base 'nf4'.*Set it to 2"):
        recipe(base, **{"train.zero.stage": 3}).probe()
    recipe(base, **{"train.zero.stage": 2}).probe()


def test_neither_the_ranking_of_the_plan_nor_the_numerics_check_chooses_stage_3(base):
    made = {bits: recipe(base, {"base": bits}, **{"train.zero.stage": 2}).job for bits in (None, "nf4")}
    stages = {bits: {layout.stage for layout in layouts.candidates(one, 1)} for bits, one in made.items()}
    assert stages == {None: {0, 1, 2, 3}, "nf4": {0, 1, 2}}
    assert [small.elsewhere(one).train.zero.stage for one in made.values()] == [3, 1]
