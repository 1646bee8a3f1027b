"""Tests the forward process: the closed form equals step-by-step noising, targets invert it, and weights and samplers follow the
papers."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import DDPMScheduler
from heliostat.errors import ConfigError
from heliostat.recipes.images.noising import NoiseObjective, Process
from heliostat.recipes.images.pipeline import Guidance, denoise, generators
from heliostat.schema import validate

DIFFUSION = [
    {"prediction": p, "schedule": s, "steps": n, "zero_terminal_snr": z}
    for p, s, (n, z) in itertools.product(
        ("epsilon", "v"), ("linear", "scaled_linear", "squaredcos_cap_v2"), ((1000, False), (50, False), (1000, True))
    )
    if not (z and p == "epsilon")
]


def process(**keys) -> Process:
    return Process(validate(NoiseObjective, keys, "objective"))


@pytest.mark.parametrize("keys", DIFFUSION, ids=str)
def test_the_closed_form_is_noising_step_by_step(keys):
    """x_t = sqrt(1 - b_t) x_{t-1} + sqrt(b_t) noise, computed for mean and variance, to 1e-6. With zero_terminal_snr, the last
    step is pure noise."""
    made = process(**keys)
    betas = made.scheduler("ddpm").betas.double()
    mean, variance = 1.0, 0.0
    for t, beta in enumerate(betas.tolist()):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        image, part = made.coefficients(torch.tensor([t]))
        assert image.item() == pytest.approx(mean, abs=1e-6 if t + 1 < len(betas) else 1e-3)
        assert part.item() ** 2 == pytest.approx(variance, abs=2e-6 if t + 1 < len(betas) else 1e-3)
    if keys["zero_terminal_snr"]:
        assert image.item() < 1e-5 and part.item() == 1.0


def test_noised_samples_have_the_closed_forms_distribution():
    """For 200,000 numbers, noised in 50 steps, the mean and variance agree within 4 standard errors."""
    made, n = process(steps=50), 200_000
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((n,), 0.7, dtype=torch.float64)
    x = clean.clone()
    for t, beta in enumerate(made.scheduler("ddpm").betas.double()):
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(n, generator=generator, dtype=torch.float64)
        if t in (0, 5, 20, 49):
            image, part = (float(c) for c in made.coefficients(torch.tensor([t])))
            assert abs(float(x.mean()) - image * 0.7) < 4 * part / n**0.5
            assert abs(float(x.var()) - part**2) < 4 * part**2 * (2 / n) ** 0.5


@pytest.mark.parametrize(
    "keys", [*DIFFUSION, {"prediction": "flow"}, {"prediction": "flow", "shift": 3.0}, {"prediction": "x"}], ids=str
)
def test_what_the_network_is_taught_gives_back_the_image(keys):
    """A perfect prediction and the noisy image determine the image: x_0 from each of the predictions."""
    made = process(**keys)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn((32, 2, 4, 4), generator=generator) for _ in range(2))
    t = made.times(torch.rand(32, generator=generator) * 0.9)
    noisy, target = made.noisy(clean, noise, t), made.target(clean, noise, t)
    image, part = (c.view(-1, 1, 1, 1) for c in made.coefficients(t))
    back = {
        "epsilon": (noisy - part * target) / image,
        "v": image * noisy - part * target,
        "flow": noisy - part * target,
        "x": target,
    }[keys["prediction"]]
    assert torch.allclose(back, clean, atol=2e-4)


@pytest.mark.parametrize("keys", DIFFUSION, ids=str)
def test_noise_and_targets_are_those_of_diffusers(keys):
    made = process(**keys)
    theirs: DDPMScheduler = made.scheduler("ddpm")
    generator = torch.Generator().manual_seed(2)
    clean, noise = (torch.randn((8, 1, 2, 2), generator=generator) for _ in range(2))
    t = torch.randint(0, keys["steps"], (8,), generator=generator)
    assert torch.allclose(made.noisy(clean, noise, t), theirs.add_noise(clean, noise, t), atol=1e-5)
    expected = theirs.get_velocity(clean, noise, t) if keys["prediction"] == "v" else noise
    assert torch.allclose(made.target(clean, noise, t), expected, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow", "x"])
def test_min_snr_weights_the_error_of_the_image(prediction):
    """In fp64: the paper's loss, min(SNR, gamma) times the squared error of the image that follows from the prediction."""
    made, generator = process(prediction=prediction, min_snr=5.0), torch.Generator().manual_seed(6)
    clean, noise, guess = (torch.randn((256, 1, 2, 2), generator=generator) for _ in range(3))
    t = made.times((torch.arange(256) + 0.5) / 256)
    mine = (made.errors(guess, clean, noise, t) * made.weights(t)).double()
    if prediction in ("flow", "x"):
        image, part = 1 - t.double(), t.double()
    else:
        steps = torch.arange(1001, dtype=torch.float64) / 1000
        level = torch.cos((steps + 0.008) / 1.008 * torch.pi / 2) ** 2
        kept = torch.cumprod(1 - (1 - level[1:] / level[:-1]).clamp(max=0.999), 0)[t]
        image, part = kept.sqrt(), (1 - kept).sqrt()
    i, p, x, e, g = image.view(-1, 1, 1, 1), part.view(-1, 1, 1, 1), clean.double(), noise.double(), guess.double()
    noisy = i * x + p * e
    back = {"epsilon": (noisy - p * g) / i, "v": i * noisy - p * g, "flow": noisy - p * g, "x": g}[prediction]
    expected = ((image / part) ** 2).clamp(max=5.0) * (back - x).square().mean((1, 2, 3))
    assert torch.allclose(mine, expected, rtol=5e-4 if prediction in ("epsilon", "v") else 1e-6), "diffusers has fp32 betas"


def test_min_snr_weights_are_the_papers():
    """w = min(snr, gamma), divided by snr (epsilon) or by snr + 1 (v). Without min-SNR, every weight is 1."""
    t = torch.arange(1000)
    for prediction in ("epsilon", "v"):
        made = process(prediction=prediction, min_snr=5.0)
        image, part = made.coefficients(t)
        for i in (0, 10, 300, 700, 999):
            snr = float(image[i] / part[i]) ** 2
            expected = min(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1)
            assert float(made.weights(t)[i]) == pytest.approx(expected, rel=1e-4)
        assert (process(prediction=prediction).weights(t) == 1).all()
    assert process(prediction="v", min_snr=5.0, zero_terminal_snr=True).weights(t).isfinite().all()


def test_the_step_of_pure_noise_is_learnt_with_min_snr_too():
    """Its signal-to-noise ratio is 0, and so would be its weight. Where the ratio is above 1, weights are the paper's."""
    t = torch.arange(1000)
    floored, paper = (process(prediction="v", min_snr=5.0, zero_terminal_snr=z) for z in (True, False))
    image, noise = floored.coefficients(t)
    weights, strong = floored.weights(t), (image / noise) ** 2 >= 1
    assert weights[999] == 1.0 and weights[~strong].min() >= 0.5 and 0 < int(strong.sum()) < 1000
    snr = (image / noise) ** 2
    assert torch.allclose(weights[strong], (snr.clamp(max=5.0) / (snr + 1))[strong])
    assert float(paper.weights(t)[999]) < 0.01  # as the paper has it, where no step is pure noise


def test_times_cover_the_process_evenly():
    uniform = (torch.arange(10_000) + 0.5) / 10_000
    assert torch.bincount(process().times(uniform)).tolist() == [10] * 1000
    assert torch.equal(process(prediction="flow").times(uniform), uniform)
    logit = process(prediction="flow", timesteps="logit_normal").times(uniform)
    assert (logit.diff() > 0).all() and 0 < float(logit[0]) < 0.05 and 0.95 < float(logit[-1]) < 1
    normal = torch.logit(logit)
    assert abs(float(normal.mean())) < 0.01 and abs(float(normal.std()) - 1) < 0.01
    assert (process(prediction="flow", shift=3.0).times(uniform) >= uniform).all()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"prediction": "eps"}, "Did you mean 'epsilon'?"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr needs prediction 'v'"),
        ({"prediction": "flow", "noise_offset": 0.1}, "Remove these keys"),
        ({"time_floor": 0.1}, "time_floor needs prediction 'x'"),
        ({"shift": 2.0}, "timesteps and shift need flow matching. Remove timesteps and shift"),
        ({"timesteps": "logit_normal"}, "timesteps and shift need flow matching"),
        ({"prediction": "x", "timestep_mean": 0.5}, "timestep_mean needs timesteps 'logit_normal'. Remove timestep_mean"),
        ({"prediction": "x", "shift": "auto"}, "Set base_size to the side of an image that needs no shift"),
        ({"prediction": "x", "base_size": 32}, "shift 'auto' and base_size need each other"),
        ({"prediction": "x", "shift": 0.0}, "shift must be above 0, not 0"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(keys, says):
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        process(**keys)


def test_a_sampler_that_cannot_sample_the_objective_is_refused():
    with pytest.raises(ConfigError, match=r"'euler' doesn't support a model with prediction 'epsilon'\. Use ddpm or ddim or dpm"):
        process().scheduler("euler")
    with pytest.raises(ConfigError, match="Use euler"):
        process(prediction="flow").scheduler("ddim")


@pytest.mark.parametrize("floor", [0.05, 0.3])
def test_the_error_of_a_predicted_image_is_that_of_its_velocity(floor):
    """In fp64, from the definition: the velocity (x_s - x_0) / s of the prediction, and noise - x_0. Below the floor, the time in
    both denominators is the floor."""
    generator = torch.Generator().manual_seed(4)
    clean, noise, guess = (torch.randn((64, 2, 3, 3), generator=generator) for _ in range(3))
    t = torch.rand(64, generator=generator)
    mine = process(prediction="x", time_floor=floor).errors(guess, clean, noise, t).double()
    s = t.double().view(-1, 1, 1, 1)
    noisy = (1 - s) * clean.double() + s * noise.double()
    velocity = (noisy - guess.double()) / s
    expected = (velocity - (noise.double() - clean.double())).square().mean((1, 2, 3))
    low = t < floor
    assert torch.allclose(mine[~low], expected[~low], rtol=1e-6) and 0 < int(low.sum()) < 64
    assert torch.allclose(mine[low], (expected * (t.double() / floor) ** 2)[low], rtol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "dpm++", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_sampler_with_the_exact_score_of_a_gaussian_samples_that_gaussian(name, prediction):
    """Normal data (mean 0.5, deviation 0.2) has a known best prediction. 100 steps sample it within 0.02."""
    made = process(prediction=prediction)
    scheduler = made.scheduler(name)
    scheduler.set_timesteps(100)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((4000, 1), generator=generator)
    for t in scheduler.timesteps:
        image, part = made.coefficients(torch.tensor([int(t)]))
        expected = 0.5 + (image * 0.04 / (image**2 * 0.04 + part**2)) * (x - image * 0.5)  # E[x_0 | x_t]
        noise = (x - image * expected) / part
        answer = noise if prediction == "epsilon" else image * noise - part * expected
        x = scheduler.step(answer, t, x, generator=generator).prev_sample
    assert float(x.mean()) == pytest.approx(0.5, abs=0.02) and float(x.std()) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("prediction", ["flow", "x"])
def test_euler_with_the_exact_prediction_of_a_gaussian_samples_that_gaussian(prediction):
    """With the best prediction of normal data (mean 0.5, deviation 0.2), `denoise` samples them within 0.02 in 100 steps."""
    made = process(prediction=prediction)

    def best(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = (t / 1000)[:, None]
        clean = 0.5 + ((1 - s) * 0.04 / ((1 - s) ** 2 * 0.04 + s**2)) * (noisy - (1 - s) * 0.5)
        return clean if prediction == "x" else (noisy - clean) / s

    x = denoise(
        best, made.scheduler("euler"), (4000, 1), 100, Guidance(2.0), generators(list(range(4000))), "cpu", made.predicts_image
    )
    assert float(x.mean()) == pytest.approx(0.5, abs=0.02) and float(x.std()) == pytest.approx(0.2, abs=0.02)
