"""Tests similar images, found on disk: the result equals a comparison of all of them one by one, for any split of the work."""

import hashlib
import random
from math import comb

import numpy as np
import pytest
from heliostat.curation import alike, segment
from heliostat.curation.stage import Picture

from tests.unit.build_curation import curate, left, left_out

WORD = 1 << 64


def signed(value: int) -> int:
    return value - WORD if value >= WORD // 2 else value


def images(bases: int, seed: int = 0) -> dict[str, Picture]:
    """Returns families of perceptual hashes that differ in some bits, chains of them, many equal ones, and some with equal
    pixels."""
    rng, found = random.Random(seed), dict[str, Picture]()

    def add(looks: int, pixels: bytes | None = None) -> bytes:
        digest = pixels or hashlib.sha256(f"{seed} {len(found)}".encode()).digest()
        found[f"i{len(found):05d}"] = Picture(b"image", digest, signed(looks), (8, 8))
        return digest

    for _ in range(bases):
        looks = rng.getrandbits(64)
        for _ in range(rng.randrange(1, 6)):
            bits = sum(1 << b for b in rng.sample(range(64), rng.randrange(6)))
            digest = add(looks ^ bits)
            if rng.random() < 0.2:
                add(looks ^ bits, digest)
    chain = rng.getrandbits(64)
    for step in range(64):
        chain ^= 1 << step
        add(chain)
    for _ in range(60):
        add(0)
    return found


def one_by_one(given: dict[str, Picture], distance: int) -> dict[str, str]:
    """Returns the reason of each dropped image, by the definition, with all images in memory."""
    kept, pixels, gone = list[int](), set[bytes](), dict[str, str]()
    for id, picture in sorted(given.items(), key=lambda item: (item[1].hash, item[0])):
        looks = picture.looks % WORD
        if picture.hash in pixels:
            gone[id] = "duplicate"
        elif any((looks ^ other).bit_count() <= distance for other in kept):
            gone[id] = "near_duplicate"
        else:
            kept.append(looks)
        pixels.add(picture.hash)
    return gone


@pytest.mark.parametrize("distance", [0, 1, 3, 8])
@pytest.mark.parametrize("pieces", [1, 7])
def test_those_that_stay_are_those_of_going_through_all_one_by_one(tmp_path, distance, pieces):
    given = images(120, distance)
    stages = [{"stage": "similar_images", "distance": distance}]
    found, here = curate(tmp_path, dict.fromkeys(given, "a caption"), stages, pieces, pictures=given)
    wanted, out = one_by_one(given, distance), left_out(found, here)
    assert {id: reason for id, (_, reason, _) in out.items()} == wanted
    assert left(found, here).keys() == given.keys() - wanted.keys() and len(wanted) > 100
    for id, (_, reason, detail) in out.items():  # who stays, or a duplicate's first, which goes with it
        other = detail.partition(" (one of ")[0]
        if reason == "duplicate":
            assert given[other].hash == given[id].hash and out.get(other, ("", "", ""))[1] != "duplicate"
        else:
            apart = ((given[other].looks ^ given[id].looks) % WORD).bit_count()
            assert other not in out and apart <= distance and id not in (other, "")
    assert sum(run.rows for run in found.runs) == len(given) - len(wanted)


def test_the_result_does_not_follow_from_how_much_memory_a_task_has(tmp_path):
    """With all data in one task of each kind, and with several parts of images, keys, and pairs."""
    given, told = images(12), []
    for memory_limit in (1 << 24, 1 << 15):
        found, here = curate(tmp_path / str(memory_limit), dict.fromkeys(given, "x"), [{"stage": "similar_images"}], 3,
                             memory_limit, pictures=given)  # fmt: skip
        told.append((left(found, here), left_out(found, here)))
    assert told[0] == told[1] and told[0][1]
    assert here.done["alike-0-judge"] > 1 and here.done["alike-0-pairs"] > 1 and here.done["alike-0-settle"] > 2


def test_equal_pixels_alone(tmp_path):
    given = images(40)
    found, here = curate(tmp_path, dict.fromkeys(given, "x"), [{"stage": "similar_images", "distance": None}], pictures=given)
    wanted = {id for id, reason in one_by_one(given, -1).items() if reason == "duplicate"}
    assert left_out(found, here).keys() == wanted and len(wanted) > 10
    funnel = segment.load(here.work.spill, [*found.tallies][-1])["0 similar_images"]
    assert funnel["dropped"] == {"duplicate": len(wanted)} and funnel["kept"] == len(given) - len(wanted)


@pytest.mark.parametrize("distance", [1, 3, 8, 16])
@pytest.mark.parametrize("hashes", [1, 10_000, 10**9])
def test_two_hashes_that_are_near_share_a_key(distance, hashes):
    count = alike.blocks(distance, hashes)
    masks = alike.masks(distance, count)
    assert len(masks) == comb(count, distance) and (len(masks) <= alike.KEYS or count == distance + 1)
    rng = random.Random(distance)
    for _ in range(300):
        apart = sum(1 << b for b in rng.sample(range(64), distance))
        assert any(apart & mask == 0 for mask in masks)
    if distance == 3 and hashes == 10**9:
        assert min(mask.bit_count() for mask in masks) >= 30


def test_the_funnel_names_the_largest_clusters(tmp_path):
    rng = np.random.default_rng(0)
    given = {f"g{g}-{i}": Picture(b"", bytes(rng.integers(0, 256, 32, np.uint8)), g, (1, 1)) for g, n in ((0, 9), (-1, 4))
             for i in range(n)}  # fmt: skip
    found, here = curate(tmp_path, dict.fromkeys(given, "x"), [{"stage": "similar_images"}], pictures=given)
    part = segment.load(here.work.spill, [*found.tallies][-1])["0 similar_images"]
    assert [size for size, _ in part["largest"]] == [9, 4] and part["counts"] == {"clusters": 2}
    assert {id for _, id in part["largest"]} == left(found, here).keys()
    assert all(detail.endswith(("(one of 9)", "(one of 4)")) for _, _, detail in left_out(found, here).values())


def test_the_pairs_of_a_key_with_many_hashes_are_all_found_with_little_work(monkeypatch):
    """Hashes differ in 24 bits, and some of them only in 6. The work is the number of compared pairs."""
    rng, work, count = np.random.default_rng(0), [0], np.bitwise_count
    spread = np.array([sum(1 << (b + 20) for b in range(24) if x >> b & 1) for x in rng.integers(0, 1 << 24, 5000)], np.uint64)
    looks = np.unique(np.concatenate([spread, spread[:40, None].ravel() ^ np.uint64(1 << 21), np.arange(64, dtype=np.uint64)]))
    keys = np.concatenate([np.zeros(len(looks) - 500, np.uint64), np.ones(500, np.uint64)])
    xor = count(looks[:, None] ^ looks)
    wanted = np.argwhere(np.triu((xor <= 3) & (xor > 0) & (keys[:, None] == keys)))

    def counted(values):
        work[0] += np.size(values)
        return count(values)

    monkeypatch.setattr(np, "bitwise_count", counted)
    found = {
        tuple(sorted(pair)) for a, b in alike.near_pairs(keys, looks, 3) for pair in zip(a.tolist(), b.tolist(), strict=True)
    }
    assert found == {tuple(pair) for pair in wanted.tolist()} and len(found) > 500
    assert work[0] < len(looks) ** 2 // 2 / 10
