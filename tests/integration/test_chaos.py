"""Tests `heliostat debug chaos` on a real job: each fault takes effect, and its row shows the cost, and that nothing was lost."""

from pathlib import Path

import pytest
import yaml

from tests.integration.answers import ask
from tests.integration.conftest import tiny_job


@pytest.fixture
def chaos_job(corpus: str, tracking: str, tmp_path: Path) -> Path:
    job = tiny_job(corpus, tracking, tmp_path)
    job["train"]["steps"], job["evaluate"] = 60, None
    job |= {"checkpoint": {"every": 5, "keep": 3}, "retries": {"backoff": 0.2}}
    path = tmp_path / "chaos.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


MIXTURE = {"arch": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "train"), [
    ({}, {"parallel": {"sequence": 2}}), (MIXTURE, {"parallel": {"expert": 2}, "zero": {"stage": 3}}),
], ids=["samples", "experts"])  # fmt: skip
def test_a_group_that_shares_samples_or_experts_and_loses_a_worker_loses_nothing(chaos_job, model, train, capsys):
    """One of two workers with a part each is killed. Both restart from the checkpoint, with the unbroken run's losses."""
    job = yaml.safe_load(chaos_job.read_text())
    job["model"] |= model
    job["train"] |= {"steps": 30, **train}
    chaos_job.write_text(yaml.safe_dump(job))
    (row,) = ask(capsys, "debug", "chaos", str(chaos_job), "--faults", "kill-worker")["faults"]
    assert (row["fault"], row["lost"], row["repeated"]) == ("kill-worker", 0, 0)
    assert row["loss_difference"] < 1e-5 and row["recovered_s"] > row["detected_s"] > 0


@pytest.mark.slow
def test_a_torn_checkpoint_a_damaged_shard_and_a_driver_killed_behind_the_last_step_lose_nothing(chaos_job, capsys):
    """The faults cost a restart from the checkpoint before the incomplete one, the samples of a row group, and a command, and
    nothing more."""
    faults = "torn-checkpoint,corrupt-shard,kill-driver-late"
    torn, corrupt, late = ask(capsys, "debug", "chaos", str(chaos_job), "--faults", faults)["faults"]
    assert (late["lost"], late["repeated"], late["recomputed_steps"], late["loss_difference"]) == (0, 0, 0, 0)
    assert [torn["fault"], corrupt["fault"]] == ["torn-checkpoint", "corrupt-shard"]
    assert {key: torn[key] for key in ("lost", "repeated")} == {key: corrupt[key] for key in ("lost", "repeated")} == {
        "lost": 0, "repeated": 0,
    }  # fmt: skip
    assert torn["recomputed_steps"] >= 5 and 0 < torn["detected_s"] < torn["recovered_s"]
    assert torn["loss_difference"] < 1e-5
    assert corrupt["recomputed_steps"] == 0 and 0 < corrupt["loss_difference"] < 0.5
