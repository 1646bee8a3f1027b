"""Tests text to image on one GPU: it learns, averages, draws, and exports. Skipped without a GPU. Run: pytest tests/gpu."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "fp16"), (3, "bf16")])
def test_a_diffusion_run_on_a_gpu_learns_and_its_export_draws(stage, precision, ray_session, tracking, tmp_path) -> None:
    from heliostat.inference.generate import generate
    from heliostat.tracking.models import resolve
    from heliostat.training.run import train

    from tests.integration.conftest import curve
    from tests.integration.test_diffusion import tiny_job, write
    from tests.unit import build_images

    job = tiny_job(build_images.digits(tmp_path / "data"), tracking, tmp_path)
    job["workers"] = {"count": 1, "gpus": 1}
    job["train"] |= {"steps": 60, "precision": precision, "zero": {"stage": stage}, "activation_checkpointing": stage == 3}
    job["train"]["optimizer"]["lr"] = 1e-2
    job["evaluate"]["every"] = job["checkpoint"]["every"] = 60
    result = train(write(tmp_path / "gpu.yaml", job))
    losses = curve(tracking, result["run_id"])
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.2
    generate(resolve(result["model_uri"], tracking), "the digit two", {"steps": 4}, 0, str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").exists()
