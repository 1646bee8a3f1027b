"""Tests documents with similar meaning: exact arithmetic, the kept documents, the same result for any split, and folders that
can't embed."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from heliostat.curation import embedding, segment
from heliostat.curation.registry import parse
from heliostat.curation.semantic import cells, vectors
from heliostat.curation.semantic.cells import centres, packed
from heliostat.curation.stage import GlobalStage
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import merging, spill
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModel

from tests.unit.build_curation import curate, left, left_out
from tests.unit.build_model import make_model, texts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / max(1e-9, np.linalg.norm(a) * np.linalg.norm(b)))


def groups(rng: np.random.Generator, count: int, dims: int = 48, spread: float = 0.2) -> np.ndarray:
    """Returns vectors in about a third as many directions."""
    middle = rng.normal(size=(max(1, count // 3), dims))
    return embedding.rounded(middle[rng.integers(0, len(middle), count)] + spread * rng.normal(size=(count, dims)))


def reference(made: np.ndarray, least: float) -> list[int]:
    """Compares all rows one by one, in float64; returns the row that each is dropped for, or -1."""
    unit = made / np.maximum(1e-9, np.linalg.norm(made.astype(np.float64), axis=1, keepdims=True))
    stays, by = list[int](), list[int]()
    for i in range(len(made)):
        near = unit[stays] @ unit[i]
        by.append(stays[int(near.argmax())] if len(near) and near.max() >= least else -1)
        stays += [i] if by[-1] < 0 else []
    return by


@pytest.mark.parametrize("held", [10**6, 700, 64])
def test_who_stays_is_what_going_through_all_one_by_one_gives_however_few_are_held(held):
    made = groups(np.random.default_rng(0), 1500)
    near, best = vectors.sieve(lambda a, b: made[a:b], len(made), 0.9, held)
    found = np.where(best >= 0.9, near, -1).tolist()
    assert found == reference(made, 0.9) and 400 < found.count(-1) < 1200


@pytest.mark.parametrize("dims", [7, 384, 1040, 2500])
def test_products_are_exact(dims):
    rng = np.random.default_rng(dims)
    a, b = (rng.integers(-127, 128, (5, dims)).astype(np.int8) for _ in "ab")
    a[0], b[0] = 127, 127  # the largest there is
    wanted = a.astype(np.int64) @ b.astype(np.int64).T
    assert (vectors.products(a, b) == wanted.astype(np.float32)).all()


def test_rounding_changes_cosines_by_little():
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(300, 384)) + 3 * rng.normal(size=384)
    apart = [cosine(*raw[i : i + 2]) - cosine(*embedding.rounded(raw)[i : i + 2]) for i in range(299)]
    assert max(map(abs, apart)) < 0.002
    assert not embedding.rounded(np.zeros((1, 8))).any()


def test_centres_follow_from_the_sample_and_cells_are_its_groups():
    rng = np.random.default_rng(2)
    made = groups(rng, 30, spread=0.0)
    sample = np.repeat(made, 20, axis=0)[rng.permutation(600)]
    different = len(np.unique(made, axis=0))
    centres = vectors.centres(sample, 1000)
    assert len(centres) == different, "no more cells than different vectors"
    assert (vectors.centres(sample, 5) == vectors.centres(sample, 5)).all()
    cells = vectors.nearest(sample, centres)
    assert len({(tuple(v), c) for v, c in zip(sample.tolist(), cells.tolist(), strict=True)}) == different == len(set(cells))


@pytest.mark.parametrize("how", ["", "mean_tokens", "cls_token", "lasttoken"])
def test_vectors_are_the_models_pooled_as_the_folder_says_and_do_not_depend_on_the_batch(tmp_path, model, how):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    if how:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            json.dumps({"pooling_mode_mean_tokens": False, f"pooling_mode_{how}": True})
        )
    given = texts(12)
    made = embedding.TextEmbedder(str(folder), 128, 8)(given)
    assert [v.tolist() for v, _ in embedding.TextEmbedder(str(folder), 128, 8)(given[::-1])] == [
        v.tolist() for v, _ in made[::-1]
    ]
    whole, tokenizer = AutoModel.from_pretrained(folder).eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text, (vector, cut) in zip(given, made, strict=True):
        ids = tokenizer.encode(text).ids
        assert cut is (len(ids) > 128)
        ids = [*ids[:127], ids[-1]] if cut else ids
        with torch.inference_mode():
            states = whole(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        wanted = {"cls_token": states[0], "lasttoken": states[-1]}.get(how, states.mean(0))
        assert cosine(vector, wanted) > 0.999


def test_a_text_without_tokens_has_zeros_for_a_vector(tmp_path, model):
    """For a tokenizer that adds no tokens around a text."""
    shutil.copytree(model, tmp_path / "copy")
    file = tmp_path / "copy" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    (none, _), (some, _) = embedding.TextEmbedder(str(tmp_path / "copy"), 128, 8)(["", "abc"])
    assert not none.any() and some.any()


def test_weights_that_are_missing_are_refused_and_not_drawn(tmp_path, model):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "layer.1.output.dense" not in k}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"model: can't load .* as a text encoder .*2 of the model's weights are missing"):
        embedding.TextEmbedder(str(folder), 128, 8)


# the stage -----------------------------------------------------------------------------------------------------------


def made_of(model: Path, given: dict[str, str]) -> dict[str, np.ndarray]:
    found = embedding.TextEmbedder(str(model), 128, 8)(list(given.values()))
    return dict(zip(given, (vector for vector, _ in found), strict=True))


def test_documents_go_for_the_nearest_that_stays_whatever_the_cut_and_memory(tmp_path, model):
    given = {f"d{i:03d}": text for i, text in enumerate(texts(90))}
    entry = {"stage": "semantic", "model": str(model), "max_tokens": 128, "min_similarity": 0.93}
    told = []
    for number, (pieces, memory) in enumerate([(1, 1 << 20), (9, 1 << 20), (9, 1 << 15)]):
        found, here = curate(tmp_path / str(number), given, [entry], pieces, memory)
        told.append((left(found, here), left_out(found, here)))
    assert told[0] == told[1] == told[2]
    kept, gone = told[0]
    order = sorted(given, key=lambda id: (-len(given[id]), id))
    made = made_of(model, given)
    by = {order[i]: order[j] for i, j in enumerate(reference(np.stack([made[id] for id in order]), 0.93)) if j >= 0}
    assert gone.keys() == by.keys() and kept.keys() == given.keys() - by.keys() and 10 < len(by) < 80
    sizes = {id: list(by.values()).count(id) + 1 for id in by.values()}
    assert gone == {id: ("0 semantic", "near_duplicate", f"{who} (one of {sizes[who]})") for id, who in by.items()}
    tallies = [segment.load(here.work.spill, name) for name in found.tallies]
    tally = next(t["0 semantic"] for t in tallies if "0 semantic" in t)
    assert tally["counts"] == {"clusters": len(sizes), "cut_to_max_tokens": sum(len(t) > 126 for t in given.values())}
    assert tally["largest"][0][0] == max(sizes.values()) and tally["dropped"] == {"near_duplicate": len(by)}
    bins = tally["histograms"]["similarity"]
    assert sum(goes for _, goes in bins.values()) == len(by) and all(float(b) >= 0.93 for b, (_, goes) in bins.items() if goes)


def test_of_several_cells_the_result_is_the_same_from_any_cut_and_other_borders_find_other_pairs(tmp_path, model, monkeypatch):
    given = {f"d{i:03d}": text for i, text in enumerate(texts(120, seed=3))}
    entry = {
        "stage": "semantic",
        "model": str(model),
        "max_tokens": 128,
        "min_similarity": 0.93,
        "cell_documents": 20,
        "keep": "first",
    }
    told = []
    for pieces, limit, many in ((1, 1 << 20, merging.MANY_RANGES), (7, 1 << 20, merging.MANY_RANGES), (15, 1 << 13, 4)):
        monkeypatch.setattr(merging, "MANY_RANGES", many)
        found, here = curate(tmp_path / str(pieces), given, [entry], pieces, limit, seed=pieces)
        told.append((left(found, here), left_out(found, here)))
    assert told[0] == told[1] == told[2] and here.done["semantic-0-centres"] == 1 and here.done["semantic-0-merge"] > 1
    made = made_of(model, given)
    for id, (_, _, detail) in told[0][1].items():
        who = detail.partition(" ")[0]
        assert who in told[0][0] and who < id and cosine(made[id], made[who]) >= 0.9299
    twice, here = curate(tmp_path / "twice", given, [entry, {**entry, "seed": 2}], 3)
    assert len(left(twice, here)) < len(told[0][0]), "of other borders, other pairs meet"


def hot(folder: Path | Location, count: int, dims: int = 24) -> tuple[Location, list[str]]:
    """Writes two cells, in four files: `count` documents around one direction with many equal ranks, and 50 others."""
    rng, place = np.random.default_rng(count), folder if isinstance(folder, Location) else Location(str(folder))
    near = embedding.rounded(np.ones((count, dims)) + 0.3 * rng.normal(size=(count, dims)))
    made, key = np.concatenate([near, groups(rng, 50, dims)]), np.repeat([7, 1 << 63], [count, 50]).astype(np.uint64)
    ids, ranks = (
        [f"https://example.org/pages/{'long/' * 15}{i:07d}" for i in rng.permutation(len(key))],
        rng.integers(0, 9, len(key)),
    )
    table = pa.table({"key": key, "rank": -ranks.astype(np.float64), "value": pa.array([""] * len(key), pa.large_string()),
                      "id": pa.array(ids, pa.large_string()), "node": np.arange(len(key)).astype(np.uint64),
                      "vector": packed(made)})  # fmt: skip
    return place, [spill.write(place, table.take(pa.array(np.arange(i, len(key), 4))), ("node",)) for i in range(4)]


def judged(place: Location, names: list[str], held: int) -> tuple[dict, list[tuple]]:
    """Returns the task's record without file names, and the dropped documents."""
    record = cells.judge(place, 0, 1, names, 0.93, held)
    rows = (row for name in record.pop("files") for table in spill.read(place, name) for row in table.to_pylist())
    gone = sorted((row["key"], row["detail"], row["measures"]) for row in rows)
    return {key: record[key] for key in ("clusters", "largest", "sizes", "bins")}, gone


def test_a_cell_larger_than_memory_gives_the_same_documents_in_blocks(tmp_path, monkeypatch):
    """Ids and vectors of at most about as many documents as have room are in memory at once."""
    place, names = hot(tmp_path, 3000)
    wanted = judged(place, names, 1 << 20)
    sizes, ordered, read = list[int](), cells._ordered, cells.Dealt.vectors

    def blocks(*arguments):
        for block in ordered(*arguments):
            sizes.append(len(block[0]))
            yield block

    def vectors_of(dealt, start, stop):
        sizes.append(stop - start)
        return read(dealt, start, stop)

    monkeypatch.setattr(cells, "_ordered", blocks)
    monkeypatch.setattr(cells.Dealt, "vectors", vectors_of)
    monkeypatch.setattr(cells, "JUDGED_ROWS", 500)
    for held in (700, 150):
        sizes.clear()
        assert judged(place, names, held) == wanted and len(wanted[1]) > 1000 and wanted[0]["clusters"] > 20
        assert len(sizes) > 2 * 3000 // held and max(sizes) < 1.5 * held


def test_comparing_a_cell_leaves_no_thread_that_reads(place, monkeypatch):
    """A thread that reads in advance holds vectors until a task takes them, or stops reading."""
    monkeypatch.setattr(spill, "GROUP_BYTES", 8 << 10)
    monkeypatch.setattr(spill, "READ_BYTES", 8 << 10)
    before = set(threading.enumerate())
    _, names = hot(place, 3000)
    dealt = cells.Dealt.read(place, names, 0, spill.ALL, 1 << 20)
    assert len(next(dealt).nodes) == 3050
    assert not [thread for thread in set(threading.enumerate()) - before if "ThreadPoolExecutor" in thread.name]


def test_many_equal_texts_are_one_cell_and_one_stays(tmp_path, model):
    """For any value of their one hash, which the sample of hashes may not contain."""
    given = {f"d{i:03d}": "same" for i in range(300)}
    entry = {"stage": "semantic", "model": str(model), "max_tokens": 128, "cell_documents": 100}
    found, here = curate(tmp_path, given, [entry], 2)
    assert list(left(found, here)) == ["d000"]
    made = spill.write(here.work.spill, pa.table({"key": np.full(3, 9, np.uint64), "vector": packed(np.ones((3, 4), np.int8))}))
    record = centres(here.work.spill, [made], 5, 3, 1)
    assert sum(map(len, spill.read(here.work.spill, record["centres"]))) == 1


def test_a_run_goes_on_and_another_threshold_embeds_nothing_again(tmp_path, model):
    given = {f"d{i}": text for i, text in enumerate(texts(40))}
    entry = {"stage": "semantic", "model": str(model), "max_tokens": 128, "min_similarity": 0.9}
    found, here = curate(tmp_path, given, [entry], 4)
    again, there = curate(tmp_path, given, [{**entry, "min_similarity": 0.8}], 4)
    assert there.kept["semantic-0-embed"] == here.done["semantic-0-embed"] and "semantic-0-embed" not in there.done
    assert len(left(again, there)) < len(left(found, here))
    assert isinstance(parse(entry), GlobalStage) and parse(entry).identity()["model"]["model.safetensors"]


def test_a_stage_is_checked_without_torch(model):
    entry = {"stage": "semantic", "model": str(model), "max_tokens": 128}
    code = f"import sys; from heliostat.curation.registry import parse; parse({entry}).check(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_folders_that_cannot_embed_are_refused_with_the_fix(tmp_path, model):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)

    def refused(match: str, **keys) -> None:
        with pytest.raises(ConfigError, match=match):
            parse({"stage": "semantic", "model": str(folder), "max_tokens": 128, **keys}).check()

    refused("max_tokens: 512 is above the model's maximum. Set max_tokens to 128", max_tokens=512)
    (folder / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Transformer"}, {"type": "st.models.Dense"}])
    )
    refused(r"model: .*modules.json: module 'Dense' isn't supported")
    (folder / "modules.json").write_text("{}")
    refused("modules.json: isn't a valid list of modules")
    (folder / "modules.json").unlink()
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    refused("pooling by max_tokens isn't supported. Supported: one of mean, last, cls")
    refused("none': no such folder. Set model to a model's folder", model=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="'oldest' needs a column"):
        parse({"stage": "semantic", "model": str(model), "keep": "oldest"})


def test_a_worker_embeds_by_the_model_that_is_in_the_folder_now(tmp_path):
    """A later prepare may reuse the process of an idle worker."""
    folder, given = tmp_path / "model", {f"d{i:03d}": text for i, text in enumerate(texts(40))}
    entry = {"stage": "semantic", "model": str(folder), "max_tokens": 128, "min_similarity": 0.93}
    make_model(folder)
    first = left(*curate(tmp_path / "1", given, [entry], 1))
    mended = {name: weight * -0.3 for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(mended, folder / "model.safetensors", {"format": "pt"})
    second = left(*curate(tmp_path / "2", given, [entry], 1))
    cells._opened.cache_clear()
    assert second == left(*curate(tmp_path / "3", given, [entry], 1)) != first
