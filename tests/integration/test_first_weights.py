"""Below ZeRO stage 3 the first worker alone makes the initial weights: the others have them from it, to the bit, and need no host
memory for weights of their own.
"""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.engine import deepspeed_engine, first_weights
from heliostat.errors import ConfigError
from heliostat.recipes import building
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
CASES = ["fp32-0", "fp32-1", "bf16-1", "bf16-2", "experts", "pretrained", "embedder"]


def _recipe(case: str, folder: Path) -> tuple[Job, Any]:
    changes: dict[str, Any] = {"workers.count": 2, "train.zero.stage": 1, "model": {**BASE["model"], "vocab_size": 96}}
    if case == "embedder":
        made = build_pairs.embedder(folder / "pairs", **{"workers.count": 2, "train.zero.stage": 1})
        recipe = Embedder(made)
        recipe.config.vocab_size = 320
        return made, recipe
    if case == "experts":
        changes["model"] = {**changes["model"], "arch": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    elif case == "pretrained":
        changes["model"] = {"pretrained": str(folder / "model")}
    else:
        precision, stage = case.split("-")
        changes |= {"train.precision": precision, "train.zero.stage": int(stage)}
    made = job(**changes)
    return made, CausalLM(made)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def built(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """In both ranks: how many weights differ from those that one process makes, the types, and the peak of host memory."""
    for case in CASES:
        made, recipe = _recipe(case, Path(folder))
        torch.manual_seed(made.train.seed)
        right = building.build(recipe)
        engine = deepspeed_engine.build_engine(made, recipe)
        low = TYPES[made.train.precision]
        found = dict(engine.module.named_parameters())
        same = [torch.equal(found[name], p.detach().to(low)) for name, p in right.named_parameters()]
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
        }
        del engine, right, found
        deepspeed_engine.destroy_engines()
        deepspeed_engine.forget_groups()
    wide = job(model=WIDE, **{"workers.count": 2, "train.zero.stage": 1, "train.precision": "bf16"})
    recipe, before = CausalLM(wide), _peak_mib()
    model = first_weights.build(wide, recipe)
    yield {"case": "memory", "mib": _peak_mib() - before, "parameters": sum(p.numel() for p in model.parameters())}
    try:
        first_weights.build(wide, Failing(wide))
    except ConfigError as e:
        yield {"case": "error", "error": str(e)}


class Failing(CausalLM):
    """Cannot be built by the first worker: a weight is missing in the folder, which the others don't read."""

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
    return ranks.run(f"{__name__}:built", (2,), str(folder))


@pytest.mark.parametrize("case", CASES)
def test_all_workers_begin_with_the_weights_of_the_first(case, told) -> None:
    """To the bit those that one process makes, in the precision that trains; also where they are read from a folder."""
    rows = [row for row in told if row["case"] == case]
    assert len(rows) == 2
    for row in rows:
        assert (row["names"], row["differ"], row["buffers"], row["frozen"]) == (True, 0, 0, 0), row
        assert row["kinds"] == [row["kind"]]


def test_only_the_first_worker_has_the_weights_in_host_memory(told) -> None:
    """In fp32. The others have what arrives, which is in bf16 and on their device, here the host; each had it all in fp32 too."""
    first, other = sorted((row for row in told if row["case"] == "memory"), key=lambda row: row["rank"])
    whole = 4 * first["parameters"] / 2**20
    assert whole > 256 and first["mib"] > whole and other["mib"] < 0.6 * whole


def test_an_error_of_the_first_worker_is_raised_on_all(told) -> None:
    """The others would wait for its weights."""
    assert [row["error"] for row in told if row["case"] == "error"] == ["model.pretrained: lacks a weight"] * 2
