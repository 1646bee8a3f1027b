"""Tests that below ZeRO stage 3, only the first worker creates the initial weights.

The others receive them, to the bit, and need no host memory for their own.
"""

import ctypes
import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.engine import deepspeed_engine, first_weights
from heliostat.errors import ConfigError
from heliostat.parallel.division import of
from heliostat.recipes import building, weightless
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.recipes.text.embedder import Embedder

from tests.integration import ranks
from tests.unit import build_pairs
from tests.unit.build_job import BASE, job

WIDE = {
    **BASE["model"],
    "hidden_size": 512,
    "vocab_size": 1 << 17,
    "tie_word_embeddings": True,
}  # 256 MiB in fp32, nearly all in one
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIVIDED = ["llama", "qwen2", "gpt_neox"]  # without biases, with biases of column-parallel matrices, and with those of both
OWN = ["scales", "reads", "keeps"]
CASES = ["fp32-0", "fp32-1", "bf16-1", "bf16-2", "experts", "pretrained", "embedder", *DIVIDED, "pretrained-divided", *OWN]
DEEP = {**BASE["model"], "intermediate_size": 1 << 17, "hidden_size": 128, "num_hidden_layers": 4}  # 768 MiB, all in matrices


def _recipe(case: str, folder: Path) -> tuple[Job, Any]:
    changes: dict[str, Any] = {"workers.count": 2, "train.zero.stage": 1, "model": {**BASE["model"], "vocab_size": 96}}
    if case == "embedder":
        made = build_pairs.embedder(folder / "pairs", **{"workers.count": 2, "train.zero.stage": 1})
        recipe = Embedder(made)
        recipe.config.vocab_size = 320
        return made, recipe
    if case == "experts":
        changes["model"] = {**changes["model"], "arch": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    elif case.startswith("pretrained"):
        changes["model"] = {"pretrained": str(folder / "model")}
        changes["train.parallel.tensor"] = 2 if case == "pretrained-divided" else 1
    elif case in DIVIDED:
        changes["model"] = {**changes["model"], "arch": case, "tie_word_embeddings": case == "llama"}
        changes |= {"train.parallel.tensor": 2, "train.precision": "bf16" if case == "llama" else "fp32"}
        if case == "gpt_neox":
            del changes["model"]["num_key_value_heads"]
    elif case in OWN:
        made = job(**changes)
        return made, {"scales": Scales, "reads": Reads, "keeps": Keeps}[case](made)
    else:
        precision, stage = case.split("-")
        changes |= {"train.precision": precision, "train.zero.stage": int(stage)}
    made = job(**changes)
    return made, CausalLM(made)


def peak_mib(work: Callable[[], torch.nn.Module]) -> tuple[float, torch.nn.Module]:
    """Returns the peak of additional memory during the work, and its result."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier cases have freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = _mib("VmRSS")
    made = work()
    return _mib("VmHWM") - before, made


def _mib(what: str) -> float:
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def built(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In both ranks, yields the number of weights that differ from those of one process, the types, and the peak of host
    memory."""
    said: list[str] = []
    first_weights.log.addFilter(lambda record: said.append(record.getMessage()) or False)
    for case in CASES:
        made, recipe = _recipe(case, Path(folder))
        torch.manual_seed(made.train.seed)
        right = building.build(recipe)
        said.clear()
        dist.barrier(group)
        os.environ["BUILDING"] = f"{folder}/building"
        engine = deepspeed_engine.build_engine(made, recipe)
        del os.environ["BUILDING"]
        low = TYPES[made.train.precision]
        found = dict(engine.module.named_parameters())
        same = [torch.equal(found[name], of(found[name]).cut(p.detach().to(low))) for name, p in right.named_parameters()]
        buffers = [torch.equal(engine.module.get_buffer(name), b) for name, b in right.named_buffers()]
        frozen = [found[name].requires_grad != p.requires_grad for name, p in right.named_parameters()]
        yield {
            "case": case,
            "names": list(found) == [name for name, _ in right.named_parameters()],
            "differ": same.count(False),
            "buffers": buffers.count(False),
            "frozen": frozen.count(True),
            "kinds": sorted({str(p.dtype) for p in found.values()}),
            "kind": str(low),
            "divided": sum(of(p).parts > 1 for p in found.values()),
            "said": said,
            "kept": [float(getattr(engine.module, "kept", 0.0)), float(getattr(right, "kept", 0.0))],
        }
        del engine, right, found
        deepspeed_engine.destroy_engines()
        deepspeed_engine.forget_groups()
    wide = job(model=WIDE, **{"workers.count": 2, "train.zero.stage": 1, "train.precision": "bf16"})
    deep = job(
        model=DEEP,
        **{"workers.count": 2, "train.zero.stage": 1, "train.precision": "bf16", "train.parallel.tensor": 2},
    )
    read = job(model={"pretrained": f"{folder}/deep"}, **{"workers.count": 2, "train.zero.stage": 1, "train.precision": "bf16"})
    for case, one in (("memory", wide), ("memory-divided", deep), ("memory-read", read)):
        recipe = CausalLM(one)
        mib, model = peak_mib(lambda one=one, recipe=recipe: first_weights.build(one, recipe))
        parameters = sum(math.prod(building.shape(p)) for p in model.parameters())
        yield {"case": case, "mib": mib, "parameters": parameters}
        del model
        deepspeed_engine.forget_groups()
    try:
        first_weights.build(wide, Failing(wide))
    except ConfigError as e:
        yield {"case": "error", "error": str(e)}


class Scales(CausalLM):
    """Changes its weights without reading them."""

    @torch.no_grad()
    def build(self) -> torch.nn.Module:
        model = super().build()
        model.lm_head.weight.mul_(0.5)
        return model


class Reads(CausalLM):
    """Reads its weights, which only one worker of a node may have at a time."""

    def build(self) -> torch.nn.Module:
        alone = "BUILDING" in os.environ and not weightless.wanted()
        if alone:
            os.close(os.open(os.environ["BUILDING"], os.O_CREAT | os.O_EXCL))
        model: Any = super().build()
        model.kept = float(model.lm_head.weight.detach().std())
        if alone:
            time.sleep(0.2)
            Path(os.environ["BUILDING"]).unlink()
        return model


class Keeps(CausalLM):
    """Draws a number from torch after its weights, which differs if the weights aren't drawn."""

    def build(self) -> torch.nn.Module:
        model: Any = super().build()
        model.kept = torch.rand(()).item()
        return model


class Failing(CausalLM):
    """Can't be built by the first worker: the folder lacks a weight, and the other workers don't read it."""

    def probe(self) -> None: ...

    @property
    def config(self) -> Any:
        if dist.get_rank() == 0:
            raise ConfigError("model.pretrained: lacks a weight")
        return CausalLM(self.job).config


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("weights")
    build_pairs.dataset(folder / "pairs")
    torch.manual_seed(7)
    CausalLM(job(model={**BASE["model"], "vocab_size": 96})).build().save_pretrained(folder / "model")
    CausalLM(job(model=DEEP)).build().save_pretrained(folder / "deep", max_shard_size="300MB")
    return ranks.run(f"{__name__}:built", (2,), str(folder))


@pytest.mark.parametrize("case", CASES)
def test_all_workers_begin_with_the_weights_of_the_first(case, told) -> None:
    """To the bit those of one process, in the training precision, also if they are read from a folder."""
    rows = [row for row in told if row["case"] == case]
    assert len(rows) == 2
    for row in rows:
        assert (row["names"], row["differ"], row["buffers"], row["frozen"]) == (True, 0, 0, 0), row
        assert row["kinds"] == [row["kind"]]


def _memory(told: list[dict[str, Any]], case: str) -> tuple[float, float, float]:
    """Returns the size of the weights in fp32, and the peaks of the first worker and of the other one, in MiB."""
    first, other = sorted((row for row in told if row["case"] == case), key=lambda row: row["rank"])
    return 4 * first["parameters"] / 2**20, first["mib"], other["mib"]


def test_only_the_first_worker_has_the_weights_in_host_memory(told) -> None:
    """In fp32. The others have only the received weights, in bf16 on their device, which here is the host. Before, each had all
    of them in fp32, too."""
    whole, first, other = _memory(told, "memory")
    assert whole > 256 and first > 0.9 * whole and other < 0.6 * whole


def test_a_worker_that_divides_matrices_has_its_part_of_them_alone(told) -> None:
    """In bf16, half of each matrix: a quarter of the whole in fp32, and one matrix. Before, it had all of them in fp32, like
    every worker."""
    whole, _, other = _memory(told, "memory-divided")
    assert whole > 700 and other < 0.45 * whole
    assert all(row["divided"] for row in told if row["case"] in (*DIVIDED, "pretrained-divided"))


def test_a_folder_is_read_tensor_by_tensor(told) -> None:
    """The first worker has its own weights in bf16, here on the host, and one tensor in fp32. Before, it had all of them in
    fp32."""
    whole, first, other = _memory(told, "memory-read")
    assert whole > 700 and first < 0.8 * whole and other < 0.7 * whole


@pytest.mark.parametrize("case", OWN)
def test_a_recipe_that_reads_its_weights_is_built_in_turns_and_says_so(case, told) -> None:
    """The result of its `build` is the same on all workers. A recipe that only changes its weights is built without them."""
    rows = {row["rank"]: row for row in told if row["case"] == case}
    assert all(row["kept"][0] == row["kept"][1] for row in rows.values())
    if case == "scales":
        assert rows[0]["said"] == rows[1]["said"] == []
    else:
        why = {"reads": "RuntimeError: Tensor.item()", "keeps": "model.kept"}[case]
        assert len(rows[0]["said"]) == 1 and f"{case.title()}.build needs real weights ({why}" in rows[0]["said"][0]
        assert "in 2 turns, and each worker uses 0.0 GB of host memory" in rows[0]["said"][0]


def test_an_error_of_the_first_worker_is_raised_on_all(told) -> None:
    """Otherwise the other workers would wait for its weights."""
    assert [row["error"] for row in told if row["case"] == "error"] == ["model.pretrained: lacks a weight"] * 2
