"""Linear layers multiplied by oneDNN are linear layers: the same values, gradients and state."""

import weakref

import pytest
import torch
from heliostat.cpu_kernels import linear

pytestmark = pytest.mark.skipif(not linear.SUPPORTED, reason="not an x86 CPU")


def pair(bias=True):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(20, 33, bias), torch.nn.GELU(), torch.nn.Linear(33, 7, bias))
    ours = torch.nn.Sequential(torch.nn.Linear(20, 33, bias), torch.nn.GELU(), torch.nn.Linear(33, 7, bias))
    ours.load_state_dict(plain.state_dict())
    linear.use(ours)
    return plain, ours


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 20), (2, 3, 20), (1, 20), (0, 20), (2, 3, 4, 20)])
def test_values_and_gradients_are_those_of_torch(shape, bias):
    inputs = torch.randn(shape, requires_grad=True)
    results = []
    for model in pair(bias):
        out = model(inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), [inputs, *model.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_inputs_and_gradients_may_lie_in_memory_in_any_order():
    plain, ours = pair()
    inputs = torch.randn(20, 6, 3).permute(2, 1, 0).requires_grad_()
    upstream = torch.randn(7, 3, 6).permute(1, 2, 0)
    results = [torch.autograd.grad(model(inputs), [inputs, *model.parameters()], upstream) for model in (plain, ours)]
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_is_frozen_gets_no_gradient():
    _, model = pair()
    model[0].requires_grad_(False)
    model(torch.randn(4, 20)).sum().backward()
    assert model[0].weight.grad is None and model[0].bias.grad is None
    assert model[2].weight.grad is not None


def test_a_weight_that_is_emptied_behind_the_forward_pass_and_filled_again_is_all_that_is_kept_of_it():
    """As ZeRO-3 does it: what was gathered must be free between the two passes."""
    inputs = torch.randn(5, 20)
    plain, ours = pair()
    layer = ours[0]
    whole, upstream = layer.weight.detach().clone(), torch.randn(5, 33)
    said = layer(inputs)
    gathered = weakref.ref(layer.weight.untyped_storage())
    layer.weight.data = torch.empty(0)
    assert gathered() is None
    layer.weight.data = whole
    torch.testing.assert_close(
        torch.autograd.grad(said, layer.weight, upstream), torch.autograd.grad(plain[0](inputs), plain[0].weight, upstream)
    )


def test_state_is_unchanged_and_other_kinds_of_linear_layer_stay_theirs():
    class Special(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    plain, ours = pair()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True))
    special = torch.nn.Sequential(Special(4, 4))
    linear.use(special)
    assert type(special[0]) is Special
