"""Tests near-duplicates: the curve of the signatures, exact clusters of any graph, the kept documents, and the same result for
any split."""

import itertools
import random
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from heliostat.curation.comparable import has_word, words
from heliostat.curation.minhash import components, exact, signatures
from heliostat.curation.minhash.signatures import Parameters, keys
from heliostat.curation.registry import parse
from heliostat.curation.stages.minhash import MinHash
from heliostat.storage.locations import Location
from heliostat.tasks import flow, spill
from heliostat.tasks.work import Work

from tests.unit.build_curation import HereFlow, curate, left, left_out, spelled

FINEWEB = Parameters(14, 8, 5, 1)


def text(rng: random.Random, length: int = 150) -> list[str]:
    return [f"w{spelled(rng.randrange(20_000))}" for _ in range(length)]


def changed(rng: random.Random, base: list[str], similarity: float) -> list[str]:
    """Replaces words in blocks at the end, so that the Jaccard similarity of the 5-grams is about the requested one."""
    shared = 2 * similarity / (1 + similarity)
    stop = round(len(base) * shared)
    return base[:stop] + text(rng, len(base) - stop)


def jaccard(a: list[str], b: list[str]) -> float:
    x, y = ({tuple(t[i : i + 5]) for i in range(len(t) - 4)} for t in (a, b))
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_pairs_meet_as_often_as_the_curve_says(similarity):
    """For 400 planted pairs, within three standard deviations of the binomial."""
    rng = random.Random(similarity)
    pairs = [(base, changed(rng, base, similarity)) for base in (text(rng) for _ in range(400))]
    made, which = keys([" ".join(t) for pair in pairs for t in pair], FINEWEB)
    assert len(which) == 800
    met = [bool((made[i] == made[i + 1]).any()) for i in range(0, 800, 2)]
    wanted = [1 - (1 - jaccard(*pair) ** 8) ** 14 for pair in pairs]
    spread = 3 * sum(p * (1 - p) for p in wanted) ** 0.5 + 1
    assert abs(sum(met) - sum(wanted)) < spread, (sum(met), sum(wanted))
    others = {k for row in made[::2] for k in row.tolist()}
    assert len(others) == 400 * 14, "texts that have nothing in common share no key"


def test_a_text_without_words_has_no_key_and_a_short_one_is_a_single_gram():
    made, which = keys(["one two", "?!", "One, two.", "one two three"], FINEWEB)
    assert which.tolist() == [0, 2, 3] and (made[0] == made[1]).all() and not (made[0] == made[2]).any()


# clusters ------------------------------------------------------------------------------------------------------------


def reference(edges: list[tuple[int, int]]) -> dict[int, int]:
    """Finds the smallest node of each node's component by union-find."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for a, b in edges:
        x, y = sorted((root(a), root(b)))
        parent[y] = x
    return {x: root(x) for x in list(parent)}


def shapes() -> dict[str, list[tuple[int, int]]]:
    rng = random.Random(0)
    ids = [rng.getrandbits(40) for _ in range(3000)]
    return {
        "path": list(itertools.pairwise(ids)),
        "star": [(ids[0], x) for x in ids[1:]],
        "pairs": [(ids[i], ids[i + 1]) for i in range(0, 3000, 2)],
        "tree": [(ids[i], ids[(i - 1) // 2]) for i in range(1, 3000)],
        "random": [(rng.choice(ids), rng.choice(ids)) for _ in range(2000)],
        "sorted path": [(i, i + 1) for i in range(2000)],
        "alternating path": [(a if a % 2 else 2000 - a, b if b % 2 else 2000 - b) for a, b in itertools.pairwise(range(1000))],
        "complete": [(ids[i], ids[j]) for i in range(14) for j in range(14, 300)],
    }


def starred(folder: str, shape: str, parts: int, room: int = 1 << 20) -> tuple[dict[int, int], int, list[tuple[int, int]]]:
    """Returns the smallest node of each other node's component, the number of rounds, and the edges."""
    edges = [(a, b) for a, b in shapes()[shape] if a != b]
    u, v = (np.array(side, np.uint64) for side in zip(*[*edges, *((b, a) for a, b in edges)], strict=True))
    flow = HereFlow(Work(Location(folder)))
    names = [spill.write(flow.work.spill, pa.table({"key": spill.mixed(u), "u": u, "v": v}), ("u", "v"))]
    members, rounds = components.stars(flow, "test", names, parts, room)
    rows = [row for name in members for t in spill.read(flow.work.spill, name) for row in t.to_pylist()]
    assert len(rows) == len({row["key"] for row in rows}), "each node once"
    return {row["key"]: row["root"] for row in rows}, rounds, edges


@pytest.mark.parametrize("parts", [1, 3, 20])
@pytest.mark.parametrize("shape", shapes())
def test_components_are_those_of_union_find(tmp_path, monkeypatch, shape, parts):
    monkeypatch.setattr(components, "parts_of", lambda names, most: most)
    found, rounds, edges = starred(str(tmp_path), shape, parts)
    assert found == reference(edges)
    assert rounds <= (2 if parts == 1 else 14)


@pytest.mark.parametrize("shape", ["alternating path", "path", "random"])
def test_rounds_never_have_much_more_than_twice_as_many_edges(tmp_path, monkeypatch, shape):
    """Connecting all neighbors of nodes of an alternating path gives 80 times as many edges, if every node has its own task."""
    monkeypatch.setattr(components, "parts_of", lambda names, most: most)
    monkeypatch.setattr(components, "forest", lambda edges: tuple(np.unique(edges, axis=1)))  # as if each node had its own task
    records, every = [], HereFlow.all
    monkeypatch.setattr(HereFlow, "all", lambda *arguments: records.append(every(*arguments)) or records[-1])
    found, _, edges = starred(str(tmp_path), shape, 4)
    assert found == reference(edges)
    sizes = [sum(record["edges"] for record in of_round) for of_round in records]
    assert max(sizes) <= 2 * components.MOST_GROWTH * sizes[0]


@pytest.mark.parametrize("shape", ["star", "tree"])
def test_a_node_with_more_neighbors_than_memory_holds_has_the_same_component(tmp_path, monkeypatch, shape):
    """Batches end at reads, so these are small here. No batch has more edges than `room` and a read."""
    monkeypatch.setattr(spill, "GROUP_BYTES", 24 * 500)
    monkeypatch.setattr(spill, "LOCAL_BYTES", 24 * 500)
    batches, largest = components._batches, [0]

    def seen(*arguments):
        for batch in batches(*arguments):
            largest[0] = max(largest[0], len(batch[0]))
            yield batch

    monkeypatch.setattr(components, "_batches", seen)
    found, _, edges = starred(str(tmp_path), shape, 2, room=1000)
    assert found == reference(edges)
    assert 1000 <= largest[0] <= 1500


# who stays -----------------------------------------------------------------------------------------------------------


def planted(clusters: int = 40) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Returns texts by id, and the ids of each cluster: two to five texts that differ in their last words. Other texts are in no
    cluster."""
    rng, texts, groups = random.Random(7), dict[str, str](), dict[str, set[str]]()
    for c in range(clusters):
        base = text(rng, 200)
        for i in range(rng.randrange(2, 6)):
            id = f"{rng.randrange(10**6):06d}-{c}"
            texts[id] = " ".join([*base, *text(rng, i)])
            groups.setdefault(str(c), set()).add(id)
    texts |= {f"alone-{i}": " ".join(text(rng)) for i in range(60)}
    return texts, groups


def test_one_of_each_cluster_stays_and_the_others_say_for_whom(tmp_path):
    texts, groups = planted()
    found, here = curate(tmp_path, texts, [{"stage": "minhash"}])
    kept, gone = left(found, here), left_out(found, here)
    assert {id for id in texts if id.startswith("alone")} <= kept.keys() and kept.keys() | gone.keys() == texts.keys()
    for members in groups.values():
        best = min(members, key=lambda id: (-len(texts[id].encode()), id))
        assert kept.keys() & members == {best}, "the longest stays, of equals the first"
        for id in members - {best}:
            assert gone[id] == ("0 minhash", "near_duplicate", f"{best} (one of {len(members)})")
    assert found.reasons == {"0 minhash: near_duplicate": len(gone)}


@pytest.mark.parametrize("seed", range(4))
def test_the_decisions_are_those_of_union_find_over_all_keys(tmp_path, seed):
    """With short texts of few words, clusters of all sizes and shapes form: chains, copies, and most documents in one cluster."""
    rng, within = random.Random(seed), {"within": "dump"} if seed % 2 else {}
    vocabulary = [spelled(i) for i in range(8 + 12 * seed)]
    texts = {f"{i:03d}": " ".join(rng.choices(vocabulary, k=rng.randrange(1, 6))) for i in range(120)}
    texts |= {f"copy{i}": rng.choice([str, str.upper, "{}!".format])(rng.choice(list(texts.values()))) for i in range(60)}
    texts |= {f"wordless{i}": "?!" for i in range(5)}
    columns = {id: {"dump": rng.randrange(2)} for id in texts}
    made, which = keys(list(texts.values()), Parameters(3, 2, 2, 1))
    members = [list(texts)[i] for i in which]
    bands = {
        id: [(key, columns[id]["dump"] if within else 0) for key in row] for id, row in zip(members, made.tolist(), strict=True)
    }
    number = {name: i for i, name in enumerate([*members, *{key for row in bands.values() for key in row}])}
    root = reference([(number[id], number[key]) for id, row in bands.items() for key in row])
    clusters = {at: [id for id in members if root[number[id]] == at] for at in root.values()}
    wanted = {}
    for cluster in clusters.values():
        kept = min(cluster, key=lambda id: (-len(texts[id].encode()), id))
        wanted |= {id: ("0 minhash", "near_duplicate", f"{kept} (one of {len(cluster)})") for id in cluster if id != kept}
    stage = {"stage": "minhash", "bands": 3, "rows": 2, "ngram": 2, **within}
    found, here = curate(tmp_path, texts, [stage], 1 + 2 * seed, 1 << 15, columns=columns, seed=seed)
    assert left_out(found, here) == wanted and len(wanted) > 30


def test_large_columns_are_not_copied_and_the_decisions_are_the_same(tmp_path, monkeypatch):
    """The choice reads small columns from files of their own. Records of earlier versions name no such file."""
    texts, _ = planted(12)
    columns = {id: {"quality": len(id) + i} for i, id in enumerate(sorted(texts))}
    stage, decisions = {"stage": "minhash", "keep": "best", "column": "quality"}, []
    for folder, most in (("small", signatures.ABOUT_BYTES), ("large", 10)):
        monkeypatch.setattr(signatures, "ABOUT_BYTES", most)
        found, here = curate(tmp_path / folder, texts, [stage], columns=columns)
        signed = [here.work.read("minhash-0-sign", path.split("/")[-1][:-5]) for path, _ in here.work.location.files()
                  if path.startswith("done/minhash-0-sign/")]  # fmt: skip
        assert signed and all(bool(record["about"]) == (most > 10) for record in signed)
        decisions.append(left_out(found, here))
    assert decisions[0] == decisions[1] and decisions[0]


@pytest.mark.parametrize(("rule", "column"), [("first", ""), ("oldest", "date"), ("best", "quality")])
def test_the_rule_says_who_stays(tmp_path, rule, column):
    texts, groups = planted(12)
    rng = random.Random(1)
    columns = {id: {"date": f"20{rng.randrange(10, 30)}-01-01", "quality": rng.random()} for id in sorted(texts)}
    for members in groups.values():
        columns[min(members)] = {}  # one without a date, and without a number
    order = {"first": lambda id: id, "oldest": lambda id: (columns[id].get("date", "z"), id),
             "best": lambda id: (-columns[id].get("quality", -1), id)}[rule]  # fmt: skip
    stage = {"stage": "minhash", "keep": rule, **({"column": column} if column else {})}
    found, here = curate(tmp_path, texts, [stage], columns=columns)
    kept = left(found, here)
    assert [kept.keys() & members for members in groups.values()] == [{min(members, key=order)} for members in groups.values()]


def test_the_same_stay_however_the_input_is_cut(tmp_path):
    """Other pieces, runs, parts of the keys, and orders, and tasks that run twice, give the same decisions."""
    texts, _ = planted()
    texts |= {f"copy-{id}": value for id, value in list(texts.items())[:30]}
    first, here = curate(tmp_path / "a", texts, [{"stage": "minhash"}], pieces=1, memory_limit=1 << 30)
    backwards = dict(reversed(texts.items()))
    for seed, pieces, limit in [(1, 7, 1 << 30), (2, 40, 1 << 16), (3, 3, 1 << 18)]:
        again, there = curate(tmp_path / str(seed), backwards, [{"stage": "minhash"}], pieces, limit, seed=seed)
        assert left(again, there) == left(first, here) and left_out(again, there) == left_out(first, here)
    assert there.done["minhash-0-edges"] > 1, "the keys were in parts"


@pytest.mark.parametrize(("within", "seed"), [("", 0), ("dump", 1), ("", 2)])
def test_a_text_is_signed_once_and_the_decisions_are_as_if_each_copy_were_signed(tmp_path, monkeypatch, within, seed):
    """Copies are in one run and in several, some without words. Without the search for equal texts, each run signs its own."""
    rng, signed = random.Random(seed), list[str]()
    bases = [" ".join(text(rng, rng.randrange(1, 12))) for _ in range(40)] + ["?!", "--", "   .", "\u0301"]
    near = [" ".join(changed(rng, base.split(), 0.9)) for base in bases[:40]]
    texts = {f"{i:04d}": rng.choice(rng.choice([bases, bases[:3], near])) for i in range(500)}
    columns = {id: {"dump": rng.randrange(3)} for id in texts}
    stage = {"stage": "minhash", "bands": 4, "rows": 2, "ngram": 2, **({"within": within} if within else {})}

    def counted(some, parameters):
        signed.extend(some)
        return keys(some, parameters)

    def run(folder: str) -> tuple[dict, dict]:
        signed.clear()
        found, here = curate(tmp_path / folder, texts, [stage], 8, 1 << 18, columns=columns, seed=seed, again=0)
        return left(found, here), left_out(found, here)

    monkeypatch.setattr(signatures, "keys", counted)
    after, different = run("after"), {(value, columns[id]["dump"] if within else 0) for id, value in texts.items()}
    assert len(signed) == len(different)
    monkeypatch.setattr(MinHash, "_repeated", lambda self, flow, kind, runs, limit: [None] * len(runs))
    assert run("before") == after and len(signed) > 2 * len(different)


def test_another_input_signs_only_the_runs_that_share_a_text_with_it(tmp_path):
    """The new input comes first, so all runs have other numbers than before."""
    rng = random.Random(6)
    texts = {f"{i}-{j}": " ".join(text(rng)) for i in range(6) for j in range(5)}
    pieces = [[f"{i}-{j}" for j in range(5)] for i in range(6)]
    texts |= {"2-0": texts["1-0"], "new-0": texts["3-0"], "new-1": " ".join(text(rng))}
    curate(tmp_path, texts, [{"stage": "minhash"}], pieces)
    found, here = curate(tmp_path, texts, [{"stage": "minhash"}], [["new-0", "new-1"], *pieces])
    assert (here.done["minhash-0-sign"], here.kept["minhash-0-sign"]) == (2, 5)
    assert left(found, here).keys() == texts.keys() - {"2-0", "new-0"}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_has_word_is_whether_words_finds_one(form):
    rng, kinds = random.Random(0), ["a", "\u0301", "!", " ", "\u0e01", "7", "\u200d", "\u3099", ".", "\u00e9", "\u4e2d", "\n"]
    for size in (0, 1, 2, 3, 70):
        for _ in range(200):
            value = unicodedata.normalize(form, "".join(rng.choices(kinds[1:4] if size == 70 else kinds, k=size)))
            assert has_word(value) == bool(words([value]).counts[0]), ascii(value)


@pytest.mark.ci
def test_a_part_is_not_read_out_of_every_run(tmp_path, monkeypatch):
    """Runs and parts both grow with the input. Reading each part from each run would cost their product."""
    texts, _ = planted()
    wanted, here = curate(tmp_path / "whole", texts, [{"stage": "minhash"}])
    reads, read = [0], spill.read

    def counted(*arguments, **more):
        reads[0] += 1
        return read(*arguments, **more)

    monkeypatch.setattr(spill, "read", counted)
    found, there = curate(tmp_path / "cut", texts, [{"stage": "minhash"}], pieces=60, memory_limit=1 << 16)
    took, runs, done = reads[0], len(found.runs), {name.removeprefix("minhash-0-"): n for name, n in there.done.items()}
    parts = done["edges"]
    assert (runs, parts) == (60, 8) and left(found, there) == left(wanted, here)
    each_run, each_part = 4 * runs, parts * (done["meet"] + done["candidates"] + done["decide"])
    each_star = done["stars"] * (done["meet"] + parts)
    assert took <= 1.4 * (each_run + each_part + each_star), "of the tasks here some run twice"
    assert done["meet"] < 2 * parts and done["decide"] < runs / 4


def cased(rng: random.Random, words: list[str]) -> list[str]:
    return [rng.choice([word, word.upper(), word.title()]) for word in words]


CHANGES = {
    "numbers": lambda rng, words: [f"{rng.randrange(10**6):,}" if word.startswith("#") else word for word in words],
    "accents": lambda rng, words: [word.replace("a", "\u00e1").replace("e", "\u00ea") for word in words],
    "accents as marks": lambda rng, words: [word.replace("a", "a\u0301").replace("e", "e\u0302") for word in words],
    "case": cased,
    "punctuation": lambda rng, words: [word + rng.choice([",", ".", "!", " --", "\u201d", "\u3002"]) for word in words],
    "white space": lambda rng, words: [word + rng.choice(["\n", "\t", "\u00a0", "  "]) for word in words],
}


@pytest.mark.parametrize("change", CHANGES)
def test_texts_that_differ_in_what_fineweb_leaves_out_are_near_duplicates(tmp_path, change):
    """All 25 pairs are found, with a number as every tenth word."""
    rng, texts = random.Random(change), dict[str, str]()
    for i in range(25):
        base = [f"#{rng.randrange(10**4)}" if rng.random() < 0.1 else word for word in text(rng)]
        texts |= {f"{i}": " ".join(base).replace("#", ""), f"{i}-too": " ".join(CHANGES[change](rng, base)).replace("#", "")}
    found, here = curate(tmp_path, texts, [{"stage": "minhash", "keep": "first"}])
    assert sorted(left(found, here)) == sorted(str(i) for i in range(25))


def test_tables_of_numbers_and_scripts_without_spaces_are_told_apart(tmp_path):
    """Texts without a common part stay, although all of their words are numbers, or only vowel signs differ."""
    rng = random.Random(4)
    tables = {f"t{i}": "\n".join(" | ".join(str(rng.randrange(1000)) for _ in range(6)) for _ in range(30)) for i in range(20)}
    chinese = {f"c{i}": "".join(chr(rng.randrange(0x4E00, 0x9FFF)) for _ in range(200)) for i in range(20)}
    signs = [chr(c) for c in range(0x93E, 0x94D)]
    hindi = {
        f"h{i}": " ".join("\u0915" + rng.choice(signs) + "\u0924" + rng.choice(signs) for _ in range(100)) for i in range(20)
    }
    found, here = curate(tmp_path, tables | chinese | hindi, [{"stage": "minhash"}])
    assert left(found, here) == tables | chinese | hindi


def test_documents_are_compared_within_a_columns_value_alone(tmp_path):
    """FineWeb compares the pages of one crawl, so the same page of another crawl stays."""
    base = " ".join(text(random.Random(9)))
    dumps = {"a": "2023-14", "b": "2023-14", "c": "2024-10", "d": "2024-10", "e": None, "f": None}
    columns = {id: {"dump": dump} if dump else {} for id, dump in dumps.items()}
    found, here = curate(tmp_path, dict.fromkeys(dumps, base), [{"stage": "minhash", "within": "dump"}], columns=columns)
    assert sorted(left(found, here)) == ["a", "c", "e"]
    assert left_out(found, here)["d"] == ("0 minhash", "near_duplicate", "c (one of 2)")


def test_thousands_of_copies_are_a_row_of_each_run_to_the_tasks_that_compare(tmp_path, monkeypatch):
    """The tasks don't get a row per copy under each of its keys. Otherwise a page that half the web has would fill one task."""
    most, now, execute, read = Counter[str](), ["", 0], flow.execute, spill.read

    def executed(work, run, kind, *more, **shared):
        now[:] = kind.rpartition("-")[2], 0
        return execute(work, run, kind, *more, **shared)

    def counted(*arguments, **more):
        for table in read(*arguments, **more):
            now[1] += len(table)
            most[now[0]] = max(most[now[0]], now[1])
            yield table

    monkeypatch.setattr(flow, "execute", executed)
    monkeypatch.setattr(spill, "read", counted)
    rng, pieces, copies = random.Random(3), 20, 2000
    page, others = " ".join(text(rng)), {f"other{i}": " ".join(text(rng)) for i in range(40)}
    texts = {f"copy{i:04d}": page if i % 2 else page.upper() for i in range(copies)} | others
    found, here = curate(tmp_path, texts, [{"stage": "minhash", "keep": "first"}], pieces, 64 << 20)
    assert left(found, here) == others | {"copy0000": page.upper()} and len(found.runs) == pieces
    gone = left_out(found, here)
    assert len(gone) == copies - 1 and set(gone.values()) == {("0 minhash", "near_duplicate", f"copy0000 (one of {copies})")}
    tasks = {kind: most.get(kind, 0) for kind in ("meet", "edges", "stars", "choose")}
    assert min(tasks.values()) > 0, "each kind of tasks was counted"
    assert max(tasks.values()) <= 14 * (pieces + len(others)), tasks


@pytest.mark.parametrize(("keys", "message"), [({"keep": "oldest"}, "'oldest' needs a column"), ({"column": "x"}, "compares no"),
                                               ({"band": 3}, "band: unknown key. Did you mean 'bands'")])  # fmt: skip
def test_what_is_wrong_is_said(keys, message):
    with pytest.raises(ValueError, match=message):
        parse({"stage": "minhash", **keys})


@pytest.mark.parametrize(("within", "seed"), [(w, s) for w in ("", "dump") for s in range(8)])
def test_the_first_document_of_each_text_does_not_depend_on_the_tables(within, seed):
    """A run is read in tables. Equal texts have equal keys, and different texts may have equal keys too."""
    rng = random.Random(seed)
    digests = sorted(bytes([rng.randrange(4)]) * 8 + bytes([rng.randrange(3)]) * 24 for _ in range(60))
    dumps = [rng.randrange(2) for _ in digests]
    table = pa.table({
        "key": np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64),
        "row": np.arange(100, 160, dtype=np.uint32), "hash": pa.array(digests, pa.binary(32)),
        "columns": [f'{{"dump": {dump}}}' for dump in dumps],
    })  # fmt: skip
    cuts = sorted({0, 60, *(rng.randrange(60) for _ in range(rng.randrange(20)))})
    parts = list(exact.with_first((table.slice(a, b - a) for a, b in itertools.pairwise(cuts)), within))
    texts = [(digest, dump if within else 0) for digest, dump in zip(digests, dumps, strict=True)]
    assert np.concatenate([first for _, _, first in parts]).tolist() == [100 + texts.index(text) for text in texts]
    assert len({tuple(text) for _, some, _ in parts for text in some.tolist()}) == len(set(texts))
