"""Tests models that are built without weights: they have the same shapes, and take no memory for weights before these are on the
training device."""

import random
import struct
import weakref

import numpy as np
import pytest
import torch
from heliostat.data import manifest
from heliostat.engine import first_weights
from heliostat.recipes import building, folder_weights, weightless
from heliostat.recipes.loading import load
from heliostat.recipes.protocol import Recipe
from heliostat.recipes.text.causal_lm import CausalLM
from safetensors.torch import load_file, save_file

from tests.unit import build_images
from tests.unit.build_job import BASE, job


class Group:
    """Replaces torch.distributed in a worker. `sent`: bytes that went to the others."""

    def __init__(self, rank: int, world: int = 8) -> None:
        self.rank, self.world, self.sent = rank, world, 0
        self.is_initialized, self.new_group, self.destroy_process_group = (lambda: True), (lambda backend: None), (lambda _: None)

    def get_rank(self) -> int:
        return self.rank

    def get_world_size(self) -> int:
        return self.world

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        assert tensor.dtype == torch.uint8 and source == 0 and tensor.is_contiguous()
        self.sent += tensor.numel()


@pytest.fixture
def worker(monkeypatch):
    """Makes this process one of several workers, without waiting for the others."""

    def made(rank: int, world: int = 8) -> Group:
        group = Group(rank, world)
        monkeypatch.setattr(first_weights, "dist", group)
        monkeypatch.setattr(first_weights, "agreed", lambda group, work: work())
        monkeypatch.setattr(first_weights, "first", lambda group, work: "" if rank else work())
        return group

    return made


def test_one_of_eight_workers_of_a_node_has_the_weights_in_host_memory(worker, monkeypatch):
    """Before, all workers had them in fp32: 8 x 32 GB for a model of 8 billion parameters. They are sent in the training
    precision."""
    made, held = job(**{"train.zero.stage": 1, "train.precision": "bf16"}), dict[int, int]()
    build = building.build

    for rank in range(8):

        def noted(recipe, rank=rank):
            model = build(recipe)
            held[rank] = sum(p.untyped_storage().nbytes() for p in model.parameters() if not p.is_meta)
            return model

        monkeypatch.setattr(building, "build", noted)
        group = worker(rank)
        model = first_weights.build(made, CausalLM(made))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert group.sent == sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert held == {0: 4 * sum(p.numel() for p in model.parameters()), **dict.fromkeys(range(1, 8), 0)}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("kind", ["llama", "tied", "shards", "bf16"])
def test_the_first_worker_reads_a_folder_tensor_by_tensor(kind, alone, worker, monkeypatch, tmp_path):
    """It held all of them in fp32. A single worker does the same."""
    torch.manual_seed(4)
    written = CausalLM(job(**{"model.tie_word_embeddings": kind == "tied"})).build()
    if kind == "bf16":
        written = written.bfloat16()
    written.save_pretrained(tmp_path, max_shard_size="20KB" if kind == "shards" else "1GB")
    made = job(model={"pretrained": str(tmp_path)}, **{"train.zero.stage": 1, "train.precision": "bf16"})
    right, read, alive, most = CausalLM(made).build(), folder_weights.Stored.read, [0], [0]

    def counted(stored):
        values = read(stored)
        alive[0] += values.nbytes
        most[0] = max(most[0], alive[0])
        weakref.finalize(values.untyped_storage(), lambda size=values.nbytes: alive.__setitem__(0, alive[0] - size))
        return values

    if kind != "bf16":  # what is read is then what trains, where the device is the host
        monkeypatch.setattr(folder_weights.Stored, "read", counted)
    monkeypatch.setattr("heliostat.recipes.text.generator.whole", lambda *_, **__: pytest.fail("loads the whole model"))
    worker(0, 1 if alone else 8)
    model = first_weights.build(made, CausalLM(made))
    for (name, p), expected in zip(model.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(p, expected.bfloat16()), name
    assert most[0] <= max(4 * p.numel() for p in model.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")


def test_a_folder_that_transformers_converts_is_loaded_by_it_and_says_so(worker, caplog, tmp_path):
    """In the folder, each expert has its own name; in the model, experts are stacked. The log reports this."""
    given = {**BASE["model"], "arch": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(4)
    CausalLM(job(model=given)).build().save_pretrained(tmp_path)
    made = job(model={"pretrained": str(tmp_path)}, **{"train.zero.stage": 1, "train.precision": "fp32"})
    right = CausalLM(made).build()
    worker(0)
    model = first_weights.build(made, CausalLM(made))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), right.parameters(), strict=True))
    assert (
        "the first worker loads all weights at once" in caplog.text
        and "needs 0.0 GB of host memory" in caplog.text
        and "expected one tensor for" in caplog.text
    )


@pytest.mark.parametrize("fault", ["cut", "renamed", "adapter", "list", "nested", "twice"])
def test_a_folder_that_is_not_as_it_should_be_is_left_to_the_library(fault, worker, tmp_path):
    """The library raises its own error, or handles the folder in its own way."""
    CausalLM(job()).build().save_pretrained(tmp_path, max_shard_size="20KB" if fault == "twice" else "1GB")
    made = job(model={"pretrained": str(tmp_path)}, **{"train.zero.stage": 1})
    with weightless.building() as noted:
        model = CausalLM(made).build()
    assert len(folder_weights.find(model, noted)) == len(list(model.parameters()))
    file = tmp_path / "model.safetensors"
    if fault == "cut":
        file.write_bytes(file.read_bytes()[:-4])
    elif fault == "renamed":
        file.write_bytes(file.read_bytes().replace(b'"lm_head.weight"', b'"lm_hand.weight"'))
    elif fault == "adapter":
        (tmp_path / "adapter_config.json").write_text("{}")
    elif fault == "twice":  # with two values, of which the library takes the last
        first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
        save_file({**load_file(second), next(iter(load_file(first))): torch.ones(1)}, second)
    else:
        header = {"list": b"[]", "nested": b"[" * 100_000}[fault]
        file.write_bytes(struct.pack("<Q", len(header)) + header)
    words = {
        "list": "AttributeError",
        "nested": "RecursionError",
        "twice": "other tensors than model.safetensors.index.json lists",
        "cut": "incomplete",
        "renamed": "expected one tensor for 'lm_head.weight', found none",
        "adapter": "contains an adapter",
    }
    with pytest.raises(folder_weights.UnreadableError, match=words[fault]):
        folder_weights.find(model, noted)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "qwen3"])
def test_a_model_without_weights_is_shaped_as_one_with_them(arch):
    """Compares names, shapes, tied weights, and buffers, which have their values."""
    given = {"arch": arch, "vocab_size": 96, "tie_word_embeddings": True}
    given |= (
        {"n_embd": 32, "n_layer": 2, "n_head": 4} if arch == "gpt2" else {k: v for k, v in BASE["model"].items() if k != "arch"}
    )
    recipe = CausalLM(job(model=given))
    right = building.build(recipe)
    with weightless.building():
        model = building.build(recipe)
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    parameters = list(model.parameters())
    for p in parameters:
        weightless.put(p, torch.zeros(p.shape, dtype=torch.bfloat16))
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    shapes = [{n: (tuple(p.shape), p.requires_grad) for n, p in m.named_parameters()} for m in (model, right)]
    assert shapes[0] == shapes[1] and model.state_dict().keys() == right.state_dict().keys()
    assert model.training == right.training and all(p.dtype == torch.bfloat16 for p in model.parameters())
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, right)]
    assert tied[0] == tied[1]
    assert all(torch.equal(b, dict(model.named_buffers())[n]) for n, b in right.named_buffers())
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"  # and what is built behind it has weights


def test_image_models_are_built_without_weights_too(tmp_path):
    from heliostat.recipes.images.text_to_image import TextToImage

    made = job(**build_images.job(build_images.digits(tmp_path / "images", 40)))
    recipe = load(made, [manifest.read(location) for location in made.sources])
    assert isinstance(recipe, TextToImage)
    right = building.build(recipe)
    with weightless.building():
        model = building.build(recipe)
    assert all(p.is_meta for p in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in right.named_parameters()}
    assert not any(b.is_meta for b in model.buffers())


def test_the_first_workers_weights_are_sent_as_they_are_drawn(worker):
    """They are sent in the training precision, and the host's copy in fp32 is freed meanwhile."""
    made = job(**{"train.zero.stage": 1, "train.precision": "bf16"})
    worker(0)
    torch.manual_seed(made.train.seed)
    right = building.build(CausalLM(made))
    model = first_weights.build(made, CausalLM(made))
    for p, expected in zip(model.parameters(), right.parameters(), strict=True):
        assert torch.equal(p, expected.bfloat16())
    assert np.isfinite(sum(float(p.float().sum()) for p in model.parameters()))


class Own(Recipe):
    """Builds two layers, and another value."""

    kind = "rows"
    batch = loss = None

    def __init__(self, made, more) -> None:
        self.job, self.more, self.list = made, more, []

    def build(self) -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        self.more(self, model)
        return model


def _tied(recipe, model):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    model[0].weight = weight
    model[1].weight = weight


def _closed(recipe, model):
    drawn = torch.rand(())
    model[0].register_forward_hook(lambda module, given, made: made * drawn)


BESIDE = {
    "nothing": (lambda recipe, model: None, ""),
    "scaled": (lambda recipe, model: model[0].weight.data.mul_(2), ""),
    "tied": (_tied, ""),
    "kept parameter": (lambda recipe, model: recipe.list.append(model[0].weight), ""),
    "buffer": (lambda recipe, model: model.register_buffer("drawn", torch.rand(2)), ""),
    "of the weights": (lambda recipe, model: model.register_buffer("norm", model[0].weight.norm()), ""),
    "Python's random": (lambda recipe, model: setattr(recipe, "seed", random.Random(0).random()), ""),
    "read": (lambda recipe, model: float(model[0].weight.std()), "RuntimeError"),
    "drawn": (lambda recipe, model: setattr(model, "order", torch.randperm(64).tolist()), "model.order[0]"),
    "copied": (lambda recipe, model: recipe.list.append(model[0].weight.detach().clone()), "recipe['list'][0]"),
    "teacher": (
        lambda recipe, model: setattr(recipe, "teacher", torch.nn.Linear(2, 2)),
        "recipe['teacher']._parameters['weight']",
    ),
    "closed over": (_closed, "model._modules['0']._forward_hooks[0] (0)"),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_what_a_build_makes_of_weights_is_found(beside, worker):
    """Such a value would differ between workers, or would have no content."""
    more, why = BESIDE[beside]
    made, group = job(**{"train.zero.stage": 1}), worker(0)
    making = first_weights._Making(made, Own(made, more))
    assert (found := making.as_first()) == why or (why == "RuntimeError" and found.startswith(why)), found
    assert all(p.is_meta for p in making.model.parameters())
    making.send()
    assert not any(p.is_meta for p in making.model.parameters()) and group.sent
    assert len(making.recipe.list) == (beside in ("copied", "kept parameter"))


def test_other_workers_have_no_weights_of_a_build_of_ones_own(worker, monkeypatch):
    """Before, each worker had all weights in fp32. A build that doesn't work without weights runs on one worker after another:
    see test_first_weights.py."""
    made = job(**{"train.zero.stage": 1})
    worker(1)
    send, held = first_weights._Making.send, []
    monkeypatch.setattr(
        first_weights._Making, "send", lambda making: (held.extend(p.is_meta for p in making.model.parameters()), send(making))
    )
    model = first_weights.build(made, Own(made, lambda recipe, model: None))
    assert held == [True] * 4 and not any(p.is_meta for p in model.parameters())
