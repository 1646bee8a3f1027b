"""Finds all pairs of 64-bit perceptual hashes that differ in at most `distance` bits. The hashes are on disk, and no pair is
missed.

Method: Manku, Jain and Das Sarma, Detecting Near-Duplicates for Web Crawling, 2007. The bits are split into blocks. Two hashes
that differ in d bits differ in at most d blocks, and are equal in the other blocks. For every choice of d blocks to leave out,
the remaining blocks are a key. So two hashes that differ in at most d bits share at least one key. With more blocks, keys are
longer, and there are more keys. The number of blocks is large enough that few different hashes share a key by chance.

A node is a perceptual hash. Images with the same perceptual hash are a group. The image with the smallest pixel hash represents
the group. A node's rank is the first 64 bits of that pixel hash.

Then this module chooses the images to keep. The result is the same as if this module visited all images in the order of their
pixel hashes.

An image is dropped if it is near an earlier image that is kept. The kept images are the lexicographically first maximal
independent set of the pairs' graph. Rounds find this set. A node is kept when all nearby earlier nodes are known to be dropped. A
node is dropped when a nearby earlier node is known to be kept. The order of hashes is random. So few rounds are needed, for any
number of nodes (Blelloch, Fineman and Shun, Greedy Sequential Maximal Independent Set and Matching are Parallel on Average,
2012).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import ceil, comb, log2

import numpy as np
import pyarrow as pa

from heliostat.curation.comparing import JUDGED, LARGEST, counted
from heliostat.curation.engine import groups
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import spill

BITS = 64
KEYS = 64  # maximum keys of a hash
TOGETHER = 2  # keys that are spilled at once
MANY = 1024  # hashes with the same key, above which their keys become longer
LEAST_PAIRS = 1 << 16  # minimum of pairs in memory before they are spilled
FACES = pa.schema(
    [("key", pa.uint64()), ("looks", pa.uint64()), ("hash", pa.binary(32)), ("id", pa.large_string()), ("node", pa.uint64())]
)
EDGES: dict[str, type[np.generic]] = {**dict.fromkeys(("u", "v", "u_rank", "v_rank"), np.uint64), "images": np.int64}


def blocks(distance: int, hashes: int) -> int:
    """Chooses the number of blocks into which a hash's 64 bits are split. It is the smallest number whose keys separate `hashes`
    hashes, with at most KEYS keys per hash."""
    count = distance + 1
    while comb(count + 1, distance) <= KEYS and BITS - distance * ceil(BITS / count) < log2(max(2, hashes)):
        count += 1
    return count


def masks(distance: int, count: int) -> list[int]:
    """Returns one 64-bit mask per key. Each mask selects `count - distance` of the `count` blocks, and there is one mask for
    every such selection."""
    edges = np.linspace(0, BITS, count + 1).astype(int).tolist()
    of_block = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    whole = (1 << BITS) - 1
    return [whole - sum(left_out) for left_out in combinations(of_block, distance)]


def faces(folder: Location, first: int, runs: list[SpilledRun], exact: bool) -> dict[str, object]:
    """Writes the perceptual hash of each image in `runs`, temporary files of images, to another temporary file. With `exact`,
    writes the pixel hash instead. `first`: the index of the first of `runs` among all such files."""
    tables = [FACES.empty_table()]
    for number, run in enumerate(runs, first):
        for table in survivors(folder, run, columns=["hash", "id", *([] if exact else ["looks"])]):
            looks = table["key"].to_numpy() if exact else table["looks"].to_numpy().view(np.uint64)
            node = (np.uint64(number) << np.uint64(32)) | table["row"].to_numpy().astype(np.uint64)
            columns = [pa.array(spill.mixed(looks)), pa.array(looks), table["hash"], table["id"], pa.array(node)]
            tables.append(pa.Table.from_arrays(columns, schema=FACES))
    table = pa.concat_tables(tables)
    name = spill.write(folder, table, ("hash", "id"))
    return {"faces": name, "rows": len(table), "files": [name]}


def gather(folder: Location, part: int, parts: int, names: list[str]) -> pa.Table:
    """Reads the images whose perceptual hash is in key range `part` of `parts` equal ranges. Returns a table that is sorted by
    perceptual hash, then by pixel hash and id."""
    order = [(name, "ascending") for name in ("looks", "hash", "id")]
    return spill.joined(folder, names, *spill.share(part, parts), FACES).sort_by(order).combine_chunks()


def firsts(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Returns two bool arrays [images] for the sorted images: whether each image is the first with its perceptual hash, and
    whether each image is the first with its pixel hash."""
    looks, hashes = table["looks"].to_numpy(), prefixes(table, 4)
    return spill.starts(looks), spill.starts(looks, *hashes.T)


def prefixes(table: pa.Table, words: int = 1) -> np.ndarray:
    """Returns the first `words` 64-bit words of each image's pixel hash, as uint64 [images, words]."""
    whole = np.frombuffer(b"".join(table["hash"].to_pylist()), ">u8").astype(np.uint64)
    return whole.reshape(-1, 4)[:, :words]


def group(folder: Location, part: int, parts: int, names: list[str], distance: int, count: int) -> dict[str, object]:
    """Writes each distinct perceptual hash of key range `part` to temporary files, once under each key of the hash. Each row has
    the hash's rank, and the number of distinct images with this hash. `count`: the number of blocks of a hash."""
    table = gather(folder, part, parts, names)
    of_group, of_pixels = firsts(table)
    starts = np.flatnonzero(of_group)
    looks, ranks = table["looks"].to_numpy()[starts], prefixes(table)[starts, 0]
    images = np.add.reduceat(of_pixels.astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64)
    numbered, files = list(enumerate(masks(distance, count) if distance else ())), []
    for some in groups(numbered, TOGETHER):
        under = [pa.table({"key": _keys(looks, *one), "looks": looks, "rank": ranks, "images": images}) for one in some]
        files.append(spill.write(folder, pa.concat_tables(under), ("looks",)))
    return {"keys": files, "rows": len(starts) * len(numbered), "files": files}


def _keys(looks: np.ndarray, number: int, mask: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return spill.mixed(spill.mixed(looks & np.uint64(mask)) + np.uint64(number))


def pairs(folder: Location, part: int, parts: int, names: list[str], distance: int) -> dict[str, object]:
    """Writes all pairs of near perceptual hashes that share a key in key range `part` to temporary files. Each pair is written
    as two edges, one per direction."""
    keys, looks, ranks, images = spill.arrays(
        folder, names, *spill.share(part, parts), key=np.uint64, looks=np.uint64, rank=np.uint64, images=np.int64
    )
    files, rows, most = list[str](), 0, max(LEAST_PAIRS, len(keys) // 4)
    for a, b in _batched(near_pairs(keys, looks, distance), most):
        u, v = np.concatenate([a, b]), np.concatenate([b, a])
        name, count = spilled(folder, (looks[u], looks[v], ranks[u], ranks[v], images[u]))
        files, rows = [*files, name], rows + count
    return {"edges": files[0], "further": files[1:], "rows": rows, "files": files}


Pairs = tuple[np.ndarray, np.ndarray]  # positions of the hashes


def near_pairs(keys: np.ndarray, looks: np.ndarray, distance: int) -> Iterator[Pairs]:
    """Finds the pairs of hashes that have the same key and differ in 1 to `distance` bits. Yields the positions of both hashes
    [pairs]; a pair may come several times. `looks`: the hashes, uint64 [hashes].

    The hashes of a key with more than `MANY` hashes get longer keys, by the same method: the bits in which the hashes differ are
    split into `distance` + 1 blocks, and each near pair agrees in one block. So the work doesn't grow with the square of the
    hashes of a key.
    """
    order = np.lexsort((looks, keys))
    keys, seen = keys[order], looks[order]
    starts = np.flatnonzero(spill.starts(keys))
    sizes = np.diff(starts, append=len(keys))
    longer = np.zeros(len(keys), bool)
    for start, size in zip(starts[sizes > MANY].tolist(), sizes[sizes > MANY].tolist(), strict=True):
        some = slice(start, start + size)
        if blocks_of := _split(int(np.bitwise_or.reduce(seen[some] ^ seen[start])), distance + 1):
            longer[some] = True
            for number, block in enumerate(blocks_of):
                for a, b in near_pairs(_keys(seen[some], number, block), seen[some], distance):
                    yield order[some][a], order[some][b]
    step, place = 1, np.flatnonzero(~longer)
    while len(place := place[place + step < len(keys)]) and len(place := place[keys[place] == keys[place + step]]):
        apart = np.bitwise_count(seen[place] ^ seen[place + step])
        near = place[(apart <= distance) & (apart > 0)]
        yield order[near], order[near + step]
        step += 1


def _split(bits: int, parts: int) -> list[int]:
    """Splits a mask into `parts` masks of about as many bits. Returns an empty list if a part would have no bit."""
    ones = [1 << bit for bit in range(BITS) if bits >> bit & 1]
    return [sum(ones[part::parts]) for part in range(parts)] if len(ones) >= parts else []


def _batched(pairs_found: Iterator[Pairs], most: int) -> Iterator[Pairs]:
    """Joins pairs into batches of at least `most` pairs. The last batch may be smaller; there is at least one."""
    none = np.zeros(0, np.int64)
    waiting, size = [(none, none)], 0
    for pair in pairs_found:
        waiting.append(pair)
        size += len(pair[0])
        if size >= most:
            yield _concatenated(waiting)
            waiting, size = [(none, none)], 0
    yield _concatenated(waiting)


def _concatenated(some: list[Pairs]) -> Pairs:
    return np.concatenate([a for a, _ in some]), np.concatenate([b for _, b in some])


def spilled(folder: Location, edges: tuple[np.ndarray, ...]) -> tuple[str, int]:
    """Writes edges to a temporary file, sorted by the first node of each edge, without repeated edges. Returns the file's name
    and the number of edges."""
    order = np.lexsort((edges[1], edges[0]))
    edges = tuple(column[order] for column in edges)
    first = spill.starts(*edges[:2])
    edges = tuple(column[first] for column in edges)
    table = pa.table({"key": spill.mixed(edges[0]), **dict(zip(EDGES, edges, strict=True))})
    return spill.write(folder, table, ("u", "v")), len(table)


NAMES = pa.schema(
    [("key", pa.uint64()), ("looks", pa.uint64()), ("gone", pa.bool_()), ("id", pa.large_string()), ("size", pa.int64())]
)


def settle(folder: Location, part: int, parts: int, names: list[str], messages: list[str]) -> dict[str, object]:
    """Decides which nodes (perceptual hashes) of key range `part` are kept or dropped, if the decisions about their earlier
    neighbors are known. Writes each decision to a temporary file, for the node's later neighbors.

    `messages`: the temporary files with the decisions of the previous round. The task also writes the edges of undecided nodes,
    and the node that caused each drop.
    """
    low, high = spill.share(part, parts)
    u, v, u_rank, v_rank, images = spill.arrays(folder, names, low, high, **EDGES)
    source, stays = spill.arrays(folder, messages, low, high, source=np.uint64, stays=np.int64)
    source, place = np.unique(source, return_index=True)
    before = (v_rank < u_rank) | ((v_rank == u_rank) & (v < u))
    at = np.minimum(np.searchsorted(source, v), max(0, len(source) - 1))
    known = before & (source[at] == v) if len(source) else np.zeros(len(u), bool)
    drops = known & (stays[place][at] == 1) if len(source) else known
    gone, waits = np.isin(u, u[drops]), np.isin(u, u[before & ~known])
    left = ~gone & waits
    settled = ~left & ~before
    verdicts = pa.table({"key": spill.mixed(v[settled]), "source": u[settled], "stays": (~gone[settled]).astype(np.int64)})
    message = spill.write(folder, verdicts, ("source",))
    on = left & ~known
    name, rows = spilled(folder, tuple(column[on] for column in (u, v, u_rank, v_rank, images)))
    order = np.lexsort((v[drops], v_rank[drops], u[drops]))
    dropped, first = np.unique(u[drops][order], return_index=True)
    by, size = v[drops][order][first], images[drops][order][first]
    fate = spill.write(folder, pa.table({"key": spill.mixed(by), "by": by, "looks": dropped, "images": size}), ("by", "looks"))
    return {"edges": name, "rows": rows, "messages": message, "fates": fate, "files": [name, message, fate]}


def name(folder: Location, part: int, parts: int, names: list[str], fates: list[str]) -> dict[str, object]:
    """Writes one row to a temporary file for each dropped node, and for each node that caused a drop. The row has the id of the
    image that is kept, and the size of this image's cluster."""
    table = gather(folder, part, parts, names)
    of_group, of_pixels = firsts(table)
    starts = np.flatnonzero(of_group)
    looks = table["looks"].to_numpy()[starts]
    sizes = np.add.reduceat(of_pixels.astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64)
    by, dropped, images = spill.arrays(folder, fates, *spill.share(part, parts), by=np.uint64, looks=np.uint64, images=np.int64)
    at = np.searchsorted(looks, by)
    np.add.at(sizes, at, images)
    own = np.flatnonzero(sizes > 1)
    node = np.concatenate([looks[own], dropped])
    which = np.concatenate([own, at])
    columns = [spill.mixed(node), node, np.repeat([False, True], [len(own), len(at)]), table["id"].take(pa.array(starts[which])),
               sizes[which]]  # fmt: skip
    names_of_places = pa.Table.from_arrays([c if isinstance(c, pa.ChunkedArray) else pa.array(c) for c in columns], schema=NAMES)
    written = spill.write(folder, names_of_places, ("looks", "gone"))
    return {"names": written, "files": [written]}


def judge(folder: Location, part: int, parts: int, names: list[str], named: list[str]) -> dict[str, object]:
    """Writes the dropped images of key range `part` to a temporary file, sorted by position. Each row has the reason for the
    drop, and the id of the image that is kept instead."""
    table = gather(folder, part, parts, names)
    of_group, of_pixels = firsts(table)
    about = spill.joined(folder, named, *spill.share(part, parts), NAMES).to_pylist()
    stays = {row["looks"]: row for row in sorted(about, key=lambda row: row["gone"])}  # a dropped image has no cluster of its own
    near = np.isin(table["looks"].to_numpy(), np.array([n for n, row in stays.items() if row["gone"]], np.uint64))
    same = np.maximum.accumulate(np.where(of_pixels, np.arange(len(table)), 0))
    places = np.flatnonzero(near | ~of_group)
    gone, firsts_of = table.take(pa.array(places)), table["id"].take(pa.array(same[places])).to_pylist()
    rows = []
    columns = (gone["looks"].to_pylist(), gone["node"].to_pylist(), of_pixels[places].tolist(), firsts_of)
    for looks, node, of_equal_pixels, first in zip(*columns, strict=True):
        if not of_equal_pixels:
            rows.append({"key": node, "reason": "duplicate", "detail": first})
        elif row := stays.get(looks):  # None with `exact`, if different pixel hashes begin with the same 64 bits
            detail = f"{row['id']} (one of {row['size']})"
            rows.append({"key": node, "reason": "near_duplicate", "detail": detail})
    judged = spill.write(folder, pa.Table.from_pylist(rows, JUDGED), ("reason",))
    clusters = [(-row["size"], row["id"]) for row in stays.values() if not row["gone"]]
    largest = [[-size, id] for size, id in heapq.nsmallest(LARGEST, clusters)]
    sizes = counted(-size for size, _ in clusters)
    return {"judged": judged, "clusters": len(clusters), "largest": largest, "sizes": sizes, "files": [judged]}
