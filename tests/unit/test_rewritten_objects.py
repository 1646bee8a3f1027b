"""Tests input objects that are rewritten during a run, with the same size and within a second: their ETag shows it."""

from dataclasses import replace

import pyarrow.fs as pafs
import pytest
from heliostat.curation.images import sources as image_sources
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.readers.streams import LeftOutError
from heliostat.curation.text import ahead, sources, tasks
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import DataError
from heliostat.storage.locations import Location

from tests.unit.build_images import image

pytestmark = pytest.mark.parametrize("place", ["s3"], indirect=True)
OLD, NEW = b'{"text": "old words"}\n', b'{"text": "new words"}\n'
CHANGED = r"changed during the run: the file had {} bytes .* has the same size now, but another content\. Start the command again"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.html"])
def test_an_object_of_the_same_size_and_second_is_an_error_that_names_it(place, name):
    place.join(name).write(OLD)
    (file,) = sources.listing(str(place), ["extract"])
    assert file.etag and file.part.identity[-1] == file.etag
    place.join(name).write(NEW)
    with pytest.raises(DataError, match=rf"^input: \S+/{name}\S*: " + CHANGED.format(r"\d+")):
        list(TextSource(str(place), TextRules()).read(file.part))
    with pytest.raises(DataError, match="but another content"):
        tasks.count_lines(place, str(place), file.part)


def test_an_object_that_is_written_again_between_its_opening_and_its_reading_is_an_error(place):
    """The store itself rejects the read, so nothing of the new object is taken for the old one."""
    place.join("a.jsonl").write(OLD)
    (file,) = sources.listing(str(place))
    assert [d.text for d in TextSource(str(place), TextRules()).read(file.part)] == ["old words"]
    with sources.blocks(place, "a.jsonl", 1000, file.part) as opened:
        place.join("a.jsonl").write(NEW)
        with pytest.raises(DataError, match=CHANGED.format(r"\d+")):
            opened.read()


def test_an_object_that_is_written_again_while_it_is_read_is_an_error(place, monkeypatch):
    monkeypatch.setattr(ahead, "MOST_AHEAD", 1 << 16)
    place.join("a.jsonl").write(OLD * 20_000)
    (file,) = sources.listing(str(place))
    with sources.blocks(place, "a.jsonl", 1 << 20, file.part) as opened:
        assert opened.read(len(OLD)) == OLD
        place.join("a.jsonl").write(NEW * 20_000)
        with pytest.raises(DataError, match="but another content"):
            opened.read()


def test_an_object_that_is_removed_while_it_is_read_is_an_error(place, monkeypatch):
    """Otherwise, its other documents would be missing, and the report would say that none was read."""
    monkeypatch.setattr(ahead, "MOST_AHEAD", 1 << 16)
    place.join("a.jsonl").write(OLD * 200_000)
    (file,) = sources.listing(str(place))
    reading = TextSource(str(place), TextRules()).read(file.part)
    assert next(reading).text == "old words"
    place.join("a.jsonl").delete()
    with pytest.raises(DataError, match=r"a\.jsonl\S*: changed during the run: .* is missing now\. Restore the file"):
        list(reading)


def test_an_image_that_is_written_again_is_an_error(place):
    place.join("metadata.jsonl").write(b'{"file_name": "a.png", "caption": "a"}\n')
    data = image(8, 8)
    place.join("a.png").write(data)
    (task,) = image_sources.tasks(str(place), image_sources.listing(str(place)), ImageColumns())
    assert list(image_sources.read(str(place), task, ImageColumns()))
    place.join("a.png").write(data[:-1] + b"x")
    with pytest.raises(DataError, match=r"a\.png\S*: " + CHANGED.format(len(data))):
        list(image_sources.read(str(place), task, ImageColumns()))


def test_a_single_object_has_an_etag_and_one_that_is_gone_is_left_out(place):
    place.join("a.jsonl").write(OLD)
    (file,) = sources.listing(str(place.join("a.jsonl")))
    assert file.path == "" and file.etag
    place.join("a.jsonl").delete()
    with sources.blocks(place.join("a.jsonl"), "", 1000, file.part) as opened, pytest.raises(LeftOutError, match="unreadable"):
        opened.read()
    later = replace(file.part, start=5)  # another task may have read its earlier ranges
    with sources.blocks(place.join("a.jsonl"), "", 1000, later) as opened, pytest.raises(DataError, match="is missing now"):
        opened.read()


def test_listings_are_those_of_pyarrow_to_the_millisecond(place):
    """Records of older datasets have sizes and times as pyarrow's client listed them."""
    for name in ("a.txt", "b/c.txt", "b/d e+%.txt"):
        place.join(name).write(name.encode())
    found = place.fs.get_file_info(pafs.FileSelector(place.path, recursive=True))
    wanted = sorted((i.path, i.size, i.mtime_ns) for i in found if i.type == pafs.FileType.File)
    assert [(i.path, i.size, i.mtime_ns) for i in place.tree()] == wanted and len(wanted) == 3
    assert Location(str(place).replace("/run", "/none")).tree() == []
