"""Tests which images `prepare` reads again: new ones and changed ones, and no others."""

import json
import os
from dataclasses import replace

import pytest
from heliostat.curation.images import planning, sources
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.stage import Dropped

from tests.unit.build_image_pipeline import keys, make_input
from tests.unit.build_images import Here, folder_of, image, prepared


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


def test_the_files_are_listed_once_for_all_metadata_files(tmp_path):
    """Otherwise, a dry run of an input with a metadata file per folder takes quadratic time."""
    for i in range(20):
        folder_of(tmp_path / "in" / str(i), [("0.png", image(8, 8, seed=i), {"caption": "x"})])
    files, passes = sources.listing(str(tmp_path / "in")), []

    class Listed(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    tasks = list(sources.tasks(str(tmp_path / "in"), Listed(files), ImageColumns()))
    states = {f.path: [f.bytes, f.modified] for f in files}
    assert [(task["entries"][0]["path"], task["state"]) for task in tasks] == [
        (path, [state]) for path, state in states.items() if path.endswith("0.png")
    ]
    assert len(tasks) == 20 and len(passes) < 5


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
        parts = planning.parts(again, str(tmp_path / "in"), files, ImageColumns(), 1 << 30)
        return {part.path_by_time or part.path for part in parts}

    assert named() == named(etag="abc") and not named() & named(etag="abc", modified=7)
