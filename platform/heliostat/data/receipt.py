"""Computes receipts: a hash chain over what every step trained on, made while training, recomputable from the shards alone.

A sample's digest is BLAKE2b-64 over where it is (source, epoch, chunk, row) and its content. A step's digest is BLAKE2b-128
over its samples' digests in lane order, through one digest a lane, so that each worker hashes only what it has. The chain
is h(t) = BLAKE2b-128(h(t-1) + step digest), from h(-1) = "". None of it depends on the number of workers.

Receipts record the version of this scheme. Version 2 hashes the names, types and nulls of rows too; of tokens it is the same as
version 1, whose receipts record none. A resumed run continues with the newest: each receipt is checked by its own version.
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
    """Computes each sample's digest from its place and its content, uint64 [n]."""
    places = np.stack([samples.source, samples.epoch, samples.chunk, samples.row], axis=1).astype("<i8")
    out = bytearray()
    for place, row in zip(places, CONTENTS[version](contents), strict=True):
        h = hashlib.blake2b(place, digest_size=8)
        h.update(row)
        out += h.digest()
    return np.frombuffer(bytes(out), dtype="<u8")


def lane_digest(digests: np.ndarray) -> int:
    """Computes the digest of one lane's samples of one step, as a signed 64-bit integer (it travels in a torch tensor)."""
    return int.from_bytes(hashlib.blake2b(digests.astype("<u8").tobytes(), digest_size=8).digest(), "little", signed=True)


def in_lane_order(parts: list[np.ndarray]) -> np.ndarray:
    """Merges each worker's lane digests, [steps, its lanes], in the order of their ranks, to lane order: int64 [steps, lanes]."""
    lanes = np.empty((len(parts[0]), sum(part.shape[1] for part in parts)), dtype=np.int64)
    for rank, part in enumerate(parts):
        lanes[:, rank :: len(parts)] = part
    return lanes


def step_digests(lanes: np.ndarray) -> list[str]:
    """Computes one hex digest for each step from lane digests, int64 [steps, lanes]."""
    return [hashlib.blake2b(row.astype("<i8").tobytes(), digest_size=16).hexdigest() for row in lanes]


def extend(chain: str, steps: list[str]) -> str:
    """Extends the hash chain by the given step digests."""
    for step in steps:
        chain = hashlib.blake2b(bytes.fromhex(chain) + bytes.fromhex(step), digest_size=16).hexdigest()
    return chain


def seal(first: int, steps: list[str], chain: str, data_digest: str) -> bytes:
    """Serializes the receipt of steps [first, first + len(steps)): their digests, and the chain after the last of them."""
    sealed = {"version": VERSION, "first": first, "steps": steps, "chain": chain, "data_digest": data_digest}
    return json.dumps(sealed).encode()
