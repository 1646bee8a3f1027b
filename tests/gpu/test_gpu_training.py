"""Tests whole runs on one GPU; skipped without one. Run: pytest tests/gpu."""

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SETTINGS = ["workers.count=1", "workers.gpus=1", "train.steps=20", "evaluate.every=20", "checkpoint.every=20"]
CASES = [
    ["train.zero.stage=1", "train.precision=bf16"],
    ["train.zero.stage=2", "train.precision=fp16"],
    ["train.zero.stage=3", "train.precision=bf16", "train.activation_checkpointing=true"],
    ["train.zero.stage=2", "train.precision=bf16", "train.zero.offload.optimizer=cpu"],
    ["train.zero.stage=3", "train.precision=bf16", "train.zero.offload={optimizer: cpu, param: cpu}"],
    ["train.zero.stage=1", "train.precision=bf16", "train.compile=true"],
]


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_run_on_a_gpu_learns(case, job_file, tracking) -> None:
    from heliostat.training.run import train

    from tests.integration.conftest import curve

    result = train(job_file(), [*SETTINGS, *case])
    losses = curve(tracking, result["run_id"])
    assert losses[-1] < losses[0] - 0.3
