"""Chooses which of the images that look alike stay, as if all were gone through by the hashes of their pixels, one by one.

An image goes if it is near to one before it that stays: those that stay are the lexicographically first maximal independent set
of the pairs. It is found in rounds: a node stays when all that are near and before it are known to go, and goes when one of them
is known to stay. The order is a hash, so it is random, and the rounds are few however many nodes there are (Blelloch, Fineman and
Shun, Greedy Sequential Maximal Independent Set and Matching are Parallel on Average, 2012).
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pyarrow as pa

from heliostat.curation.alike.pairs import EDGES, firsts, gather, spilled
from heliostat.curation.comparing import JUDGED, LARGEST, counted
from heliostat.storage.locations import Location
from heliostat.tasks import spill

NAMES = pa.schema(
    [("key", pa.uint64()), ("looks", pa.uint64()), ("gone", pa.bool_()), ("id", pa.large_string()), ("size", pa.int64())]
)


def settle(folder: Location, part: int, parts: int, names: list[str], messages: list[str]) -> dict[str, Any]:
    """Decides on the nodes of this part that can be decided on, and spills messages to those that come after them.

    `messages` say which nodes stay and which go. Also spilled are the edges of nodes that are left, and by whom others go.
    """
    u, v, u_rank, v_rank, images = _columns(folder, part, parts, names, EDGES)
    source, stays = _columns(folder, part, parts, messages, ("source", "stays"))
    source, place = np.unique(source, return_index=True)
    before = (v_rank < u_rank) | ((v_rank == u_rank) & (v < u))
    at = np.minimum(np.searchsorted(source, v), max(0, len(source) - 1))
    known = before & (source[at] == v) if len(source) else np.zeros(len(u), bool)
    drops = known & (stays[place][at] == 1) if len(source) else known
    gone, waits = np.isin(u, u[drops]), np.isin(u, u[before & ~known])
    left = ~gone & waits
    tell = ~left & ~before
    told = pa.table({"key": spill.mixed(v[tell]), "source": u[tell], "stays": (~gone[tell]).astype(np.int64)})
    message = spill.write(folder, told, ("source",))
    on = left & ~known
    record = spilled(folder, tuple(column[on] for column in (u, v, u_rank, v_rank, images)))
    order = np.lexsort((v[drops], v_rank[drops], u[drops]))
    dropped, first = np.unique(u[drops][order], return_index=True)
    by, size = v[drops][order][first], images[drops][order][first]
    fate = spill.write(folder, pa.table({"key": spill.mixed(by), "by": by, "looks": dropped, "images": size}), ("by", "looks"))
    return record | {"messages": message, "fates": fate, "files": [*record["files"], message, fate]}


def _columns(folder: Location, part: int, parts: int, names: list[str], columns: tuple[str, ...]) -> list[np.ndarray]:
    held = [t for name in names for t in spill.read(folder, name, *spill.share(part, parts))]
    kinds = {"images": np.int64, "stays": np.int64}
    return [np.concatenate([np.zeros(0, kinds.get(c, np.uint64)), *(t[c].to_numpy() for t in held)]) for c in columns]


def name(folder: Location, part: int, parts: int, names: list[str], fates: list[str]) -> dict[str, Any]:
    """Spills for each node that goes, and for those that others go for, the id of the image that stays and their number."""
    table = gather(folder, part, parts, names)
    of_group, of_pixels = firsts(table)
    starts = np.flatnonzero(of_group)
    looks = table["looks"].to_numpy()[starts]
    sizes = np.add.reduceat(of_pixels.astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64)
    by, dropped, images = _columns(folder, part, parts, fates, ("by", "looks", "images"))
    at = np.searchsorted(looks, by)
    np.add.at(sizes, at, images)
    own = np.flatnonzero(sizes > 1)
    node = np.concatenate([looks[own], dropped])
    which = np.concatenate([own, at])
    columns = [spill.mixed(node), node, np.repeat([False, True], [len(own), len(at)]), table["id"].take(pa.array(starts[which])),
               sizes[which]]  # fmt: skip
    told = pa.Table.from_arrays([c if isinstance(c, pa.ChunkedArray) else pa.array(c) for c in columns], schema=NAMES)
    written = spill.write(folder, told, ("looks", "gone"))
    return {"names": written, "files": [written]}


def judge(folder: Location, part: int, parts: int, names: list[str], told: list[str]) -> dict[str, Any]:
    """Spills which images of this part go, by their places in runs, with the reason and who stays."""
    table = gather(folder, part, parts, names)
    of_group, of_pixels = firsts(table)
    held = [t for n in told for t in spill.read(folder, n, *spill.share(part, parts))]
    about = pa.concat_tables([NAMES.empty_table(), *held]).to_pylist()
    stays = {row["looks"]: row for row in sorted(about, key=lambda row: row["gone"])}  # who goes is no cluster of its own
    near = np.isin(table["looks"].to_numpy(), np.array([n for n, row in stays.items() if row["gone"]], np.uint64))
    same = np.maximum.accumulate(np.where(of_pixels, np.arange(len(table)), 0))
    places = np.flatnonzero(near | ~of_group)
    gone, firsts_of = table.take(pa.array(places)), table["id"].take(pa.array(same[places])).to_pylist()
    found = []
    columns = (gone["looks"].to_pylist(), gone["node"].to_pylist(), of_pixels[places].tolist(), firsts_of)
    for looks, node, alike, first in zip(*columns, strict=True):
        if not alike:
            found.append({"key": node, "reason": "duplicate", "detail": first})
        elif row := stays.get(looks):  # none where groups are of equal pixels: their hashes begin alike by chance
            detail = f"{row['id']} (one of {row['size']})"
            found.append({"key": node, "reason": "near_duplicate", "detail": detail})
    judged = spill.write(folder, pa.Table.from_pylist(found, JUDGED), ("reason",))
    clusters = [(-row["size"], row["id"]) for row in stays.values() if not row["gone"]]
    largest = [[-size, id] for size, id in heapq.nsmallest(LARGEST, clusters)]
    sizes = counted(-size for size, _ in clusters)
    return {"judged": judged, "clusters": len(clusters), "largest": largest, "sizes": sizes, "files": [judged]}
