"""Tests the image pipeline on the engine: it resumes after a kill, its result doesn't depend on the split, and it rejects
impossible keys."""

import hashlib
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import segment
from heliostat.curation.images import pictures, sources, tasks
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.prepare import sha256_json
from heliostat.curation.stage import Dropped
from heliostat.errors import ConfigError
from heliostat.tasks import merging
from PIL import Image

from tests.unit.build_curation import KilledError
from tests.unit.build_image_pipeline import STAGES, keys, make_input
from tests.unit.build_images import Here, folder_of, image, photos, prepared, rows_of, scaled


@pytest.mark.parametrize("stages", [[], STAGES], ids=["plain", "stages"])
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_dataset(tmp_path, stages):
    """The run is killed at every fifth task. Finished tasks don't run again, and some tasks run twice, as Ray may do."""
    make_input(tmp_path / "in")
    whole, flow = prepared(keys(tmp_path, "whole", stages=stages, memory_limit=1 << 16), again=0)
    finished = Counter(flow.ran)
    seen = Counter[str]()
    for most in (5,) * (len(flow.ran) // 5 + 1):
        try:
            made, last = prepared(keys(tmp_path, stages=stages, memory_limit=1 << 16), most=most, seed=seen.total())
        except KilledError:
            seen["killed"] += 1
            continue
        break
    assert made.digest == whole.digest and seen["killed"] >= 4
    assert {kind: last.kept.get(kind, 0) + last.done.get(kind, 0) for kind in finished} == finished
    assert sum(last.kept.values()) >= 5 * (seen["killed"] - 1)
    assert not (tmp_path / "out.work").exists()


def by_definition(folder: Path, distance: int | None, shard_images: int) -> tuple[dict[str, bytes], dict[str, int]]:
    """Returns the shards, by path, and the dropped images, computed with all images in memory, in the order of their pixel
    hashes."""
    columns, sizes = ImageColumns(label="kind"), pictures.buckets(32, 2.0, 8)
    listed = sources.listing(str(folder))
    raw = [r for task in sources.tasks(str(folder), listed, columns) for r in sources.read(str(folder), task, columns)]
    made = [r if isinstance(r, Dropped) else pictures.prepare(r, pictures.ImageRules(sizes, min_side=8)) for r in raw]
    dropped = Counter(m.reason for m in made if isinstance(m, Dropped))
    kept = list[pictures.StoredPicture]()
    for one in sorted((m for m in made if isinstance(m, pictures.StoredPicture)), key=lambda m: (m.hash, m.id)):
        apart = [((one.looks ^ other.looks) % (1 << 64)).bit_count() for other in kept]
        if distance is not None and any(other.hash == one.hash for other in kept):
            dropped["duplicate"] += 1
        elif distance is not None and apart and min(apart) <= distance:
            dropped["duplicate" if one.hash in {m.hash for m in made if isinstance(m, pictures.StoredPicture) and m.id < one.id}
                    else "near_duplicate"] += 1  # fmt: skip
        else:
            kept.append(one)
    shards, counts = dict[str, list[pictures.StoredPicture]](), Counter(f"{w}x{h}" for w, h in (one.size for one in kept))
    for one in kept:
        bucket = f"{one.size[0]}x{one.size[1]}"
        number = int(one.hash[:15], 16) % max(1, round(counts[bucket] / shard_images))
        shards.setdefault(f"{bucket}/shards/{number:05d}", []).append(one)
    found = {}
    for place, members in shards.items():
        data = tasks.shard(rows_of(members), 5)
        found[f"{place}/{hashlib.sha256(data).hexdigest()[:16]}.parquet"] = data
    return found, dict(sorted(dropped.items()))


@pytest.mark.parametrize(("duplicates", "distance"), [("perceptual", 3), ("perceptual", 10), ("exact", -1), ("keep", None)])
def test_a_dataset_is_bitwise_what_it_is_by_definition(tmp_path, duplicates, distance):
    """Shards, bytes, and reasons equal those from before the pipeline ran in tasks."""
    make_input(tmp_path / "in")
    made, _ = prepared(keys(tmp_path, duplicates=duplicates, distance=max(0, distance or 0), columns={"label": "kind"}))
    shards, dropped = by_definition(tmp_path / "in", distance, 10)
    assert made.meta["dropped"] == dropped and made.meta["documents"] == made.rows
    facts = {"kind", "name", "documents", "dropped", "channels", "content", "classes", "parts", "digests", "digest", "files",
             "tokenizer", "vocab_size", "end_of_document"}  # fmt: skip
    assert made.meta.keys() == facts and made.meta["classes"] == ["even", "odd"] and made.meta["content"] == "images"
    assert sorted(set(made.paths)) == sorted(shards) and len(shards) > 5
    assert all((tmp_path / "out" / path).read_bytes() == data for path, data in shards.items())


def test_the_dataset_is_the_same_however_the_work_is_cut(tmp_path, monkeypatch):
    """This also holds if the shards' parts are merged first, as with very many runs."""
    make_input(tmp_path / "in")
    made = [prepared(keys(tmp_path, f"out{i}", memory_limit=limit, stages=STAGES), seed=i)
            for i, limit in enumerate((1 << 15, 1 << 18, 2 << 30))]  # fmt: skip
    monkeypatch.setattr(merging, "MANY", 2)
    made.append(prepared(keys(tmp_path, "merged", memory_limit=1 << 18, stages=STAGES), seed=5))
    assert len({dataset.digest for dataset, _ in made}) == 1
    assert ["merge" in flow.done for _, flow in made] == [False, False, False, True]


def test_images_of_the_same_looks_go_and_crops_stay(tmp_path):
    """For photographs, and their scaled, compressed, and converted versions."""
    rows, shapes = list[tuple[str, bytes, dict[str, Any]]](), {"small": (0.4, "JPEG", 60), "webp": (1.0, "WEBP", 80)}
    for name, data in photos().items():
        rows.append((f"{name}.jpg", data, {"caption": name}))
        for how, (factor, encoding, quality) in shapes.items():
            rows.append((f"{name}-{how}.{encoding.lower()}", scaled(data, factor, encoding, quality), {"caption": how}))
        whole = Image.open(io.BytesIO(data))
        crop = whole.crop((0, 0, whole.width // 2, whole.height // 2))
        out = io.BytesIO()
        crop.save(out, "PNG")
        rows.append((f"{name}-crop.png", out.getvalue(), {"caption": "crop"}))
    folder_of(tmp_path / "in", rows)
    made, _ = prepared(keys(tmp_path, columns={}, buckets=None, tokenizer=None))
    captions = pq.read_table(Path(made.location.path) / made.paths[0])["id"].to_pylist()
    assert Counter(id.partition(".")[0].partition("-crop")[0].partition("-")[0] for id in captions) == Counter(
        dict.fromkeys(photos(), 2)
    )
    assert sum("crop" in id for id in captions) == 3 and made.meta["dropped"] == {"near_duplicate": 6}


def test_stages_and_columns_are_in_the_identity_only_where_they_are_given(tmp_path):
    """So a dataset from before these keys is up to date."""
    plain = ImagePipeline(**keys(tmp_path, columns={"label": "kind"}))
    assert not {"stages", "work", "keep_work", "memory_limit"} & plain.identity().keys()
    assert plain.identity()["columns"] == {"image": "image", "caption": "caption", "label": "kind"}
    seen = {sha256_json(plain.identity())}
    for more in ({"stages": STAGES}, {"stages": STAGES[:1]}, {"columns": {"others": ["url"]}}):
        seen.add(sha256_json(ImagePipeline(**keys(tmp_path, columns={"label": "kind"}) | more).identity()))
    assert len(seen) == 4
    assert sha256_json(ImagePipeline(**keys(tmp_path, columns={"label": "kind"}, memory_limit="1GiB")).identity()) in seen


def test_stages_that_cannot_be_are_refused(tmp_path):
    make_input(tmp_path / "in", 8)

    def refused(match: str, **more: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            Here.model_validate(keys(tmp_path, **more)).check()

    refused("image_size comes after similar_images", stages=[{"stage": "similar_images"}, {"stage": "image_size"}])
    refused("'label' is the name of the label column", columns={"others": ["label"]})
    within = {"stage": "minhash", "within": "crawls"}
    refused(
        r"stages.0: minhash: within: 'crawls' isn't a column .* Correct the name, or add the column to `columns.others`",
        stages=[within],
    )
    refused(r"within: 'crawls' isn't a column .*Did you mean 'crawl'\?", stages=[within], columns={"others": ["crawl"]})
    Here.model_validate(keys(tmp_path, stages=[within | {"within": "crawl"}], columns={"others": ["crawl"]})).check()
    refused("work: .* and the output .* overlap", work=str(tmp_path / "out" / "work"))


def test_sizes_and_encodings_that_cannot_be_are_refused(tmp_path):
    """No bucket has the requested aspect ratio, and WebP stores no grayscale. The smallest value that fits is accepted."""
    make_input(tmp_path / "in", 8)

    def checked(**more: Any) -> None:
        Here.model_validate(keys(tmp_path, **more)).check()

    for resolution, buckets in ((500, {"step": 64, "max_aspect": 1.1}), (100, {"step": 64, "max_aspect": 1.5})):
        with pytest.raises(
            ConfigError, match=r"^buckets.max_aspect: 1.[15] allows no size of resolution .*\. Raise buckets.max_aspect"
        ):
            checked(resolution=resolution, buckets=buckets)
    with pytest.raises(ConfigError, match=r"^encoding: webp doesn't support grayscale \(channels: 1\)\. Use png or jpeg"):
        checked(channels=1, encoding="webp")
    checked(resolution=512, buckets={"step": 64, "max_aspect": 1.1})
    checked(resolution=500, buckets={"step": 64, "max_aspect": 1.2})
    checked(channels=1, encoding="jpeg")
    checked(channels=3, encoding="webp")


def test_captions_that_train_the_tokenizer_may_come_in_any_order(tmp_path):
    """With another split of the work, captions come in another order, and the tokenizer is the same."""
    make_input(tmp_path / "in")
    made = [
        prepared(keys(tmp_path, f"o{i}", memory_limit=limit))[0].meta["tokenizer"] for i, limit in enumerate((1 << 15, 1 << 30))
    ]
    assert made[0] == made[1]


def test_runs_are_cut_by_the_bytes_of_images(tmp_path):
    """A run has each image with its caption, its pixel hash, and its size."""
    rows = [(f"{i}.png", image(64, 64, seed=i), {"caption": f"number {i}"}) for i in range(30)]
    folder_of(tmp_path / "in", rows)
    prepared(keys(tmp_path, columns={}, buckets=None, resolution=64, tokenizer=None, keep_work=True, memory_limit=1 << 19))
    found = [table for path in (tmp_path / "out.work" / "spill").rglob("*.parquet") if (table := pq.read_table(path)).schema.names
             == segment.PICTURES.names]  # fmt: skip
    assert len(found) > 2 and sum(len(table) for table in found) == 30
    for row in pa.concat_tables(found).to_pylist():
        pixels = Image.open(io.BytesIO(row["image"]))
        assert (pixels.width, pixels.height) == (row["width"], row["height"]) == (64, 64)
        assert hashlib.sha256(f"{pixels.mode} {pixels.size} ".encode() + pixels.tobytes()).digest() == row["hash"]
        assert row["text"] == f"number {row['id'].partition('.')[0]}"
