"""Tests the image pipeline on the engine: it resumes after a kill, its result doesn't depend on the split, and it records every
image."""

import base64
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import forget, reasons, segment
from heliostat.curation.images import pictures, sources, tasks
from heliostat.curation.images.pipeline import ImagePipeline
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.prepare import sha256_json
from heliostat.curation.stage import Dropped
from heliostat.curation.text import trace
from heliostat.data import documents, manifest
from heliostat.errors import ConfigError
from heliostat.tasks import merging
from heliostat.tracking.lineage_of_documents import TrainedOnDocument
from heliostat.tracking.report import curation
from PIL import Image

from tests.unit.build_curation import KilledError
from tests.unit.build_images import ROWS, Here, folder_of, image, photos, prepared, scaled

SIZES = [(40, 40), (80, 40), (40, 80), (60, 40)]


def make_input(folder: Path, count: int = 60) -> None:
    """Writes images in two Parquet files and a tar. Each seventh image appears again, smaller and as a JPEG, and some images are
    bad."""
    folder.mkdir()
    rows = []
    for i in range(count):
        data = image(*SIZES[i % 4], seed=i)
        rows.append({"image": data, "caption": f"image number {i}", "kind": "even" if i % 2 == 0 else "odd", "url": f"u/{i}"})
        if i % 7 == 3:
            rows.append(rows[-1] | {"image": scaled(data, 0.8), "caption": "it looks alike", "url": f"alike/{i}"})
        if i % 9 == 3:
            rows.append(rows[-1] | {"caption": "the very same", "url": f"same/{i}"})
        if i % 20 == 5:
            rows.append(rows[-1] | {"image": image(40, 40, seed=1000 + i), "caption": "short"})
    bad = [(b"bad", "not an image"), (None, "no image"), (image(9, 9), ""), (image(20, 20, seed=5000), "a small one"),
           (image(50, 50)[:-60], "cut short")]  # fmt: skip
    rows += [{"image": data, "caption": caption} for data, caption in bad]
    third = len(rows) // 3
    pq.write_table(pa.Table.from_pylist(rows[:third]), folder / "a.parquet", row_group_size=5)
    pq.write_table(pa.Table.from_pylist(rows[third : 2 * third]), folder / "b.parquet", row_group_size=5)
    with tarfile.open(folder / "c.tar", "w") as tar:
        for number, row in enumerate(rows[2 * third :]):
            bodies = {"json": json.dumps({k: v for k, v in row.items() if k != "image"}).encode()}
            bodies |= {"png": row["image"]} if row["image"] else {}
            for suffix, body in bodies.items():
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))


def keys(folder: Path, output: str = "out", **more: Any) -> dict[str, Any]:
    usual = {"name": "test", "input": str(folder / "in"), "output": str(folder / output), "resolution": 32,
             "columns": {"label": "kind", "others": ["url"]}, "min_side": 8, "buckets": {"step": 8, "max_aspect": 2.0},
             "duplicates": "perceptual", "tokenizer": {"vocab_size": 300}, "chunk_images": 5, "shard_images": 10}  # fmt: skip
    return {k: v for k, v in (usual | more).items() if v is not None}


STAGES = [{"stage": "length", "min_chars": 6}, {"stage": "image_size", "min_side": 31}]


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
        rows = [{**asdict(one), "width": one.size[0], "height": one.size[1]} for one in members]
        data = tasks.shard(pa.Table.from_pylist(rows, ROWS), 5)
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


def test_new_input_is_only_its_own_work(tmp_path, monkeypatch):
    """The dataset equals that of a run without the earlier work."""
    monkeypatch.setattr(sources, "FILES_PER_TASK", 32)
    rows = [(f"{i:04d}.png", image(16, 16, seed=i), {"caption": f"number {i}"}) for i in range(70)]
    folder_of(tmp_path / "in", rows[:64])
    given = keys(tmp_path, buckets=None, resolution=16, columns={}, tokenizer=None, keep_work=True)
    _, first = prepared(given, again=0)
    assert first.done["read"] == 2
    for name, data, _ in rows[64:]:
        (tmp_path / "in" / name).write_bytes(data)
    lines = [json.dumps({"file_name": name, **columns}) for name, _, columns in rows]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(lines))
    made, second = prepared(given, again=0)
    assert second.kept["read"] == 2 and second.done["read"] == 1
    assert made.digest == prepared(keys(tmp_path, "other", buckets=None, resolution=16, columns={}, tokenizer=None))[0].digest
    (tmp_path / "in" / "0003.png").write_bytes(rows[50][1])  # another image of the same name
    _, third = prepared(given, again=0)
    assert third.kept["read"] == 2 and third.done["read"] == 1


@pytest.mark.parametrize("name", ["./img/a.png", "img//a.png", "img/b.jfif", "img/c"])
def test_a_changed_image_is_read_again_whatever_its_name(tmp_path, name):
    """The listing has its size and its time of modification, so neither the old dataset nor kept work is up to date."""
    folder_of(tmp_path / "in", [("0.png", image(16, 16, seed=1), {"caption": "the first"})])
    (tmp_path / "in" / "img").mkdir()
    with (tmp_path / "in" / "metadata.jsonl").open("a") as f:
        f.write("\n" + json.dumps({"file_name": name, "caption": "the other"}))
    (tmp_path / "in" / "NOTES.txt").write_text("none of the input's")
    given = keys(tmp_path, buckets=None, resolution=16, columns={}, tokenizer=None, keep_work=True)
    (tmp_path / "in" / name).write_bytes(image(16, 16, seed=2))
    listed = sources.listing(str(tmp_path / "in"))
    first, _ = prepared(given, again=0)
    (tmp_path / "in" / name).write_bytes(image(16, 16, seed=3))
    again, flow = prepared(given, again=0)
    assert flow.done["read"] == 1 and again.digest != first.digest and again.rows == first.rows == 2
    assert [f.path for f in listed] == ["0.png", os.path.normpath(name), "metadata.jsonl"]
    assert sources.listing(str(tmp_path / "in")) != listed


def test_an_image_that_a_metadata_file_names_by_dots_is_still_outside(tmp_path):
    folder_of(tmp_path / "in", [("0.png", image(16, 16), {"caption": "x"})])
    (tmp_path / "in" / "metadata.jsonl").write_text('{"file_name": "img/../0.png", "caption": "x"}')
    (task,) = sources.tasks(str(tmp_path / "in"), sources.listing(str(tmp_path / "in")), ImageColumns())
    (left,) = sources.read(str(tmp_path / "in"), task, ImageColumns())
    assert isinstance(left, Dropped) and left.reason == "outside"


@pytest.mark.parametrize("form", ["archives", "a folder"])
def test_images_that_were_read_without_etags_are_not_read_again(tmp_path, monkeypatch, form):
    """Versions before ETags named a store's read tasks by sizes and times. A changed object is read again."""
    if form == "archives":
        make_input(tmp_path / "in")
    else:
        folder_of(tmp_path / "in", [(f"{i}.png", image(40, 40, seed=i), {"caption": "a caption"}) for i in range(3)])
    (before, first), real = prepared(keys(tmp_path, tokenizer=None, keep_work=True)), Here.inputs
    monkeypatch.setattr(Here, "inputs", lambda self: [replace(file, etag="abc") for file in real(self)])
    after, again = prepared(keys(tmp_path, tokenizer=None, keep_work=True))
    assert first.done["read"] > 0 and again.done.get("read", 0) == 0 and after.digest == before.digest

    def named(**changes: object) -> set[str]:
        files = [replace(file, **changes) for file in sources.listing(str(tmp_path / "in"))]
        parts = [
            sources.spilled(first.work.spill, task, {}) for task in sources.tasks(str(tmp_path / "in"), files, ImageColumns())
        ]
        return {part.path_by_time or part.path for part in parts}

    assert named() == named(etag="abc") and not named() & named(etag="abc", modified=7)


def test_what_became_of_every_image_is_told(tmp_path):
    """A kept image has its shard. A dropped one has the stage, the reason, and the image that stayed. All images are counted."""
    make_input(tmp_path / "in")
    made, _ = prepared(keys(tmp_path, stages=STAGES))
    ends = {row["id"]: row for table in reasons.ends(made) for row in table.to_pylist()}
    funnel = reasons.funnel(made)
    assert list(funnel) == ["read", "0 length", "1 image_size", "2 similar_images", "finish", "shard"]
    assert len(ends) == funnel["read"]["documents"] == made.rows + sum(made.meta["dropped"].values())
    held = {row["id"]: row for path in set(made.paths) for row in pq.read_table(Path(made.location.path) / path).to_pylist()}
    assert {id for id, row in ends.items() if row["reason"] == "kept"} == held.keys() and len(held) > 30
    for id, row in ends.items():
        told = trace.trace(made, reasons.end_of(made, id)[0])
        assert told["images"] and told["end"]["reason"] == row["reason"] and told["end"]["what"]
        if row["reason"] == "kept":
            (piece,) = told["shard"]["pieces"]
            file = pq.ParquetFile(Path(made.location.path) / row["detail"])
            assert file.read_row_group(piece["row_group"])["id"][piece["first"]].as_py() == id
            trained = TrainedOnDocument(None, made, id)  # where a run that trains on the collection finds it: in one of its parts
            parts = {name: manifest.read(made.location.join(name)) for name in made.meta["parts"]}
            held_by = {name: found for name, part in parts.items() if (found := trained._pieces(part))}
            ((part, ((path, there),)),) = held_by.items()
            assert f"{part}/{path}" == row["detail"] and (there.row_group, there.first) == (piece["row_group"], piece["first"])
            assert {part.digest for part in parts.values()} < trained.digests
        elif row["reason"] in ("duplicate", "near_duplicate"):
            assert told["kept"] in held and row["stage"] == "2 similar_images"
        else:
            assert told["kept"] is None and told["shard"] is None
    by_reason = Counter((row["stage"], row["reason"]) for row in ends.values())
    assert (
        by_reason["0 length", "short"] >= 3 and by_reason["1 image_size", "small"] and by_reason["2 similar_images", "duplicate"]
    )
    assert by_reason["read", "no_image"] == by_reason["read", "no_caption"] == 1
    assert by_reason["1 image_size", "undecodable"] == by_reason["finish", "undecodable"] == 1
    near = next(row for row in ends.values() if row["reason"] == "near_duplicate")
    url = json.loads(near["columns"])["url"]
    assert [row["id"] for row in trace.find(made, url=url)] == [near["id"]]
    assert funnel["1 image_size"]["histograms"]["side"] and funnel["2 similar_images"]["largest"]
    page = curation.page(curation.gather(made))
    small = [example for rule in funnel["1 image_size"]["examples"].values() for example in rule]
    assert small and all(len(example) == 6 and example[5] in page for example in small)
    pictures = [Image.open(io.BytesIO(base64.b64decode(example[5]))) for example in small if example[5]]
    assert len(pictures) >= len(small) - 2 and all(max(p.size) <= 96 and p.format == "JPEG" for p in pictures)
    assert page.count('<img alt="" src="data:image/jpeg;base64,') >= len(pictures)
    assert (
        "similar_images" in page and "almost the pixels of another image" in page and "tokens" not in page.partition("</dl>")[0]
    )


def test_what_images_cannot_be_asked_is_one_error(tmp_path):
    make_input(tmp_path / "in", 12)
    made, _ = prepared(keys(tmp_path, stages=STAGES))
    with pytest.raises(ConfigError, match=r"--text: the dataset contains images\. Pass --id or --url"):
        trace.find(made, text=b"x")


@pytest.mark.parametrize("buckets", [{"step": 8, "max_aspect": 2.0}, None], ids=["collection", "one size"])
def test_an_image_is_forgotten_and_the_others_keep_their_places(tmp_path, buckets):
    """Its shard's other row groups, the other shards, and the parts are equal to the byte."""
    make_input(tmp_path / "in")
    made, _ = prepared(keys(tmp_path, stages=STAGES, buckets=buckets))
    end = next(row for table in reasons.ends(made) for row in table.to_pylist() if row["reason"] == "kept")
    output = made.location.ending("2")
    target, found = forget.one(trace.find(made, id=end["id"]), "--id")
    forget.check(made, output)
    less = forget.forget(made, target, found, output)
    assert manifest.read(output).digest == less.digest != made.digest
    assert (less.rows, less.meta["documents"], less.kind) == (made.rows - 1, made.meta["documents"] - 1, made.kind)
    both = [{row["id"]: row for path in set(m.paths) for row in pq.read_table(Path(m.location.path) / path).to_pylist()}
            for m in (made, less)]  # fmt: skip
    assert both[1] == {id: row for id, row in both[0].items() if id != target}
    (changed,) = set(made.paths) - set(less.paths)
    assert changed == end["detail"] and len(set(made.paths)) - len(set(less.paths)) in (0, 1)
    for name in made.meta.get("parts", {}):
        before, after = (manifest.read(m.location.join(name)) for m in (made, less))
        assert (before.digest == after.digest) is not end["detail"].startswith(f"{name}/"), (
            "parts that it is not in stay the same"
        )
        assert before.meta["size"] == after.meta["size"] and after.file("tokenizer.json").exists()
    assert reasons.funnel(less)["shard"]["kept"] == made.rows - 1
    assert trace.trace(less, trace.find(less, id=target)[0])["end"]["reason"] == "forgotten"


def test_an_images_place_in_a_dataset_without_stages(tmp_path):
    make_input(tmp_path / "in", 20)
    made, _ = prepared(keys(tmp_path, buckets=None))
    path = made.paths[0]
    ids = pq.read_table(Path(made.location.path) / path)["id"].to_pylist()
    found = [documents.pieces(made, path, id) for id in ids]
    assert all(len(pieces) == 1 and pieces[0].tokens == 1 for pieces in found)
    assert documents.pieces(made, path, "no such id") == []


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
