"""Tests attention over samples of several documents that workers share.

It works block by block: its memory doesn't grow with the square of the length, and its numbers equal those with a mask of all
pairs.
"""

import pytest
import torch
from heliostat.parallel import document_attention, sequence_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.unit.test_sequence_parallel import planned

LENGTH, HEADS, SHARED, WIDTH = 100, 4, 2, 8


class Module(torch.nn.Module):
    num_key_value_groups = HEADS // SHARED
    is_causal = True


class Largest(TorchDispatchMode):
    """Measures the largest storage, in bytes, of the computations in its context."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def attended(given: list[torch.Tensor], documents: torch.Tensor | None, **more) -> list[torch.Tensor]:
    """Computes attention; returns the result, and the gradients of its inputs."""
    leaves = [x.clone().requires_grad_() for x in given]
    made, _ = document_attention.in_blocks(sdpa_attention_forward)(Module(), *leaves, documents, **more)
    return [made.detach(), *torch.autograd.grad((made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum(), leaves)]


def drawn(length: int = LENGTH, kind: torch.dtype = torch.float64, rows: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, heads, length, WIDTH, dtype=kind) for heads in (HEADS, SHARED, SHARED)]


@pytest.mark.parametrize("rows", [1, 7, 32, 99, 100])
def test_attention_in_blocks_is_that_of_a_mask_of_all_pairs(rows, monkeypatch):
    """For results and gradients, with documents that begin inside a block or at its edge, and with a sample in the middle of a
    document."""
    where = torch.cat([positions(7, 25, 1, 1, 66), positions(100) + 3])
    documents = document_attention.numbers(where)
    whole = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    given = drawn()
    leaves = [x.clone().requires_grad_() for x in given]
    made, _ = sdpa_attention_forward(Module(), *leaves, whole)
    right = [made, *torch.autograd.grad((made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum(), leaves)]
    monkeypatch.setattr(document_attention, "ROWS", rows)
    for found, expected in zip(attended(given, documents), right, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_no_tensor_grows_with_the_square_of_a_samples_length(monkeypatch):
    """Uses the attention of models with split samples, forward and backward. A mask of all pairs would have 16 MiB."""
    monkeypatch.setattr(document_attention, "ROWS", 64)
    core, length = document_attention.in_blocks(sdpa_attention_forward), 4096

    def exchanged(module, query, key, value, documents, **given):
        return core(module, query, key, value, documents)

    attention = sequence_attention.Attention(exchanged, lambda found: found)
    leaves = [x.requires_grad_() for x in drawn(length, torch.float32, rows=1)]
    with Largest() as largest:
        made, _ = attention(Module(), *leaves, position_ids=positions(1000, 2000, 1096))
        made.sum().backward()
    assert all(x.grad is not None for x in leaves)
    assert largest.bytes <= document_attention.mask_bytes(length, 4) * 2 < length**2 / 4


def test_dropout_draws_the_same_numbers_backwards(monkeypatch):
    """The gradient belongs to the forward computation. With almost full dropout, few values count."""
    monkeypatch.setattr(document_attention, "ROWS", 16)
    given, documents = drawn(rows=1), document_attention.numbers(positions(30, 70))
    torch.manual_seed(1)
    _, _, _, of_value = attended(given, documents, dropout=0.5)
    after = torch.get_rng_state()
    # attention is linear in the values: the gradient follows from the results of two of them with the same random numbers
    moved = [given[0], given[1], given[2] + 1e-3 * torch.sign(of_value)]
    results = []
    for some in (given, moved):
        torch.manual_seed(1)
        with torch.no_grad():
            made, _ = document_attention.in_blocks(sdpa_attention_forward)(Module(), *some, documents, dropout=0.5)
        results.append((made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum())
    assert float(results[1] - results[0]) == pytest.approx(1e-3 * float(of_value.abs().sum()), rel=1e-6)
    assert torch.equal(torch.get_rng_state(), after)  # and what follows draws on


def test_gradients_of_keys_are_summed_in_fp32(monkeypatch):
    """A key gets gradients from many blocks. A sum in bf16 would lose the small ones."""
    monkeypatch.setattr(document_attention, "ROWS", 8)
    given = [x.to(torch.bfloat16) for x in drawn(1024, rows=1)]
    documents = document_attention.numbers(positions(1024))
    found = attended(given, documents)
    monkeypatch.setattr(document_attention, "ROWS", 1024)
    right = attended([x.double() for x in given], documents)
    for one, expected in zip(found[1:], right[1:], strict=True):
        assert float((one - expected).norm() / expected.norm()) < 0.01


def test_the_plan_counts_the_mask_of_a_block_and_not_of_all_pairs():
    """For 32,768 tokens, a mask of all pairs takes 1 GiB. A block's mask takes 32 MiB, and its bias in bf16 twice that."""
    length = 1 << 15
    long = [{"data.sequence_length": length, "data.document_mask": mask} for mask in (False, True)]
    without, found = (planned(4, **changes)["memory"]["activations"] for changes in long)
    assert found - without == document_attention.mask_bytes(length, 2) == 3 * 1024 * length
