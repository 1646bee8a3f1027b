"""Tests `heliostat check --numerics`: architectures compute the same numbers at every stage, and planted faults are found and
named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from heliostat.config.spec import Job
from transformers import LlamaConfig, LlamaForCausalLM

from tests.golden import data
from tests.integration import commands, fine_tuning_data, selection, trials
from tests.integration.layouts import SMALL_STAYS_DIVIDED
from tests.unit import build_images, build_job
from tests.unit.build_text_to_image import CANVAS

ARCHITECTURES: dict[str, dict[str, Any]] = {  # most as wide as their classes' defaults: the check itself cuts them
    "gpt2": {"train.zero.stage": 1},
    "qwen2": {"train.zero.stage": 2, "train.parallel.tensor": 2, "train.optimizer": {"name": "sgd", "lr": 1e-2}},
    "qwen3": {"train.zero.stage": 3, "train.parallel.sequence": 2},
    "gemma2": {"train.zero.stage": 1, "train.parallel.tensor": 2, "train.precision": "bf16"},
    "phi3": {"train.zero.stage": 2, "data.document_mask": True, "train.tiled_mlp": True},
    "gpt_neox": {"train.zero.stage": 3, "train.activation_checkpointing": True, "train.activation_offload": True,
                 "train.tiled_mlp": True, "train.tiled_loss": True},
    "olmo2": {"train.zero.stage": 0},
    "mixtral": {"train.zero.stage": 2, "model.output_router_logits": True, "train.precision": "bf16"},
    "qwen3_moe": {"train.zero.stage": 3, "train.parallel.expert": 2},
    "deepseek_v3": {"train.zero.stage": 1, "model.router_bias_update_rate": 0.01, "model.router_z_loss_coef": 0.01},
    "llama": {"train.zero.stage": 2, "train.parallel.sequence": 2, "train.optimizer": {"name": "muon", "lr": 1e-2},
              "train.activation_checkpointing": 1, "train.tiled_mlp": True},
}  # fmt: skip
EXTRA = {"gpt2": {"n_embd": 96, "n_head": 4}, "phi3": {"pad_token_id": 0}, "deepseek_v3": {"first_k_dense_replace": 1}}


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    return data.tokens(tmp_path_factory.mktemp("data") / "documents")


def made(name: str, documents: Path, **changes: Any) -> Job:
    settings = {"name": name, "data.sources": [{"path": str(documents)}], "train.precision": "fp32", "workers.count": 2}
    return build_job.job(**{**settings, **changes})


@pytest.fixture(scope="module")
def concluded(request, documents, tmp_path_factory) -> dict[str, dict[str, Any]]:
    asked = selection.asked(request, "arch")
    models = {arch: {"arch": arch, "num_hidden_layers": 2, **EXTRA.get(arch, {})} for arch in asked}
    jobs = [made(arch.replace("_", "-"), documents, model=model, **ARCHITECTURES[arch]) for arch, model in models.items()]
    return trials.run(jobs, tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize("arch", selection.kept(ARCHITECTURES))
def test_an_architecture_computes_what_one_plain_process_does(arch, concluded) -> None:
    """Dense models and experts, at every stage, with three optimizers, two precisions, document masks, checkpointing, balancing
    by bias, sharded experts, and shared samples."""
    one = concluded[arch.replace("_", "-")]
    assert one["ok"], one["faults"][:3]
    assert ("reduced from" in one["trial"]["model"]) == (arch != "gpt2")  # which is small enough as it is
    rows = {row["what"]: row for row in one["rows"]}
    assert rows["gradients"]["count"] == rows["updates"]["count"] >= 4 * 15  # a row for each tensor and step
    assert rows["receipts"]["count"] == 4 * one["trial"]["global_batch_size"]
    assert one["losses"]["engine"][0] != one["losses"]["engine"][1]


@pytest.mark.ci
def test_the_canvas_trains_at_stage_3_as_in_one_plain_process(tmp_path_factory) -> None:
    """Its layers outside the blocks, and the projection that it calls twice, are sharded and gathered like all others."""
    place = tmp_path_factory.mktemp("canvas")
    keys = build_images.job(build_images.digits(place / "digits"), backbone=CANVAS, objective={"prediction": "flow"})
    settings = {"name": "canvas", "train.zero.stage": 3, "workers.count": 2, "train.deepspeed": SMALL_STAYS_DIVIDED}
    made = build_job.job(**keys, **settings, **{"train.optimizer": {"lr": 1e-3, "eps": 1e-4}})  # gradients begin near zero
    one = trials.run([made], place)[made.name]
    assert one["ok"], one["faults"][:3]
    assert {row["what"]: row["count"] for row in one["rows"]}["gradients"] > 100


# adapters -------------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora-0": {"train.zero.stage": 0, "train.micro_batch_size": 1, "train.tiled_loss": True},
    "rslora-1": {"train.zero.stage": 1, "data.document_mask": True, "train.attention": "eager"},
    "dora-2": {"train.zero.stage": 2, "train.activation_checkpointing": True, "train.attention": "sdpa"},
    "lora-3": {"train.zero.stage": 3, "data.document_mask": True, "train.tiled_loss": True, "train.micro_batch_size": 4},
    "lora-2": {"train.zero.stage": 2, "model.adapter.base": "nf4", "data.document_mask": True},
    "dora-3": {"train.zero.stage": 3, "train.micro_batch_size": 1, "train.precision": "bf16"},
}


def wide(folder: Path, documents: Path, vocabulary: int = 96) -> Path:
    """Writes a base that is too large for the check, so that the check reduces it, with the tokenizer of the documents."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    shutil.copy(documents / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def adapted(request, documents, tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adapted")
    base, jobs = wide(folder / "base", documents), []
    for name in selection.asked(request, "adapter"):
        adapter = {"method": name.partition("-")[0], "rank": 4, "alpha": 6.0}
        jobs.append(made(name, documents, **{"model": {"pretrained": str(base), "adapter": adapter}, **ADAPTERS[name]}))
    return trials.run(jobs, folder)


@pytest.mark.parametrize("adapter", selection.kept(ADAPTERS, "lora-3"))
def test_an_adapter_computes_what_one_plain_process_does(adapter, adapted) -> None:
    """At every stage, with packed documents, two kinds of attention, a tiled loss, and several micro-batches."""
    one = adapted[adapter]
    assert one["ok"], one["faults"][:3]
    assert "reduced from" in one["trial"]["model"]
    rows = {row["what"]: row for row in one["rows"]}
    matrices = {"lora": 2, "rslora": 2, "dora": 3}[adapter.partition("-")[0]]
    assert rows["gradients"]["count"] == rows["updates"]["count"]
    assert rows["gradients"]["count"] % (4 * 7 * matrices) == 0, "only the matrices of the adapter are trained"
    assert one["losses"]["engine"][0] != one["losses"]["engine"][1]


# fine-tuning ----------------------------------------------------------------------------------------------------------

TUNED: dict[str, dict[str, Any]] = {
    "sft-3": {"train.zero.stage": 3, "train.attention": "eager", "train.tiled_loss": True},
    "sft-sequence": {"train.zero.stage": 1, "train.parallel.sequence": 2, "train.micro_batch_size": 1},
    "sft-bf16": {"train.zero.stage": 2, "train.precision": "bf16"},
    "sft-nf4": {"train.zero.stage": 2, "model.adapter": {"rank": 4, "base": "nf4"}, "train.activation_checkpointing": True},
    "sft-whole": {"train.zero.stage": 0},
    "dpo-3": {"train.zero.stage": 3, "model.dpo": {"loss": "ipo", "reference_model": "any"}, "train.tiled_loss": True},
    "dpo-nf4": {"train.zero.stage": 2, "model.adapter": {"rank": 4, "base": "nf4"}, "train.activation_checkpointing": True},
    "sft-leak": {},  # with planted faults
    "sft-mean": {},
    "sft-shift": {},
    "dpo-prompt": {"model.adapter": {"rank": 4}},
}  # fmt: skip
PLANTED = "sft-leak", "sft-mean", "sft-shift", "dpo-prompt"


def fine_tuned(name: str, folder: Path) -> Job:
    recipe = name.partition("-")[0]
    data = "pairs" if "model.adapter" in TUNED[name] and recipe == "dpo" else {"sft": "packed", "dpo": "referred"}[recipe]
    settings = {"name": name, "recipe": f"heliostat.recipes:{recipe.upper()}", "data.sources": [{"path": str(folder / data)}],
                "model": {"pretrained": str(folder / ("base" if name == "sft-whole" else "wide"))}, "workers.count": 2,
                "data.sequence_length": None, "train.precision": "fp32", "data.document_mask": recipe == "sft"}  # fmt: skip
    return build_job.job(**{**settings, **TUNED[name]})


@pytest.fixture(scope="module")
def tuned(request, tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tuned")
    fine_tuning_data.build(folder)
    wide(folder / "wide", folder / "packed", 400)
    return trials.run([fine_tuned(name, folder) for name in selection.asked(request, "tuned_as")], folder)


@pytest.mark.parametrize("tuned_as", selection.kept([name for name in TUNED if name not in PLANTED], "sft-3"))
def test_fine_tuning_computes_what_one_plain_process_does(tuned_as, tuned) -> None:
    """The plain process computes each conversation and each answer alone, so packs, padding, and masks are checked, too."""
    one = tuned[tuned_as]
    assert one["ok"], one["faults"][:3]
    assert ("reduced from" in one["trial"]["model"]) == (tuned_as != "sft-whole")
    rows = {row["what"]: row for row in one["rows"]}
    assert rows["gradients"]["count"] == rows["updates"]["count"] > 0
    assert one["losses"]["engine"][0] != one["losses"]["engine"][1]


def spoil(name: str) -> None:
    """Changes the batches, or the number of terms, of this process's workers. The plain process doesn't use these functions."""
    from heliostat.recipes.text import packs, preference_rows
    from heliostat.recipes.text.sft import SFT

    def changed(batch: Any, change: Any) -> Any:
        return lambda *arguments: change(batch(*arguments))

    if name == "sft-leak":
        packs.batch = changed(packs.batch, lambda made: {k: v for k, v in made.items() if k != "position_ids"})
    if name == "sft-mean":
        SFT.terms = lambda self, batch: batch["input_ids"].numel()
    if name == "sft-shift":
        packs.batch = changed(packs.batch, lambda made: made | {"labels": made["labels"].roll(1, 1)})
    if name == "dpo-prompt":
        preference_rows.batch = changed(preference_rows.batch, lambda made: made | {"labels": made["labels"].roll(1, 0)})


@pytest.mark.ci
def test_faults_of_fine_tuning_are_found_at_the_first_step(tmp_path) -> None:
    """Packs whose conversations see each other, a mean over untrained tokens, a shifted mask, and labels of another prompt."""
    fine_tuning_data.build(tmp_path)
    wide(tmp_path / "wide", tmp_path / "packed", 400)
    spoiled = trials.run([fine_tuned(name, tmp_path) for name in PLANTED], tmp_path, f"{__name__}:spoil")
    for name in PLANTED:
        assert not spoiled[name]["ok"]
        assert min(fault["step"] for fault in named(spoiled[name], "loss")) == 1 or name == "dpo-prompt", name
        assert min(fault["step"] for fault in named(spoiled[name], "gradients")) == 1, name
    assert all("a wrong scale" in fault["text"] for fault in named(spoiled["sft-mean"], "gradients"))


# faults that are planted in the workers of a trial -------------------------------------------------------------------

WHICH = "model.layers.1.mlp.up_proj.weight"
FAULTY = {"not-reduced": 0, "wrong-scale": 2, "stale-gradient": 1, "stale-weights": 1, "lost-moment": 3, "wrong-rate": 0}


def plant(name: str) -> None:
    """Changes this process's trial. Processes that resume stay unchanged."""
    from heliostat.numerics import play

    build = play.deepspeed_engine.build_engine

    def engine(*given: Any) -> Any:
        built = build(*given)
        if torch.distributed.get_world_size() > 1:
            {"wrong-scale": scaled, "not-reduced": alone, "stale-gradient": repeated, "stale-weights": kept,
             "lost-moment": forgetful, "wrong-rate": hasty}[name](built)  # fmt: skip
        return built

    play.deepspeed_engine.build_engine = engine


def _parameter(engine: Any) -> Any:
    return dict(engine.module.named_parameters())[WHICH]


def scaled(engine: Any) -> None:
    _parameter(engine).register_hook(lambda gradient: gradient * 1.02)


def alone(engine: Any) -> None:
    """Removes the exchange of gradients between workers."""
    engine.allreduce_gradients = lambda *given, **named: None


def repeated(engine: Any) -> None:
    """Repeats the previous step's gradient of one parameter, like a buffer that wasn't filled again."""
    calls: list[torch.Tensor] = []

    def old(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(gradient.clone())
        micros = engine.gradient_accumulation_steps()
        return calls[-1 - micros] if len(calls) > micros else gradient

    _parameter(engine).register_hook(old)


def kept(engine: Any) -> None:
    """Lets one worker continue with one parameter's weights from before the step."""
    step = engine.step

    def stepped() -> None:
        before = _parameter(engine).detach().clone()
        step()
        if torch.distributed.get_rank() == 1:
            _parameter(engine).data.copy_(before)

    engine.step = stepped


def forgetful(engine: Any) -> None:
    """Deletes the optimizer's first moments after the third step."""
    step = engine.step

    def stepped() -> None:
        step()
        if engine.global_steps == 3:
            for state in engine.optimizer.optimizer.state.values():
                state["exp_avg"].zero_()

    engine.step = stepped


def hasty(engine: Any) -> None:
    step = engine.step

    def stepped() -> None:
        if engine.is_gradient_accumulation_boundary():
            engine.optimizer.param_groups[0]["lr"] *= 1.5
        step()

    engine.step = stepped


@pytest.fixture(scope="module")
def faulty(documents, tmp_path_factory) -> dict[str, dict[str, Any]]:
    jobs = [made(name, documents, **{"train.zero.stage": stage}) for name, stage in FAULTY.items()]
    return trials.run(jobs, tmp_path_factory.mktemp("faulty"), f"{__name__}:plant")


def named(found: dict[str, Any], what: str) -> list[dict[str, Any]]:
    return [fault for fault in found["faults"] if fault["what"] == what]


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "cause", "first"),
    [
        ("wrong-scale", "is 1.02 times the right gradient: a wrong scale", 1),
        ("stale-gradient", "is the gradient of the previous step: a stale buffer", 2),
    ],
)
def test_a_wrong_gradient_is_found_and_its_cause_and_parameter_are_named(name, cause, first, faulty) -> None:
    gradients = named(faulty[name], "gradients")
    assert {fault["name"] for fault in gradients} == {WHICH}
    assert min(fault["step"] for fault in gradients) == first
    assert all(cause in fault["text"] and WHICH in fault["text"] for fault in gradients)
    assert not named(faulty[name], "updates")  # the optimizer is right, given that gradient


@pytest.mark.ci
def test_gradients_that_were_not_reduced_are_told_from_others(faulty) -> None:
    gradients = named(faulty["not-reduced"], "gradients")
    assert (
        len({fault["name"] for fault in gradients})
        == next(r for r in faulty["not-reduced"]["rows"] if r["what"] == "updates")["count"] / 4
    )
    assert all("one worker's share: the gradient wasn't reduced over the workers" in fault["text"] for fault in gradients)


@pytest.mark.ci
def test_weights_that_were_not_renewed_are_named_with_their_worker(faulty) -> None:
    in_use = named(faulty["stale-weights"], "weights in use")
    assert {fault["name"] for fault in in_use} == {f"{WHICH} on worker 1"}
    assert min(fault["step"] for fault in in_use) == 2
    assert "a stale buffer" in in_use[0]["text"]


@pytest.mark.ci
def test_an_optimizer_that_errs_is_found_by_its_updates_alone(faulty) -> None:
    assert {fault["what"] for fault in faulty["lost-moment"]["faults"]} == {"updates"}
    assert min(fault["step"] for fault in faulty["lost-moment"]["faults"]) == 4
    hasty_ = named(faulty["wrong-rate"], "updates")
    assert any("is 1.5 times the right update: a wrong scale" in fault["text"] for fault in hasty_)


# the command ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_one_object_and_leaves_no_process_behind(documents, tmp_path) -> None:
    changes = {"train.precision": "fp32", "workers.count": 2, "mlflow.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    changes |= {"data.sources": [{"path": str(documents)}], "storage": str(tmp_path / "runs")}
    path = build_job.write(tmp_path, **changes)
    (spool := tmp_path / "tmp").mkdir()
    env = {"TMPDIR": str(spool), "OMP_NUM_THREADS": "1"}
    done = commands.run("check", str(path), "--numerics", "--json", log=tmp_path / "log", **env)
    assert done.returncode == 0, done.err
    found = json.loads(done.out.splitlines()[-1])["numerics"]
    assert found["ok"] and {row["faults"] for row in found["rows"]} == {0}
    assert not list(spool.glob("heliostat-numerics-*")) and not (tmp_path / "runs").exists()
