"""Tests fill-in-the-middle: rearranged documents decode to their text, depend only on their hash and the seed, and are
counted."""

import hashlib
import json
import math
import random
from itertools import chain, pairwise

import numpy as np
import pytest
import yaml
from heliostat.curation import forget
from heliostat.curation.text import infilling, sources, tokens
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.infilling import Arranged, FillInTheMiddle, arrange
from heliostat.curation.text.tasks import TextSource
from heliostat.data import infilling as layout
from heliostat.data import manifest
from heliostat.data.manifest_table import in_memory
from heliostat.errors import ConfigError
from heliostat.evaluation import held_out as suites
from heliostat.evaluation.documents import Documents, held_out
from heliostat.recipes.text import vocabulary
from heliostat.recipes.text.vocabulary import sizes
from heliostat.storage.locations import Location
from heliostat.tasks.work import Work
from tokenizers import AddedToken, Tokenizer

from tests.unit import build_pages
from tests.unit.build_curation import HereFlow
from tests.unit.build_making import text_making
from tests.unit.test_tokenizers import END, HELD, trained

BPE = {"vocab_size": 400, "train_bytes": 50_000, "path": None, "end_of_document": END}
KEYS = FillInTheMiddle(rate=0.5, spm_rate=0.5, span_chars=700, seed=3)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def joined(document: list) -> str:
    return "".join(text if isinstance(text, str) else text.prefix + text.middle + text.suffix for text in document)


def test_the_pieces_are_the_document_and_follow_from_its_hash_and_the_seed():
    for text in (*build_pages.texts(), *HELD, "a", "👩‍👩‍👧 e\u0301" * 300):
        for most in (16, 700, None):
            keys = FillInTheMiddle(rate=0.7, span_chars=most)
            made = arrange(text, digest(text), keys)
            assert joined(made) == text and made == arrange(text, digest(text), keys)
            assert not any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(made))
            assert most is None or all(len(joined([one])) <= most for one in made if isinstance(one, Arranged))
    others = [arrange(text, digest(text), FillInTheMiddle(seed=seed)) for text in build_pages.texts() for seed in (0, 1)]
    assert sum(a != b for a, b in zip(others[::2], others[1::2], strict=True)) > len(others) / 4


def test_as_many_are_rearranged_as_the_rates_say_and_cuts_are_anywhere():
    """Within five standard errors of 4,000 draws, which are independent."""
    count, text = 4000, "x" * 99
    keys = FillInTheMiddle(rate=0.3, spm_rate=0.8)
    made = [arrange(text, digest(str(i)), keys)[0] for i in range(count)]
    found = [one for one in made if isinstance(one, Arranged)]
    assert abs(len(found) / count - 0.3) < 5 * math.sqrt(0.3 * 0.7 / count)
    assert abs(np.mean([one.suffix_first for one in found]) - 0.8) < 5 * math.sqrt(0.8 * 0.2 / len(found))
    for piece in ("prefix", "middle", "suffix"):  # each is a third on average, and may be nothing
        lengths = [len(getattr(one, piece)) for one in found]
        assert abs(np.mean(lengths) - 33) < 4 and min(lengths) == 0 and max(lengths) > 80
    assert all(isinstance(arrange(text, digest(str(i)), FillInTheMiddle(rate=1))[0], Arranged) for i in range(99))


def marked(kind: str) -> str:
    """Returns a tokenizer with Code Llama's markers as plain tokens, as in some models' tokenizers."""
    made = Tokenizer.from_str(trained(kind))
    made.add_tokens([AddedToken(name, normalized=False) for name in layout.KNOWN[3]])
    return made.to_str()


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, prefixed", "byte fallback", "metaspace"])
def test_tokens_are_the_texts_and_markers_stand_for_no_bytes(kind):
    """Decoding gives the document, and its bytes equal those of the tokens.

    This also holds if a text spells a marker, and if a tokenizer puts a space before each text.
    """
    names = infilling.names(tokens.load(marked(kind)))
    tokenizer = tokens.load(infilling.marking(marked(kind), names))
    end, markers = tokenizer.token_to_id(END), layout.find(tokenizer, names)
    texts = [*HELD, *(build_pages.texts()[:8] if "byte" in kind else ()), *([f"x {names[1]} y" * 9] if "level" in kind else ())]
    arranged = [arrange(text, digest(text), FillInTheMiddle(rate=0.8, span_chars=300)) for text in texts]
    encoded = infilling.encode(tokenizer, arranged, end, markers)
    inside, opening = (np.array(one) for one in sizes(tokenizer, tokenizer.get_vocab_size()))
    for text, document, ids in zip(texts, arranged, encoded, strict=True):
        parts = [tokenizer.decode(part, skip_special_tokens=False) for part in layout.texts(ids, end, markers)]
        for part, one in zip(parts, map(joined, ([one] for one in document)), strict=True):
            assert part == one if kind == "byte-level" else part.lstrip(" ") == one.lstrip(" ")  # decoders add one, or take one
        whole = layout.text(tokenizer, ids, end, markers)
        assert whole == text if kind == "byte-level" else whole.replace(" ", "") == text.replace(" ", "")
        if not any(isinstance(one, str) for one in document):
            assert whole == text
        first = np.concatenate([[True], ids[:-1] == end])
        untold = (
            sum(isinstance(one, str) and one.startswith(" ") for one in document)
            if kind in ("byte-level, prefixed", "metaspace")
            else 0
        )
        assert int(np.where(first, opening[ids], inside[ids]).sum()) == len(text.encode()) - untold
        found, counts = [one for one in document if isinstance(one, Arranged)], markers.counted([ids])
        assert counts["texts"] == len(found) and counts["documents"] == bool(found)
        assert counts["suffix_first"] == sum(one.suffix_first or not one.prefix for one in found)


def test_a_tokenizer_that_cannot_do_it_is_refused():
    with pytest.raises(
        ConfigError, match=r"none of the tokens that mark prefix, .*<fim_prefix>.*Use another tokenizer, or train a tokenizer"
    ):
        infilling.names(tokens.load(trained("byte fallback")))
    with pytest.raises(ConfigError, match="puts a space before each text"):
        layout.encode(tokens.load(trained("word pieces")), ["a"])


def test_a_pretrained_model_must_have_the_markers_of_the_data():
    data = Tokenizer.from_str(infilling.marking(marked("byte-level"), layout.KNOWN[3]))
    model, end = Tokenizer.from_str(trained("byte-level")), data.token_to_id(END)
    ids = [data.token_to_id(name) for name in layout.KNOWN[3]]
    assert vocabulary.difference(data, model, [end]) is None and vocabulary.difference(data, data, [end, *ids]) is None
    assert "documents mark pieces with '▁<PRE>', which is missing in" in vocabulary.difference(data, model, [end, *ids])


def test_without_a_rearranged_text_the_tokens_are_what_they_are_without_the_key():
    tokenizer = tokens.load(marked("byte fallback"))
    texts, end = list(build_pages.texts()), tokenizer.token_to_id(END)
    keys = FillInTheMiddle(rate=1e-12, span_chars=100)
    made = infilling.encode(tokenizer, [arrange(t, digest(t), keys) for t in texts], end, layout.Markers(1, 2, 3))
    assert all(np.array_equal(a, b) for a, b in zip(made, tokens.encode(tokenizer, texts, end), strict=True))


def make(folder, name: str, given: str | None = None, keys: FillInTheMiddle | None = KEYS, **options):
    here = HereFlow(Work(Location(f"{folder}/{name}.work")), seed=options.pop("seed", 0))
    source, output = TextSource(str(folder / "in"), TextRules()), Location(f"{folder}/{name}")
    limits = {"shard_bytes": 60_000, "chunk_tokens": 5000, **options}
    made = text_making(here, source, output, tokenizer=BPE, given_tokenizer=given, infill=keys, **limits)
    rows, meta = made.run(sources.listing(str(folder / "in")))
    return in_memory(rows).to_pylist(), meta


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    (folder / "in").mkdir()
    texts = list(build_pages.texts())
    random.Random(0).shuffle(texts)
    half = len(texts) // 2
    for name, some in (("a", texts[:half]), ("b", texts[half:])):
        (folder / "in" / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in some))
    return folder


def published(folder, name: str, made) -> manifest.Manifest:
    rows, meta = made
    place = Location(f"{folder}/{name}")
    place.join("tokenizer.json").write(place.join(meta["files"]["tokenizer.json"]).read())
    return manifest.write(place, rows, {k: v for k, v in meta.items() if k not in ("listed", "files")})


def test_a_dataset_is_the_same_however_it_is_made_and_says_what_was_rearranged(pages):
    made = make(pages, "one")
    assert make(pages, "two", seed=7, memory_limit=40_000) == made
    rows, meta = made
    assert len({row["path"] for row in rows}) > 2
    arranged = [arrange(text, digest(text), KEYS) for text in build_pages.texts()]
    texts = [one for document in arranged for one in document if isinstance(one, Arranged)]
    assert meta["rearranged"]["documents"] == sum(any(isinstance(one, Arranged) for one in d) for d in arranged)
    assert meta["rearranged"]["texts"] == len(texts) > 50
    assert meta["fill_in_the_middle"] == {**KEYS.model_dump(), "names": list(layout.OWN), "markers": [1, 2, 3]}
    assert meta["bytes"] == sum(len(text.encode()) for text in set(build_pages.texts()))
    assert make(pages, "other", keys=FillInTheMiddle(rate=0.5, span_chars=700, seed=4))[0] != rows
    plain = make(pages, "plain", keys=None)[1]
    assert "rearranged" not in plain and "fill_in_the_middle" not in plain and plain["bytes"] == meta["bytes"]


def test_what_is_read_back_from_shards_is_the_text(pages):
    one = published(pages, "back", make(pages, "back"))
    found = list(chain.from_iterable(Documents(one).texts(range(one.chunks.num_rows))))
    expected = [joined([part]) for text in set(build_pages.texts()) for part in arrange(text, digest(text), KEYS)]
    assert sorted(found) == sorted(expected)


def test_held_out_middles_are_asked_as_the_data_had_them(pages, tmp_path):
    """The question and the answer are one passage of a held-out document, in either order."""
    for rate in (0.5, 1.0):
        keys = FillInTheMiddle(rate=0.5, spm_rate=rate)
        one = published(pages, f"asked {rate}", make(pages, f"asked {rate}", keys=keys))
        told = suites.make(str(one.location), tmp_path / str(rate), 30, 0.2, seed=3)
        assert told["tasks"]["held_out_middle"] > 15
        task = yaml.safe_load((tmp_path / str(rate) / "tasks" / "held_out_middle.yaml").read_text())
        assert task["generation_kwargs"]["until"] == [END]
        held = list(chain.from_iterable(Documents(one).texts(held_out(one, 0.2))))
        tokenizer, markers = Tokenizer.from_str(one.file("tokenizer.json").read().decode()), layout.Markers.of(one.meta)
        for line in (tmp_path / str(rate) / "data" / "held_out_middle.jsonl").read_text().splitlines():
            asked = json.loads(line)
            assert any(asked["prefix"] + asked["answer"] + asked["suffix"] in text for text in held)
            pieces = layout.encode(tokens.load(tokenizer.to_str()), [asked["prefix"], asked["suffix"]])
            assert tokenizer.encode(asked["context"]).ids == markers.prompt(*pieces, suffix_first=rate == 1)


def test_a_document_that_is_forgotten_takes_its_counts_with_it(pages):
    """Its bytes are those of its text, without markers."""
    one = published(pages, "whole", make(pages, "whole"))
    text = max(build_pages.texts(), key=lambda t: sum(isinstance(p, Arranged) for p in arrange(t, digest(t), KEYS)))
    gone = [p for p in arrange(text, digest(text), KEYS) if isinstance(p, Arranged)]
    lines = {f"{n}.jsonl#{i}": json.loads(line)["text"] for n in "ab"
             for i, line in enumerate((pages / "in" / f"{n}.jsonl").read_text().splitlines(), 1)}  # fmt: skip
    (id,) = [name for name, found in lines.items() if found == text]
    (path,) = {p for p in one.paths if forget.documents.pieces(one, p, id)}
    _, written = forget._shard(one, path, {"id": id}, Location(f"{pages}/without"))
    assert written["bytes"] == len(text.encode()) and written["documents"] == written["rearranged.documents"] == 1
    assert written["rearranged.texts"] == len(gone) > 1
