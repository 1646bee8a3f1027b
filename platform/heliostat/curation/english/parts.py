"""Defines what the compiled loops share: a part of a text as arrays, hashes of its words, and the table of known hashes.

Few arrays, because a compiled function receives each array as seven numbers or more.

`chars`: the characters of a part of at most LONGEST characters, int64: the kinds above CODE_BITS, and the code point below.
`sums`: uint64 [2, LONGEST + 2]: the sums for the hashes of a part's characters, and the powers of FACTOR. `words`: the first
character of each word, int32 [LONGEST + 2]. `table`: an open-addressing table of hashes, uint64 [places, 2]: each hash and its
value.
"""

from __future__ import annotations

import numpy as np

from heliostat.curation import comparable_characters
from heliostat.curation.compiled import compiled, finalized
from heliostat.curation.english.characters import CODES, TAGS
from heliostat.curation.english.rules import LONGEST

FACTOR = np.uint64(comparable_characters.FACTOR)
# distinguish the table's hashes of units, of words that are joined, and of the first two of these, from those of exceptions
UNIT, SEQUENCE, PAIR = np.uint64(0xD1342543DE82EF95), np.uint64(0xA2684A87BD05DF2A), np.uint64(0x739C6FCB9B88CEBF)
CODE_BITS, CODE = 21, (1 << 21) - 1
_TAGS, _LAST_TAG = TAGS.start, TAGS.stop - 1


@compiled
def mixed(value: np.uint64) -> np.uint64:
    """Mixes the bits of a hash. Never returns 0, which marks a free place."""
    value = finalized(value)
    return value if value else np.uint64(1)


@compiled
def scratch(powers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `chars`, `sums`, and `words` for a part."""
    sums = np.empty((2, LONGEST + 2), np.uint64)
    sums[0, 0] = 0
    for power in range(LONGEST + 1):
        sums[1, power] = powers[power]
    return np.empty(LONGEST + 2, np.int64), sums, np.empty(LONGEST + 2, np.int32)


@compiled
def kind_of(kinds: np.ndarray, code: int) -> int:
    """Returns the kinds of a code point."""
    if code >= CODES:
        code = code - _TAGS + CODES if _TAGS <= code <= _LAST_TAG else len(kinds) - 1
    return int(np.int64(kinds[code]))


@compiled
def has(chars: np.ndarray, at: int, kinds: int) -> bool:
    """Checks whether a character has one of these kinds."""
    return (chars[at] & (kinds << CODE_BITS)) != 0


@compiled
def code_at(chars: np.ndarray, at: int) -> int:
    return chars[at] & CODE


@compiled
def hash_of(sums: np.ndarray, begin: int, end: int) -> np.uint64:
    return mixed(sums[0, end] - sums[0, begin] * sums[1, end - begin])


@compiled
def value_of(table: np.ndarray, key: np.uint64) -> np.uint64:
    """Returns the value of a hash in the table; 0 if the table doesn't contain the hash."""
    mask = np.uint64(len(table) - 1)
    at = key & mask
    while table[at, 0] and table[at, 0] != key:
        at = (at + np.uint64(1)) & mask
    return table[at, 1]
