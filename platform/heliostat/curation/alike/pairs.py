"""Finds all pairs of perceptual hashes that differ in at most `distance` of 64 bits, exactly, with the hashes on disk.

(Manku, Jain and Das Sarma, Detecting Near-Duplicates for Web Crawling, 2007.) Bits are cut into blocks. Two hashes that differ in
d bits are equal in all blocks but d of them, so for every choice of d blocks to leave out, the others are a key under which such
a pair meets. More blocks make longer keys, and more of them; there are as many as keep chance from filling the groups.

A node is a perceptual hash that some image has; images with the same one are a group, in which the first by the hash of pixels
stands for the others. Its rank is the first 64 bits of that hash.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from math import ceil, comb, log2
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.curation.engine import groups
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import spill

BITS = 64
KEYS = 64  # of a hash, at most
TOGETHER = 2  # keys that are spilled together
FACES = pa.schema(
    [("key", pa.uint64()), ("looks", pa.uint64()), ("hash", pa.binary(32)), ("id", pa.large_string()), ("node", pa.uint64())]
)
EDGES = ("u", "v", "u_rank", "v_rank", "images")


def blocks(distance: int, hashes: int) -> int:
    """Chooses the number of blocks: the first whose keys are as long as tells so many hashes apart, within KEYS keys of each."""
    count = distance + 1
    while comb(count + 1, distance) <= KEYS and BITS - distance * ceil(BITS / count) < log2(max(2, hashes)):
        count += 1
    return count


def masks(distance: int, count: int) -> list[int]:
    """Lists the bits of each key: all blocks but `distance` of them."""
    edges = np.linspace(0, BITS, count + 1).astype(int).tolist()
    of_block = [(1 << stop) - (1 << start) for start, stop in pairwise(edges)]
    whole = (1 << BITS) - 1
    return [whole - sum(left_out) for left_out in combinations(of_block, distance)]


def faces(folder: Location, number: int, run: SpilledRun, exact: bool) -> dict[str, Any]:
    """Spills the perceptual hash of each image of a run, which has this number; if `exact`, the pixels' hash in its place."""
    found = []
    for table in survivors(folder, run, columns=["hash", "id", *([] if exact else ["looks"])]):
        looks = table["key"].to_numpy() if exact else table["looks"].to_numpy().view(np.uint64)
        node = (np.uint64(number) << np.uint64(32)) | table["row"].to_numpy().astype(np.uint64)
        columns = [pa.array(spill.mixed(looks)), pa.array(looks), table["hash"], table["id"], pa.array(node)]
        found.append(pa.Table.from_arrays(columns, schema=FACES))
    table = pa.concat_tables([FACES.empty_table(), *found])
    name = spill.write(folder, table, ("hash", "id"))
    return {"faces": name, "rows": len(table), "files": [name]}


def gather(folder: Location, part: int, parts: int, names: list[str]) -> pa.Table:
    """Reads the images of a part of all perceptual hashes, in groups, each sorted by the hash of pixels and the id."""
    held = [t for name in names for t in spill.read(folder, name, *spill.share(part, parts))]
    order = [(name, "ascending") for name in ("looks", "hash", "id")]
    return pa.concat_tables([FACES.empty_table(), *held]).sort_by(order).combine_chunks()


def firsts(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Tells of gathered images whether each is the first of its group, and the first with its pixels."""
    looks, hashes = table["looks"].to_numpy(), prefixes(table, 4)
    of_group = np.ones(len(table), bool)
    of_group[1:] = looks[1:] != looks[:-1]
    of_pixels = np.ones(len(table), bool)
    of_pixels[1:] = of_group[1:] | (hashes[1:] != hashes[:-1]).any(axis=1)
    return of_group, of_pixels


def prefixes(table: pa.Table, words: int = 1) -> np.ndarray:
    """Returns the first 64-bit words of the hashes, a row of them for each image."""
    whole = np.frombuffer(b"".join(table["hash"].to_pylist()), ">u8").astype(np.uint64)
    return whole.reshape(-1, 4)[:, :words]


def group(folder: Location, part: int, parts: int, names: list[str], distance: int, count: int) -> dict[str, Any]:
    """Spills every node of this part under its keys, of `count` blocks, with its rank and its images of different pixels."""
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


def pairs(folder: Location, part: int, parts: int, names: list[str], distance: int) -> dict[str, Any]:
    """Spills the edges between nodes that meet under a key of this part and are near enough, both ways."""
    columns = ("key", "looks", "rank", "images")
    held = [t for name in names for t in spill.read(folder, name, *spill.share(part, parts))]
    keys, looks, ranks, images = (np.concatenate([np.zeros(0, np.int64 if c == "images" else np.uint64),
                                                  *(t[c].to_numpy() for t in held)]) for c in columns)  # fmt: skip
    order = np.lexsort((looks, keys))
    keys, seen = keys[order], looks[order]
    here, there, step, place = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 1, np.arange(len(keys))
    while len(place := place[place + step < len(keys)]) and len(place := place[keys[place] == keys[place + step]]):
        apart = np.bitwise_count(seen[place] ^ seen[place + step])
        near = place[(apart <= distance) & (apart > 0)]
        here.append(near)
        there.append(near + step)
        step += 1
    a, b = order[np.concatenate(here)], order[np.concatenate(there)]
    u, v = np.concatenate([a, b]), np.concatenate([b, a])
    return spilled(folder, (looks[u], looks[v], ranks[u], ranks[v], images[u]))


def spilled(folder: Location, edges: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """Spills edges by the node that they begin at, each once."""
    order = np.lexsort((edges[1], edges[0]))
    edges = tuple(column[order] for column in edges)
    first = np.ones(len(order), bool)
    first[1:] = (edges[0][1:] != edges[0][:-1]) | (edges[1][1:] != edges[1][:-1])
    edges = tuple(column[first] for column in edges)
    table = pa.table({"key": spill.mixed(edges[0]), **dict(zip(EDGES, edges, strict=True))})
    name = spill.write(folder, table, ("u", "v"))
    return {"edges": name, "rows": len(table), "files": [name]}
