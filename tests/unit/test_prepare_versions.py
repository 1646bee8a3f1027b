"""Tests `prepare` in a folder with a dataset: the old dataset stays until the new one is complete, runs keep their version, and
other files stay."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.curation import prepare as preparing
from heliostat.curation import prepare_report
from heliostat.curation.prepare import InputFile, Pipeline
from heliostat.data import manifest, versions
from heliostat.data.index import index
from heliostat.errors import ConfigError, DataError, StorageError
from heliostat.storage.locations import Location

PARTS = ("8x8", "16x8")


class Numbers(Pipeline):
    """Writes rows of numbers from `first`, in shards of ten, one for each of `shards`, in this process without Ray."""

    first: int = 0
    shards: int = 3
    fail: str = ""
    parts: list[str] = []
    dropped: dict[str, int] = {}
    by: dict[str, Any] = {}
    etag: str = ""
    beside = frozenset({"by", "etag"})

    def written_by(self, inputs: list[InputFile]) -> dict[str, Any] | None:
        return self.by or None

    def check(self) -> None:
        if self.fail == "check":
            raise ConfigError("fail: as it was told to")

    def inputs(self) -> list[InputFile]:
        return [InputFile("numbers", self.shards, 0, self.etag)]

    def write(self, output: Location, inputs: list[InputFile]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        rows = []
        for part in [f"{p}/" for p in self.parts] or [""]:
            beside = {"tokenizer.json": versions.store(output, f"{part}files/tokenizer-", str(self.first).encode(), ".json")}
            for number in range(self.shards):
                sink, first = pa.BufferOutputStream(), self.first + 10 * number
                pq.write_table(pa.table({"n": range(first, first + 10)}), sink)
                data = sink.getvalue().to_pybytes()
                path = versions.store(output, f"{part}shards/{number:05d}/", data, ".parquet")
                rows += manifest.read_footer(output, path, None)
                if number == 1 and self.fail == "write":
                    raise OSError(28, "No space left on device")
                if number == 1 and self.fail == "interrupt":
                    raise KeyboardInterrupt
                if number == 1 and self.fail == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
        if self.parts:
            versions.store(output, "files/tokenizer-", str(self.first).encode(), ".json")
            beside = {k: v.partition("/")[2] for k, v in beside.items()}
            return rows, {"kind": "rows", "files": beside, "parts": {p: {} for p in self.parts}}
        listed = versions.store(output, "files/listed-", b"the list", ".parquet") if self.dropped else None
        return rows, {"kind": "rows", "files": beside, "dropped": self.dropped, "listed": listed}


Make = Callable[..., dict[str, Any]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Runs `prepare` on the pipeline above, with these keys, into `out`."""
    monkeypatch.setattr(preparing, "connect", lambda cpus: None)  # the pipeline asks nothing of Ray
    monkeypatch.setattr(preparing, "_keep_to", lambda labels: None)

    def run(force: bool = False, **keys: Any) -> dict[str, Any]:
        path = tmp_path / "numbers.yaml"
        target = {"pipeline": "tests.unit.test_prepare_versions:Numbers", "name": "numbers", "output": str(tmp_path / "out")}
        path.write_text(json.dumps(target | keys))
        return preparing.prepare(path, [], force)

    return run


def numbers(version: manifest.Manifest) -> list[int]:
    """Returns the contents of a version's shards, read by its manifest."""
    paths = dict.fromkeys(version.chunks["path"].to_pylist())
    return [n for p in paths for n in pq.read_table(f"{version.location.path}/{p}")["n"].to_pylist()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def data(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(folder).items() if name != versions.RECORD}


def test_a_dataset_that_a_model_wrote_says_so_also_where_it_is_up_to_date(make, tmp_path):
    by = {"model": {"folder": "models/lm", "digest": "0" * 64}, "input": "prompts.jsonl", "answers": 1200}
    plain = make()
    assert plain["written_by"] is None and len(prepare_report.explain(plain)) == 2
    for found in (make(by=by, force=True), make(by=by)):
        assert found["written_by"] == by and found["digest"] == plain["digest"]
        assert prepare_report.explain(found)[2] == "written by model 000000000000 (models/lm): 1,200 answers to prompts.jsonl"
    assert versions.read_record(Location(str(tmp_path / "out")))["made"]["written_by"] == by


def test_a_dataset_that_is_prepared_again_says_why(make, monkeypatch, caplog):
    """A stage with other decisions has another version. A dataset made by the earlier version still opens."""
    version, plainly = {"pii": 2}, Pipeline.identity

    def identity(self: Pipeline) -> dict[str, Any]:
        return plainly(self) | {"stages": [{"stage": "pii", "version": version["pii"]}]}

    monkeypatch.setattr(Pipeline, "identity", identity)

    def said(**keys: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            make(**keys)
        return next(
            (r.message.partition("preparing the dataset again, because ")[2] for r in caplog.records if "again" in r.message), ""
        )

    assert said() == "" and said() == ""
    version["pii"] = 3
    assert said() == "the dataset's stages have new versions: 0 pii has version 3, formerly 2" and said() == ""
    assert said(first=7) == "the pipeline's keys, or the versions of its stages, have changed"
    assert said(first=7, shards=2) == "the pipeline's keys, or the versions of its stages, have changed"


@pytest.mark.parametrize("fault", ["check", "write", "interrupt"])
def test_a_prepare_that_fails_or_is_interrupted_leaves_the_dataset_as_it_was(make, tmp_path, fault, caplog):
    """After a wrong key, a full disk, or Ctrl-C, the folder has exactly the earlier files, and is still up to date."""
    made = make()
    before = data(tmp_path / "out")
    with pytest.raises((ConfigError, OSError, KeyboardInterrupt)):
        make(first=500, fail=fault)
    assert data(tmp_path / "out") == before
    assert numbers(manifest.read(Location(str(tmp_path / "out")))) == list(range(30))
    assert make()["up_to_date"] and make()["digest"] == made["digest"]
    if fault == "interrupt":
        assert "interrupted; removing the files of this run" in caplog.text
        assert "continues from the finished tasks" in caplog.text


def test_a_prepare_that_is_killed_costs_nothing_and_what_it_left_goes_later(make, tmp_path, monkeypatch):
    """SIGKILL arrives in the middle of writing. The old version stays readable, and the leftovers are removed when they are a day
    old."""
    made = make()
    before = data(tmp_path / "out")
    code = (
        "import sys; from pathlib import Path; from heliostat.curation import prepare as p\n"
        "p.connect = p._keep_to = lambda *a, **k: None\np.prepare(Path(sys.argv[1]), ['first=500', 'fail=kill'])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "numbers.yaml")], cwd=root, timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = set(data(tmp_path / "out")) - set(before)
    assert left and {k: v for k, v in data(tmp_path / "out").items() if k in before} == before
    assert make()["digest"] == made["digest"] and make()["up_to_date"]
    make(first=1000)
    assert left <= set(data(tmp_path / "out"))
    monkeypatch.setattr(versions, "ORPHAN_S", 0)
    make(first=2000)
    assert not left & set(data(tmp_path / "out"))


def test_a_run_keeps_the_version_that_it_reads_until_its_days_are_over(make, tmp_path):
    """This includes its shards, its manifest, and its tokenizer. A shard of both versions is stored once."""
    place = Location(str(tmp_path / "out"))
    make()
    old = manifest.read(place)
    report = make(shards=2)
    assert report["versions_kept"] == 1 and report["removed"]["files"] == 0
    shared = set(old.chunks["path"].to_pylist()) & set(manifest.read(place).chunks["path"].to_pylist())
    assert len(shared) == 2
    make(first=7)
    assert place.join("tokenizer.json").read() == b"7" == manifest.read(place).file("tokenizer.json").read()
    again = manifest.read(place, old.digest)
    assert numbers(again) == list(range(30)) and again.file("tokenizer.json").read() == b"0"
    report = make(first=7, keep_days=0)
    assert report["up_to_date"] and report["versions_kept"] == 0 and report["removed"]["files"] > 3
    with pytest.raises(DataError, match="didn't keep the earlier version"):
        manifest.read(place, old.digest)
    newest = manifest.read(place)
    assert set(data(tmp_path / "out")) == {
        "manifest.parquet", "tokenizer.json", f"manifests/{newest.digest[:12]}.parquet", *newest.chunks["path"].to_pylist(),
        newest.meta["files"]["tokenizer.json"],
    }  # fmt: skip


def test_replaced_versions_go_by_the_time_at_which_they_were_replaced(make, tmp_path):
    place = Location(str(tmp_path / "out"))
    make()
    first = manifest.read(place)
    make(first=100)
    record = versions.read_record(place)
    assert list(record["replaced"]) == [manifest.version_name(first.digest)]
    record["replaced"] = {name: time.time() - 6.9 * 86400 for name in record["replaced"]}
    versions.write_record(place, record)
    make(first=200)
    assert numbers(manifest.read(place, first.digest)) == list(range(30))
    record = versions.read_record(place)
    record["replaced"][manifest.version_name(first.digest)] -= 0.2 * 86400
    versions.write_record(place, record)
    assert make(first=200)["versions_kept"] == 1
    with pytest.raises(DataError):
        manifest.read(place, first.digest)


def test_a_new_dataset_is_published_without_reading_its_manifest_again(make, tmp_path, monkeypatch):
    """A manifest may take gigabytes. Only the replaced versions are read, to find the files that they share."""
    first, found, real = make()["digest"], list[str](), manifest.read_version
    monkeypatch.setattr(manifest, "read_version", lambda place, name: found.append(name) or real(place, name))
    make(first=100)
    assert found == [manifest.version_name(first)]


def test_going_back_to_a_version_makes_it_the_newest_again(make, tmp_path):
    first = make()["digest"]
    make(first=100)
    assert make()["digest"] == first
    assert make(keep_days=0)["versions_kept"] == 0
    assert numbers(manifest.read(Location(str(tmp_path / "out")))) == list(range(30))


def test_a_dataset_of_before_there_were_names_by_content_is_replaced_without_harm(make, tmp_path):
    """For shards such as `shards/00000.parquet`, a plain tokenizer.json, and a record of two keys: its runs keep all of them."""
    place = Location(str(tmp_path / "out"))
    (tmp_path / "out/shards").mkdir(parents=True)
    pq.write_table(pa.table({"n": range(5)}), tmp_path / "out/shards/00000.parquet")
    place.join("tokenizer.json").write(b"old")
    old = manifest.write(place, manifest.read_footer(place, "shards/00000.parquet", None), {"kind": "rows"})
    place.join(versions.RECORD).write(json.dumps({"config": "x", "input": "y"}).encode())
    assert old.file("tokenizer.json").read() == b"old"
    make()
    again = manifest.read(place, old.digest)
    assert numbers(again) == list(range(5)) and again.file("tokenizer.json").read() == b"old"
    assert place.join("tokenizer.json").read() == b"0"
    assert index(place).shards_added == 0, "a replaced version's shards were taken for new ones"
    make(keep_days=0)
    assert not (tmp_path / "out/shards/00000.parquet").exists()


def test_an_object_that_was_written_again_is_prepared_again_and_older_records_stay_up_to_date(make):
    """Records from before ETags have only sizes and times, and still count."""
    make()
    assert make(etag="a")["up_to_date"]
    make(etag="a", force=True)
    assert make(etag="a")["up_to_date"]
    assert not make(etag="b")["up_to_date"] and make(etag="b")["up_to_date"]
    assert make()["up_to_date"], "of a store that gives none any more"


def test_what_was_published_halfway_is_not_up_to_date(make, tmp_path, monkeypatch):
    """The store becomes unreachable after the manifest is written. The next run makes the dataset again, completely."""

    def broken(*_: Any) -> None:
        raise StorageError("pulled the plug")

    make()
    with monkeypatch.context() as patch:
        patch.setattr(versions, "publish", broken)
        with pytest.raises(StorageError):
            make(first=100)
    assert not make()["up_to_date"]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"0" and make()["up_to_date"]


def test_parts_are_replaced_and_removed_like_the_whole(make, tmp_path):
    """For a collection with other parts: the removed part stays for its runs, and is then deleted with its folder."""
    place = Location(str(tmp_path / "out"))
    make(parts=list(PARTS))
    old, part = manifest.read(place), manifest.read(place.join(PARTS[0]))
    make(parts=[PARTS[1]], first=100)
    assert numbers(manifest.read(place.join(PARTS[0]), part.digest)) == list(range(30)) and len(numbers(old)) == 60
    assert make(parts=[PARTS[1]], first=100, keep_days=0)["versions_kept"] == 0
    assert not (tmp_path / "out" / PARTS[0]).exists()
    assert numbers(manifest.read(place.join(PARTS[1]))) == list(range(100, 130))
    assert len(list((tmp_path / "out" / PARTS[1] / "manifests").iterdir())) == 1


# what it says --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dropped", "duplicates", "said"),
    [
        ({"duplicate": 14}, 0, "14 duplicate (listed in OUT/quarantine.parquet)"),
        ({"duplicate": 14, "no_caption": 2}, 0, "14 duplicate, 2 no_caption (listed"),
        ({}, 3, "3 duplicate"),
        ({"duplicate": 1, "empty": 0}, 2, "3 duplicate (listed"),
        ({}, 0, "nothing"),
    ],
)
def test_everything_that_was_left_out_is_said(make, tmp_path, dropped, duplicates, said):
    """Pipelines count duplicates among the dropped documents, as for images, or separately, as for text."""
    report = {**make(dropped=dropped), "duplicates": duplicates}
    ready, left_out = prepare_report.explain(report)
    assert (
        left_out.startswith(f"dropped: {said}".replace("OUT", str(tmp_path / "out")))
        and "is ready after" in ready
        and "30 rows" in ready
    )


# whose folder it is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thesis.tex", "shards/00000.parquet", "manifest.parquet", "1x1/manifest.parquet"])
def test_a_folder_that_holds_something_else_is_refused_and_stays_as_it_is(make, tmp_path, name):
    """This includes a folder that only looks like a dataset: without a record, its manifest must be valid."""
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"years of work")
    for force in (False, True):
        with pytest.raises(ConfigError, match=rf"output: .*out: not empty, and not a heliostat dataset.*'{name.split('/')[0]}'"):
            make(force=force)
    assert files(tmp_path / "out") == {name: b"years of work"}


def test_nothing_is_removed_but_what_a_manifest_names(make, tmp_path, monkeypatch):
    """A person's files in the dataset's folder, and shards that were never listed, survive every version."""
    monkeypatch.setattr(versions, "ORPHAN_S", 0)
    make()
    mine = {"notes.txt": b"a", "shards/mine.parquet": b"b", "shards/00000/mine.parquet": b"c", "8x8/manifest.parquet": b"d"}
    for name, content in mine.items():
        Location(str(tmp_path / "out")).join(name).write(content)
    make(first=100)
    make(first=200, keep_days=0)
    found = files(tmp_path / "out")
    assert {name: found.get(name) for name in mine} == mine and "shards/00001" in " ".join(found)


def test_two_prepares_of_one_folder_do_not_work_at_once(make, tmp_path):
    """The error names the other live process of this machine. A dead process is no obstacle."""
    place = Location(str(tmp_path / "out"))
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    import psutil

    claim = {"host": socket.gethostname(), "pid": other.pid, "started": psutil.Process(other.pid).create_time()}
    versions.write_record(place, {"building": claim})
    try:
        with pytest.raises(ConfigError, match=f"process {other.pid} is preparing this dataset"):
            make()
    finally:
        other.communicate(b"\n", timeout=30)
    assert make()["documents"] == 30 and "building" not in versions.read_record(place)
