"""Checks with compiled loops whether a part of a text is a URL."""

from __future__ import annotations

import numpy as np

from heliostat.curation.compiled import compiled
from heliostat.curation.english.characters import DIGIT, LABEL, LOWER, NAME
from heliostat.curation.english.parts import code_at, has

_STOP, _HYPHEN, _PLUS, _COLON, _SLASH, _AT, _UNDERSCORE, _ZERO, _QUERY, _FRAGMENT = (ord(c) for c in ".-+:/@_0?#")


@compiled
def is_url(chars: np.ndarray, begin: int, end: int) -> bool:
    """Checks whether a core is a URL: a host with a top-level domain, or a public IP address, with the usual parts of a URL. The
    host begins at the start, after `://`, or after an `@`."""
    dot, last, at = False, -1, begin
    for place_ in range(begin, end):
        dot |= code_at(chars, place_) == _STOP
        if code_at(chars, place_) == _AT:
            last = place_
    if not dot:
        return False
    if _is_host(chars, begin, end) or _is_address(chars, begin, end):
        return True
    while at < end and (has(chars, at, NAME) or code_at(chars, at) in (_PLUS, _HYPHEN, _STOP)):
        at += 1
    scheme = -1
    slashes = at + 2 < end and code_at(chars, at + 1) == _SLASH and code_at(chars, at + 2) == _SLASH
    if at - begin >= 2 and slashes and code_at(chars, at) == _COLON:
        scheme = at + 3
        if _is_host(chars, scheme, end) or _is_address(chars, scheme, end):
            return True
    if last <= begin:
        return False
    for start in (begin, scheme, last):
        at = start + 1
        while 0 < at < end and code_at(chars, at) != _AT:
            at += 1
        if start >= 0 and at < end and (_is_host(chars, at + 1, end) or _is_address(chars, at + 1, end)):
            return True
    return _is_host(chars, last + 1, end) or _is_address(chars, last + 1, end)


@compiled
def _is_host(chars: np.ndarray, at: int, end: int) -> bool:
    """Checks whether the characters are a host with a top-level domain, and the other parts of a URL."""
    labels = 0
    while True:
        start = at
        while at < end and at - start < 64 and (has(chars, at, LABEL) or (at > start and _in_label(code_at(chars, at)))):
            at += 1
        if not 1 <= at - start <= 63 or at >= end or code_at(chars, at) != _STOP:
            break
        at += 1
        labels += 1
    at = start
    while at < end and has(chars, at, LOWER):
        at += 1
    return labels > 0 and 2 <= at - start <= 63 and _ends(chars, at, end)


@compiled
def _in_label(code: int) -> bool:
    return code in (_HYPHEN, _UNDERSCORE)


@compiled
def _is_address(chars: np.ndarray, at: int, end: int) -> bool:
    """Checks whether the characters are a public IPv4 address, and the other parts of a URL."""
    if at >= end or code_at(chars, at) == _ZERO:
        return False
    numbers = 0  # 10 bits each
    for number in range(4):
        start, value = at, 0
        while at < end and at - start < 4 and has(chars, at, DIGIT):
            value = value * 10 + code_at(chars, at) - _ZERO
            at += 1
        if not 1 <= at - start <= 3:
            return False
        numbers = numbers << 10 | value
        if number < 3:
            if at >= end or code_at(chars, at) != _STOP:
                return False
            at += 1
    first, second, third, last = numbers >> 30, numbers >> 20 & 1023, numbers >> 10 & 1023, numbers & 1023
    private = first == 10 or first == 127 or (first == 169 and second == 254) or (first == 192 and second == 168)
    private |= first == 172 and 16 <= second <= 31
    valid = not private and first <= 223 and max(second, third) <= 255 and 1 <= last <= 254
    return valid and _ends(chars, at, end)


@compiled
def _ends(chars: np.ndarray, at: int, end: int) -> bool:
    """Checks whether a URL ends here, except for a port, a path, a query, and a fragment."""
    if at < end and code_at(chars, at) == _COLON:
        start = at + 1
        at = start
        while at < end and at - start < 6 and has(chars, at, DIGIT):
            at += 1
        if not 2 <= at - start <= 5:
            return False
    return at == end or code_at(chars, at) == _SLASH or code_at(chars, at) == _QUERY or code_at(chars, at) == _FRAGMENT
