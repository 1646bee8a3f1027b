"""Tests the image pipeline's pure functions: decoding, filters, buckets, duplicates, and every kind of source, valid and
broken."""

import io
import itertools
import json
import tarfile
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation.images import pictures, sources
from heliostat.curation.images import tasks as image_tasks
from heliostat.curation.images.pictures import Dropped, ImageRules, Raw, StoredPicture
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.text import sources as text_sources
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from PIL import Image

from tests.unit.build_images import image

SQUARE = ImageRules(((16, 16),))


def reason(raw: Raw, rules: ImageRules = SQUARE) -> str:
    made = pictures.prepare(raw, rules)
    return made.reason if isinstance(made, Dropped) else "kept"


@pytest.mark.parametrize(
    ("encoding", "mode"),
    [*((e, m) for e in ("PNG", "WEBP") for m in ("RGB", "L", "RGBA", "LA", "P")), ("JPEG", "RGB"), ("JPEG", "L")],
)
def test_every_kind_of_image_becomes_what_the_rules_say(encoding, mode):
    """For any mode, the stored bytes decode to the bucket's size and the requested channels."""
    data = image(40, 30, mode=mode if mode != "P" else "RGB", encoding=encoding)
    if mode == "P":
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).quantize(16).save(out, encoding)
        data = out.getvalue()
    for channels, expected in ((1, "L"), (3, "RGB")):
        made = pictures.prepare(Raw("a", data, "some  text\n"), ImageRules(((16, 16),), channels))
        assert isinstance(made, StoredPicture) and made.caption == "some text"
        stored = Image.open(io.BytesIO(made.image))
        assert (stored.size, stored.mode, stored.format) == ((16, 16), expected, "PNG")


def test_what_is_transparent_becomes_white():
    out = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(out, "PNG")
    assert np.asarray(pictures.decode(out.getvalue(), 3)).min() == 255


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_keeps_its_upper_byte(channels):
    """Like colors of 16 bits, so that different images have different pixels. Its transparent value has 16 bits, too."""
    rng = np.random.default_rng(0)
    many = [rng.integers(300, 60000, (20, 30), np.uint16) for _ in range(2)]
    for values in many:
        for clear, turned in itertools.product((None, int(values[0, 0])), (1, 6)):
            expected = (values >> 8).astype(np.uint8)
            if clear is not None:
                expected[values == clear] = 255
            out, exif = io.BytesIO(), Image.Exif()
            exif[0x0112] = turned
            more = {} if clear is None else {"transparency": clear}
            Image.fromarray(values).save(out, "PNG", exif=exif, **more)
            decoded = np.asarray(pictures.decode(out.getvalue(), channels).convert("RGB"))
            assert np.array_equal(decoded, np.dstack([np.rot90(expected, -1) if turned == 6 else expected] * 3))
    hashes = set()
    for values in many:
        out = io.BytesIO()
        Image.fromarray(values).save(out, "PNG")
        hashes.add(pictures.prepare(Raw("a", out.getvalue(), "x"), ImageRules(((16, 16),), channels)).hash)
    assert len(hashes) == 2


def test_a_photo_is_turned_as_its_exif_says():
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (20, 10)).save(out, "JPEG", exif=exif)
    assert pictures.decode(out.getvalue(), 3).size == (10, 20)


@pytest.mark.parametrize(
    ("raw", "rules", "expected"),
    [
        (Raw("a", None, "x"), {}, "no_image"),
        (Raw("a", image(20, 20), None), {}, "no_caption"),
        (Raw("a", image(20, 20), " \n"), {}, "no_caption"),
        (Raw("a", b"", "x"), {}, "undecodable"),
        (Raw("a", b"not an image", "x"), {}, "undecodable"),
        (Raw("a", image(20, 20)[:-40], "x"), {}, "undecodable"),
        (Raw("a", image(20, 20, encoding="JPEG")[:300], "x"), {}, "undecodable"),
        (Raw("a", b"GIF89a" + image(20, 20), "x"), {}, "undecodable"),
        (Raw("a", image(20, 20), "x"), {"min_side": 21}, "too_small"),
        (Raw("a", image(20, 50), "x"), {"max_aspect": 2.4}, "aspect"),
        (Raw("a", image(20, 50), "x"), {"max_aspect": 2.5}, "kept"),
        (Raw("a", image(20, 20), "abc"), {"min_caption": 4}, "caption_short"),
        (Raw("a", image(20, 20), "abc"), {"max_caption": 2}, "caption_long"),
        (Raw("a", image(20, 20), "a\ud800c"), {}, "not_utf8"),
        (Raw("a", image(20, 20), "abc", "\udc00"), {}, "not_utf8"),
        (Raw("a", image(20, 20), "abc"), {"min_caption": 3, "max_caption": 3}, "kept"),
    ],
)
def test_bad_and_unwanted_images_are_dropped_with_a_reason(raw, rules, expected):
    assert reason(raw, ImageRules(((16, 16),), **rules)) == expected
    assert expected == "kept" or expected in pictures.REASONS


def test_any_damage_to_an_image_is_a_reason_and_never_an_exception():
    """Bytes are cut, flipped, and overwritten at random places, in all three formats."""
    rng = np.random.default_rng(0)
    for encoding in ("PNG", "JPEG", "WEBP"):
        whole = image(30, 30, encoding=encoding)
        for _ in range(60):
            data = bytearray(whole[: int(rng.integers(1, len(whole) + 1))])
            for place in rng.integers(0, len(data), 4):
                data[place] = int(rng.integers(0, 256))
            assert reason(Raw("a", bytes(data), "x")) in ("kept", "undecodable")


@pytest.mark.parametrize(("resolution", "aspect", "step"), [(64, 2.0, 8), (512, 2.0, 64), (256, 4.0, 64), (64, 1.0, 64)])
def test_buckets_have_the_area_and_aspect_that_were_asked_for(resolution, aspect, step):
    sizes = pictures.buckets(resolution, aspect, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution * resolution < width * (height + step)
        assert max(width, height) / min(width, height) <= aspect


def test_an_image_goes_to_the_bucket_of_the_nearest_aspect():
    sizes = pictures.buckets(64, 2.0, 8)
    for width, height in itertools.product(range(30, 90, 7), repeat=2):
        chosen = pictures.nearest((width, height), sizes)
        ratios = [max(w * height / (h * width), h * width / (w * height)) for w, h in sizes]
        assert ratios[sizes.index(chosen)] == pytest.approx(min(ratios))


def test_the_perceptual_hash_survives_scaling_and_compression_and_tells_images_apart():
    def looks(data: bytes) -> int:
        return pictures.looks(pictures.decode(data, 3))

    one = image(200, 150, seed=1)
    again = pictures.encode(pictures.decode(one, 3).resize((90, 70)), "jpeg", 70)
    assert ((looks(one) ^ looks(again)) & (2**64 - 1)).bit_count() <= 3
    others = [looks(image(200, 150, seed=s)) for s in range(2, 30)]
    assert min(((looks(one) ^ o) & (2**64 - 1)).bit_count() for o in others) > 8


# sources -------------------------------------------------------------------------------------------------------------


def read(uri: str, columns: ImageColumns | None = None) -> dict[str, str]:
    """Returns id -> caption, or the reason in capitals."""
    columns = columns or ImageColumns()
    files = sources.listing(uri)
    found = [r for t in sources.tasks(uri, files, columns) for r in sources.read(uri, json.loads(json.dumps(t)), columns)]
    return {r.id: r.reason.upper() if isinstance(r, Dropped) else f"{r.caption}|{r.label}" for r in found}


def test_digits_have_captions_of_which_ten_are_held_back():
    found = read("sklearn:digits")
    assert len(found) == 1797 and len(set(found.values())) == 50
    captions = {v.split("|")[0] for v in found.values()}
    for word in sources.WORDS:
        assert sum(template.format(word) in captions for template in sources.TEMPLATES) == len(sources.TEMPLATES) - 1
    assert all(label in caption for caption, label in (v.split("|") for v in found.values()))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_with_a_metadata_file(tmp_path, kind):
    rows = [{"file_name": f"{i}.png", "caption": f"image {i}", "kind": "x"} for i in range(3)]
    (tmp_path / "sub").mkdir()
    for i in range(2):
        (tmp_path / "sub" / f"{i}.png").write_bytes(image(9, 9, i))
    name = tmp_path / "sub" / f"metadata.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), name)
    elif kind == "jsonl":
        name.write_text("\n".join(json.dumps(r) for r in rows))
    else:
        name.write_text("file_name,caption,kind\n" + "\n".join(",".join(r.values()) for r in rows))
    assert read(str(tmp_path), ImageColumns(label="kind")) == {
        "sub/0.png": "image 0|x",
        "sub/1.png": "image 1|x",
        "sub/2.png": "UNREADABLE",
    }


def test_a_row_goes_to_the_end_of_its_line_whatever_is_in_its_caption(tmp_path):
    rows = [{"file_name": "0.png", "caption": "one\u2028two\u0085three"}, {"file_name": "1.png", "caption": "x"}]
    (tmp_path / "metadata.jsonl").write_bytes("\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode())
    assert list(text_sources.rows(Location(str(tmp_path)), "metadata.jsonl", 1 << 20)) == rows


def test_a_metadata_file_that_cannot_be_read_is_one_error(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a"')
    with pytest.raises(ConfigError, match=r"input: metadata.jsonl: can't read this file"):
        read(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"name": "a"}')
    with pytest.raises(ConfigError, match=r"metadata\.jsonl: no column 'file_name'\. The file's columns: name"):
        read(str(tmp_path))


def test_parquet_with_bytes_or_structs(tmp_path):
    data = [image(9, 9), None, image(9, 9)]
    pq.write_table(pa.table({"image": data, "caption": ["a", "b", None]}), tmp_path / "a.parquet")
    rows = [{"image": {"bytes": data[0], "path": "x.png"}, "caption": "c"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    found = read(str(tmp_path))
    assert found == {
        "a.parquet#1": "a|",
        "a.parquet#2": "b|",
        "a.parquet#3": "None|",
        "b.parquet#1": "c|",
        "c.parquet": "CORRUPT",
    }


def tar(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_webdataset_tars(tmp_path):
    picture = image(9, 9)
    whole = tar([
        ("x/1.png", picture), ("x/1.txt", b"one"), ("x/1.cls", b"7\n"),
        ("x/2.v1.jpg", picture), ("x/2.json", json.dumps({"caption": "two", "tag": 5}).encode()),
        ("x/3.webp", picture),
        ("x/4.txt", b"four"),
        ("x/5.png", picture), ("x/5.json", b"{"),
    ])  # fmt: skip
    (tmp_path / "a.tar").write_bytes(whole)
    (tmp_path / "b.tar").write_bytes(whole[: 512 * 3 + len(picture)])
    found = read(str(tmp_path / "a.tar"), ImageColumns(label="tag"))
    assert found == {
        "a.tar/x/1": "one|7",
        "a.tar/x/2": "two|5",
        "a.tar/x/3": "None|",
        "a.tar/x/4": "four|",
        "a.tar/x/5": "CORRUPT",
    }
    assert "CORRUPT" in read(str(tmp_path / "b.tar")).values()


@pytest.mark.parametrize("folder", ["", f"{'x' * 120}/"], ids=["short names", "long names"])
def test_a_tar_that_stops_before_its_end_says_so(folder):
    """At an invalid or truncated header, or without the mark at its end. The images before are kept, and the loss is reported."""
    whole = tar([(f"{folder}{i}.{part}", body) for i in range(3) for part, body in (("png", image(9, 9)), ("txt", b"c"))])
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        heads = [m.offset for m in file]
        end = file.offset
    broken = bytearray(whole)
    broken[heads[4] + 150] ^= 0xFF  # its checksum

    def found(data: bytes) -> list[str]:
        made = sources.read_tar("a.tar", io.BytesIO(data), ImageColumns())
        return [r.reason if isinstance(r, Dropped) else r.id.rpartition("/")[2] for r in made]

    assert found(whole) == found(whole[: end + 512]) == ["0", "1", "2"]
    assert found(whole[:end]) == found(whole[: end + 100]) == found(whole[:end] + b"x" * 512) == ["0", "1", "2", "corrupt"]
    assert found(bytes(broken)) == found(whole[: heads[4]]) == found(whole[: heads[4] + 100]) == ["0", "1", "corrupt"]


def test_a_sample_of_a_tar_is_bounded_with_all_its_parts():
    """Files that aren't part of it aren't read. Images of exactly the limit, with their texts, are kept."""
    sample = [("1.png", b"p" * 600), ("1.jpg", b"p" * 300), ("1.txt", b"c" * 100)]
    data = tar([*sample, ("1.npy", bytes(5000)), ("2.npy", bytes(5000)), ("3.png", b"p"), ("3.txt", b"c")])
    found = {limit: list(sources.read_tar("a.tar", io.BytesIO(data), ImageColumns(), limit)) for limit in (1000, 999)}
    kept, alone, last = found[1000]
    assert kept == Raw("a.tar/1", b"p" * 600, "c" * 100) and last == Raw("a.tar/3", b"p", "c")
    assert alone == Raw("a.tar/2", None, None), "it is told as no_image"
    assert found[999] == [Dropped("a.tar/1", "too_large", "the part .txt"), alone, last]


def test_names_that_are_not_utf8_end_nothing(tmp_path):
    """In a tar, the image gets an id that can be stored. In a metadata file, no file has such a name."""
    members = [("x/caf\udce9.png", image(9, 9)), ("x/caf\udce9.txt", b"one"), ("y.png", image(9, 9)), ("y.txt", b"two")]
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert read(str(tmp_path / "a.tar")) == {"a.tar/x/caf\\xe9": "one|", "a.tar/y": "two|"}
    for name in ("0.png", "\\xed\\xa0\\x80.png"):
        (tmp_path / name).write_bytes(image(9, 9))
    rows = [{"file_name": name, "caption": "c"} for name in ("\ud800.png", "caf\udce9.png", "0.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert read(str(tmp_path)) == {
        "\\xed\\xa0\\x80.png": "UNREADABLE",
        "caf\\xed\\xb3\\xa9.png": "UNREADABLE",
        "0.png": "c|",
    }


def test_an_input_without_images_is_one_error(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"found 1 file, but none is supported\. Supported: metadata.jsonl"):
        sources.listing(str(tmp_path))


def test_a_metadata_file_is_cut_into_tasks(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": f"{i}.png"}) for i in range(1200)))
    tasks = sources.tasks(str(tmp_path), [InputFile("metadata.jsonl", 1, 0)], ImageColumns())
    assert [len(t["entries"]) for t in tasks] == [512, 512, 176]


def test_a_large_parquet_file_is_read_in_parts(tmp_path):
    """Each row appears once, with its number in the file, and with the named columns."""
    rows = [{"image": image(9, 9, i), "caption": f"c{i}", "url": f"u{i}"} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    size = (tmp_path / "a.parquet").stat().st_size
    columns = ImageColumns(others=("url",))
    edges = [0, size // 3, size // 2, size]
    found = []
    for start, stop in itertools.pairwise(edges):
        parts = [{"path": "a.parquet", "bytes": size, "modified": 0, "start": start, "stop": stop, "first": 0}]
        some = list(sources.read(str(tmp_path), {"kind": "archives", "parts": parts}, columns))
        assert some
        found += some
    assert [(r.id, r.caption, r.columns) for r in found] == [(f"a.parquet#{i + 1}", f"c{i}", {"url": f"u{i}"}) for i in range(40)]
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    broken = [list(sources.read(str(tmp_path), {"kind": "archives", "parts": [
        {"path": "a.parquet", "bytes": size, "modified": 0, "start": start, "stop": stop, "first": 0}]}, columns))
        for start, stop in itertools.pairwise(edges)]  # fmt: skip
    assert [[r.reason for r in some] for some in broken] == [["corrupt"], [], []]


def test_each_part_of_a_parquet_file_tells_its_own_broken_row_group(tmp_path):
    """This holds for any first row group of a part, broken or too large. A file that can't be opened is reported once."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.parquet"

    def write(images: list[bytes], **more: Any) -> list[int]:
        """Writes row groups of two rows; returns the start of each, and the file's size."""
        pq.write_table(pa.table({"image": images, "caption": ["c"] * len(images)}), path, row_group_size=2, **more)
        made = pq.read_metadata(path)
        begin = [made.row_group(g).column(0) for g in range(made.num_row_groups)]
        return [*(min(c.data_page_offset, c.dictionary_page_offset or c.data_page_offset) for c in begin), path.stat().st_size]

    def parts(edges: list[int], limit: int) -> list[list[str]]:
        asked = [FilePart("a.parquet", edges[-1], 0, a, b, 0) for a, b in itertools.pairwise([0, *edges[1:]])]
        tasks = [{"kind": "archives", "parts": [asdict(part)]} for part in asked]
        read = [sources.read(str(tmp_path), task, ImageColumns(), sources.ImageLimits(limit)) for task in tasks]
        return [[getattr(r, "reason", r.id) for r in some] for some in read]

    edges = write([rng.bytes(3000) for _ in range(10)], write_page_checksum=True, compression="none", use_dictionary=False,
                  write_statistics=False)  # fmt: skip
    data = bytearray(path.read_bytes())
    for group in (1, 3):
        data[edges[group] + 500] ^= 0xFF
    path.write_bytes(data)
    kept = [[f"a.parquet#{i}", f"a.parquet#{i + 1}"] for i in range(1, 10, 2)]
    assert parts(edges, 1 << 20) == [kept[0], ["corrupt"], kept[2], ["corrupt"], kept[4]]
    assert parts(edges, len(data) - 1) == [["too_large"], [], [], [], []]
    edges = write([b"a" * size for size in (10, 10, 99_999, 99_998, 10, 10)], compression="zstd")
    assert parts(edges, 50_000) == [kept[0], ["too_large"], kept[2]]


def test_a_shard_is_the_same_bytes_in_whatever_order_its_images_come():
    rows = [
        {
            "hash": f"{i % 7}{i:31}".encode(),
            "id": str(i),
            "caption": "c",
            "label": "",
            "image": bytes([i]),
            "width": 1,
            "height": 1,
        }
        for i in range(50)
    ]
    table = pa.Table.from_pylist(rows)
    data = image_tasks.shard(table, 10)
    assert data == image_tasks.shard(table.take(pa.array(np.random.default_rng(0).permutation(50))), 10)
    file = pq.ParquetFile(io.BytesIO(data))
    assert file.num_row_groups == 5 and file.read()["id"].to_pylist() == [
        r["id"] for r in sorted(rows, key=lambda r: (r["hash"], r["id"]))
    ]
    rows[3]["image"] = b"other"
    content = pq.ParquetFile(io.BytesIO(image_tasks.shard(pa.Table.from_pylist(rows), 10))).metadata.metadata[b"content"]
    assert content != file.metadata.metadata[b"content"]
