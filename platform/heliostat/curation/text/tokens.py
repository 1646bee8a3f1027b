"""Converts documents to token shards: tokenizers, the split into row groups, and the Parquet bytes. All functions are pure."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from heliostat.curation.text import stretches
from heliostat.data.manifest import PLACES, PLACES_KEY
from heliostat.errors import ConfigError

SCHEMA = pa.schema(
    [
        # no nulls and no empty lists: the footer's value count is then the token count
        pa.field("tokens", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
        pa.field("document", pa.string(), nullable=False),
    ]
)
FORM = {"compression": "zstd", "use_dictionary": False, "write_statistics": ["document"], "write_page_checksum": True}
# shares of all documents, in the order of their hashes, at which a row group ends: so each can be held out exactly
PARTS = [digit / 10**places for places in (4, 3, 2, 1) for digit in (1, 2, 5)]
TOGETHER = 1 << 18  # tokens that are counted at once
BATCH_CHARS = 1 << 16  # characters per call of the tokenizer: the encodings take thirty times as much memory


def train(texts: Iterable[str], vocab_size: int, end_of_document: str, markers: Sequence[str] = ()) -> str:
    """Trains a byte-level BPE, and returns its `tokenizer.json` as text. This tokenizer can encode every string, and decoding
    returns the same string.

    `markers`: other special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_document, *markers],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


@lru_cache(maxsize=2)
def load(definition: str) -> Tokenizer:
    """Loads a tokenizer from its definition (JSON). The tokenizer doesn't truncate or pad texts, and encodes the names of special
    tokens in a text as plain text."""
    try:
        tokenizer = Tokenizer.from_str(definition)
    except Exception as e:  # the library raises bare Exception
        raise ConfigError(f"tokenizer.path: the tokenizers library can't read this file ({e}). Use another file") from e
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_id(tokenizer: Tokenizer, end_of_document: str) -> int:
    number = tokenizer.token_to_id(end_of_document)
    if number is None:
        added = ", ".join(sorted(t.content for t in tokenizer.get_added_tokens_decoder().values())[:10])
        raise ConfigError(
            f"tokenizer.end_of_document: {end_of_document!r} isn't in the vocabulary. Choose one of the tokenizer's special "
            f"tokens: {added or 'none'}"
        )
    return number


def encode(tokenizer: Tokenizer, texts: list[str], end: int) -> list[np.ndarray]:
    """Encodes each text to token ids (int32), and appends the token `end` to each text."""
    known, ended = stretches.of(tokenizer), np.int32(end).tobytes()
    if known is None:
        encodings = (one for batch in batches(texts) for one in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
        return [np.array([*encoding.ids, end], np.int32) for encoding in encodings]
    ids = (one for batch in batches(texts) for one in _by_stretches(known, batch))
    return [np.frombuffer(one + ended, np.int32) for one in ids]


def _by_stretches(known: stretches.Stretches, texts: list[str]) -> list[bytes]:
    """Encodes texts stretch by stretch, and one large text in parts. Returns each text's token ids as bytes (int32)."""
    if len(texts) > 1:
        return known.encode(texts)
    return [b"".join(one for part in stretches.parts(texts[0], BATCH_CHARS) for one in known.encode([part]))]


def counted(encoded: list[np.ndarray], vocab_size: int) -> np.ndarray:
    """Counts the occurrences of each token, int64 [vocab_size]. Counts at most 2 * TOGETHER tokens at a time, because numpy
    copies them as int64."""
    counts, waiting, size = np.zeros(vocab_size, np.int64), list[np.ndarray](), 0
    for part in (ids[at : at + TOGETHER] for ids in encoded for at in range(0, len(ids), TOGETHER)):
        waiting.append(part)
        size += len(part)
        if size >= TOGETHER:
            counts += np.bincount(np.concatenate(waiting), minlength=vocab_size)
            waiting, size = [], 0
    return counts + np.bincount(np.concatenate(waiting), minlength=vocab_size) if waiting else counts


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Yields the texts in batches of at most BATCH_CHARS characters, for the tokenizer. A longer text is a batch alone."""
    start = 0
    while start < len(texts):
        stop, chars = start, 0
        while stop < len(texts) and (stop == start or chars + len(texts[stop]) <= BATCH_CHARS):
            chars += len(texts[stop])
            stop += 1
        yield texts[start:stop]
        start = stop


def cut(lengths: np.ndarray, target: int) -> list[tuple[int, int]]:
    """Splits documents into ranges, one per row group. The ranges have about equal numbers of tokens, near `target`. No range
    is empty, and no range ends within a document."""
    if not len(lengths):
        return []
    ends = np.cumsum(lengths)
    groups = max(1, round(int(ends[-1]) / target))
    aims = ends[-1] * np.arange(1, groups) / groups
    after = np.searchsorted(ends, aims)  # the first document that reaches the target; split after it, or before it if nearer
    before = np.where(after > 0, ends[after - 1], 0)
    cuts = after + np.where(ends[after] - aims <= aims - before, 1, 0)
    bounds = sorted({0, len(lengths), *cuts.tolist()})
    return list(itertools.pairwise(bounds))


def ranges(lengths: np.ndarray, places: np.ndarray, target: int) -> list[tuple[int, int]]:
    """Splits documents into ranges, one per row group, with about `target` tokens. `places`: the hold-out position of each
    document (`manifest.place`), in descending order. A range ends at each boundary in `PARTS`, and never between documents with
    equal positions."""
    bounds = [0, *sorted(int((places >= part * PLACES).sum()) for part in PARTS), len(lengths)]
    stretches = list[tuple[int, int]]()
    for a, b in itertools.pairwise(bounds):
        if a == b:
            continue
        firsts = np.flatnonzero(np.diff(places[a:b], prepend=-1))  # the first document of each place
        edges = [*(a + firsts).tolist(), b]
        stretches += [(edges[start], edges[stop]) for start, stop in cut(np.add.reduceat(lengths[a:b], firsts), target)]
    return stretches


def piece(target: int) -> int:
    """Returns the number of tokens for a row group that ends within a document: 15 times a power of two, at most `target`.

    A row group of this size contains complete sequences of any usual length, with no tokens left over.
    """
    return max(1, 15 * 2 ** ((target // 15).bit_length() - 1) if target >= 15 else target)


def pieces(lengths: list[int], target: int) -> list[list[int]]:
    """Divides documents into row groups. Returns, for each row group, the lengths of the rows in tokens.

    The documents form one group unless they have more than twice `target` tokens, for example in one long document. Then groups
    of `piece(target)` tokens are split off while more than twice `target` tokens remain.
    """
    out: list[list[int]] = []
    rows, left = lengths[::-1], sum(lengths)  # the next document is last
    while left > 2 * target:
        group, room = list[int](), piece(target)
        while room:
            group.append(min(room, rows[-1]))
            room -= group[-1]
            rows[-1] -= group[-1]
            if not rows[-1]:
                rows.pop()
        out.append(group)
        left -= sum(group)
    return [*out, rows[::-1]]


def chunks(lengths: np.ndarray, target: int, places: np.ndarray | None = None) -> list[tuple[list[int], int]]:
    """Plans the row groups of a shard. Returns, for each row group, the lengths of the rows in tokens, and the hold-out position
    (`manifest.place`).

    Row groups that share a document, or documents with equal positions, have the same position. So such row groups are always
    held out together. Without `places`, the position is -1.
    """
    bounds = cut(lengths, target) if places is None else ranges(lengths, places, target)
    out = []
    for start, stop in bounds:
        place = -1 if places is None else int(places[start:stop].max())
        together = places is not None and stop - start > 1 and places[start] == places[stop - 1]
        for a, b in cut(lengths[start:stop], target) if together else [(0, stop - start)]:
            out += [(rows, place) for rows in pieces(lengths[start + a : start + b].tolist(), target)]
    return out


def documents_in(lengths: np.ndarray, target: int, places: np.ndarray) -> list[tuple[int, int]]:
    """Plans row groups of complete documents. Returns, for each row group, the number of its documents, and its hold-out
    position. The arguments are those of `ranges`."""
    groups = list[tuple[int, int]]()
    for start, stop in ranges(lengths, places, target):
        together = places[start] == places[stop - 1]  # documents with equal positions may be many
        parts = cut(lengths[start:stop], target) if together else [(0, stop - start)]
        groups += [(b - a, int(places[start:stop].max())) for a, b in parts]
    return groups


def shard(ids: list[str], tokens: list[np.ndarray], chunk_tokens: int, places: np.ndarray | None = None) -> bytes:
    """Returns a shard as the bytes of a Parquet file. The same documents in the same order always give the same bytes.

    A row that ends before the end of a document is continued in the next row, which has the same id. The documents' hold-out
    positions (`places`, from `manifest.place`) must be in descending order.
    """
    lengths = np.array([len(t) for t in tokens], np.int64)
    ends = np.cumsum(lengths)
    groups, content = chunks(lengths, chunk_tokens, places), hashlib.sha256()
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SCHEMA, **FORM) as writer:
        begin = 0
        for rows, _ in groups:
            offsets = np.concatenate([[0], np.cumsum(rows)])
            values = _between(tokens, ends, begin, begin + int(offsets[-1]))
            names = [ids[i] for i in np.searchsorted(ends, begin + offsets[:-1], side="right")]
            element = SCHEMA.field("tokens").type
            lists = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values), type=element)
            table = pa.Table.from_arrays([lists, pa.array(names, pa.string())], schema=SCHEMA)
            writer.write_table(table, row_group_size=max(1, len(rows)))
            content.update(values.data)
            begin += int(offsets[-1])
        _sign(writer, content.hexdigest(), None if places is None else [place for _, place in groups])
    return sink.getvalue().to_pybytes()


def _between(tokens: list[np.ndarray], ends: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Returns a range of the tokens of all documents, without joining the other documents. `ends`: the positions at which
    documents end."""
    first, last = (int(place) for place in np.searchsorted(ends, [start, stop - 1], side="right"))
    before = int(ends[first]) - len(tokens[first])
    values = tokens[first] if first == last else np.concatenate(tokens[first : last + 1])
    return values[start - before : stop - before]


def _sign(writer: pq.ParquetWriter, content: str, places: list[int] | None) -> None:
    """Writes the digest of a shard's content into the Parquet footer. The manifest hashes the footer, so any changed token
    changes the dataset's digest."""
    writer.add_key_value_metadata({"content": content})
    if places is not None:
        writer.add_key_value_metadata({PLACES_KEY.decode(): json.dumps(places)})


def without(file: pq.ParquetFile, ids: set[str]) -> tuple[bytes | None, np.ndarray]:
    """Rewrites an open shard without some documents. Returns the new shard (None if it is empty), and the removed tokens.

    Row groups keep their hold-out positions and the remaining documents. So the same documents are held out as before.
    """
    known = (file.metadata.metadata or {}).get(PLACES_KEY)
    old, places, gone = json.loads(known) if known else None, list[int](), list[np.ndarray]()
    sink, kept = pa.BufferOutputStream(), [np.zeros(0, np.int32)]
    with pq.ParquetWriter(sink, SCHEMA, **FORM) as writer:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=SCHEMA.names).cast(SCHEMA)
            named = pc.is_in(table["document"], value_set=pa.array(sorted(ids), pa.string()))
            left = table.filter(pc.invert(named))
            gone += [_flat(table.filter(named))]
            if len(left):
                kept.append(_flat(left))
                places += [old[group]] if old else []
                writer.write_table(left, row_group_size=len(left))
        _sign(writer, hashlib.sha256(np.concatenate(kept).data).hexdigest(), places if old else None)
    return sink.getvalue().to_pybytes() if len(kept) > 1 else None, np.concatenate(gone)


def _flat(table: pa.Table) -> np.ndarray:
    return table["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.int32)


def entropy(counts: np.ndarray) -> float:
    """Computes the entropy of the unigram distribution in nats per token.

    The result is rounded, because the last bits of a logarithm differ between machines.
    """
    used = counts[counts > 0].astype(np.float64)
    p = used / used.sum()
    return round(math.fsum(-p * np.log(p)), 6)
