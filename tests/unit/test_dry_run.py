"""Tests a dry run: its sample, its predictions for the whole input, and its limits."""

import gzip
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from heliostat.cli.common import app
from heliostat.curation import leftovers, predicting, prediction
from heliostat.curation.pieces import FilePart
from heliostat.curation.predicting import Prediction
from heliostat.curation.prepare import Pipeline, dry_run
from heliostat.curation.registry import parse
from heliostat.curation.stages.length import Length
from heliostat.curation.text import sampling, sources, tokens
from heliostat.curation.text.documents import TextRules
from heliostat.curation.text.making import TextMaking
from heliostat.curation.text.sampling import SampledTexts
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location
from heliostat.tasks import merging
from heliostat.tasks.work import Work
from typer.testing import CliRunner

from tests.unit.build_curation import HereFlow, spelled
from tests.unit.build_making import make, text_making

SHARD_BYTES = 40_000
BPE = {"vocab_size": 300, "train_bytes": 5000, "path": None, "end_of_document": "<|endoftext|>"}
STAGES = [{"stage": "length", "min_words": 40}, {"stage": "minhash"}, {"stage": "length", "max_words": 90}]


def text(rng: random.Random) -> str:
    return " ".join(f"w{spelled(rng.randrange(900))}" for _ in range(10 + rng.randrange(110)))


def make_input(folder: Path, documents: int = 6000) -> None:
    """Writes lines in a large file and a compressed one, and files with one document each. A tenth of all documents are
    near-duplicates in pairs."""
    rng = random.Random(0)
    texts = [text(rng) for _ in range(documents)]
    for i in range(0, documents, 10):
        texts[i] = texts[(i * 7 + 5) % documents] + " end"
    folder.mkdir()
    third = documents // 3
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts[:third]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as f:
        f.write("\n".join(json.dumps({"text": t}) for t in texts[third : 2 * third]))
    for i in range(2 * third, documents):
        (folder / f"{i}.txt").write_text(texts[i])


def trial(tmp_path: Path, share: float, seed: int = 0, stages=STAGES, name: str = "trial") -> tuple[TextMaking, list]:
    inputs = sources.listing(str(tmp_path / "in"), ["extract"] * bool(stages))
    sample = sampling.choose(inputs[::-1] if seed else inputs, share, "in")
    here = HereFlow(Work(Location(f"{tmp_path}/{name}.work")), seed=seed)
    source = SampledTexts(str(tmp_path / "in"), TextRules(), "in", sample.records)
    output, parsed = Location(f"{tmp_path}/{name}"), [parse(entry) for entry in stages]
    return text_making(here, source, output, parsed, shard_bytes=SHARD_BYTES, sample=sample), inputs


def make_whole(folder: Path, stages: list[dict[str, Any]]) -> tuple[dict[str, Any], HereFlow]:
    """Returns the funnel of the whole input's dataset, and the record of its making, with each task once."""
    (_, meta), here = make(folder, "whole", stages, shard_bytes=SHARD_BYTES, again=0.0)
    return json.loads((folder / "whole" / meta["curation"]["funnel"]).read_text()), here


def test_a_sample_follows_from_input_and_share_alone(tmp_path):
    """The sample doesn't depend on the order of the listing or of the tasks, and reads little more than its share."""
    make_input(tmp_path / "in", 3000)
    made, inputs = trial(tmp_path, 0.1)
    again, _ = trial(tmp_path, 0.1, seed=1, name="again")
    assert made.sample.parts == again.sample.parts
    first, second = made.predicted(inputs), again.predicted(inputs)
    for found in (first, second):
        for key in ("cpu_hours", "cpu_hours_low", "cpu_hours_high", "wall_hours"):
            found.pop(key)
        for row in found["funnel"]:
            row.pop("cpu_hours")
    assert first == second
    assert all(0.05 < p.read_bytes / p.input_bytes < 0.9 for p in (made.sample, again.sample))


def test_every_record_has_the_same_chance_and_a_larger_share_holds_the_smaller(tmp_path):
    make_input(tmp_path / "in", 3000)
    inputs, found = sources.listing(str(tmp_path / "in"), ["extract"]), {}
    for share in (0.05, 0.2):
        sample = sampling.choose(inputs, share, "in")
        source = SampledTexts(str(tmp_path / "in"), TextRules(), "in", sample.records)
        found[share] = [d.id for part in sample.parts for d in source.read(part)]
        assert len(found[share]) == len(set(found[share]))
        for kind, of in (("a.jsonl", 1000), ("b.jsonl", 1000), (".txt", 1000)):
            count = sum(kind in id for id in found[share])
            spread = 4 * (of * share * (1 - share)) ** 0.5 * (3 if kind == "a.jsonl" else 1)  # whose lines come by the block
            assert abs(count - of * share) < spread, (kind, share, count)
    assert {i for i in found[0.05] if ".txt" in i} <= {i for i in found[0.2] if ".txt" in i}
    assert 0.1 < sample.taken_bytes / sample.input_bytes < 0.3
    assert sample.of_bytes == pytest.approx(5, rel=0.3) and sample.unknown > 0.5


def test_large_files_of_lines_are_read_in_places_only(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "RANGES", 64)
    (tmp_path / "in").mkdir()
    rng = random.Random(1)
    with (tmp_path / "in" / "a.jsonl").open("w") as f:
        while f.tell() < 12_000_000:
            f.write(json.dumps({"text": "x" * rng.randrange(3000)}) + "\n")
    sample = sampling.choose(sources.listing(str(tmp_path / "in")), 0.4, "in")
    assert sample.records == {"lines": 1.0} and 50 < len(sample.parts) < 100
    assert 0.3 < sample.read_bytes / sample.input_bytes < 0.5
    few = sampling.choose(sources.listing(str(tmp_path / "in")), 0.01, "in")
    assert 40 < len(few.parts) < 90, "places are many however small the share, and records in them fewer"
    assert few.records["lines"] == pytest.approx(0.01 * 183 / 64, rel=0.02)


def test_what_is_predicted_of_each_stage_is_near_the_whole(tmp_path):
    make_input(tmp_path / "in", 2500)
    made, inputs = trial(tmp_path, 0.4)
    found = made.predicted(inputs)
    truth, _ = make_whole(tmp_path, STAGES)
    assert [row["stage"] for row in found["funnel"]] == [n for n in truth if n != "finish"]
    for row in found["funnel"]:
        of = truth[row["stage"]]
        assert row["kept_low"] <= of["kept"] <= row["kept_high"], row
        assert row["kept"] == pytest.approx(of["kept"], rel=0.08) and row["kept_bytes"] == pytest.approx(
            of["kept_bytes"], rel=0.1
        )
        assert row["documents"] == pytest.approx(of["documents"], rel=0.08)
    (of,) = [of for of in found["duplicates"] if "minhash" in of]
    share, truly = found["duplicates"][of], 1 - truth[of]["kept"] / truth[of]["documents"]
    assert share["seen"] < 0.7 * truly, "a sample shows few of the duplicates"
    assert share["expected"] == pytest.approx(truly, rel=0.35) and share["low"] <= truly <= share["high"]
    assert any("minhash" in note for note in found["notes"])
    assert found["tokens"] == pytest.approx(truth["shard"]["counts"]["tokens"], rel=0.1)


OF_ALL_SIZES = [{"stage": "length", "min_words": 30}]


@pytest.fixture(scope="module")
def of_all_sizes(tmp_path_factory) -> tuple[Path, dict]:
    """Writes a folder `in` with documents of very different sizes; returns the part of the whole that stays after
    OF_ALL_SIZES."""
    folder, rng = tmp_path_factory.mktemp("sizes"), random.Random(5)
    (folder / "in").mkdir()
    for i in range(1500):
        words = " ".join(f"w{spelled(rng.randrange(900))}" for _ in range(min(3000, int(rng.lognormvariate(4, 1.2)))))
        (folder / "in" / f"{i}.txt").write_text(words or "w1")
    return folder, make_whole(folder, OF_ALL_SIZES)[0]["shard"]


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_documents_bytes_and_tokens_of_a_whole_lie_between_the_bounds_that_are_told(of_all_sizes, share):
    """The documents have very different sizes, and a stage drops a third of them. The report shows the bounds."""
    folder, truth = of_all_sizes
    made, inputs = trial(folder, share, stages=OF_ALL_SIZES, name=f"trial-{share}")
    found = made.predicted(inputs)
    last = found["funnel"][-1]
    assert 800 < truth["kept"] < 1100 and last["kept_low"] <= truth["kept"] <= last["kept_high"]
    assert found["bytes_low"] <= truth["kept_bytes"] <= found["bytes_high"] < 1.7 * found["bytes"]
    assert found["tokens_low"] <= truth["counts"]["tokens"] <= found["tokens_high"]
    told = "\n".join(prediction.explain(found | {"name": "a", "cost": 0.0, "currency": "USD", "seconds": 1.0}))
    for name in ("bytes", "tokens"):
        assert f"{found[name]:,} {name} ({found[f'{name}_low']:,} to {found[f'{name}_high']:,})" in told


def test_merges_that_the_whole_will_need_are_foreseen(tmp_path, monkeypatch):
    """A sample has too few runs for a merge. The prediction still includes the hours of the whole's merges, and the reason."""
    make_input(tmp_path / "in", 2500)
    plain = [note for note in trial(tmp_path, 0.1, name="plain")[0].predicted([])["notes"] if "merges" in note]
    monkeypatch.setattr(merging, "MANY", 2)
    made, inputs = trial(tmp_path, 0.1)
    found = made.predicted(inputs)
    _, whole = make_whole(tmp_path, STAGES)
    assert not plain and "merge" in whole.done and "merge" not in made.flow.done
    assert sum("merges these files" in note and "estimated from a part of the sample" in note for note in found["notes"]) == 1
    again = Prediction(made.sample, made.stages, funnel_of(made), made.flow, made.counted, 0.0, 0.0, {},
                       shards_drop_duplicates=True)  # fmt: skip
    told = again.report(1)
    merge, _ = (counts.pop("merge") for counts in (made.flow.seconds, made.flow.walls))
    more = merge * made.sample.of_bytes * again.factors[0][""] / 3600
    assert merge > 0 and told["cpu_hours"] - again.report(1)["cpu_hours"] == pytest.approx(more)
    assert "merging" not in made.flow.seconds, "what was merged to see how long it takes"


def funnel_of(made: TextMaking) -> dict:
    (path,) = Path(made.output.path).glob("files/funnel*")
    return json.loads(path.read_text())


def test_a_pipeline_without_stages_is_predicted_too(tmp_path):
    make_input(tmp_path / "in", 900)
    made, inputs = trial(tmp_path, 0.5, stages=[])
    found = made.predicted(inputs)
    assert [row["stage"] for row in found["funnel"]] == ["read", "shard"] and found["cpu_hours"] > 0
    assert found["duplicates"].keys() == {"shard"}, "of text, shards leave out exact ones"
    assert found["documents"] == pytest.approx(900, rel=0.2)


def test_seconds_of_opening_stages_are_not_taken_for_work(tmp_path):
    make_input(tmp_path / "in", 900)
    made, inputs = trial(tmp_path, 0.5, stages=[])
    before = made.predicted(inputs)["cpu_hours"]
    funnel = {
        name: made.counted.get(name, {}) | {"counts": {}, "documents": 9, "kept": 9, "kept_bytes": 9}
        for name in ("read", "shard")
    }
    made.flow.seconds["read"] += 100
    made.flow.opening["read"] += 100

    def hours() -> float:
        found = Prediction(made.sample, [], funnel, made.flow, made.counted, 0.0, 0.0, {})
        return sum(found._hours(found.factors[0], made.flow.seconds).values()) - before

    assert hours() * 3600 < 101
    made.flow.opening["read"] = 0
    assert hours() * 3600 > 150


def test_the_fixed_seconds_of_tasks_are_not_scaled_with_the_documents(tmp_path):
    """The complete input has about as many tasks as its sample, but larger ones. Files of a few rows, which a task of a sample
    writes in milliseconds, were predicted as half of the CPU seconds of `minhash`."""
    make_input(tmp_path / "in", 900)
    made, inputs = trial(tmp_path, 0.2)
    found, funnel = made.predicted(inputs), funnel_of(made)

    def hours(fixed: float, more: float) -> dict[str, float]:
        seconds = {kind: value + more * made.flow.done[kind] for kind, value in made.flow.seconds.items()}
        of_files = Prediction(made.sample, made.stages, funnel, made.flow, made.counted, 0.0, fixed, {})
        return of_files._hours(of_files.factors[0], seconds)

    before, after = hours(0.0, 0.0), hours(1.0, 1.0)
    assert after.keys() == before.keys() >= {"read", "minhash-1-sign", "shards", "ends"}
    for kind, value in before.items():
        assert after[kind] * 3600 == pytest.approx(value * 3600 + made.flow.done[kind], abs=0.01 * made.flow.done[kind] + 0.01)
    (row,) = (row for row in found["funnel"] if row["stage"] == "1 minhash")
    of_tasks = found["cpu_hours"] - sum(other["cpu_hours"] for other in found["funnel"] if other is not row)
    assert 0 < row["cpu_hours"] < of_tasks, "as its tasks, which are a part of all tasks"
    assert 0.0 < predicting.small_files(made.flow.work.spill)["fixed"] < 0.1


def test_opening_a_range_of_lines_is_not_taken_for_reading(tmp_path, monkeypatch):
    """A sample opens a range for each 64 KB, and a task of the complete input one for 100 MB. The sample's CPU seconds of reading
    were two to three times as many."""
    make_input(tmp_path / "in", 900)
    monkeypatch.setattr(sampling, "BLOCK", 4096)
    monkeypatch.setattr(sampling, "RANGES", 4)
    real = sources.blocks

    def slow(base: Location, path: str, limit: int, part: FilePart) -> object:
        until = time.process_time() + (0.2 if part.stop is not None else 0.0)
        while time.process_time() < until:
            pass
        return real(base, path, limit, part)

    monkeypatch.setattr(sources, "blocks", slow)
    made, inputs = trial(tmp_path, 0.1, stages=[])
    found = made.predicted(inputs)
    spent = 0.2 * sum(part.stop is not None for part in made.sample.parts)
    scaled = spent * made.sample.input_bytes / made.sample.read_bytes
    assert 0 < spent <= found["cpu_hours"] * 3600 < spent + 1 < scaled


def test_loading_a_tokenizer_is_not_taken_for_the_work_of_a_shard(tmp_path, monkeypatch):
    """A tokenizer of 2 MB takes 0.05 s. A sample of 1 % has a hundredth of a shard, so this was predicted as 5 s."""
    make_input(tmp_path / "in", 900)
    real = tokens.load

    def slow(definition: str) -> object:
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass
        return real(definition)

    made, inputs = trial(tmp_path, 0.1, stages=[])
    monkeypatch.setattr(tokens, "load", slow)
    (row,) = (row for row in made.predicted(inputs)["funnel"] if row["stage"] == "shard")
    assert 0.5 <= row["cpu_hours"] * 3600 < 0.5 * made.flow.done["shards"] + 2


def test_a_slow_first_batch_of_a_process_is_not_taken_for_the_usual_speed(tmp_path, monkeypatch):
    """A process loads libraries and fills caches once, for any amount of data. A sample has a tenth of the data, so without a
    first batch that doesn't count, half a second of loading would be predicted as five."""
    make_input(tmp_path / "in", 900)
    real, left = Length.open, [0.5]

    def opened(self):
        work = real(self)

        def loads_first(documents):
            until = time.process_time() + (left.pop() if left else 0.0)
            while time.process_time() < until:
                pass
            return work(documents)

        return loads_first

    monkeypatch.setattr(Length, "open", opened)
    made, inputs = trial(tmp_path, 0.1, stages=[{"stage": "length", "min_words": 17}])
    found = made.predicted(inputs)
    assert not left and 0.1 < found["cpu_hours"] * 3600 < 2.5
    assert found["funnel"][1]["cpu_hours"] * 3600 < 0.5, "the stage alone"


WARMED = """
import sys
from heliostat.curation import segment
from heliostat.curation.chain import Chain
from heliostat.storage.locations import Location
from tests.unit.build_curation import Given
segment._warm([], Given({}), Chain(Location(sys.argv[1]), []))
print("pandas" in sys.modules)
"""


def test_a_process_that_keeps_no_document_of_its_first_batch_loads_libraries_too(tmp_path):
    """Arrow imports pandas in 0.2 s for the first table. In a 1 % sample, each process whose first batch had no kept document
    added 20 s to the prediction."""
    done = subprocess.run([sys.executable, "-c", WARMED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


HETEROGENEOUS = [{"stage": "length", "min_words": 30}, {"stage": "length", "max_words": 400}]


@pytest.mark.ci
def test_a_small_share_of_a_heterogeneous_input_predicts_documents_bytes_and_tokens_within_ten_percent(tmp_path, monkeypatch):
    """The input has three kinds of pages in files of their own: short, long, and of lognormal sizes. The sample has about a
    thousand documents. With 64 ranges at random places, the documents had errors of up to 22 %."""
    monkeypatch.setattr(sys.modules[__name__], "SHARD_BYTES", 1 << 24)
    rng, words = random.Random(3), [f"w{spelled(number)}" for number in range(900)]
    (tmp_path / "in").mkdir()
    for file in range(30):
        sizes = {0: lambda: rng.randrange(10, 60), 1: lambda: rng.randrange(200, 500),
                 2: lambda: min(900, 1 + int(rng.lognormvariate(4, 0.8)))}[file % 3]  # fmt: skip
        lines = (json.dumps({"text": " ".join(rng.choices(words, k=sizes()))}) for _ in range(300 * (1 + file % 3)))
        (tmp_path / "in" / f"{file:02}.jsonl").write_text("\n".join(lines))
    made, inputs = trial(tmp_path, 0.06, stages=HETEROGENEOUS)
    found, truth = made.predicted(inputs), make_whole(tmp_path, HETEROGENEOUS)[0]["shard"]
    assert found["documents"] == pytest.approx(truth["kept"], rel=0.1)
    assert found["bytes"] == pytest.approx(truth["kept_bytes"], rel=0.1)
    assert found["tokens"] == pytest.approx(truth["counts"]["tokens"], rel=0.1)


def test_a_documents_place_is_what_was_drawn():
    """Images of a tar, lines of a file, and files of a repository have the place of their file or range. A single file is its own
    place."""
    drawn = {"in/a.tar", "b.jsonl@65536", "c.git"}
    for id, place in (("in/a.tar/x/1", "in/a.tar"), ("b.jsonl@65536#7", "b.jsonl@65536"), ("c.git#src/x.py", "c.git"),
                      ("C#/a.cs", "C#/a.cs"), ("b.jsonl#7", "b.jsonl#7")):  # fmt: skip
        assert predicting.place_of(id, drawn) == place


def test_clusters_are_counted_the_same_in_parts(tmp_path, monkeypatch):
    make_input(tmp_path / "in", 900)
    made, inputs = trial(tmp_path, 0.6)
    whole = made.predicted(inputs)["duplicates"]
    monkeypatch.setattr(predicting, "ROWS", 50)
    again, _ = trial(tmp_path, 0.6, name="again")
    assert again.predicted(inputs)["duplicates"] == whole and again.flow.done["alike"] > 3 and whole["1 minhash"]["seen"] > 0


def test_pages_of_which_neighbours_are_alike_are_predicted(tmp_path, monkeypatch):
    """Half of the lines of a file are followed by almost the same line, like the pages of a crawl."""
    monkeypatch.setattr(sampling, "BLOCK", 8000)
    rng = random.Random(5)
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "a.jsonl").open("w") as file:
        for i in range(2500):
            words = [f"w{spelled(rng.randrange(900))}" for _ in range(60)]
            for one in (words, [*words, "end"])[: 1 + i % 2]:
                file.write(json.dumps({"text": " ".join(one)}) + "\n")
    made, inputs = trial(tmp_path, 0.15, stages=[{"stage": "minhash"}])
    found = made.predicted(inputs)
    (share,) = found["duplicates"].values()
    assert share["seen"] < 0.2 and share["expected"] == pytest.approx(1 / 3, abs=0.06)
    assert found["documents"] == pytest.approx(2500, rel=0.1)


def test_a_share_that_holds_nothing_is_refused_and_nothing_stays(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"name": "i", "pipeline": "heliostat.pipelines:TextPipeline", "input": str(tmp_path / "in"),
                                "output": str(tmp_path / "out"), "tokenizer": {"vocab_size": 300}}))  # fmt: skip
    monkeypatch.setattr("heliostat.curation.prepare._start_ray", lambda pipeline: None)
    with pytest.raises(ConfigError, match=r"--sample: .*of 1 file is less than one file\. Pass a larger share"):
        dry_run(path, [], 1e-9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "p.yaml"]


class OwnPipeline(Pipeline):
    def check(self): ...

    def inputs(self):
        return []

    def write(self, output, inputs):
        return [], {}


def test_pipelines_without_a_dry_run_say_so(tmp_path):
    with pytest.raises(ConfigError, match="--sample: OwnPipeline doesn't support dry runs"):
        OwnPipeline.model_construct().predict(Location(str(tmp_path)), [], 0.5)


def test_a_sample_of_which_nothing_is_left_says_so(tmp_path):
    make_input(tmp_path / "in", 300)
    made, inputs = trial(tmp_path, 0.5, stages=[{"stage": "length", "min_words": 5000}])
    with pytest.raises(DataError, match=r"the sample is empty .*Pass a larger --sample"):
        made.predicted(inputs)


def test_a_dry_run_makes_nothing_that_could_be_forced():
    from heliostat.cli import main  # noqa: F401  (registers the commands)

    found = CliRunner().invoke(app, ["data", "prepare", "p.yaml", "--sample", "1%", "--force"])
    assert isinstance(found.exception, ConfigError) and "--force" in str(found.exception)


def test_what_a_killed_dry_run_left_is_removed_a_day_later(tmp_path):
    """The next dry run with the same output removes it. Younger folders, which may be in use, and other files stay."""
    output = Location(str(tmp_path / "out"))
    names = ["out.sample-0123abcd", "out.sample-89abcdef", "out.sample-mine", "other.sample-0123abcd", "out", "out.work"]
    for name in names:
        (tmp_path / name / "work").mkdir(parents=True)
        (tmp_path / name / "work" / "x").write_text("x")
    late = time.time() + leftovers.OLD_S + 10
    os.utime(tmp_path / names[1] / "work" / "x", (late, late))
    assert leftovers.remove_old_samples(output) == []
    assert leftovers.remove_old_samples(output, late) == ["out.sample-0123abcd"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(set(names) - {"out.sample-0123abcd"})
    assert leftovers.SAMPLE.fullmatch(leftovers.sample_folder(output).name.removeprefix("out"))


def test_tokens_a_byte_of_a_whole_are_estimated_from_halves_of_a_sample(tmp_path):
    """The estimate is nearer than the sample's own rate, which is too low because its tokenizer was trained on it. It is within
    the bounds."""
    rng = random.Random(3)
    vocabulary = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 9))) for _ in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, [1 / (i + 5) for i in range(3000)], k=120)) for _ in range(600)]
    (tmp_path / "in").mkdir()
    for i, one in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_text(one)
    bpe = {**BPE, "vocab_size": 2000, "train_bytes": 10_000_000}
    inputs = sources.listing(str(tmp_path / "in"))
    sample = sampling.choose(inputs, 0.1, "in")
    here = HereFlow(Work(Location(f"{tmp_path}/work")))
    source = SampledTexts(str(tmp_path / "in"), TextRules(), "in", sample.records)
    made = text_making(here, source, Location(f"{tmp_path}/trial"), tokenizer=bpe, shard_bytes=1 << 20, chunk_tokens=5000,
                       sample=sample)  # fmt: skip
    found = made.predicted(inputs)
    tokenizer = tokens.load(tokens.train(sorted(texts), 2000, "<|endoftext|>"))
    truly = sum(map(len, tokens.encode(tokenizer, texts, 0)))
    kept = found["funnel"][-1]["kept_bytes"]
    assert kept == pytest.approx(sum(map(len, texts)), rel=0.03)
    assert found["tokens"] == pytest.approx(truly * kept / sum(map(len, texts)), rel=0.05)
    assert found["tokens_low"] <= truly <= found["tokens_high"]
    assert any(note.startswith("tokens: the sample's tokenizer") for note in found["notes"])
