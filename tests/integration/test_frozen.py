"""Tests parameters that aren't trained: they are in every export, are written once per run, and are never lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from heliostat.checkpoint import layout
from heliostat.checkpoint import saver as checkpoint
from heliostat.checkpoint.index import TensorIndex
from heliostat.checkpoint.placement import Tensor
from heliostat.config import spec
from heliostat.engine import deepspeed_engine, sharded_state
from heliostat.errors import CheckpointError
from heliostat.inference import export
from heliostat.storage.locations import Location
from heliostat.tune.trial import clone
from safetensors.torch import load_file
from torch import nn

from tests.integration import ranks
from tests.unit import build_index
from tests.unit.build_job import job
from tests.unit.build_recipe import Around

AFMOE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_dense_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


def afmoe_model() -> nn.Module:
    """Returns a model of transformers that freezes a parameter of each router."""
    from transformers import AfmoeConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AfmoeConfig(**AFMOE), dtype=torch.float32)


class Adapted(nn.Module):
    """Defines a frozen base, whose size no worker count divides, and trained parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(7, 13).requires_grad_(False)
        self.head = nn.Linear(13, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x)).square().mean()


def _engine(recipe: Any, stage: int, precision: str = "bf16") -> Any:
    world = dist.get_world_size()
    changes = {"train.zero.stage": stage, "train.precision": precision, "workers.count": world, "train.global_batch_size": world}
    changes |= {"train.micro_batch_size": 1, "train.deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    return deepspeed_engine.build_engine(job(**changes), recipe)


def _save(saver: checkpoint.Saver, step: int, engine: Any) -> None:
    facts = build_index.facts(world_size=2, zero_stage=2, job=job().dump())
    saver.save(step, sharded_state.of(engine).tensors(), facts, sharded_state.of(engine).frozen())
    saver.wait()


def _load(run: Location, step: int, engine: Any, saver: checkpoint.Saver, group: Any) -> None:
    found = checkpoint.open_checkpoint(run, step)
    checkpoint.load(found, sharded_state.of(engine).tensors(whole=True) | sharded_state.of(engine).frozen(whole=True), group)
    sharded_state.of(engine).after_load(0)
    saver.frozen.loaded(found, sharded_state.of(engine).frozen())


def afmoe(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    for stage in (0, 1, 2, 3):
        engine = _engine(Around(afmoe_model), stage, "bf16" if stage else "fp32")
        shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in engine.module.named_parameters()}
        for slices in sharded_state.of(engine).frozen(whole=True).values():
            slices.local.copy_(torch.arange(slices.start, slices.start + len(slices.local)) / 8)  # as if it were pretrained
        run = Location(f"{folder}/{stage}")
        _save(checkpoint.Saver(run, spec.Checkpoint(every=1), group), 1, engine)
        if dist.get_rank() == 0:
            export.write_weights(checkpoint.open_checkpoint(run, 1), shapes, torch.float32, Path(folder) / f"{stage}/model")
            frozen = {n: list(load_file(f"{folder}/{stage}/model.safetensors")[n]) for n in shapes if n.endswith("expert_bias")}
            yield {"stage": stage, "frozen": {n: [float(x) for x in v] for n, v in frozen.items()}}


def test_a_model_that_freezes_parameters_by_itself_is_exported_whole_at_every_stage(tmp_path: Path) -> None:
    """afmoe's expert biases are in the export with their values, for any distribution over ranks."""
    told = {row["stage"]: row["frozen"] for row in ranks.run(f"{__name__}:afmoe", (3,), str(tmp_path))}
    assert told == {stage: {"model.layers.1.mlp.expert_bias": [0.0, 0.125, 0.25, 0.375]} for stage in range(4)}


def life(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    run = Location(folder)

    def told(case: str) -> Iterator[dict[str, Any]]:
        dist.barrier()
        if dist.get_rank() == 0:
            place = Path(folder, "checkpoints")
            files = {f"{p.parent.name}/{p.name}": p.stat().st_mtime_ns for p in sorted(place.glob("frozen-*/*"))}
            used = {s: checkpoint.open_checkpoint(run, s).index.frozen for s in layout.steps(run)}
            yield {"case": case, "files": files, "used": used}
        dist.barrier()

    saver = checkpoint.Saver(run, spec.Checkpoint(every=1, keep=2), group)
    if dist.get_world_size() == 2:
        engine = _engine(Around(Adapted), 2)
        for step in (1, 2, 3, 4):
            _save(saver, step, engine)
        yield from told("saved")
    everyone.wait()
    if dist.get_world_size() == 3:  # goes on at another stage, precision and worker count
        engine = _engine(Around(Adapted), 3, "fp32")
        _load(run, 4, engine, saver, group)
        _save(saver, 5, engine)
        yield from told("resumed")
        next(iter(sharded_state.of(engine).frozen().values())).local.mul_(2)
        _save(saver, 6, engine)
        yield from told("changed")
        _save(saver, 7, engine)
        yield from told("pruned")


def test_they_are_written_once_per_run_and_kept_as_long_as_a_checkpoint_names_them(tmp_path: Path) -> None:
    """Four saves and a resume at another stage, precision, and worker count use one unchanged folder.

    Changed parameters are written to a new folder, and a folder that no checkpoint names is deleted.
    """
    by_case = {row["case"]: row for row in ranks.run(f"{__name__}:life", (2, 3), str(tmp_path))}
    saved, resumed, changed, pruned = (by_case[case] for case in ("saved", "resumed", "changed", "pruned"))
    (name,) = {file.split("/")[0] for file in saved["files"]}
    assert saved["used"] == {"3": name, "4": name} and resumed["used"] == {"4": name, "5": name}
    assert resumed["files"] == saved["files"]
    (other,) = {file.split("/")[0] for file in changed["files"]} - {name}
    assert changed["used"] == {"5": name, "6": other}
    assert pruned["used"] == {"6": other, "7": other}
    assert {file.split("/")[0] for file in pruned["files"]} == {other}


def lost(group: Any, everyone: Any, folder: str) -> Iterator[dict[str, Any]]:
    run, other = Location(f"{folder}/one"), Location(f"{folder}/clone")
    engine = _engine(Around(Adapted), 2)
    saver = checkpoint.Saver(run, spec.Checkpoint(every=1, keep=5), group)
    _save(saver, 1, engine)
    if dist.get_rank() == 0:
        clone({"id": "1", "folder": str(run), "step": 1}, other)
        found = checkpoint.open_checkpoint(other, 1)
        yield {"case": "clone", "sum": float(found.read("frozen.base.weight").float().sum())}
        yield {"case": "truth", "sum": float(engine.module.base.weight.float().sum())}
        shard = max(Path(folder, "one/checkpoints").glob("frozen-*/*.safetensors"))
        kept = shard.read_bytes()
        for case, data in [("flipped", kept[:-1] + bytes([kept[-1] ^ 1])), ("cut", kept[:-1])]:
            shard.write_bytes(data)
            try:
                [checkpoint.open_checkpoint(run, 1).read(f"frozen.base.{n}") for n in ("weight", "bias")]
            except CheckpointError as e:
                yield {"case": case, "error": type(e).__name__, "text": str(e)}
        Location(str(shard.parent)).delete()
    dist.barrier()
    _save(saver, 2, engine)  # what was lost while the run goes on is written again
    yield {"case": "again", "sum": float(checkpoint.open_checkpoint(run, 2).read("frozen.base.weight").float().sum())}


def test_what_is_lost_of_them_is_found_and_no_checkpoint_before_is_tried(tmp_path: Path) -> None:
    """All checkpoints need them, so damage ends the run with one line, and doesn't lead back to step 0.

    A clone has its own copy, and a run that still has them in memory writes them again.
    """
    told = ranks.run(f"{__name__}:lost", (2,), str(tmp_path))
    sums = {row["sum"] for row in told if "sum" in row}
    assert len(sums) == 1 and {row["case"] for row in told} == {"clone", "truth", "flipped", "cut", "again"}
    errors = {row["case"]: row for row in told if "error" in row}
    assert [row["error"] for row in errors.values()] == ["CheckpointError"] * 2
    assert all("Restore the file from a copy" in row["text"] and "frozen-" in row["text"] for row in errors.values())


def indexed(*names: str) -> TensorIndex:
    return TensorIndex(layout.FORMAT, [], {name: Tensor("F32", [1]) for name in names})


def test_a_checkpoint_from_before_they_were_saved_exports_them_as_the_model_was_built(caplog: pytest.LogCaptureFixture) -> None:
    """A message reports this. Values in the checkpoint aren't built again."""
    old = layout.SavedCheckpoint(Location("/nowhere"), indexed("master.head.weight", "master.head.bias"))
    names = [n for n, p in Adapted().named_parameters() if not p.requires_grad]
    with caplog.at_level(logging.WARNING):
        initial = export._initial(old, job(), Around(Adapted), names)
    torch.manual_seed(job().train.seed)
    assert torch.equal(initial["base.weight"], Adapted().base.weight) and set(initial) == {"base.weight", "base.bias"}
    assert "the checkpoint has no frozen parameters, so 2 parameters get their initial values from the job's seed" in caplog.text
    frozen = layout.SavedCheckpoint(Location("/nowhere"), indexed(*(f"frozen.{n}" for n in names)))
    assert export._initial(layout.SavedCheckpoint(old.location, old.index, frozen), job(), Around(Adapted), names) == {}
