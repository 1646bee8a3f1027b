"""Tests the terms that change a text-to-image loss: contrastive flow matching, immiscible noise, and several captions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from heliostat.data import manifest
from heliostat.data.dataset import plan
from heliostat.errors import ConfigError
from heliostat.recipes.counter_random import normals
from heliostat.recipes.images import captions, immiscible
from heliostat.recipes.images.text_to_image import TextToImage
from heliostat.storage.locations import Location
from heliostat.training.worker.micro_batches import BatchPlan

from tests.unit import build_images
from tests.unit.build_images import folder_of, image, prepared
from tests.unit.build_job import job
from tests.unit.build_text_encoders import texts
from tests.unit.build_text_to_image import clip, recipe, rows, woken

pytestmark = [pytest.mark.ci, pytest.mark.usefixtures("one_thread")]
TEXTS = [{"text": "{caption}"}, {"text": "a picture of {label}", "weight": 2.0}]
TERMS: dict[str, dict[str, Any]] = {
    "contrastive": {"objective": {"prediction": "flow"}, "contrastive": {"weight": 0.2}},
    "contrastive, x": {"objective": {"prediction": "x", "time_floor": 0.3}, "contrastive": {"weight": 0.2}},
    "candidates": {"immiscible": {"candidates": 4}},
    "group": {"immiscible": {"group": 4}},
    "captions": {"captions": TEXTS},
    "all": {"objective": {"prediction": "x"}, "contrastive": {}, "immiscible": {"candidates": 3}, "captions": TEXTS},
}


def made_for(dataset: Path, micro: int = 4, **model: Any) -> TextToImage:
    made = TextToImage(
        job(**build_images.job(dataset, **model), **{"train.micro_batch_size": micro, "train.global_batch_size": 16})
    )
    made.bind([manifest.read(Location(str(dataset)))])
    return made


@pytest.mark.parametrize("term", TERMS)
def test_a_term_depends_on_neither_workers_nor_micro_batches(term, digits):
    """The noise, the captions, and the objective of a step are the same on 1, 2, and 4 workers, in micro-batches of 4 and 8."""
    content = rows(digits, 32)
    torch.manual_seed(0)
    model = woken(recipe(digits).build())

    def computed(workers: int, micro: int) -> tuple[dict[str, torch.Tensor], float]:
        wanted = {"train.global_batch_size": 32, "train.micro_batch_size": micro, "data.virtual_ranks": 4}
        described = job(**build_images.job(digits, caption_dropout=0.3, **TERMS[term]), **wanted)
        made, data = TextToImage(described), [manifest.read(Location(str(digits)))]
        made.bind(data)
        batch_plan, parts, total = BatchPlan(described, plan(described, data)), list[dict[str, torch.Tensor]](), 0.0
        for rank in range(workers):
            keys = batch_plan.keys(3, range(rank, 4, workers)) if workers > 1 else batch_plan.keys(3, range(4))
            for some in np.split(keys, len(keys) // micro):
                batch = made.complete(made.batch(content.take(some - 96), some))
                loss = made.loss(model, batch)
                total += loss.sum.item() + sum(p.weight * p.value.item() for p in loss.parts.values()) * len(some)
                parts.append(batch)
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: values[whole["key"].argsort()] for name, values in whole.items()}, total

    with torch.no_grad():
        right, objective = computed(1, 8)
        for workers, micro in ((1, 4), (2, 8), (2, 4), (4, 8), (4, 4)):
            other, mine = computed(workers, micro)
            assert all(torch.equal(other[name], right[name]) for name in right) and right.keys() == other.keys()
            assert mine == pytest.approx(objective, rel=1e-5)


@pytest.mark.parametrize("prediction", ["flow", "x"])
def test_contrastive_flow_matching_is_the_papers(prediction, digits):
    """In fp64: the mean of |v - u'|^2 over the samples, where u' is the velocity noise - image of the pair's other sample. A pair
    with equal captions counts as 0, and the objective subtracts `weight` times the mean."""
    objective = {"prediction": prediction, **({"time_floor": 0.2} if prediction == "x" else {})}
    made = made_for(digits, objective=objective, contrastive={"weight": 0.1}, caption_dropout=0.6)
    torch.manual_seed(0)
    model = woken(made.build())
    batch = made.complete(made.batch(rows(digits, 32), np.arange(32)))
    with torch.no_grad():
        loss = made.loss(model, batch)
        s = batch["time"].double().view(-1, 1, 1, 1)
        x, e = batch["image"].double(), batch["noise"].double()
        noisy = (1 - s) * x + s * e
        output = model(noisy.float(), 1000 * batch["time"], batch["caption"]).double()
    velocity = output if prediction == "flow" else (noisy - output) / s.clamp(min=0.2)
    expected, alike = 0.0, 0
    for i in range(32):
        j = i + 1 if i % 2 == 0 else i - 1
        if torch.equal(batch["caption"][i], batch["caption"][j]):
            alike += 1
        else:
            expected += float((velocity[i] - (e[j] - x[j])).square().mean()) / 32
    part = loss.parts["contrast"]
    assert 0 < alike < 32 and part.weight == -0.1
    assert part.value.item() == pytest.approx(expected, rel=1e-5)
    plain = made_for(digits, objective=objective, caption_dropout=0.6).loss(model, batch)
    assert not plain.parts and plain.sum.item() == pytest.approx(loss.sum.item(), rel=1e-6)


def test_the_nearest_of_several_noises_is_used(digits):
    made = made_for(digits, immiscible={"candidates": 5})
    content, keys = rows(digits), np.arange(40, 52)
    plain = recipe(digits).complete(recipe(digits).batch(content, keys))
    batch = made.complete(made.batch(content, keys))
    others = [normals(made.seed, batch["key"], immiscible.STREAM + i, 64).view(12, 1, 8, 8) for i in range(4)]
    candidates = torch.stack([plain["noise"], *others]).double()
    near = (candidates - batch["image"].double()).square().sum((2, 3, 4)).argmin(0)
    assert torch.equal(batch["noise"].double(), candidates[near, torch.arange(12)]) and len(near.unique()) > 2
    assert torch.equal(made._completed(made.batch(content, keys), training=False)["noise"], plain["noise"]), "as samplers do"


def test_the_noises_of_a_group_are_assigned_with_the_least_distance(digits):
    """Among all permutations of each group's noises, by brute force in fp64. The noises themselves stay the same."""
    made, plain = made_for(digits, immiscible={"group": 4}), recipe(digits)
    content, keys = rows(digits), np.arange(12)
    before, after = (m.complete(m.batch(content, keys)) for m in (plain, made))
    changed = 0
    for group in torch.arange(12).split(4):
        images, noises = before["image"][group].double(), before["noise"][group]
        cost = {p: float((images - noises[list(p)]).square().sum()) for p in itertools.permutations(range(4))}
        best = min(cost, key=lambda p: cost[p])
        assert torch.equal(after["noise"][group], noises[list(best)])
        changed += best != (0, 1, 2, 3)
    assert changed


def test_held_out_batches_have_the_same_samples_without_assignments(digits, monkeypatch):
    """Scores use noise that doesn't depend on the image, so the host assigns no noise for them."""
    made, content, keys = made_for(digits, immiscible={"group": 4}), rows(digits), np.arange(12)
    model = woken(made.build()).eval()
    with torch.no_grad():
        before = made.evaluate(model, made.batch(content, keys))
        monkeypatch.setattr(immiscible.Immiscible, "assigned", None)
        batch = made.held_out_batch(content, keys)
        after = made.evaluate(model, batch)
    assert "assigned" not in batch and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_near_noise_brings_images_and_noise_closer(digits):
    """The paper's measure: distances fall, most with the most candidates."""
    content, keys = rows(digits, 48), np.arange(48)

    def distance(**model: Any) -> float:
        made = made_for(digits, micro=16, **model)
        batch = made.complete(made.batch(content, keys))
        return float((batch["image"] - batch["noise"]).square().flatten(1).sum(1).sqrt().mean())

    plain, two, eight = distance(), distance(immiscible={"candidates": 2}), distance(immiscible={"candidates": 8})
    assert plain > two > eight and plain > distance(immiscible={"group": 16})


def test_captions_are_chosen_by_weight_and_key():
    several = [captions.CaptionText(text=text, weight=weight) for text, weight in (("a", 1.0), ("b", 2.0), ("c", 5.0))]
    keys = np.arange(16_000)
    choice = captions.choose(several, 3, keys)
    counts = np.bincount(choice, minlength=3)
    assert (np.abs(counts - 2000 * np.array([1, 2, 5])) < 5 * np.sqrt(2000 * np.array([1, 2, 5]))).all()
    assert np.array_equal(choice[[5, 99]], captions.choose(several, 3, np.array([5, 99])))
    assert not np.array_equal(choice, captions.choose(several, 4, keys))
    content = pa.table({"caption": ["one", "two"], "label": ["cat", ""]})
    made = captions.chosen(content, [captions.CaptionText(text="a {label}, {caption}")], 0, np.arange(2))
    assert made["caption"].to_pylist() == ["a cat, one", "two"], "an image without a label has its own caption"


def test_stored_embeddings_are_mixed_and_dropped_as_texts_are(digits, tmp_path):
    """The pipeline encodes the further captions. For every key, the network gets the same caption, or the same dropped caption,
    as from the texts, within float16."""
    described = [(f"{i}.png", image(8, 8, seed=i), {"caption": f"number {i}", **({"long": f"the image of {i}"} if i % 4 else {})})
                 for i in range(12)]  # fmt: skip
    encoder = str(clip(tmp_path / "clip", digits))
    folder_of(tmp_path / "in", described)
    columns = {"others": ["long"], "captions": ["long"]}
    keys = {"name": "test", "input": str(tmp_path / "in"), "resolution": 8, "columns": columns}
    prepared({**keys, "output": str(tmp_path / "texts")})
    prepared({**keys, "output": str(tmp_path / "stored"), "latents": {"text_encoder": encoder, "length": 8}})
    model = {"text": {"pretrained": encoder, "length": 8}, "caption_dropout": 0.4,
             "captions": [{"text": "{caption}"}, {"text": "{long}", "weight": 2.0}]}  # fmt: skip
    found: dict[str, torch.Tensor] = {}
    content = {
        name: pq.read_table(next((tmp_path / name / "shards").rglob("*.parquet"))).sort_by("id") for name in ("texts", "stored")
    }
    for name in ("texts", "stored"):
        made = made_for(tmp_path / name, **model)
        found[name] = torch.cat(
            [made.complete(made.batch(content[name], np.arange(i, i + 12)))["caption"].float() for i in range(0, 60, 12)]
        )
    assert torch.allclose(found["texts"], found["stored"], atol=2e-3)
    empty = made.parts.empty["text"]
    dropped = (found["stored"] == empty).flatten(1).all(1)
    own = torch.from_numpy(np.stack([np.frombuffer(v, np.float16) for v in content["stored"]["embedding"].to_pylist()]))
    kept = (found["stored"].flatten(1) == own.float().repeat(5, 1)).all(1)
    assert 10 < int(dropped.sum()) < 40 and 5 < int(kept.sum()) < 40 and int((dropped | kept).sum()) < 60
    assert "long" in content["texts"].column_names and "embedding_long" in content["stored"].column_names

    with pytest.raises(ConfigError, match=r"model\.captions\.0\.text: 'a \{long\}' isn't one column, but .* stores embeddings"):
        made_for(tmp_path / "stored", **model | {"captions": [{"text": "a {long}"}]})
    with pytest.raises(
        ConfigError, match=r"no embeddings of the column 'label'\. Add this column to the pipeline's columns\.captions"
    ):
        made_for(tmp_path / "stored", **model | {"captions": [{"text": "{label}"}]})
    with pytest.raises(ConfigError, match=r"columns\.captions: 'short' isn't in columns\.others, and no stage stores it"):
        prepared({**keys, "output": str(tmp_path / "none"), "columns": {"captions": ["short"]}})


def test_captions_of_several_text_encoders_are_mixed_as_texts_are(digits, tmp_path):
    """Each encoder embeds the caption that the key chooses, also the pooled embedding, within float16."""
    described = [(f"{i}.png", image(8, 8, seed=i), {"caption": f"number {i}", **({"long": f"the image of {i}"} if i % 4 else {})})
                 for i in range(12)]  # fmt: skip
    text = texts(["clip", "t5"], tmp_path / "models", digits, [8, 12], [16, 24])
    folder_of(tmp_path / "in", described)
    keys = {"name": "test", "input": str(tmp_path / "in"), "resolution": 8, "columns": {"others": ["long"], "captions": ["long"]}}
    prepared({**keys, "output": str(tmp_path / "texts")})
    settings = ({"layer": "penultimate"}, {"padding": "seen"})
    encoders = [{"text_encoder": t["pretrained"], "length": t["length"], **s} for t, s in zip(text, settings, strict=True)]
    stored, _ = prepared({**keys, "output": str(tmp_path / "stored"), "latents": {"text_encoders": encoders}})
    assert captions.embeddings(stored) and len(captions.embeddings(stored)) == 3
    model = {"backbone": build_images.FLUX, "text": text, "caption_dropout": 0.4, "objective": {"prediction": "flow"},
             "contrastive": {}, "captions": [{"text": "{caption}"}, {"text": "{long}", "weight": 2.0}]}  # fmt: skip
    completed = {}
    for name in ("texts", "stored"):
        made = made_for(tmp_path / name, **model)
        content = pq.read_table(next((tmp_path / name / "shards").rglob("*.parquet"))).sort_by("id")
        completed[name] = [made.complete(made.batch(content, np.arange(i, i + 12))) for i in range(0, 60, 12)]
    assert completed["stored"][0].keys() == completed["texts"][0].keys() >= {"caption", "pooled", "contrasted"}
    for ours, theirs in zip(completed["stored"], completed["texts"], strict=True):
        for name, values in theirs.items():
            assert torch.allclose(ours[name].float(), values.float(), atol=5e-3, rtol=5e-3), name
    with pytest.raises(ConfigError, match=r"stores no embeddings of the column 'label'"):
        made_for(tmp_path / "stored", **model | {"captions": [{"text": "{label}"}]})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"contrastive": {}}, r"model\.contrastive: not supported with prediction 'epsilon', only with flow matching"),
        ({"contrastive": {"weight": 2}}, "contrastive.weight: 2 is too large"),
        ({"immiscible": {}}, "set either candidates or group"),
        (
            {"immiscible": {"group": 3}},
            r"immiscible\.group: needs groups of 3 consecutive samples, but train\.micro_batch_size is 4",
        ),
        (
            {"immiscible": {"candidates": 2}, "objective": {"noise_offset": 0.1}},
            "not supported with model.objective.noise_offset",
        ),
        ({"captions": [{"text": "{lable}"}]}, r"has no column 'lable'\. Did you mean 'label'\?"),
        ({"captions": [{"text": "{caption!r}"}]}, "expected names of columns in braces"),
        ({"captions": [{"text": "{caption"}]}, "captions"),
    ],
)
def test_terms_that_cannot_work_are_rejected(model, message, digits):
    with pytest.raises(ConfigError, match=message):
        made_for(digits, **model)


def test_pairs_need_complete_virtual_ranks(digits):
    """A virtual rank with an odd number of samples would pair other samples on another number of workers."""
    described = build_images.job(digits, objective={"prediction": "flow"}, contrastive={})
    with pytest.raises(ConfigError, match=r"but train\.global_batch_size / data\.virtual_ranks is 1\. Use a multiple of 2"):
        TextToImage(job(**described, **{"train.micro_batch_size": 2, "train.global_batch_size": 8, "data.virtual_ranks": 8}))


def test_an_exported_model_is_scored_in_batches_of_any_size(digits, tmp_path):
    """`model evaluate` has micro-batches of 8, which needn't contain the groups of the training."""
    aids = {"repa": {"layer": 1}, "tread": {"from": 1, "to": 1}}  # repa needs features, which other datasets don't have
    model = build_images.job(digits, immiscible={"group": 16}, objective={"prediction": "x"}, contrastive={}, **aids)["model"]
    exported = TextToImage.exported(tmp_path, model)
    assert not {"immiscible", "contrastive", *aids} & set(exported) and exported["objective"] == {"prediction": "x"}
    described = {**build_images.job(digits), "model": {**exported, "backbone": build_images.UNET}}
    TextToImage(job(**described, **{"train.micro_batch_size": 1, "train.global_batch_size": 1}))


def test_jobs_with_terms_are_planned(digits):
    """The plan runs the loss on fake tensors, with 1 to 3 samples."""
    from heliostat.plan.model_stats import activations, build, work

    for model in ({**TERMS["all"], "immiscible": {"group": 4}}, TERMS["all"]):
        made = made_for(digits, **model)
        described = job(**build_images.job(digits, **model), **{"train.micro_batch_size": 4})
        built = build(made)
        assert activations(described, made, built, rows(digits, 1)).batch > 0
        assert work(described, made, built, (rows(digits, 2), rows(digits, 3)))
