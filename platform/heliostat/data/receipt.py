"""Computes receipts: a hash chain over the samples of every step. Anyone can recompute the chain from the shards.

- A sample's digest is BLAKE2b-64 over its place (source, epoch, chunk, row) and its content.
- A virtual rank's digest is BLAKE2b-64 over its samples' digests. So each worker hashes only its own samples.
- A step's digest is BLAKE2b-128 over the digests of the virtual ranks, in ascending order.
- The chain is h(t) = BLAKE2b-128(h(t-1) + step digest), from h(-1) = "".

None of these digests depends on the number of workers.

A receipt records the version of this scheme that it uses; receipts of version 1 don't record a version. Each receipt is checked
by the rules of its version. Version 2 also hashes the names, types, and nulls of rows; for tokens, versions 1 and 2 give the
same digests. A resumed run continues with the newest version.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from heliostat.data.content import Content, sample_bytes, sample_bytes_1
from heliostat.data.order import SamplePlaces

GENESIS = ""
VERSION = 2
CONTENTS = {1: sample_bytes_1, 2: sample_bytes}


def sample_digests(samples: SamplePlaces, contents: Content, version: int = VERSION) -> np.ndarray:
    """Computes the digest of each sample from the sample's place (source, epoch, chunk, row) and its content: uint64 [n]."""
    places = np.stack([samples.source, samples.epoch, samples.chunk, samples.row], axis=1).astype("<i8")
    out = bytearray()
    for place, row in zip(places, CONTENTS[version](contents), strict=True):
        h = hashlib.blake2b(place, digest_size=8)
        h.update(row)
        out += h.digest()
    return np.frombuffer(bytes(out), dtype="<u8")


def lane_digest(digests: np.ndarray) -> int:
    """Computes the digest of a virtual rank's samples of one step, as a signed 64-bit integer for a torch tensor."""
    return int.from_bytes(hashlib.blake2b(digests.astype("<u8").tobytes(), digest_size=8).digest(), "little", signed=True)


def in_lane_order(parts: list[np.ndarray]) -> np.ndarray:
    """Merges the workers' digests into the order of virtual ranks: int64 [steps, virtual ranks].

    `parts`: for each worker, in the order of ranks, an array [steps, the worker's virtual ranks].
    """
    lanes = np.empty((len(parts[0]), sum(part.shape[1] for part in parts)), dtype=np.int64)
    for rank, part in enumerate(parts):
        lanes[:, rank :: len(parts)] = part
    return lanes


def step_digests(lanes: np.ndarray) -> list[str]:
    """Computes the hex digest of each step from the digests of its virtual ranks, int64 [steps, virtual ranks]."""
    return [hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=16).hexdigest() for row in lanes]


def extend(chain: str, steps: list[str]) -> str:
    """Extends the hash chain by the digests of the following steps, and returns the new chain."""
    for step in steps:
        chain = hashlib.blake2b(bytes.fromhex(chain) + bytes.fromhex(step), digest_size=16).hexdigest()
    return chain


def seal(first: int, steps: list[str], chain: str, data_digest: str) -> bytes:
    """Serializes the receipt of steps [first, first + len(steps)): their digests, and the chain after the last step."""
    sealed = {"version": VERSION, "first": first, "steps": steps, "chain": chain, "data_digest": data_digest}
    return json.dumps(sealed).encode()
