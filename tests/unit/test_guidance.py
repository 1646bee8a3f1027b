"""Tests guidance in sampling: the formulas of its papers, the interval, and the options of requests."""

from __future__ import annotations

import pytest
import torch
from heliostat.errors import ConfigError
from heliostat.recipes.images.config import Samples
from heliostat.recipes.images.generator import PictureOptions
from heliostat.recipes.images.noising import NoiseObjective, Process
from heliostat.recipes.images.pipeline import Guidance, denoise, generators
from heliostat.schema import validate


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_guidance_is_that_of_its_papers(rescale):
    """In fp64: without + scale (having - without), and the mixture with the guided prediction at the standard deviation of the
    prediction with text."""
    generator = torch.Generator().manual_seed(0)
    without, having = (torch.randn((5, 3, 4, 4), generator=generator) * s for s in (1.0, 2.0))
    mine = Guidance(3.5, rescale=rescale).guide(without, having)
    for i in range(5):
        u, c = without[i].double(), having[i].double()
        guided = u + 3.5 * (c - u)
        expected = rescale * guided * (c.std() / guided.std()) + (1 - rescale) * guided
        assert torch.allclose(mine[i].double(), expected, rtol=1e-6, atol=1e-6)
        if rescale == 1:
            assert float(mine[i].std()) == pytest.approx(float(having[i].std()), rel=1e-5)


@pytest.mark.parametrize(("prediction", "sampler"), [("flow", "euler"), ("x", "euler"), ("v", "ddim"), ("epsilon", "dpm++")])
def test_guidance_acts_only_in_its_interval(prediction, sampler):
    """Outside the interval, and with a scale of 1, the model only predicts with text, and samples are those without guidance."""
    process = Process(NoiseObjective(prediction=prediction))
    sizes: dict[float, int] = {}

    def sampled(guidance: Guidance) -> torch.Tensor:
        sizes.clear()

        def predictor(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            sizes[float(t[0]) / 1000] = len(noisy)
            text = torch.tensor([0.0, 0.0, 1.0, 1.0])[-len(noisy) :].view(-1, 1, 1, 1)
            return 0.2 * noisy + text * noisy.roll(1, -1)

        return denoise(predictor, process.scheduler(sampler), (2, 1, 4, 4), 10, guidance, generators([1, 2]), "cpu")

    full = sampled(Guidance(3.0))
    assert set(sizes.values()) == {4} and len(sizes) == 10
    limited = sampled(Guidance(3.0, (0.25, 0.75)))
    assert {time for time, size in sizes.items() if size == 4} == {time for time in sizes if 0.25 <= time <= 0.75}
    assert len(set(sizes.values())) == 2 and not torch.allclose(limited, full, atol=1e-3)
    plain = sampled(Guidance(1.0))
    assert set(sizes.values()) == {2}
    assert torch.allclose(plain, sampled(Guidance(3.0, (0.9995, 0.9996)))) and not torch.allclose(plain, full, atol=1e-3)


@pytest.mark.parametrize("interval", [[0.5, 0.5], [0.8, 0.2], [-0.1, 0.5], [0.0, 1.1]])
def test_an_interval_that_is_not_one_is_rejected(interval):
    for model in (Samples, PictureOptions):
        with pytest.raises(ConfigError, match="guidance_interval: expected two ascending numbers from 0"):
            validate(model, {"guidance_interval": interval}, "samples")
