"""Tests the chain from a file of conversations to a model that people use: SFT of an adapter, its merged export, preferences with
the log-probabilities of this export, and DPO.

The chain is played twice. In the first one, each training loses a worker, and resumes on another number of workers. The losses
and exports of both are equal. Lineage, trace, and forget know the whole chain.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import heliostat
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from heliostat.cli.main import app
from heliostat.curation.prepare import prepare
from heliostat.data import manifest
from heliostat.recipes.folder_digests import weights_digest
from heliostat.recipes.protocol import Batch, Loss
from heliostat.recipes.text.dpo import DPO
from heliostat.recipes.text.sft import SFT
from heliostat.runs import goodput
from heliostat.runs.samples import samples
from heliostat.storage.locations import Location
from heliostat.training.driver import finalize
from heliostat.training.run import train
from heliostat.validation.check import check, load_job

from tests.integration import strikes
from tests.integration.answers import ask
from tests.integration.conftest import curve
from tests.integration.pipelines import write_pipeline
from tests.unit import build_conversations
from tests.unit.build_conversations import WORDS
from tests.unit.test_dpo import write_base

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]
STEPS, RESIZED = 6, 4  # steps of each training; the step after which the first chain's workers change in number
PAUSE_S = 0.15


class PacedSFT(SFT):
    """Trains slowly enough for a fault to strike during a step."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        time.sleep(PAUSE_S)
        return super().loss(model, batch)


class PacedDPO(DPO):
    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        time.sleep(PAUSE_S)
        return super().loss(model, batch)


@dataclass(frozen=True)
class Trained:
    run: str  # run id
    losses: list[float]
    export: Path


@dataclass(frozen=True)
class Chain:
    folder: Path
    tracking: str
    sft: list[Trained]  # of the chain with faults, and of the chain without
    dpo: list[Trained]


def job(chain: Path, tracking: str, name: str, recipe: str, data: str, model: dict[str, Any]) -> Path:
    described = {
        "name": name, "recipe": f"tests.integration.test_chain:{recipe}", "model": {**model, "samples": {"held_out": 0}},
        "data": {"sources": [{"path": str(chain / data)}], "seed": 3, "virtual_ranks": 2, "shuffle_window": 16,
                 "document_mask": data == "chats"},
        "train": {"steps": STEPS, "global_batch_size": 2, "micro_batch_size": 1, "precision": "fp32", "zero": {"stage": 2},
                  "optimizer": {"lr": 3e-3}, "schedule": {"name": "constant"}, "log_every": 1},
        "checkpoint": {"every": 2}, "workers": {"count": 2}, "retries": {"backoff": 0.1}, "storage": str(chain / "runs"),
        "mlflow": {"uri": tracking, "experiment": "chain"},
    }  # fmt: skip
    path = chain / f"{name}.yaml"
    path.write_text(yaml.safe_dump(described))
    return path


def trained(path: Path, tracking: str, strike: bool, resize: bool, register: str) -> Trained:
    """Trains, exports the merged model, and registers it. `strike`: kills a worker after the first checkpoint. `resize`: resumes
    on one worker after step RESIZED."""
    run = strikes.run_folder(path)
    if strike:
        strikes.when((lambda: strikes.complete(run, 2), lambda: strikes.kill(strikes.workers()[-1])))
    if resize:
        with pytest.MonkeyPatch.context() as patch:  # the model of a run that resumes later is unused, and takes seconds
            patch.setattr(finalize, "Exports", ())
            train(path, [f"train.steps={RESIZED}"])
    result = train(path, [f"mlflow.register={register}", *(["workers.count=1"] if resize else [])], resume=resize)
    export = heliostat.Run(str(run)).export(path.parent / "exports" / path.stem)
    return Trained(result["run_id"], curve(tracking, result["run_id"]), export)


def write_pairs(path: Path) -> None:
    """Writes preferences: the better answer is the first word."""
    drawn = random.Random(4)
    words = [drawn.sample(WORDS, 4) for _ in range(24)]
    path.write_text("".join(json.dumps({"prompt": " ".join(w), "chosen": w[0], "rejected": w[1]}) + "\n" for w in words))


@pytest.fixture(scope="module")
def chain(tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    base = write_base(folder)
    chats = "".join(json.dumps({"messages": messages}) + "\n" for messages in build_conversations.conversations(40))
    (folder / "chats.jsonl").write_text(chats)
    keys: dict[str, Any] = {"model": str(base), "sequence_length": 64, "chunk_tokens": 256}
    prepare(write_pipeline(folder, "ConversationPipeline", "chats", name="chats", input=str(folder / "chats.jsonl"),
                           output=str(folder / "chats"), **keys), [])  # fmt: skip
    write_pairs(folder / "pairs.jsonl")
    prepare(write_pipeline(folder, "PreferencePipeline", "pairs", name="pairs", input=str(folder / "pairs.jsonl"),
                           output=str(folder / "pairs"), **keys), [])  # fmt: skip
    sft, dpo = list[Trained](), list[Trained]()
    for number, strike in enumerate((True, False)):
        model = {"pretrained": str(base), "adapter": {"rank": 2}}
        path = job(folder, tracking, f"sft-{number}", "PacedSFT", "chats", model)
        sft.append(trained(path, tracking, strike, True, "chain-sft"))
    prepare(write_pipeline(folder, "ReferencePipeline", "scored", name="scored", input=str(folder / "pairs"),
                           output=str(folder / "scored"), model=str(sft[0].export)), [])  # fmt: skip
    for number, strike in enumerate((True, False)):
        path = job(folder, tracking, f"dpo-{number}", "PacedDPO", "scored", {"pretrained": str(sft[number].export)})
        dpo.append(trained(path, tracking, strike, strike, "chain-dpo"))
    return Chain(folder, tracking, sft, dpo)


def test_a_killed_worker_changes_no_bit_and_a_resize_only_the_rounding(chain: Chain) -> None:
    """The attempts show that both happened. Both trainings of SFT are resized, so their exports are equal to the last bit."""
    assert chain.sft[0].losses == chain.sft[1].losses
    assert weights_digest(chain.sft[0].export) == weights_digest(chain.sft[1].export)
    struck, calm = chain.dpo
    assert struck.losses[:RESIZED] == calm.losses[:RESIZED] and struck.losses == pytest.approx(calm.losses, rel=1e-5)
    for name, losses in (("sft", chain.sft[0].losses), ("dpo", struck.losses)):
        assert len(losses) == STEPS and len(set(losses)) > 1
        attempts = sorted(goodput.read(Location(str(chain.folder / "runs" / f"{name}-0"))), key=lambda a: a.started)
        assert [(a.workers, a.reached >= RESIZED) for a in attempts] == [(2, False), (2, True), (1, True)]
    assert weights_digest(chain.sft[0].export) != weights_digest(chain.folder / "model")


def test_lineage_shows_the_whole_chain(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    where, folder = ["--mlflow", chain.tracking], chain.folder
    node = ask(capsys, "run", "lineage", "models:/chain-dpo/1", *where)["run"]
    assert (node["run_id"], node["name"]) == (chain.dpo[0].run, "dpo-0")
    assert [export["folder"] for export in node["exports"]] == [str(chain.dpo[0].export)]
    (source,) = node["data"]["segments"][-1]["sources"]
    assert [one["digest"] for one in source["made_from"]] == [manifest.read(Location(str(folder / "pairs"))).digest]
    assert source["inputs"] == [str(folder / "pairs"), str(folder / "pairs.jsonl")]
    parents = {parent["key"]: parent for parent in node["parents"]}
    assert parents.keys() == {"model.pretrained", "data.sources.0.reference"}
    for parent in parents.values():
        assert (parent["run_id"], parent["step"], parent["folder"]) == (chain.sft[0].run, STEPS, str(chain.sft[0].export))
    sft = parents["model.pretrained"]["run"]
    (chats,) = sft["data"]["segments"][-1]["sources"]
    assert chats["inputs"] == [str(folder / "chats.jsonl")] and sft["models"][0]["uri"] == "models:/chain-sft/1"
    assert [export["folder"] for export in sft["exports"]] == [str(chain.sft[0].export)]
    (base,) = sft["parents"]
    assert (base["key"], base["folder"], base["run"]) == ("model.pretrained", str(folder / "model"), None)
    capsys.readouterr()
    app(["run", "lineage", "chain-dpo/1", *where], standalone_mode=False)
    shown = "".join(capsys.readouterr().out.split())
    chained = [f"run dpo-0 ({chain.dpo[0].run})", f"made from pairs {source['made_from'][0]['digest'][:12]} of {folder}/pairs",
               f"made from {folder}/pairs.jsonl", f"exported to {chain.dpo[0].export}",
               "initialized from model.pretrained: sft-0",
               f"run sft-0 ({chain.sft[0].run})", f"made from {folder}/chats.jsonl", f"exported to {chain.sft[0].export}",
               f"initialized from model.pretrained: a folder ({folder}/model)",
               "log-probabilities by data.sources.0.reference: sft-0", f"run sft-0 ({chain.sft[0].run}), see above"]  # fmt: skip
    places = [shown.find("".join(text.split())) for text in chained]
    assert -1 not in places and places == sorted(places), shown


def ids_of(row: dict[str, Any]) -> list[str]:
    return row["ids"] if "ids" in row else [row["id"]]


def seen(chain: Chain, dataset: str, run: str) -> tuple[str, set[int]]:
    """Returns a document of a dataset that a run used most often, and the steps, from the samples of all steps."""
    steps = dict[str, set[int]]()
    for step in range(1, STEPS + 1):
        for sample in samples(Location(str(chain.folder / "runs" / run)), step):
            group = pq.ParquetFile(chain.folder / dataset / sample["shard"]).read_row_group(sample["row_group"])
            for id in ids_of(group.to_pylist()[sample["row"]]):
                steps.setdefault(id, set()).add(step)
    return max(steps.items(), key=lambda item: (len(item[1]), item[0]))


def test_trace_leads_from_a_conversation_to_the_models_that_saw_it(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    """SFT by its own samples, DPO by inheritance. A pair leads to DPO by the dataset with log-probabilities, and back."""
    where = ["--mlflow", chain.tracking]
    id, steps = seen(chain, "chats", "sft-0")
    (document,) = ask(capsys, "data", "trace", str(chain.folder / "chats"), "--id", id, *where)["documents"]
    rows = {row["name"]: row for row in document["runs"]}
    assert rows.keys() == {"sft-0", "sft-1", "dpo-0", "dpo-1"} and document["copies"] == []
    assert document["read"] == {"file": "chats.jsonl", "line": int(id.partition("#")[2])}
    for number in (0, 1):
        sft, dpo = rows[f"sft-{number}"], rows[f"dpo-{number}"]
        assert set(sft["steps"]) == steps and sft["inherited"] == [] and sft["models"] == [f"models:/chain-sft/{number + 1}"]
        assert (dpo["steps"], dpo["models"]) == ([], [f"models:/chain-dpo/{number + 1}"])
        assert (sft["outdated"], dpo["outdated"]) == ([], [str(chain.folder / "scored")])
        assert dpo["inherited"] == list(dict.fromkeys([chain.sft[number].run, chain.sft[0].run])), "its base, and its reference"
        assert [one["folder"] for one in sft["exports"] + dpo["exports"]] == [
            str(chain.sft[number].export), str(chain.dpo[number].export),
        ]  # fmt: skip
    id, steps = seen(chain, "scored", "dpo-0")
    for dataset in ("pairs", "scored"):
        (document,) = ask(capsys, "data", "trace", str(chain.folder / dataset), "--id", id, *where)["documents"]
        rows = {row["name"]: row for row in document["runs"]}
        assert rows.keys() == {"dpo-0", "dpo-1"} and all(set(row["steps"]) == steps for row in rows.values())
        assert all((row["inherited"], row["outdated"]) == ([], []) for row in rows.values())
        assert [copy["name"] for copy in document["copies"]] == (["scored"] if dataset == "pairs" else [])


def test_forget_makes_datasets_without_it_and_names_the_models_to_train_again(
    chain: Chain, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A pair must also be forgotten in the dataset with log-probabilities, which the command names."""
    where, names = ["--mlflow", chain.tracking], {"sft-0", "sft-1", "dpo-0", "dpo-1"}
    (chat, _), (pair, _) = seen(chain, "chats", "sft-0"), seen(chain, "scored", "dpo-0")
    for dataset, id, runs in (("chats", chat, names), ("pairs", pair, {"dpo-0", "dpo-1"}), ("scored", pair, {"dpo-0", "dpo-1"})):
        output = tmp_path / dataset
        capsys.readouterr()
        command = ["data", "forget", str(chain.folder / dataset), "--id", id, "--out", str(output), *where]
        app(command, standalone_mode=False)
        shown = "".join(capsys.readouterr().out.split())
        assert {name for name in names if f"run{name}(" in shown} == runs and "traintheserunsagain" in shown
        for number in (0, 1):
            assert f"models:/chain-dpo/{number + 1}" in shown and str(chain.dpo[number].export) in shown
            assert (str(chain.sft[number].export) in shown) == (dataset == "chats")
        copy = f"heliostat data forget {chain.folder}/scored --id '{pair}' --out {chain.folder}/scored-2"
        assert (copy.replace(" ", "") in shown) == (dataset == "pairs")
        made = manifest.read(Location(str(output)))
        ids = [one for path in made.paths for row in pq.read_table(output / path).to_pylist() for one in ids_of(row)]
        assert ids and id not in ids
    again = job(tmp_path, chain.tracking, "again", "PacedSFT", "chats", {"pretrained": str(chain.folder / "model")})
    assert check(load_job(again)).manifests[0].meta["forgotten"], "a job can train on the new dataset"
