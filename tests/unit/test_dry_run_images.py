"""Tests a dry run of images: its sample, and its predictions for the whole input."""

import random
from collections import Counter

import numpy as np
import pytest
from heliostat.curation import prediction, reasons, sampled
from heliostat.curation.pieces import FilePart
from heliostat.errors import DataError
from heliostat.storage.locations import Location

from tests.unit.build_image_pipeline import make_input
from tests.unit.build_images import Here, folder_of, image, prepared


def keys(folder, **more):
    return {"name": "t", "input": str(folder / "in"), "output": str(folder / "out"), "resolution": 16,
            "duplicates": "exact", **more}  # fmt: skip


def predict(folder, fraction: float, name: str = "trial", **more):
    pipeline = Here.model_validate(keys(folder, **more))
    return pipeline.predict(Location(str(folder / name)), pipeline.inputs(), fraction)


def test_what_is_predicted_of_images_is_near_the_whole(tmp_path):
    """For files with metadata: stages, bytes, and images that reading drops."""
    rng = random.Random(0)
    rows = [(f"{i:04d}.png", image(8 + rng.randrange(40), 24, seed=i), {"caption": "x" * (1 + i % 9)}) for i in range(500)]
    folder_of(tmp_path / "in", rows)
    stages = [{"stage": "length", "min_chars": 4}]
    found = predict(tmp_path, 0.3, stages=stages, min_side=12)
    assert found == {**predict(tmp_path, 0.3, "again", stages=stages, min_side=12, memory_limit=1 << 26),
                     **{k: found[k] for k in found if "hours" in k or k in ("funnel", "seconds")}}  # fmt: skip
    made, _ = prepared(keys(tmp_path, stages=stages, min_side=12))
    truth = reasons.funnel(made)
    assert [row["stage"] for row in found["funnel"]] == [name for name in truth if name != "finish"]
    for row in found["funnel"]:
        of = truth[row["stage"]]
        assert row["kept_low"] <= of["kept"] <= row["kept_high"], row
        assert row["kept"] == pytest.approx(of["kept"], rel=0.15)
        assert row["kept_bytes"] == pytest.approx(of["kept_bytes"], rel=0.2) and row["tokens"] is None
    assert found["sample"]["read_bytes"] == pytest.approx(0.3 * found["input"]["bytes"], rel=0.1)
    assert 0 < found["cpu_hours_low"] <= found["cpu_hours"] <= found["cpu_hours_high"] and found["tokens"] is None
    told = {**found, "cost": 1.0, "currency": "EUR"}
    lines, table = prediction.explain(told), prediction.table(told)
    assert "documents" in lines[1] and "tokens" not in lines[1] and len(table) == len(found["funnel"]) + 1


def test_images_in_archives_are_sampled_as_they_are_read(tmp_path):
    make_input(tmp_path / "in", 120)
    found = predict(tmp_path, 0.5, columns={"label": "kind"}, min_side=8)
    made, _ = prepared(keys(tmp_path, columns={"label": "kind"}, min_side=8))
    assert found["documents"] == pytest.approx(made.rows, rel=0.35)
    assert [row["stage"] for row in found["funnel"]] == ["read", "0 similar_images", "shard"]
    assert found["duplicates"]["0 similar_images"]["expected"] >= found["duplicates"]["0 similar_images"]["seen"]


def test_duplicates_that_are_kept_are_none_that_are_predicted(tmp_path):
    """Shards of images drop no duplicates. Without a stage that compares images, all of them stay."""
    rows = [(f"{i:03d}.png", image(8, 8, seed=i // 2), {"caption": "x"}) for i in range(60)]
    folder_of(tmp_path / "in", rows)
    found = predict(tmp_path, 0.5, duplicates="keep")
    assert found["duplicates"] == {} and not found["funnel"][-1]["dropped"]
    assert found["funnel"][-1]["kept"] == found["funnel"][-1]["documents"] == found["funnel"][0]["documents"]


def test_the_digits_have_a_dry_run(tmp_path):
    pipeline = Here.model_validate(keys(tmp_path) | {"input": "sklearn:digits", "channels": 1, "resolution": 8})
    found = pipeline.predict(Location(str(tmp_path / "trial")), pipeline.inputs(), 0.1)
    assert found["documents"] == pytest.approx(1797, rel=0.25)


def test_what_cannot_be_tried_is_one_error(tmp_path):
    folder_of(tmp_path / "in", [("a.png", image(8, 8), {"caption": "x"})])
    with pytest.raises(DataError, match="the sample is empty"):
        predict(tmp_path, 0.0001)


def test_a_share_has_large_files_and_small_ones_as_all_have_them():
    """Each part has the same chance, larger shares contain smaller ones, and the two parts of a pair are drawn almost
    independently."""
    rng = random.Random(1)
    counts, pairs = dict[str, int](), 0
    for trial in range(120):
        parts = [FilePart(f"{trial}/{i}", int(rng.paretovariate(1.0) * 1000), 0) for i in range(400)]
        few, many = sampled.evenly(parts, 0.1), sampled.evenly(parts, 0.3)
        assert {p.path for p in few} <= {p.path for p in many} and few == sampled.evenly(parts[::-1], 0.1)
        large = sorted(parts, key=lambda p: p.length)[-100:]
        for part in few:
            counts[part.path.split("/")[1]] = counts.get(part.path.split("/")[1], 0) + 1
        assert abs(len({p.path for p in few} & {p.path for p in large}) - 10) <= 6
        chosen = {p.path.split("/")[1] for p in many}
        pairs += sum(str(i) in chosen and str(i + 1) in chosen for i in range(0, 400, 2))
    assert sum(counts.values()) == pytest.approx(120 * 40, rel=0.05) and max(counts.values()) < 35
    assert pairs == pytest.approx(120 * 200 * 0.09, rel=0.1)
    small = [sampled.evenly([FilePart(f"t{t}/{i}", 1000, 0) for i in range(20)], 0.01) for t in range(2000)]
    assert sum(map(len, small)) == pytest.approx(400, rel=0.2), "of classes of which less than one is a share"


@pytest.mark.parametrize("count", [3, 5])
def test_each_part_has_the_same_chance_whatever_the_number_of_parts(count):
    chosen = [sampled.evenly([FilePart(f"t{t}/{i:02}", 1000, 0) for i in range(count)], 1 / count) for t in range(600 * count)]
    counts = Counter(part.path[-2:] for (part,) in chosen)
    assert len(counts) == count and all(abs(number - 600) < 130 for number in counts.values())


def test_parts_are_spread_evenly_and_neighbors_are_drawn_almost_independently():
    """Neighbors are often similar. So a spread sample has smaller errors, and the estimate of duplicates, which are often
    neighbors, needs the chance that both are in the sample."""
    variances, pairs = list[float](), 0
    for trial in range(100):
        chosen = np.zeros(1000, bool)
        parts = [FilePart(f"{trial}/{i:04}", 1000, 0) for i in range(1000)]
        chosen[[int(part.path[-4:]) for part in sampled.evenly(parts, 0.1)]] = True
        variances.append(chosen.reshape(10, 100).sum(1).var())
        pairs += int((chosen[1:] & chosen[:-1]).sum())
    assert np.mean(variances) < 5, "9 for random parts"
    assert pairs == pytest.approx(100 * 999 * 0.01, rel=0.25)
