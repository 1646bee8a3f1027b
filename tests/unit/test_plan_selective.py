"""Tests the plan for selective checkpointing: memory, time, and the choice of configurations.

Also compares the recomputed products of any kind of checkpointing with torch's count.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from heliostat.cli import plan
from heliostat.plan import hardware, layouts, planner
from heliostat.plan.counts import ALWAYS
from heliostat.plan.estimate import Planner
from heliostat.plan.layouts import Layout
from heliostat.plan.model_stats import activations, build, work
from heliostat.recipes.text.causal_lm import CausalLM
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.unit.build_job import BASE, job
from tests.unit.test_plan_memory_savers import LONG, TILED, WHICH

SELECTIVE = "selective"
pytestmark = pytest.mark.usefixtures("in_repository")


class Alive(TorchDispatchMode):
    """Records the storages of everything created in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self, model: torch.nn.Module) -> int:
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        return sum(size for ref, size in self.made.values() if not ref.expired() and ref.cdata not in own)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "olmo2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_kept_is_what_is_alive_behind_a_real_forward_pass(arch, precision):
    """Counts everything that was created and still exists, held by autograd or by the contexts of checkpointing."""
    model = {"n_embd": 32, "n_head": 4} if arch == "gpt2" else BASE["model"]
    j = job(**{"model": {**model, "arch": arch, "vocab_size": 96}, **LONG, "train.precision": precision})
    recipe = CausalLM(j)
    counted = activations(j, recipe, build(recipe), planner.sample(j, recipe))
    behind = replace(counted, layers=tuple((given, 0, dear) for given, _, dear in counted.layers))
    recipe = CausalLM(j.model_copy(update={"train": j.train.model_copy(update={"activation_checkpointing": SELECTIVE})}))
    model = recipe.build().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    batch = recipe.batch(planner.sample(j, recipe))
    with Alive() as alive:
        loss = recipe.loss(model, batch)
    kept = alive.bytes(model)
    assert loss.sum.requires_grad
    assert behind.selective() == pytest.approx(kept, rel=0.04)
    assert counted.checkpointed < counted.selective() < counted.kept


PRODUCTS = {"llama": (), "olmo2": (), "gpt_neox": ("num_key_value_heads",)}


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("which", [True, SELECTIVE])
@pytest.mark.parametrize("arch", PRODUCTS)
def test_products_that_are_played_again_are_those_that_torch_counts(arch, which, tiled):
    """A layer is recomputed up to the last tensor that autograd keeps. A norm after an MLP in tiles keeps its output. So the MLP
    is recomputed with its layer, and once more for its gradients. (Its last product is recomputed only at stage 3.)"""
    model = {k: v for k, v in BASE["model"].items() if k not in PRODUCTS[arch]} | {"arch": arch, "vocab_size": 96}
    j = job(**{**LONG, "model": model, "model.num_hidden_layers": 3, TILED: tiled, "workers.gpus": 1})
    recipe = CausalLM(j)
    found = work(j, recipe, build(recipe), tuple(planner.sample(j, recipe, n) for n in (2, 3)))
    products = [w for w in found if w.kind == "matmul"]
    replayed = [w for w in products if w.replayed == ALWAYS and not (which == SELECTIVE and w.dear)]
    once, again = (sum(w.count * w.flops for w in some) for some in (products, replayed))
    assert counted(j, False) == once
    assert counted(j, which) == once + again
    assert (again == 0) == (which == SELECTIVE and not (tiled and arch == "olmo2"))


class Products(TorchDispatchMode):
    """Counts FLOPs as torch does. (Its FlopCounterMode follows modules, and fails if a gradient recomputes some of them.)"""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.flops += flop_registry[func._overloadpacket](*args, out_val=out)
        return out


def counted(j, which) -> int:
    """Returns the FLOPs of products in a step with one real sample."""
    recipe = CausalLM(j.model_copy(update={"train": j.train.model_copy(update={"activation_checkpointing": which})}))
    model = recipe.build()
    with Products() as products:
        recipe.loss(model, recipe.batch(np.zeros((1, 256), dtype=np.int32))).sum.backward()
    return products.flops


@pytest.fixture
def wide() -> Planner:
    sizes = {"model.hidden_size": 4096, "model.intermediate_size": 16384, "model.num_hidden_layers": 4}
    j = job(**LONG | sizes | {"workers.gpus": 1, "workers.count": 4, "train.precision": "bf16", "data.sequence_length": 2048})
    return planner.planners(j, CausalLM(j), None, None, hardware.table())[-1]


def test_it_lies_between_none_and_all_in_memory_and_in_time(wide):
    none, some, every = (wide.candidate(Layout(2, 2, which, False)) for which in (False, SELECTIVE, True))
    assert none.memory["activations"] > some.memory["activations"] > every.memory["activations"]
    assert none.speed["step_s"] < some.speed["step_s"] < every.speed["step_s"]
    assert 0 < some.parts["replaying"] < every.parts["replaying"] / 2


def test_the_cheapest_that_fits_is_found_by_memory(wide):
    """The choices are none, selective, and some layers: with less memory, more is recomputed. Of four layers, checkpointing three
    takes as much memory as all four, because one is whole during its recomputation, and less time."""
    layout, chosen = Layout(3, 2, True, False), {}
    given = {which: wide.candidate(replace(layout, checkpointing=which)) for which in (False, SELECTIVE, 3, True)}
    for which, one in given.items():
        wide.device = replace(wide.device, memory=one.memory["total"])
        kinds = [replace(layout, checkpointing=kind) for kind in (False, SELECTIVE, True)]
        fitting = [wide.candidate(each) for kind in kinds for each in (kind, *wide.partly(kind))]
        chosen[which] = min(fitting, key=layouts.order).layout.checkpointing
    assert chosen == {False: False, SELECTIVE: SELECTIVE, 3: 3, True: 3}
    assert given[3].memory["total"] <= given[True].memory["total"] and given[3].speed["step_s"] < given[True].speed["step_s"]


@pytest.mark.parametrize(
    ("model", "singly"), [(BASE["model"], True), ({"arch": "xlnet", "d_model": 32, "n_head": 4, "n_layer": 2}, False)]
)
def test_an_architecture_whose_layers_are_not_checkpointed_one_by_one_is_offered_no_part(model, singly):
    """The plan doesn't recommend what `check` would reject."""
    j = job(**{"model": {**model, "vocab_size": 96}})
    found = planner.planners(j, CausalLM(j), None, None, hardware.table())[-1]
    assert found.selects is singly


def test_it_is_ranked_where_the_job_could_have_it():
    def offered(**changes) -> bool:
        return SELECTIVE in {one.checkpointing for one in layouts.candidates(job(**changes), 1, selects=True)}

    assert offered() and offered(**{TILED: True})
    assert not offered(**{"train.compile": True}) and not offered(**{WHICH: True, "train.activation_offload": True})
    assert SELECTIVE not in {one.checkpointing for one in layouts.candidates(job(), 1)}
    j = job(**{WHICH: SELECTIVE})
    assert layouts.changes(j, layouts.of(j)) == []
    assert layouts.changes(job(), layouts.of(j)) == [f"{WHICH}=selective"]
    assert (plan.replayed(SELECTIVE), plan._checkpointing(SELECTIVE)) == ("selective", ", selective activation checkpointing")
