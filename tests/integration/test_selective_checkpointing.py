"""Tests selective checkpointing in real DeepSpeed engines on two ranks.

At every ZeRO stage and with shared samples, losses and gradient norms equal those without checkpointing, to the bit. No expensive
operation is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from heliostat.config.spec import Job
from heliostat.recipes.text.selective import is_dear
from torch.utils._python_dispatch import TorchDispatchMode

from tests.golden import data
from tests.integration import layouts, ranks, selection
from tests.unit.build_job import BASE


@dataclass(frozen=True)
class Case:
    stage: int
    arch: str = "llama"
    sequence: int = 1
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"zero{self.stage}-{self.arch}-{self.precision}-by-{self.sequence}"


# (DeepSpeed's linear layers at stage 3 write their bias into the product, and qwen2 has biases)
CASES = [Case(0), Case(1), Case(2), Case(3), Case(3, "qwen2"), Case(3, sequence=2), Case(2, "gpt_neox", 2), Case(3, "qwen2", 2),
         Case(2, precision="bf16"), Case(3, "qwen2", precision="bf16"), Case(3, "mixtral")]  # fmt: skip
OWN: dict[str, dict[str, Any]] = {"mixtral": {"num_local_experts": 4}, "gpt_neox": {"num_key_value_heads": None}}
FEW = Case(1), Case(3, "qwen2"), Case(3, "qwen2", 2)


class Dear(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += is_dear(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def _job(case: Case, which: bool | str, folder: Path, **more: Any) -> Job:
    model = {**BASE["model"], "arch": case.arch, "vocab_size": 96} | OWN.get(case.arch, {})
    model = {key: value for key, value in model.items() if value is not None}
    changes: dict[str, Any] = {"model": model, "workers.count": 2, "train.parallel": {"sequence": case.sequence}}
    changes |= {"train.zero.stage": case.stage, "train.activation_checkpointing": which, "train.precision": case.precision}
    changes["train.deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return layouts.described(f"{case}-{which}".lower(), folder, batch=4, **changes, **more)


def played_in_ranks(group: Any, everyone: Any, folder: str, *names: str) -> Iterator[dict[str, Any]]:
    for case in (case for case in CASES if str(case) in names):
        for which in (False, "selective"):
            player = layouts.player(_job(case, which, Path(folder)))
            with Dear() as dear:
                losses = player.losses(0, layouts.STEPS)
            if player.rank == 0:
                yield {"case": str(case), "losses": losses, "norms": list(player.stepper.norms), "dear": dear.count}


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("selective")
    data.build(folder)
    names = dict.fromkeys(map(str, selection.asked(request, "case")))
    return ranks.run(f"{__name__}:played_in_ranks", (2,), str(folder), *names, deadline_s=480)


@pytest.mark.parametrize("case", selection.kept(CASES, *FEW), ids=str)
def test_losses_are_those_of_no_checkpointing_to_the_bit(case: Case, played: list[dict[str, Any]]) -> None:
    whole, mine = (row for row in played if row["case"] == str(case))
    assert mine["losses"] == whole["losses"] and len(set(mine["losses"])) > 1
    assert mine["norms"] == whole["norms"]
    assert mine["dear"] == whole["dear"] > 0


def products_in_ranks(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    """Counts the expensive operations of a run with every layer checkpointed whole, and with none."""
    for stage in (2, 3):
        for which in (False, True):
            made = _job(Case(stage), which, Path(folder))
            player = layouts.player(made)
            with Dear() as dear:
                player.losses(0, layouts.STEPS)
            if player.rank == 0:
                yield {"stage": stage, "which": which, "dear": dear.count}


@pytest.mark.ci
def test_the_last_product_of_a_layer_is_played_again_at_stage_3_alone(tmp_path: Path) -> None:
    """As the plan counts it: of attention and seven products, the last one is left out, except where DeepSpeed multiplies."""
    data.build(tmp_path)
    rows = ranks.run(f"{__name__}:products_in_ranks", (2,), str(tmp_path))
    dear = {(row["stage"], row["which"]): row["dear"] for row in rows}
    played = layouts.STEPS * 2 * 2  # of two layers, in two micro-batches a step
    assert (dear[2, True] - dear[2, False], dear[3, True] - dear[3, False]) == (7 * played, 8 * played)
