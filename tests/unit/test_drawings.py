"""Tests the drawings of the diffusion quickstart: their styles, their captions, and the combinations that are held out."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from heliostat.curation.images import drawings, pictures
from heliostat.curation.images.drawings import STYLES, combinations, held_out, subjects
from heliostat.errors import ConfigError
from heliostat.recipes.images.picture_judge import LabeledPictures, PictureJudge
from PIL import Image

from tests.unit.build_images import prepared

ALL, TRAIN, HELD = (f"drawings:{part}" for part in drawings.PARTS)


def pictures_of(uri: str) -> LabeledPictures:
    raws = list(drawings.read(uri))
    small = [pictures.fit(Image.open(io.BytesIO(raw.image or b"")), (32, 32)) for raw in raws]
    return LabeledPictures(np.stack([np.asarray(one) for one in small]), [raw.caption or "" for raw in raws],
                           [raw.label for raw in raws], [raw.columns["style"] for raw in raws])  # fmt: skip


def test_a_model_can_infer_every_held_out_combination_from_the_others():
    """Each subject and each style is in training, in at least six and 120 combinations. Two pictures of each subject show its
    colors. 15 % are held out, evenly by style."""
    train, held = combinations(TRAIN), combinations(HELD)
    assert not set(train) & set(held) and sorted([*train, *held]) == sorted(combinations(ALL))
    assert len(held) / len(train + held) == pytest.approx(0.15, abs=0.002)
    by_subject, by_style = (Counter(pair[i] for pair in train) for i in (0, 1))
    assert set(by_subject) == set(subjects()) and min(by_subject.values()) >= 6
    natural = Counter(name for name, style in train if style in ("color", "yellow", "night"))
    assert set(natural) == set(subjects()) and min(natural.values()) == 2
    assert set(by_style) == set(STYLES) and min(by_style.values()) >= 120
    assert max(Counter(style for _, style in held).values()) <= 1.5 * min(Counter(style for _, style in held).values())
    assert all(len(held_out(number)) == (2 if number % drawings.EVERY == 0 else 1) for number in range(len(subjects())))


def test_captions_differ_and_name_their_subject():
    captions = [drawings.caption(name, style) for name, style in combinations(ALL)]
    assert len(set(captions)) == len(captions) == len(STYLES) * len(subjects())
    assert drawings.caption("ant", "color") == "a color picture of an ant"
    assert {drawings.caption("glasses", "blue"), drawings.caption("bus", "blue")} <= {
        "a blue picture of glasses", "glasses in shades of blue", "a blue picture of a bus", "a bus in shades of blue"
    }  # fmt: skip


@pytest.mark.ci
def test_the_judge_recognizes_real_held_out_pictures_that_it_has_not_seen():
    """So the scores of drawn pictures measure the model, not the judge. Shuffled subjects score near chance."""
    known, real = pictures_of(TRAIN), pictures_of(HELD)
    judge = PictureJudge(known)
    scores = judge.accuracy(real, real.pictures)
    assert scores["top1"] >= 0.95 and scores["top5"] >= 0.98 and scores["style"] >= 0.95
    noise = np.random.default_rng(9).normal(0, 6.0, real.pictures.shape)  # of 255: people don't see it
    noisy = (real.pictures + noise).round().clip(0, 255).astype(np.uint8)
    assert judge.accuracy(real, noisy)["style"] >= 0.95
    other = LabeledPictures(
        real.pictures, real.captions, real.subjects[7:] + real.subjects[:7], real.styles[3:] + real.styles[:3]
    )
    wrong = judge.accuracy(other, real.pictures)
    assert wrong["top1"] < 0.05 and wrong["style"] < 0.5
    with pytest.raises(ConfigError, match=r"needs datasets with labels and at least two styles"):
        PictureJudge(LabeledPictures(real.pictures, real.captions, real.subjects, [""] * len(real.styles)))


def test_a_dataset_of_drawings_has_captions_labels_and_styles(tmp_path):
    import pyarrow.parquet as pq

    made, _ = prepared({"name": "test", "input": HELD, "output": str(tmp_path), "resolution": 32})
    rows = [row for path in dict.fromkeys(made.paths) for row in pq.read_table(tmp_path / path).to_pylist()]
    assert {(row["label"], row["style"]) for row in rows} == set(combinations(HELD)) and len(rows) == len(combinations(HELD))
    assert all(row["caption"] == drawings.caption(row["label"], row["style"]) for row in rows)
    assert made.meta["size"] == [32, 32] and set(made.meta["classes"]) == set(subjects())


def test_an_unknown_part_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"^input: unknown drawings \('drawings:noto'\)\. Use drawings:openmoji, "):
        prepared({"name": "test", "input": "drawings:noto", "output": str(tmp_path), "resolution": 32})
    with pytest.raises(ConfigError, match=r"^input: 'sklearn:digit' isn't an input that heliostat makes\. Did you mean "):
        prepared({"name": "test", "input": "sklearn:digit", "output": str(tmp_path), "resolution": 32})
    with pytest.raises(ConfigError, match=r"^input: 'emoji:all' .*\. Use one of: drawings:openmoji, sklearn:digits$"):
        prepared({"name": "test", "input": "emoji:all", "output": str(tmp_path), "resolution": 32})
