"""Tests supervised fine-tuning on real Ray: a killed worker and another number of workers leave the losses unchanged, evaluations
answer prompts, and the exported model chats."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import yaml
from heliostat.errors import NonFiniteError
from heliostat.tracking.mlflow_client import read_json
from heliostat.tracking.models import resolve
from heliostat.tracking.report import conversations as report
from heliostat.tracking.report.page import gather, page
from heliostat.training.run import train
from mlflow import MlflowClient

from tests.integration.conftest import curve, tiny_job
from tests.integration.strikes import run_folder, saved, when, workers
from tests.unit import build_conversations
from tests.unit.page import client, opened

STEPS = 30


def job_file(data: Path, tracking: str, folder: Path, name: str) -> Path:
    job = tiny_job(str(data), tracking, folder)
    job |= {"name": name, "recipe": "heliostat.recipes:SFT", "data": {"sources": [{"path": str(data)}], "seed": 5},
            "evaluate": {"every": 10, "samples": 24, "fraction": 0.1}, "checkpoint": {"every": 5}}  # fmt: skip
    job["model"]["samples"] = {"prompts": ["amber birch"], "held_out": 3, "max_tokens": 6}
    job["train"] |= {"steps": STEPS, "log_every": 1, "optimizer": {"lr": 1e-2}}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.mark.ci
def test_a_killed_worker_and_a_resize_leave_the_losses_and_the_model_answers(
    ray_session: None, tracking: str, tmp_path: Path
) -> None:
    data = build_conversations.packs(tmp_path / "packs", number=240)
    (unbroken,) = (train(job_file(data, tracking, tmp_path, "unbroken"), ["workers.count=1", "train.zero.stage=0"]),)
    path = job_file(data, tracking, tmp_path, "struck")
    folder = run_folder(path)
    thread = when((lambda: saved(folder) >= 5, lambda: os.kill(workers()[-1].pid, signal.SIGKILL)))
    train(path, ["train.stop_after=20", "retries.backoff=0.1"])
    thread.join(10)
    result = train(path, ["workers.count=1", "train.zero.stage=1"], resume=True)
    losses = curve(tracking, result["run_id"])
    assert losses == pytest.approx(curve(tracking, unbroken["run_id"]), rel=1e-4)
    assert len(losses) == STEPS and losses[-1] < losses[0] / 2
    assert result["unit"] == "tokens" and result["eval"] == pytest.approx(unbroken["eval"], rel=1e-4)

    store = MlflowClient(tracking_uri=tracking)
    first, last = report.answers_of(store, result["run_id"])
    assert (first.step, last.step) == (10, STEPS) and [len(one.rows) for one in (first, last)] == [4, 4]
    assert last.rows[0]["prompt"].endswith("<|im_start|>user\namber birch<|im_end|>\n<|im_start|>assistant\n")
    assert all(row["finished"] for row in last.rows), "the model learned to end its turn"
    audit = report.audit_of(store, result["run_id"])
    assert audit and audit["sources"][0]["conversations"] == 240
    assert store.get_run(result["run_id"]).data.params["masks.0.trained"] == str(audit["sources"][0]["trained"])
    sources = (read_json(store, result["run_id"], "data.json", dict) or {})["segments"][0]["sources"]
    mean = audit["sources"][0]["tokens"] / audit["sources"][0]["rows"]
    assert sources[0]["tokens"] == pytest.approx(sources[0]["samples"] * mean, abs=1)
    shown = page(gather(store, store.get_run(result["run_id"])))
    assert "Answers to held-out prompts" in shown and "class='trained'" in shown

    with opened(resolve(result["model_uri"], tracking)) as url:
        messages = [{"role": "user", "content": "amber birch"}]
        chosen = client(url).chat.completions.create(model="model", messages=messages, max_tokens=6, temperature=0)  # type: ignore[call-overload]
    assert chosen.choices[0].finish_reason == "stop"
    assert chosen.choices[0].message.content == last.rows[0]["answer"]


@pytest.mark.ci
def test_a_step_without_trained_tokens_ends_the_run_before_a_checkpoint(
    ray_session: None, tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit finds such rows earlier, so this dataset has only few of them: enough for one step of one row."""
    chats = [*build_conversations.conversations(30), [{"role": "user", "content": "amber"}]]
    data = build_conversations.packs(tmp_path / "packs", chats=chats, pack=False)
    monkeypatch.setattr("heliostat.recipes.text.mask_audit.MOST_UNTRAINED", 1.0)
    path = job_file(data, tracking, tmp_path, "untrained")
    settings = ["train.global_batch_size=1", "train.micro_batch_size=1", "workers.count=1", "checkpoint.every=1000",
                "train.log_every=1000", "evaluate=null"]  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"step \d+: no token of its samples is trained.*Samples \(source:chunk:row\): 0:"):
        train(path, [*settings, "train.steps=31"])
    assert saved(run_folder(path)) == 0
