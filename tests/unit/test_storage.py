"""Tests storage: a Location is one place in any spelling, writes are atomic, and listings are complete."""

import os
import pickle
import random
import threading
from pathlib import Path

import pytest
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_written_is_what_is_read(tmp_path, scheme):
    """Bytes of any size, to new folders, replace the earlier content."""
    place = Location(f"{scheme}{tmp_path}").join("a", "b", "c.bin")
    assert not place.exists() and place.name == "c.bin"
    for data in (b"x", b"", os.urandom(100_000)):
        place.write(data)
        assert place.read() == data == (tmp_path / "a/b/c.bin").read_bytes()
        with place.open() as f:
            assert f.size() == len(data) and f.read() == data
    assert place.exists()


@pytest.mark.parametrize("base", ["BASE", "file://BASE", "relative", "s3://bucket/base", "s3://bucket/base?region=x"])
@pytest.mark.parametrize("part", ["..", "../x", "a/../../x", "a/..", "/etc/passwd", "/"])
def test_no_part_of_a_path_leads_out_of_the_folder(tmp_path, base, part):
    with pytest.raises(DataError, match=r"is outside this folder"):
        Location(base.replace("BASE", str(tmp_path))).join("a", part)


@pytest.mark.parametrize("part", ["%2e%2e/x", "%2e%2e%2fx", "..\\x", "a..b/c..", "...", "a%00b", "a?b", ".", ".hidden/x"])
def test_names_that_only_look_like_a_way_out_stay_in_the_folder(tmp_path, part):
    """Neither a disk nor the S3 client decodes them a second time."""
    assert Location("s3://bucket/base").join(part).path == f"bucket/base/{part}"
    place = Location(str(tmp_path / "base")).join(part, "f")
    place.write(b"x")
    assert Path(os.path.realpath(place.path)).is_relative_to(tmp_path / "base")


def test_a_reader_never_sees_half_a_file(tmp_path):
    """While two threads overwrite a file with complete files, every read returns one of them. No other file remains."""
    place, versions = Location(str(tmp_path / "f")), [bytes([i]) * 300_000 for i in range(4)]
    place.write(versions[0])
    stop = threading.Event()

    def write(mine: list[bytes]) -> None:
        while not stop.is_set():
            for data in mine:
                place.write(data)

    writers = [threading.Thread(target=write, args=(versions[i : i + 2],)) for i in (0, 2)]
    for w in writers:
        w.start()
    try:
        seen = {place.read() for _ in range(200)}
    finally:
        stop.set()
        for w in writers:
            w.join()
    assert seen <= set(versions) and len(seen) > 1
    assert place.read() in versions
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """After an error in the middle of a write, the old bytes are still there, without a partial file."""
    place = Location(str(tmp_path / "f"))
    place.write(b"old")

    def fill(out) -> None:
        out.write(b"new, but not all of it")
        raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        place._put(fill)
    assert place.read() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_upload_copies_a_file(tmp_path):
    """A file larger than one block arrives completely."""
    (tmp_path / "from").write_bytes(os.urandom((16 << 20) + 12_345))
    Location(str(tmp_path)).join("x", "to").upload(tmp_path / "from")
    assert (tmp_path / "x" / "to").read_bytes() == (tmp_path / "from").read_bytes()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_listing_finds_every_file_and_folder_and_nothing_else(tmp_path, scheme, seed):
    """files() is recursive with sizes, and folders() lists one level. Both are sorted, relative, and empty for a missing
    place."""
    rng, root = random.Random(seed), Location(f"{scheme}{tmp_path}")
    expected = {}
    for _ in range(rng.randrange(1, 25)):
        parts = [rng.choice("abc") * 2 for _ in range(rng.randrange(3))] + [f"{rng.choice('xyz')}{rng.randrange(99)}"]
        expected["/".join(parts)] = data = bytes(rng.randrange(50))
        root.join(*parts).write(data)
    assert root.files() == sorted((p, len(d)) for p, d in expected.items())
    assert root.folders() == sorted({p.split("/")[0] for p in expected if "/" in p})
    assert root.join("nothing", "here").files() == [] == root.join("nothing").folders()


@pytest.mark.parametrize("name", ["a b", "100%", "a%20b", "über", "x#y", "x?y=z", "a:b", "[1]", "~", "a=b&c"])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_of_any_name_is_found_again(tmp_path, scheme, name):
    """join() reaches every name from files(): no character of a name is taken for a part of the URI."""
    (tmp_path / name).write_bytes(b"here")
    root = Location(f"{scheme}{tmp_path}")
    assert [root.join(path).read() for path, _ in root.files()] == [b"here"]


def test_delete_takes_a_file_or_a_folder_and_does_not_mind_nothing(tmp_path):
    """The whole tree is deleted, its neighbors stay, and a second deletion isn't an error."""
    root = Location(str(tmp_path))
    for path in ("a/x", "a/b/y", "c"):
        root.join(path).write(b"")
    for _ in range(2):
        root.join("a").delete()
        assert root.files() == [("c", 0)]
    root.join("c").delete()
    assert root.files() == []


def test_absolute_takes_relative_paths_from_the_root_and_leaves_the_rest():
    """Only a bare relative path changes. URIs and absolute paths stay the same."""
    root = Path("/workspace")
    assert str(Location("data/a").absolute(root)) == "/workspace/data/a"
    for uri in ("/data/a", "file:///data/a", "s3://bucket/a?region=eu-west-1"):
        assert str(Location(uri).absolute(root)) == uri


def test_paths_are_what_the_file_system_takes():
    """The path is bucket/key on S3, without the query, and an absolute path on disk. join keeps the query at the end."""
    s3 = Location("s3://bucket/key/?endpoint_override=h:1&scheme=http")
    assert s3.path == "bucket/key" and s3.is_s3
    assert str(s3.join("a", "b")) == "s3://bucket/key/a/b?endpoint_override=h:1&scheme=http"
    assert s3.join("a", "b").path == "bucket/key/a/b" and s3.join("a").name == "a"
    assert Location("file:///x/y").path == Location("/x/y").path == "/x/y" and not Location("/x").is_s3
    assert Location("x").path == str(Path.cwd() / "x")
    assert Location("s3://bucket/a#b").path == "bucket/a#b"


@pytest.mark.parametrize(
    ("told", "uri"),
    [
        *(("AWS_ACCESS_KEY_ID and AWS_SECRET", u) for u in ("s3://key:secret@b/x", "s3://AKIA@bucket", "s3://a:b@c/d?region=x")),
        *(("isn't supported. Use a path, file:// or s3://", u) for u in ("gs://b/x", "http://h/x", "hdfs://x", "S4://b")),
        *(("has no path", uri) for uri in ("", "s3://", "s3:///key", "s3:bucket/key")),
    ],
)
def test_a_uri_that_names_no_place_of_ours_is_refused(told, uri):
    """The error has an alternative, and no part of a secret. Without a bucket, the URI would mean the current folder, or
    everything."""
    with pytest.raises(ConfigError, match=told) as e:
        Location(uri)
    assert "secret" not in str(e.value) and (not told.startswith("AWS") or uri not in str(e.value))


def test_a_location_pickles_as_its_uri():
    """Locations are sent to Ray workers, without an open file system."""
    for uri in ("/x", "file:///x", "s3://b/k?region=eu-west-1"):
        place = Location(uri)
        _ = place.fs
        assert pickle.loads(pickle.dumps(place)) == place  # noqa: S301
        assert len(pickle.dumps(place)) < 300
