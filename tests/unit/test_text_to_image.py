"""Tests the text-to-image recipe: random numbers by sample, losses as sums, and evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from heliostat.data import manifest
from heliostat.data.dataset import plan
from heliostat.errors import ConfigError
from heliostat.recipes.images import rows as image_rows
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location
from heliostat.training.worker.micro_batches import BatchPlan

from tests.unit import build_images
from tests.unit.build_images import TEXT
from tests.unit.build_job import job
from tests.unit.build_text_to_image import BACKBONES, recipe, rows, woken

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "objective",
    [{"prediction": "epsilon"}, {"prediction": "v", "min_snr": 5.0}, {"prediction": "flow"}, {"prediction": "x"}],
    ids=str,
)
@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_a_batchs_loss_is_the_sum_of_its_samples_whatever_the_cut(arch, objective, digits):
    """Noise, times, and caption dropout depend on each sample's key, so micro-batches and their order change nothing."""
    made, content, keys = recipe(digits, backbone=BACKBONES[arch], objective=objective), rows(digits), np.arange(100, 112)
    torch.manual_seed(0)
    model = woken(made.build())
    assert made.terms(made.batch(content, keys)) == 12 * made.terms_per_sample
    with torch.no_grad():
        whole = made.loss(model, made.batch(content, keys)).sum.item()
        parts = sum(made.loss(model, made.batch(content.slice(i, 4), keys[i : i + 4])).sum.item() for i in (0, 4, 8))
        turned = np.roll(np.arange(12), 5)
        torch.manual_seed(9)
        other = made.loss(model, made.batch(content.take(turned), keys[turned])).sum.item()
        again = made.loss(model, made.batch(content, keys + 1000)).sum.item()
    assert whole == pytest.approx(parts, rel=1e-5) == pytest.approx(other, rel=1e-5)
    assert abs(whole - again) > 1e-3, "another key, other noise"


def test_draws_are_normal_uniform_and_dropped_as_often_as_asked():
    """For the numbers on the host. test_counter_random tests those on the device."""
    draw = image_rows.draw_on_host
    made = draw(7, np.arange(4000), (1, 4, 4), 0.2, 0.0, True)
    assert abs(float(made.noise.mean())) < 0.02 and abs(float(made.noise.std()) - 1) < 0.02
    assert 0.49 < float(made.time.mean()) < 0.51 and float(made.time.max()) < 1
    assert 0.18 < float(made.dropped.float().mean()) < 0.22
    assert made.posterior is not None and abs(float((made.posterior * made.noise).mean())) < 0.02
    offset = draw(7, np.arange(4000), (1, 4, 4), 0.0, 0.5, False).noise
    assert abs(float(offset.mean(dim=(1, 2, 3)).var()) - (0.25 + 1 / 16)) < 0.02
    assert torch.equal(draw(7, np.array([5]), (1, 4, 4), 0.2, 0.0, True).noise[0], made.noise[5])
    assert not torch.equal(draw(8, np.array([5]), (1, 4, 4), 0.2, 0.0, True).noise[0], made.noise[5])


@pytest.mark.parametrize("version", [1, 2])
def test_random_numbers_are_of_a_step_whatever_computes_it(version, digits):
    """The noise, time, and caption of each sample of a step don't depend on the number of workers, or on the micro-batches and
    their number.

    They are the same after a resume, which creates its own recipe.
    """
    content = rows(digits, 24)

    def drawn(workers: int, micro: int) -> dict[str, torch.Tensor]:
        wanted = {
            "train.recipe_version": version,
            "train.global_batch_size": 8,
            "train.micro_batch_size": micro,
            "data.virtual_ranks": 4,
        }
        given = job(**build_images.job(digits, caption_dropout=0.5, objective={"noise_offset": 0.1}), **wanted)
        made, data = TextToImage(given), [manifest.read(Location(str(digits)))]
        made.bind(data)
        batch_plan, parts = BatchPlan(given, plan(given, data)), list[dict[str, torch.Tensor]]()
        for rank in range(workers):
            keys = np.concatenate([batch_plan.keys(2, range(lane, lane + 1)) for lane in range(rank, 4, workers)])
            for some in np.split(keys, len(keys) // micro):
                parts.append(made.complete(made.batch(content.take(some), some)))
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: values[whole["key"].argsort()] for name, values in whole.items()}

    right = drawn(1, 2)
    assert right["key"].tolist() == list(range(16, 24)) and len(right["time"].unique()) == 8
    for workers, micro in ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1)):
        other = drawn(workers, micro)
        assert right.keys() == other.keys() and all(torch.equal(other[name], right[name]) for name in right)


def test_version_1_sends_its_random_numbers_and_version_2_its_keys(digits):
    """Checks a batch on its way to the device."""
    names = {}
    for version in (1, 2):
        made = TextToImage(job(**build_images.job(digits), **{"train.recipe_version": version}))
        made.bind([manifest.read(Location(str(digits)))])
        names[version] = set(made.batch(rows(digits), np.arange(12)))
    assert names[2] == {"clean", "text", "mask", "key"} and names[1] == names[2] | {"noise", "time", "dropped"}


def test_a_dropped_caption_is_an_empty_one_in_training_and_never_in_evaluation(digits):
    made, content = recipe(digits, caption_dropout=0.5), rows(digits)
    seen: list[torch.Tensor] = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, noisy: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            seen.append(text)
            return noisy * self.weight

    batch = made.batch(content, np.arange(12))
    made.loss(Spy(), batch)
    made.evaluate(Spy(), batch)
    empty = made.parts.empty["text"]
    dropped = image_rows.draw(made.seed, batch["key"], *made._drawn(batch["clean"])).dropped
    assert 0 < int(dropped.sum()) < 12
    assert all(torch.equal(seen[0][i], empty if dropped[i] else batch["text"][i]) for i in range(12))
    assert torch.equal(seen[1], batch["text"])
    assert (batch["text"] != empty).any(1).all()


def test_evaluation_is_on_fixed_noise_and_its_quarters_make_up_the_loss(digits):
    made, content = recipe(digits), rows(digits)
    torch.manual_seed(0)
    model = woken(made.build()).eval()
    with torch.no_grad():
        one, two = (
            {n: float(v.sum()) for n, v in made.evaluate(model, made.batch(content, np.arange(12))).items()} for _ in range(2)
        )
    assert one == two
    scores = made.metrics(one)
    assert sum(one[f"samples_t{i}"] for i in range(4)) == 12 and min(one[f"samples_t{i}"] for i in range(4)) >= 2
    assert sum(one[f"loss_t{i}"] for i in range(4)) == pytest.approx(one["loss"], rel=1e-5)
    assert scores["loss"] == pytest.approx(one["loss"] / 12)


def test_datasets_that_do_not_belong_together_are_refused(digits, tmp_path):
    whole = manifest.read(Location(str(digits)))
    other = manifest.Manifest(whole.location, whole.chunks, {**whole.meta, "size": [16, 8]})
    with pytest.raises(ConfigError, match=r"data.one_source_batches: required"):
        image_rows.facts([whole, other], False)
    assert image_rows.facts([whole, other], True).size == (8, 8)
    with pytest.raises(ConfigError, match="have different numbers of channels"):
        image_rows.facts([whole, manifest.Manifest(whole.location, whole.chunks, {**whole.meta, "channels": 3})], True)
    with pytest.raises(ConfigError, match="contains no images"):
        image_rows.facts([manifest.Manifest(whole.location, whole.chunks, {"kind": "rows"})], True)
    assert TEXT["length"] == 8


def test_scores_that_need_prompts_are_missed_with_a_line(digits, caplog, tmp_path):
    """Without prompts nothing is drawn, so nothing can be compared."""
    recipe(digits, samples={"features": {"pretrained": str(tmp_path)}})
    assert "no scores for features and clip, because the job has no prompts" in caplog.text
