"""Tests `train.parallel: auto`: the fastest configuration by the plan, over all ways in which workers can shard the model."""

import json
import logging

import pytest
from heliostat import schema
from heliostat.checkpoint import layout
from heliostat.config.spec import Job
from heliostat.errors import ConfigError, StorageError
from heliostat.plan import auto, hardware, layouts, plan_file, planner, ranking
from heliostat.recipes.text.causal_lm import CausalLM
from heliostat.storage.locations import Location
from heliostat.training.run import train_job
from heliostat.validation import check
from heliostat.validation.check import load_job

from tests.unit.build_index import index
from tests.unit.build_job import job, write
from tests.unit.forked import run

FOUR = {"workers.count": 4, "workers.gpus": 1, "train.global_batch_size": 16}
MIXTRAL = {"model.arch": "mixtral", "model.num_local_experts": 8, "model.num_experts_per_tok": 2}
DEEP = {"model.hidden_size": 16384, "model.num_hidden_layers": 3, "model.intermediate_size": 65536, "model.vocab_size": 4096}
pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("in_repository")]


def ranked(**changes):
    made = job(**changes)
    return made, ranking.ranking(made, CausalLM(made)).dump()


def degrees(found) -> set[tuple[int, int, int]]:
    return {tuple(one["parallel"].values()) for one in found["layouts"]}


@pytest.mark.parametrize(
    ("changes", "expected", "note"),
    [
        ({}, {(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1)}, "no number of workers supports expert parallelism"),
        ({"workers.count": [2, 4]}, {(1, 1, 1), (2, 1, 1), (1, 2, 1)}, "no number of workers supports expert parallelism"),
        (MIXTRAL, {(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 1, 2), (1, 1, 4)}, "no number of workers supports tensor parallelism"),
        ({"train.parallel": {"tensor": 2}}, {(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1)}, "no number of workers"),
        ({"train.compile": True}, {(1, 1, 1)}, "no number of workers supports tensor parallelism"),
        ({"workers.count": 1}, {(1, 1, 1)}, ""),
    ],
)  # fmt: skip
def test_every_way_to_divide_the_model_is_ranked_and_what_is_not_says_why(changes, expected, note):
    """Each configuration is a job that `heliostat check` accepts, so the printed `--set` is enough."""
    _, found = ranked(**{**FOUR, **changes})
    assert degrees(found) == expected
    assert any(n.startswith(note) for n in found["notes"]) if note else not found["notes"]
    for one in found["layouts"]:
        keys = {k: v for k, v in one["layout"].items() if v is not None}
        plain = {**FOUR, **changes, "train.parallel": {}, **keys}
        assert layouts.of(job(**plain)).settings() == one["layout"]


@pytest.mark.parametrize(
    "changes",
    [
        {"train.parallel": {"tensor": 2}, "workers.count": 8, "train.global_batch_size": 4, "train.micro_batch_size": 1},
        {"train.parallel": {"sequence": 2}, "workers.count": 8, "train.global_batch_size": 12, "train.micro_batch_size": 1},
        {"train.attention": "flash_attention_2", "data.document_mask": True, "train.micro_batch_size": 1},
        {"train.compile": "blocks", "train.zero.stage": 1},
        {"train.grad_accum_dtype": "fp32", "train.zero.stage": 1},
        {"workers.count": [2, 6], "train.global_batch_size": 48, "train.micro_batch_size": 1},
        {"workers.count": [2, 16], "train.global_batch_size": 64, "train.micro_batch_size": 8},
        {"data.virtual_ranks": 4, "workers.count": [2, 4]},
    ],
)  # fmt: skip
def test_what_is_offered_is_a_job_on_every_number_of_workers_that_the_job_has(changes):
    """This holds even if the job's own configuration is almost the only one."""
    made, found = ranked(**{**FOUR, **changes})
    counts = made.worker_counts()
    for one in found["layouts"]:
        keys = one["layout"]
        layout = layouts.Layout(
            keys["train.zero.stage"], keys["train.micro_batch_size"], keys["train.activation_checkpointing"],
            bool(keys["train.zero.offload.optimizer"]), keys["train.zero.offload.param"], *one["parallel"].values())  # fmt: skip
        assert set(counts) <= set(layouts.applied(made, layout).worker_counts())
    assert found["workers"] == counts[-1] and layouts.of(made).family in {
        (k["train.zero.stage"], k["train.activation_checkpointing"], bool(k["train.zero.offload.optimizer"]),
         k["train.zero.offload.param"], *(k[f"train.parallel.{d}"] for d in ("sequence", "tensor", "expert")))
        for k in (one["layout"] for one in found["layouts"])
    }  # fmt: skip


def test_a_cpu_that_computes_no_bf16_gets_a_layout_of_fp32(monkeypatch):
    """A job in bf16 may not have stage 0, which is among these configurations."""
    monkeypatch.setattr(check, "cpu_flags", lambda: {"avx2"})
    made = auto.settled(job(**{"workers.count": 2, "train.precision": "bf16", "train.parallel": "auto"}))
    assert made.train.precision == "fp32" and not made.train.parallel.auto


def test_divided_matrices_are_planned_on_a_workers_part_and_experts_on_those_that_travel():
    """Each degree is planned like a job with that degree."""
    for changes, key in (({}, "tensor"), (MIXTRAL, "expert")):
        stage = 1 if key == "tensor" else 3
        _, found = ranked(**{**FOUR, **changes})
        own, alone = ranked(**{**FOUR, **changes, "train.zero.stage": stage, "train.parallel": {key: 2}})
        mine = [one for one in found["layouts"] if one["parallel"][key] == 2]
        assert mine and [one["speed"] for one in mine] == [one["speed"] for one in alone["layouts"] if one["parallel"][key] == 2]
        assert all(one["memory"]["weights"] for one in mine) and own.train.parallel.model_dump()[key] == 2


def test_auto_is_the_first_of_the_ranking_and_a_job_like_any_other(caplog):
    asked = {**FOUR, **DEEP, "data.sequence_length": 512, "train.global_batch_size": 64}
    _, found = ranked(**asked)
    with caplog.at_level(logging.INFO, "heliostat"):
        made = auto.settled(job(**asked, **{"train.parallel": "auto"}))
    assert layouts.of(made).settings() == found["layouts"][0]["layout"] and not made.train.parallel.auto
    assert f"the fastest of {len(found['layouts'])} parallelism configurations on 4 workers of H100" in caplog.text
    assert all(f"--set {s}" in caplog.text for s in found["set"]) and found["set"]
    assert "--set 'train.parallel={" in caplog.text or "--set train.parallel={}" in caplog.text
    assert auto.settled(made) is made, "which is settled already"
    assert schema.validate(Job, made.dump(), "again") == made


def test_a_run_that_goes_on_with_as_many_workers_keeps_its_layout(tmp_path, caplog):
    asked = {**FOUR, "storage": str(tmp_path), "train.parallel": "auto"}
    own = {k: v for k, v in asked.items() if k != "train.parallel"} | {"train.zero.stage": 2, "train.micro_batch_size": 4}
    place = layout.folder(job(**asked).run_folder, 10).join(layout.INDEX)
    place.write(layout.encode(index(10, job=job(**own).dump())))
    with caplog.at_level(logging.INFO, "heliostat"):
        kept = auto.settled(job(**asked), resume=True)
    assert (
        (kept.train.zero.stage, kept.train.micro_batch_size)
        == (
            2,
            4,
        )
        and "--set train.zero.stage=2" in caplog.text
        and "keeps this parallelism configuration: --set" in caplog.text
    )
    fewer = job(**{**asked, "workers.count": 2})
    assert auto.settled(fewer, resume=True) == auto.settled(fewer), "other workers, and so the fastest on those"
    elastic = job(**{**asked, "workers.count": [2, 4]})
    assert auto.settled(elastic, resume=True).train.zero.stage == 2


def test_what_does_not_fit_is_one_error_and_what_is_not_settled_is_not_trained(tmp_path):
    huge = {**FOUR, **DEEP, "model.hidden_size": 131072, "model.intermediate_size": 524288}
    with pytest.raises(
        ConfigError,
        match=r"^train\.parallel: auto: no parallelism configuration fits on 4 workers of H100 \(closest to fitting: .* GiB",
    ):
        auto.settled(job(**huge, **{"train.parallel": "auto"}))
    with pytest.raises(ConfigError, match=r"^train\.parallel: auto works only with"):
        train_job(job(**{"train.parallel": "auto", "storage": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"train\.parallel: .*automatic"):
        job(**{"train.parallel": "automatic"})


def test_commands_plan_the_layout_that_auto_finds(tmp_path):
    """`plan` and `train --dry-run` use it, and `--rank` lists the alternatives."""
    path = str(write(tmp_path, **{**FOUR, "data.sources.0.path": str(tmp_path / "nothing"), "train.parallel": "auto"}))
    made = auto.settled(load_job(tmp_path / "job.yaml"))
    code, out, lines, _ = run("plan", path, "--json")
    found = json.loads(out)
    assert code == 0 and any("train.parallel: auto: the fastest of " in line for line in lines)
    plain = planner.planners(made, CausalLM(made), None, None, hardware.table())[-1].chosen()
    assert found["memory"] == plain.memory and found["speed"]["step_s"] == plain.speed["step_s"]
    assert layouts.of(made) != layouts.of(load_job(tmp_path / "job.yaml"))
    code, out, _, _ = run("train", path, "--dry-run")
    assert code == 0 and f"at ZeRO stage {made.train.zero.stage} on 4 ranks" in out
    code, out, _, _ = run("plan", path, "--rank")
    assert code == 0 and "sequence 2" in out and "tensor 2" in out


@pytest.mark.parametrize(
    ("name", "gib", "expected"),
    [("NVIDIA H100 80GB HBM3", 79.2, "H100"), ("NVIDIA A100-SXM4-80GB", 79.3, "A100"), ("NVIDIA H200", 139.8, "H200"),
     ("NVIDIA L4", 22.0, "L4"), ("NVIDIA L40S", 44.4, None), ("NVIDIA A100-SXM4-40GB", 39.4, None), ("Tesla T4", 14.6, None)],
)  # fmt: skip
def test_this_machines_gpu_is_one_of_the_table_with_its_memory_or_an_error(name, gib, expected):
    devices = hardware.table()["devices"]
    if expected:
        assert auto.named(name, gib * hardware.GIB, devices) == expected
        return
    with pytest.raises(ConfigError, match=f"this machine's {name} with {gib:.0f} GiB isn't in the price table"):
        auto.named(name, gib * hardware.GIB, devices)


def test_datasets_that_cannot_be_read_are_asked_for_once(tmp_path, monkeypatch):
    """Each read takes as long as a store may be unreachable. The ranking read the datasets again, and so did the configuration
    that it chose."""
    asked = []

    def probe(place: Location) -> None:
        asked.append(place)
        raise StorageError(f"{place}: is away")

    monkeypatch.setattr(Location, "probe", probe)
    found = plan_file.plan_file(write(tmp_path, **{"train.parallel": "auto"}))
    assert len(asked) == 1 and [note for note in found["notes"] if "is away" in note]
