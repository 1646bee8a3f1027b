"""Makes a small web of real documentation pages with planted faults, and sets clean pages aside for scoring.

Pages are set aside by the hash of their paths, and as whole sites. A page that is similar to one of these, or shares text with
them, is in neither part. Planted are menus, banners and footers of the sites that show a page, exact and near copies on other
sites, pages of repeated advertisements, and other or wrong encodings. Pages in other languages are real.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from heliostat.curation import decontamination
from heliostat.curation.encodings import decode
from heliostat.curation.html import extractor
from heliostat.curation.minhash.signatures import Parameters, keys
from resiliparse.parse.lang import detect_fast

MOST_BYTES = 100_000  # of a page
ASIDE = 26  # of 256 paths
LEAST_WORDS = 100  # of a page that is scored
SHARED = 0.1  # of a page's 13-grams may stand in pages that are aside
SITES = 12
EXACT, NEAR, SPAM = 0.12, 0.18, 0.10  # copies and advertisements, by real pages
CP1252, UTF16, WRONG = 0.08, 0.04, 0.03  # of pages
CHARSET = re.compile(r"<meta[^>]*charset[^>]*>|<\?xml[^>]*\?>", re.IGNORECASE)
PARAGRAPH = re.compile(r">([^<>]{40,})<")
WORD = re.compile(r"[a-z]{4,}")


@dataclass
class Web:
    """Holds pages to train on by path, clean texts by the part that they score, and counts of the kinds of pages."""

    pages: dict[str, bytes] = field(default_factory=dict)
    aside: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def make(folder: Path, apart: set[str], pages: int, scored: int) -> Web:
    """Makes a web of about so many real pages below a folder, whose folders are sites. `scored` pages of each kind are set
    aside."""
    web, main = Web(), extractor({"library": "resiliparse", "main_content": True, "max_undecodable": 0.05})
    clean = extractor({"library": "trafilatura", "main_content": True, "max_undecodable": 0.05})
    chosen = dict[str, tuple[str, str, str]]()  # what it is for, the page, its main text
    for path, data, what in _walk(folder, apart):
        most = pages if what == "train" else 2 * scored
        if sum(kind == what for kind, _, _ in chosen.values()) < most:
            text = main({}, data)[1].decode()
            if what == "train" or (len(text.split()) >= LEAST_WORDS and detect_fast(text)[0] == "en"):
                chosen[path] = what, decode(data)[0], text
    near = _near(chosen)
    for path, (what, page, text) in chosen.items():
        if path in near:
            web.count("much like a page aside")
        elif what != "train":
            found = clean({}, page.encode())[1].decode()
            if len(web.aside.setdefault(what, [])) < scored and len(found.split()) >= LEAST_WORDS:
                web.aside[what].append(found)
        else:
            web.count("real, English" if detect_fast(text)[0] == "en" else "real, of other languages")
            web.pages[path] = page.encode()
    return _planted(web)


def _walk(folder: Path, apart: set[str]) -> Iterator[tuple[str, bytes, str]]:
    """Yields (path, page, its part) in the order of the paths' hashes."""
    paths = (p for p in folder.rglob("*") if p.suffix in (".html", ".htm") and p.is_file() and p.stat().st_size < MOST_BYTES)
    for path in sorted((str(p.relative_to(folder)) for p in paths), key=digest):
        what = "another site" if path.partition("/")[0] in apart else "the same sites" if digest(path)[1] < ASIDE else "train"
        yield path, (folder / path).read_bytes(), what


def _near(chosen: dict[str, tuple[str, str, str]]) -> set[str]:
    """Finds pages that a band of MinHash, or a share of 13-grams, identifies as copies of a page set aside; all but one of
    these."""
    order = sorted(chosen, key=lambda path: chosen[path][0] == "train")
    found, bands, grams = set[str](), set[int](), set[int]()
    for first in range(0, len(order), 200):
        paths = order[first : first + 200]
        made, which = keys([chosen[path][2] for path in paths], Parameters(14, 8, 5, 1))
        for row, place in zip(made.tolist(), which.tolist(), strict=True):
            path = paths[place]
            mine = decontamination.grams([chosen[path][2]], 13)[0].tolist()
            if bands.intersection(row) or sum(gram in grams for gram in mine) > SHARED * len(mine):
                found.add(path)
            elif chosen[path][0] != "train":
                bands.update(row)
                grams.update(mine)
    return found


def _planted(web: Web) -> Web:
    rng, real = random.Random(0), [page.decode() for page in web.pages.values()]
    words = sorted({w for page in real[::10] for w in WORD.findall(page)})
    sites = [_site(rng, words, number) for number in range(SITES)]
    shown = [(page, "") for page in real]
    shown += [(page, "exact copies") for page in rng.sample(real, int(EXACT * len(real)))]
    shown += [(_changed(rng, page, words), "near copies") for page in rng.sample(real, int(NEAR * len(real)))]
    shown += [(_spam(rng, words), "advertisements") for _ in range(int(SPAM * len(real)))]
    web.pages = {}
    for number, (page, what) in enumerate(shown):
        site = rng.randrange(SITES)
        if what == "exact copies":  # nothing of the site
            data = page.encode()
        else:
            data, how = _encoded(rng, _dressed(page, *sites[site]))
            if how:
                web.count(how)
        if what:
            web.count(what)
        web.pages[f"site-{site}/{number}.html"] = data
    return web


def _site(rng: random.Random, words: list[str], number: int) -> tuple[str, str]:
    """Makes the menus and footers that a site puts above and below its pages."""
    links = [" ".join(rng.sample(words, 2)).title() for _ in range(40)]
    menu = "".join(f"<li><a href='/{i}'>{name}</a></li>" for i, name in enumerate(links[:28]))
    more = "".join(f"<li><a href='/more/{i}'>{name}</a></li>" for i, name in enumerate(links[28:]))
    above = (f"<div class='cookies'><p>We use cookies to improve your experience on site {number}. Accept all</p></div>"
             f"<div class='menu'><ul>{menu}</ul></div><div>Log in | Register | Share | Print this page</div>")  # fmt: skip
    below = (f"<div class='related'><h4>You may also like</h4><ul>{more}</ul></div><div class='footer'><p>Copyright {number} "
             "All rights reserved | Terms of use | Privacy policy | Contact | Subscribe to our newsletter</p></div>")  # fmt: skip
    return above, below


def _dressed(page: str, above: str, below: str) -> str:
    page = re.sub(r"(<body[^>]*>)", lambda m: m[1] + above, page, count=1, flags=re.IGNORECASE)
    return re.sub(r"(</body>)", lambda m: below + m[1], page, count=1, flags=re.IGNORECASE)


def _changed(rng: random.Random, page: str, words: list[str]) -> str:
    """Changes one of forty words in longer texts of a page."""

    def other(match: re.Match[str]) -> str:
        return ">" + re.sub(r"\w+", lambda w: rng.choice(words) if rng.random() < 1 / 40 else w[0], match[1]) + "<"

    return PARAGRAPH.sub(other, page)


def _spam(rng: random.Random, words: list[str]) -> str:
    things = rng.sample(words, 6)
    offers = [f"Buy cheap {a} {b} online, best {a} price, {b} discount today!" for a in things[:3] for b in things[3:]]
    lines = "".join(f"<p>{rng.choice(offers)}</p>" for _ in range(rng.randrange(30, 90)))
    lines += f"<p>{', '.join(rng.choices(things, k=200))}</p>"
    return f"<html><head><title>{things[0]}</title></head><body>{lines}</body></html>"


def _encoded(rng: random.Random, page: str) -> tuple[bytes, str]:
    """Encodes a page; returns its encoding, too, if it isn't UTF-8."""
    kind, page = rng.random(), CHARSET.sub("", page)
    names = [(CP1252, "windows-1252", "windows-1252"), (UTF16, "utf-16", "utf-16"), (WRONG, "utf-8", "iso-8859-1")]
    for share, codec, said in names:
        if (kind := kind - share) < 0:
            page = page.replace("<head>", f'<head><meta charset="{said}">', 1)
            return page.encode(codec, "xmlcharrefreplace"), f"as {codec}" + (f", said to be {said}" if codec != said else "")
    return page.replace("<head>", '<head><meta charset="utf-8">', 1).encode(), ""
