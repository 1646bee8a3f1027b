"""Measures recall of `minhash` and `decontaminate`, and of datatrove's, on planted pairs with one difference each. By hand:

    apt-get download python3.13-doc debian-reference-fr debian-reference-zh-cn; dpkg-deb -x NAME.deb FOLDER
    python -m tests.benchmarks.planted_pairs FOLDER [--datatrove VENV/bin/python] [--pairs 50]

A pair is a passage of documentation and a copy with the row's change. Both are among passages without copies, and tables of
random numbers. Near-duplicates: a pair is found if both are in one cluster. Other pairs in clusters are false if they share less
than a tenth of their 5-grams. Decontamination: the first words of the passage are an example of an evaluation set, and the copy
must be dropped. Passages that share no 13 words with an example must stay.

`--speed` measures the signatures of the passages instead, for heliostat of this tree, and of another with `--before
TREE/platform`, interleaved.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path

from tests.benchmarks import harness, minhash_recall
from tests.benchmarks.minhash_recall import SHOWN, jaccard

N = 13
EXAMPLE = 60  # words of a passage that are an example; of Chinese, twice as many characters
BACKGROUND, TABLES = 1000, 50
MENU = "Home | Products | Documentation | Download | Community | News | Blog | Search | Log in | Register | English | Français"
FOOTER = "Copyright. All rights reserved. Terms of use, privacy, imprint, contact. Follow us. Subscribe to the newsletter."
NUMBER = re.compile(r"\d+")
WIDE = str.maketrans("，。：；（）！？", ",.:;()!?")


def passages(lines: Iterable[str], size: Callable[[str], int], least: int) -> Iterator[str]:
    """Joins paragraphs to passages of at least so many words."""
    held = list[str]()
    for paragraph in "".join(lines).split("\n\n"):
        held.append(paragraph)
        if sum(map(size, held)) >= least:
            yield "\n\n".join(held).strip()
            held = []


def words(text: str) -> int:
    return len(text.split())


def ideographs(text: str) -> int:
    return sum("\u4e00" <= c <= "\u9fff" for c in text)


def replaced(rng: random.Random, text: str, others: list[str], share: float) -> str:
    return re.sub(r"\w+", lambda found: rng.choice(others) if rng.random() < share else found[0], text)


def without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")


def rewrapped(text: str) -> str:
    """Joins Chinese to one line, without spaces next to its characters, and with Latin punctuation."""
    return re.sub(r"(?<=[\u3000-\uffef])\s+|\s+(?=[\u3000-\uffef])", "", text).translate(WIDE)


def other_characters(rng: random.Random, text: str, others: str) -> str:
    return "".join(rng.choice(others) if "\u4e00" <= c <= "\u9fff" and rng.random() < 0.02 else c for c in text)


def other(folder: Path, language: str) -> str:
    """Reads Debian's reference in another language."""
    return gzip.decompress(next(folder.rglob(f"*.{language}.txt.gz")).read_bytes()).decode()


def plant(folder: Path, pairs: int) -> tuple[dict[str, str], dict[str, list[tuple[str, str]]], dict[str, str]]:
    """Returns texts by id, the pairs of each row, and the example of each copy."""
    rng = random.Random(0)
    sources = sorted(folder.rglob("*.rst.txt"))
    if not sources:
        raise SystemExit(f"{folder} has no *.rst.txt; unpack python3.13-doc there")
    english = [p for path in sources for p in passages(path.open(encoding="utf-8"), words, 250)]
    french, chinese = list(passages([other(folder, "fr")], words, 200)), list(passages([other(folder, "zh-cn")], ideographs, 250))
    chinese = [text for text in chinese if "+--" not in text]  # tables, of which the first words are a border
    for some in (english, french, chinese):
        rng.shuffle(some)
    french = [unicodedata.normalize("NFC", text) for text in french]
    vocabulary, characters = re.findall(r"\w+", " ".join(english[:200])), re.sub(r"[^\u4e00-\u9fff]", "", "".join(chinese))
    numbered = [text for text in english if 0.05 * words(text) <= len(NUMBER.findall(text)) <= 0.3 * words(text)]
    english = [text for text in english if text not in set(numbered)]
    rows: dict[str, tuple[list[str], int, Callable[[str], str]]] = {
        "other numbers": (numbered, pairs, lambda t: NUMBER.sub(lambda _: str(rng.randrange(10 ** rng.randrange(1, 7))), t)),
        "no accents (French)": (french, pairs, without_accents),
        "NFD (French)": (french, pairs, lambda t: unicodedata.normalize("NFD", t)),
        "other lines and punctuation (Chinese)": (chinese, pairs, rewrapped),
        "2 % of characters (Chinese)": (chinese, pairs, lambda t: other_characters(rng, t, characters)),
        "5 % of words": (english, 4 * pairs, lambda t: replaced(rng, t, vocabulary, 0.05)),
        "1 % of words": (english, pairs, lambda t: replaced(rng, t, vocabulary, 0.01)),
        "exact copy": (english, pairs, lambda t: t),
        "menu and footer added": (english, pairs, lambda t: f"{MENU}\n\n{t}\n\n{FOOTER}"),
    }
    texts, planted, examples = dict[str, str](), defaultdict[str, list[tuple[str, str]]](list), dict[str, str]()
    for row, (given, count, change) in rows.items():
        for _ in range(min(count, len(given))):
            text, id = given.pop(), f"d{len(texts)}"
            texts |= {id: text, f"{id}-copy": change(text)}
            planted[row].append((id, f"{id}-copy"))
            examples[f"{id}-copy"] = text[: 2 * EXAMPLE] if "Chinese" in row else " ".join(text.split()[:EXAMPLE])
    others = [*english, *french, *chinese, *numbered]
    texts |= {f"other{i}": text for i, text in enumerate(rng.sample(others, min(len(others), BACKGROUND)))}
    for i in range(TABLES):
        texts[f"table{i}"] = "\n".join(" | ".join(str(rng.randrange(10**4)) for _ in range(6)) for _ in range(40))
    return texts, planted, examples


def written(folder: Path, texts: dict[str, str], examples: dict[str, str]) -> None:
    (folder / "in").mkdir()
    order = sorted(texts)
    random.Random(1).shuffle(order)
    lines = [json.dumps({"id": id, "text": texts[id]}, ensure_ascii=False) for id in order]
    (folder / "in" / "a.jsonl").write_text("\n".join(lines) + "\n")
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in examples.values()]
    (folder / "examples.jsonl").write_text("\n".join(rows) + "\n")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def ours(place: str) -> list[str]:
    """Lists the documents that `decontaminate` drops."""
    from heliostat.curation.stage import Document
    from heliostat.curation.stages.decontaminate import Decontaminate

    folder = Path(place)
    work = Decontaminate(sets={"planted": str(folder / "examples.jsonl")}, n=N).open()
    return [row["id"] for row in read(folder / "in" / "a.jsonl") if not work([Document(row["id"], row["text"])])[0].document]


def theirs(place: str) -> list[str]:
    """Lists the documents that datatrove's filter drops, with the hashes of its indexer, which needs lighteval."""
    from datatrove.data import Document
    from datatrove.pipeline.decont import n_grams
    from datatrove.utils.text import ngrams, simplify_text

    folder = Path(place)
    filtered = n_grams.NGramsDecontFilter(str(folder), config=n_grams.NGramsDecontConfig(n_grams=N))
    filtered._index_hashes = {
        filtered.hash_func(" ".join(gram)): "planted"
        for row in read(folder / "examples.jsonl")
        for gram in ngrams(filtered.tokenizer.word_tokenize(simplify_text(row["text"], filtered.config.norm_config)), N)
    }
    filtered.stat_update = lambda *names, **more: None
    return [row["id"] for row in read(folder / "in" / "a.jsonl")
            if filtered.filter(Document(text=row["text"], id=row["id"])) is not True]  # fmt: skip


def clusters_of(told: dict[str, str], texts: dict[str, str]) -> dict[str, list[str]]:
    groups = defaultdict[str, list[str]](list)
    for id in texts:
        groups[told.get(id, f"alone {id}" if id not in told.values() else id)].append(id)
    return groups


def shares(a: str, b: str) -> bool:
    """Returns whether two texts share N consecutive words, as letters and digits."""
    x, y = ["".join(c if c.isalnum() else " " for c in t.lower()).split() for t in (a, b)]
    return bool({tuple(x[i : i + N]) for i in range(len(x) - N + 1)} & {tuple(y[i : i + N]) for i in range(len(y) - N + 1)})


def compare(folder: Path, pythons: dict[str, str], pairs: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        texts, planted, examples = plant(folder, pairs)
        written(here, texts, examples)
        print(f"{len(texts):,} documents, {sum(len(t.encode()) for t in texts.values()) / 1e6:.1f} MB", flush=True)
        cells, dropped, wrong = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list), list[str]()
        for side, python in pythons.items():
            clusters, drops = (minhash_recall.ours, ours) if side == "heliostat" else (minhash_recall.theirs, theirs)
            groups = clusters_of(harness.apart(clusters, temporary, python=python)[0], texts)
            of = {id: cluster for cluster, ids in groups.items() for id in ids}
            gone = set(harness.apart(drops, temporary, python=python)[0])
            for row, some in planted.items():
                cells[row].append(f"{sum(of[a] == of[b] for a, b in some)} of {len(some)}")
                dropped[row].append(f"{sum(b in gone for _, b in some)} of {len(some)}")
            joined = [pair for ids in groups.values() for pair in combinations(sorted(ids)[:SHOWN], 2)]
            false = [(a, b) for a, b in joined if b != f"{a}-copy" and jaccard(texts[a], texts[b]) < 0.1]
            told = [id for id in gone if not id.endswith("-copy") and f"{id}-copy" not in texts]
            clean = [id for id in told if not any(shares(texts[id], text) for text in examples.values())]
            wrong.append(f"{side}: {len(false)} of {len(joined):,} pairs in clusters are of unrelated documents {false[:3]}; "
                         f"{len(clean)} documents without a shared n-gram were dropped {clean[:3]}")  # fmt: skip
    heads = [f"`minhash`, {side}" if side == "heliostat" else f"MinHash, {side}" for side in pythons]
    harness.head("the copy has", *heads, *(f"decontamination, {side}" for side in pythons))
    for row in cells:
        harness.row(row, *cells[row], *dropped[row])
    print(*wrong, sep="\n")


def signatures(file: str) -> float:
    """Returns the CPU seconds of the signatures of texts, 2,000 at a time."""
    from heliostat.curation.minhash.signatures import Parameters, keys

    texts, parameters = json.loads(Path(file).read_text()), Parameters(14, 8, 5, 1)
    keys(texts[:50], parameters)
    return harness.cpu(lambda: [keys(texts[at : at + 2000], parameters) for at in range(0, len(texts), 2000)])


def speed(folder: Path, before: str, times: int = 5) -> None:
    """Measures MB/s of signatures per core, interleaved with another tree."""
    english = [path.read_text() for path in sorted(folder.rglob("*.rst.txt"))]
    others = [other(folder, language) for language in ("fr", "zh-cn")]
    mixed = [text[at : at + 5000] for text in others for at in range(0, len(text), 5000)]
    trees = {tree: f"{tree}:{harness.ROOT}" for tree in (before, str(harness.ROOT / "platform")) if tree}
    for name, texts in {"English": english, "French and Chinese": mixed}.items():
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(texts, file)
            file.flush()
            ways = {tree: partial(harness.apart, signatures, file.name, PYTHONPATH=path) for tree, path in trees.items()}
            took = harness.by_turns(ways, times)
        size = sum(len(text.encode()) for text in texts) / 1e6
        harness.row(f"{name}, {size:.1f} MB", *(f"{size / min(seconds for seconds, _ in some):.1f}" for some in took.values()))


def main() -> None:
    asked = harness.arguments(__doc__, folder=Path, datatrove="", pairs=50, speed=False, before="")
    if asked.speed:
        speed(asked.folder, asked.before)
    else:
        sides = {"heliostat": sys.executable} | ({"datatrove": asked.datatrove} if asked.datatrove else {})
        compare(asked.folder, sides, asked.pairs)


if __name__ == "__main__":
    main()
