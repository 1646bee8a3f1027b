"""Tests that fine-tuning computes the same in every configuration: SFT, SFT with an adapter, and DPO over workers, micro-batches,
packing, attention, tiled losses, and ZeRO stages.

All cases train the same conversations in each step. Each case is compared with one plain process that uses only transformers,
peft, and torch: the loss, and the gradient of each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from heliostat.config.spec import Job
from heliostat.data.stream import StepSamples
from heliostat.engine import deepspeed_engine
from heliostat.numerics import compare, play
from heliostat.recipes import adapters
from transformers import AutoModelForCausalLM

from tests.integration import layouts, ranks, selection
from tests.integration.fine_tuning_data import IGNORED, Row, answer, build, rows
from tests.unit.build_job import job

STEPS, SEED, LR, BETAS, EPS, RANK, BETA = 2, 7, 3e-3, (0.9, 0.95), 1e-4, 4, 0.2
LOSS, GRADIENT = 1e-5, 1e-4  # largest relative differences


class Case(NamedTuple):
    recipe: str  # sft, or dpo
    stage: int
    workers: int
    micro: int
    adapter: bool
    packed: bool  # several conversations per row
    attention: str
    tiled: bool

    def __str__(self) -> str:
        words = [self.recipe, "lora" * self.adapter, f"zero{self.stage}", f"workers{self.workers}", f"micro{self.micro}",
                 "packed" * self.packed, self.attention, "tiled" * self.tiled]  # fmt: skip
        return "-".join(filter(None, words))


def every(recipe: str, stage: int, switches: Iterable[int]) -> Case:
    """Returns the case of five switches. Preferences have no packs, so the third switch is their adapter."""
    workers, micro, third, attention, tiled = switches
    adapter = bool(third) if recipe == "dpo" else recipe == "lora"
    return Case("dpo" if recipe == "dpo" else "sft", stage, 1 + workers, 1 + micro, adapter, recipe != "dpo" and bool(third),
                ("sdpa", "eager")[attention], bool(tiled))  # fmt: skip


RECIPES = ("sft", "lora", "dpo")
ROWS = (0, 0, 0, 0, 0), (0, 0, 0, 1, 0), (0, 0, 1, 0, 1), (0, 1, 0, 0, 1)  # of each stage, and their complements
COVERING = [(stage, switches) for stage, row in enumerate(ROWS) for switches in (row, tuple(1 - bit for bit in row))]
CASES = [every(recipe, *case) for recipe in RECIPES for case in COVERING]
WHOLE = [every(recipe, stage, bits) for recipe in RECIPES for stage in range(4) for bits in product((0, 1), repeat=5)]
FEW = CASES[0], CASES[7], CASES[-1]


def test_the_cases_contain_every_pair_of_settings() -> None:
    """So a fault that needs two settings is seen, without the complete grid."""
    for one, other in combinations(range(6), 2):
        pairs = {((stage, *switches)[one], (stage, *switches)[other]) for stage, switches in COVERING}
        assert len(pairs) == (8 if one == 0 else 4)


# the cases' jobs -----------------------------------------------------------------------------------------------------


def dataset(case: Case) -> str:
    if case.recipe == "sft":
        return "packed" if case.packed else "single"
    return "pairs" if case.adapter else "referred"


def described(case: Case, folder: Path) -> Job:
    name = dataset(case)
    model: dict[str, Any] = {"pretrained": str(folder / "base")}
    model |= {"adapter": {"rank": RANK}} if case.adapter else {}
    model |= {"dpo": {"beta": BETA, "label_smoothing": 0.1}} if case.recipe == "dpo" else {}
    return job(**{
        "name": str(case), "storage": str(folder / "runs"), "recipe": f"heliostat.recipes:{case.recipe.upper()}", "model": model,
        "data.sources": [{"path": str(folder / name)}], "data.sequence_length": None, "evaluate": None, "train.steps": STEPS,
        "train.global_batch_size": len(rows(folder, name)), "train.micro_batch_size": case.micro, "train.seed": SEED,
        "train.precision": "fp32", "train.grad_clip": 0.0, "train.schedule": {"name": "constant"},
        "train.attention": case.attention, "data.document_mask": case.recipe == "sft",
        "train.optimizer": {"name": "adamw", "lr": LR, "betas": [*BETAS], "eps": EPS, "weight_decay": 0.0},
        "train.tiled_loss": case.tiled,
        "train.zero.stage": case.stage, "workers.count": case.workers, "train.deepspeed": layouts.SMALL_STAYS_DIVIDED,
    })  # fmt: skip


# the plain process ---------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    loss: float
    gradients: dict[str, torch.Tensor]


def plain(case: Case, folder: Path) -> list[Step]:
    """Trains the same steps in one process, one sequence after another."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if case.adapter:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
        for name, p in model.named_parameters():
            if name.endswith(adapters.DOWN):
                layer = name.removeprefix("base_model.model.").removesuffix(f".{adapters.DOWN}")
                p.data.copy_(adapters.first_down(SEED, layer, tuple(p.shape)))
    trained = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    loss: Callable[[Any, list[Row]], torch.Tensor] = preference_loss if case.recipe == "dpo" else conversation_loss
    steps = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss(model, rows(folder, "single" if case.recipe == "sft" else dataset(case)))
        value.backward()
        steps.append(Step(value.item(), {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}))
        optimizer.step()
    return steps


def conversation_loss(model: Any, chats: list[Row]) -> torch.Tensor:
    """Computes the mean over all trained tokens, with the loss of transformers."""
    sums, terms = [], 0
    for chat in chats:
        tokens = torch.tensor([chat["tokens"]])
        labels = tokens.where(torch.tensor([chat["trained"]]), IGNORED)
        sums.append(model(input_ids=tokens, labels=labels, num_items_in_batch=1).loss)
        terms += int((labels[:, 1:] != IGNORED).sum())
    return torch.stack(sums).sum() / terms


def preference_loss(model: Any, pairs: list[Row]) -> torch.Tensor:
    losses = []
    for row in pairs:
        gains = []
        for name in ("chosen", "rejected"):
            if "reference_chosen" in row:
                reference = torch.tensor(row[f"reference_{name}"])
            else:
                with torch.no_grad(), model.disable_adapter():
                    reference = answer(model, row, name)[0]
            gains.append(answer(model, row, name)[0] - reference)
        margin = BETA * (gains[0] - gains[1])
        losses.append(-0.9 * torch.log(torch.sigmoid(margin)) - 0.1 * torch.log(1 - torch.sigmoid(margin)))
    return torch.stack(losses).mean()


# the cases -----------------------------------------------------------------------------------------------------------


def trained(group: Any, everyone: Any, place: str, *names: str) -> Iterator[dict[str, Any]]:
    """Yields the differences of each case from the plain process, for cases with this number of workers."""
    folder, right = Path(place), dict[tuple[str, bool, str], list[Step]]()
    for case in (case for case in WHOLE if str(case) in names and case.workers == dist.get_world_size()):
        mine = steps(case, folder)
        if dist.get_rank():
            continue
        kind = case.recipe, case.adapter, dataset(case) if case.recipe == "dpo" else ""
        if kind not in right:
            right[kind] = plain(case, folder)
        loss = max(abs(one.loss - other.loss) / abs(other.loss) for one, other in zip(mine, right[kind], strict=True))
        pairs = [(one.gradients, other.gradients) for one, other in zip(mine, right[kind], strict=True)]
        assert all(one.keys() == other.keys() for one, other in pairs)
        worst = [compare.relative(one[name], other[name], 1e-6) for one, other in pairs for name in other]
        yield {"case": str(case), "loss": loss, "gradient": max(worst), "counted": len(worst),
               "moved": abs(right[kind][1].loss - right[kind][0].loss)}  # fmt: skip


def steps(case: Case, folder: Path) -> list[Step]:
    player = layouts.player(described(case, folder))
    gradients = list[dict[str, torch.Tensor]]()
    play.watch(player.engine, gradients.append)
    player._read = partial(everything, player, pq.read_table(folder / dataset(case) / "shards/0.parquet"))  # type: ignore[method-assign]
    losses = player.losses(0, STEPS)
    deepspeed_engine.destroy_engines()
    deepspeed_engine.forget_groups()
    return [Step(*one) for one in zip(losses, gradients, strict=True)]


def everything(player: play.Player, table: pa.Table) -> StepSamples:
    """Returns this worker's share of a step that contains each row of the dataset once."""
    assert player.samples
    mine, micro = player.samples.next_step(), player.job.train.micro_batch_size
    places = [lane * micro + place for lane in mine.lanes for place in range(micro)]
    return replace(mine, content=table.take(places).combine_chunks())


def ran(names: list[str], folder: Path, deadline_s: int = ranks.DEADLINE_S) -> dict[str, dict[str, Any]]:
    build(folder)
    return {row["case"]: row for row in ranks.run(f"{__name__}:trained", (1, 2), str(folder), *names, deadline_s=deadline_s)}


@pytest.fixture(scope="module")
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return ran([str(case) for case in selection.asked(request, "case")], tmp_path_factory.mktemp("fine-tuning"))


def same(row: dict[str, Any], case: Case) -> None:
    assert row["loss"] < LOSS and row["gradient"] < GRADIENT, row
    assert row["counted"] >= STEPS * (28 if case.adapter else 21), "a gradient for each matrix"
    assert row["moved"] > 1e-3


@pytest.mark.parametrize("case", selection.kept(CASES, *FEW), ids=str)
def test_every_configuration_trains_like_one_plain_process(case: Case, played: dict[str, dict[str, Any]]) -> None:
    same(played[str(case)], case)


@pytest.mark.slow
def test_the_complete_grid_trains_like_one_plain_process(tmp_path: Path) -> None:
    rows = ran([str(case) for case in WHOLE], tmp_path, 3600)
    assert len(rows) == len(set(map(str, WHOLE)))
    for case in WHOLE:
        same(rows[str(case)], case)
