"""Tests `prepare` with stages on real Ray: it resumes after a kill, is the same on one node and three, and has a reason for every
document."""

import contextlib
import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from heliostat.curation import pieces, reasons
from heliostat.curation.prepare import prepare
from heliostat.curation.stages import minhash
from heliostat.data import manifest
from heliostat.errors import HeliostatError, StorageError
from heliostat.storage.locations import Location
from heliostat.tasks import flow, merging, pool, ray_cluster
from heliostat.tasks.flow import Task
from heliostat.tasks.pool import ActorPool
from heliostat.tasks.work import Work
from ray.util.placement_group import placement_group, remove_placement_group

from tests.integration import commands
from tests.integration.pipelines import write_pipeline
from tests.unit.build_curation import spelled
from tests.waiting import until


def make_input(folder: Path, documents: int = 300, seed: int = 0) -> dict[str, str]:
    """Writes JSON lines with near and exact duplicates and bad records; returns the texts by id."""
    folder.mkdir(exist_ok=True)
    rng, texts, number = random.Random(seed), dict[str, str](), 0
    with (folder / f"{seed}.jsonl").open("w") as f:
        for i in range(documents):
            words = [f"w{spelled(rng.randrange(3000))}" for _ in range(60 + rng.randrange(90))]
            if texts and i % 7 == 3:
                words = [*rng.choice(list(texts.values())).split(), "more"]
            text = rng.choice(list(texts.values())) if texts and i % 11 == 5 else " ".join(words)
            number += 1
            texts[f"{seed}.jsonl#{number}"] = text
            f.write(json.dumps({"text": text, "url": f"http://h/{i}"}) + "\n")
            if i % 50 == 9:
                f.write("{broken\n")
                number += 1
    return texts


def make_yaml(tmp_path: Path, **more: object) -> Path:
    keys = {"columns": ["url"], "stages": [{"stage": "minhash"}], "chunk_tokens": 4000, "shard_bytes": 30_000}
    return write_pipeline(tmp_path, tokenizer={"vocab_size": 400, "train_bytes": 20_000}, **keys | more)


@pytest.mark.usefixtures("ray_session")
def test_every_document_has_a_reason(tmp_path):
    texts = make_input(tmp_path / "in")
    report = prepare(make_yaml(tmp_path), [])
    assert not (tmp_path / "out.work").exists(), "unfinished work goes when the dataset is published"
    made = manifest.read(Location(str(tmp_path / "out")))
    found = {row["id"]: row for table in reasons.ends(made) for row in table.to_pylist()}
    assert set(texts) <= set(found) and len(found) == len(texts) + 6
    kept = {id for id, row in found.items() if row["reason"] == "kept"}
    assert len(kept) == report["documents"]
    assert {row["reason"] for row in found.values()} == {"kept", "near_duplicate", "invalid_json"}
    for id in list(texts)[:40]:
        (row,) = reasons.end_of(made, id)
        assert row["stage"] == ("shard" if id in kept else "0 minhash")
        if id in kept:
            assert row["detail"] in made.paths and row["hash"] == hashlib.sha256(texts[id].encode()).hexdigest()
            assert [r["id"] for r in reasons.kept_as(made, row["hash"])] == [id]
        else:
            assert row["detail"].partition(" ")[0] in kept
    assert reasons.end_of(made, "nowhere") == []
    told = reasons.funnel(made)
    assert list(told) == ["read", "0 minhash", "shard"] and told["read"]["dropped"] == {"invalid_json": 6}
    assert told["read"]["documents"] == len(found) and told["0 minhash"]["documents"] == len(texts)
    assert told["0 minhash"]["kept"] == told["shard"]["kept"] == report["documents"]
    assert told["shard"]["counts"]["tokens"] == report["tokens"]
    assert set(reasons.seconds(made)) == {"read", "0 minhash", "shard"}
    assert report["dropped"] == {"0 minhash: near_duplicate": told["0 minhash"]["dropped"]["near_duplicate"], "invalid_json": 6}
    assert prepare(make_yaml(tmp_path), [])["up_to_date"]


def once(folder: Location, number: int, mark: str) -> dict[str, object]:
    """Records its process. The fourth call ends its process, the first time."""
    with Path(mark).open("a") as f:
        f.write(f"{number}\n")
    if number == 4 and Path(mark).read_text().split().count("4") == 1:
        os._exit(1)
    return {"files": [], "number": number, "pid": os.getpid()}


def refuse(folder: Location) -> dict[str, object]:
    raise StorageError(f"{folder}/x: storage failed for 60 s")


@pytest.mark.usefixtures("ray_session")
def test_what_a_task_says_to_the_person_is_its_own_line(tmp_path):
    """This holds for many tasks at once: Ray used to abort the process if it canceled a task that was just ending."""
    for number in range(20):
        tasks = (Task(f"{i:032}", {}) for i in range(1 + number % 6))
        with pytest.raises(StorageError, match=r"^\S+/x: storage failed for 60 s$") as told:
            flow.Flow(Work(Location(str(tmp_path)))).all("refuse", refuse, tasks)
        assert type(told.value) is StorageError


def assigned(folder):
    return {"memory": ray.get_runtime_context().get_assigned_resources()["memory"], "files": []}


@pytest.mark.usefixtures("ray_session")
def test_ray_reserves_what_a_task_may_take(tmp_path):
    here = flow.Flow(Work(Location(str(tmp_path))), memory=64 << 20)
    (found,) = here.all("assigned", assigned, iter([Task(f"{0:032}", {})]))
    assert found["memory"] == 64 << 20


@pytest.mark.usefixtures("ray_session")
def test_tasks_that_need_gpus_run_in_actors_that_stay(tmp_path, monkeypatch):
    """Two actors, as for two GPUs. One of them dies, and its task runs again in its successor."""
    monkeypatch.setattr(flow.Flow, "devices", lambda self, each=1.0: 2)
    monkeypatch.setattr(ray_cluster, "ActorPool", lambda *given, num_gpus, **options: ActorPool(*given, **options))
    found = flow.Flow(Work(Location(str(tmp_path / "work"))))
    tasks = [Task(f"{i:032}", {"number": i, "mark": str(tmp_path / "mark")}) for i in range(20)]
    records = found.all("gpu", once, iter(tasks), pooled=True)
    assert [r["number"] for r in records] == list(range(20)) and len({r["pid"] for r in records}) in (2, 3)
    ran = (tmp_path / "mark").read_text().split()
    assert set(ran) == {str(i) for i in range(20)} and len(ran) <= 23
    again = flow.Flow(Work(Location(str(tmp_path / "work"))))
    assert again.all("gpu", once, iter(tasks), pooled=True) == records and again.kept == {"gpu": 20} and not again.done
    until(lambda: not any(Path(f"/proc/{r['pid']}").exists() for r in records), "end of the actors, with the tasks")


@pytest.mark.ci
@pytest.mark.usefixtures("ray_session")
def test_actors_that_find_no_place_are_not_waited_for(tmp_path, monkeypatch, caplog):
    """If only one of two fits, the tasks run in that one. If none fits, it is one error, in time."""
    total = int(ray.cluster_resources()["CPU"])
    monkeypatch.setattr(flow.Flow, "devices", lambda self, each=1.0: 2)
    monkeypatch.setattr(
        ray_cluster, "ActorPool", lambda *given, num_cpus, num_gpus, **options: ActorPool(*given, num_cpus=total, **options)
    )
    monkeypatch.setattr(pool, "PLACE_S", 40.0)  # a process starts slowly on a busy machine
    found = flow.Flow(Work(Location(str(tmp_path / "work"))))
    tasks = [Task(f"{i:032}", {"number": i, "mark": str(tmp_path / "mark")}) for i in range(4)]
    records = found.all("gpu", once, iter(tasks), pooled=True)
    assert [r["number"] for r in records] == list(range(4)) and len({r["pid"] for r in records}) == 1
    assert "started 1 of 2 actors" in caplog.text
    monkeypatch.setattr(pool, "PLACE_S", 3.0)
    others = placement_group([{"CPU": 1}])
    ray.get(others.ready(), timeout=60)
    try:
        with pytest.raises(HeliostatError, match="none of 2 actors could start within 3 s"):
            flow.Flow(Work(Location(str(tmp_path / "other")))).all("gpu", once, iter(tasks), pooled=True)
    finally:
        remove_placement_group(others)


@pytest.mark.ci
@pytest.mark.usefixtures("ray_session")
def test_kept_work_is_gone_on_with(tmp_path):
    """With another tokenizer or new input, read files aren't read again. The digest equals that of a dataset made at once."""
    make_input(tmp_path / "in")
    yaml = make_yaml(tmp_path, keep_work=True)
    prepare(yaml, [])
    read = sorted((tmp_path / "out.work/done/read").iterdir())
    prepare(yaml, ["tokenizer.vocab_size=350"])
    assert sorted((tmp_path / "out.work/done/read").iterdir()) == read
    make_input(tmp_path / "in", 100, seed=1)
    grown = prepare(yaml, [])
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / "out.work/done/read").iterdir()}
    assert set(read) < set(again)
    forced = prepare(yaml, [], force=True)
    assert forced["digest"] == grown["digest"] == prepare(make_yaml(tmp_path), [f"output={tmp_path}/other"])["digest"]
    assert min(p.stat().st_mtime_ns for p in (tmp_path / "out.work/done/read").iterdir()) > max(again.values()), "begun anew"


@pytest.mark.ci
@pytest.mark.usefixtures("ray_session")
def test_merges_change_nothing(tmp_path, monkeypatch):
    """With limits for small data, everything that many gigabytes need runs: merges of runs before shards, and of spills before
    they are compared or listed."""
    make_input(tmp_path / "in")
    yaml = make_yaml(tmp_path, shard_bytes=15_000, keep_work=True)
    monkeypatch.setattr(reasons, "END_ROWS", 80)
    plain = prepare(yaml, [])
    monkeypatch.setattr(pieces, "LEAST", 1 << 13)
    monkeypatch.setattr(minhash, "ROW_BYTES", 60_000)
    monkeypatch.setattr(merging, "MANY", 2)
    monkeypatch.setattr(merging, "MANY_RANGES", 4)
    merged = prepare(yaml, [f"output={tmp_path}/merged", "memory_limit=67108864"])
    done = {path.name for path in (tmp_path / "merged.work" / "done").iterdir()}
    assert {"merge", "minhash-0-merge", "ends-merge"} <= done
    assert merged["digest"] == plain["digest"] and merged["dropped"] == plain["dropped"]
    first, again = (pa.concat_tables(reasons.ends(manifest.read(Location(f"{tmp_path}/{out}")))) for out in ("out", "merged"))
    told = ["id", "stage", "reason", "hash"]
    assert first.select(told).equals(again.select(told)) and len(first) > 300


@pytest.mark.ci
@pytest.mark.usefixtures("ray_session")
def test_killed_at_any_moment_the_same_digest(tmp_path):
    """The driver and all its processes are killed three times, each time later. Finished work stays, and the digest is the
    same."""
    make_input(tmp_path / "in", 3000)
    yaml = make_yaml(tmp_path, keep_work=True)
    command, log = ["data", "prepare", str(yaml), "--json"], tmp_path / "driver.log"
    done, finished = tmp_path / "out.work/done", 0
    for more in (1, 4, 8):
        run = commands.start(*command, log=log)
        try:
            until(lambda least=finished + more, run=run: len(records(done)) >= least or run.poll() is not None, "records")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        time.sleep(2)  # for Ray's processes to see that their driver has ended
        before = records(done)
        assert len(before) >= finished + more or run.returncode == 0, "it ended by itself"
        finished = len(before)
    last = commands.run(*command, log=log, timeout=240)
    report = json.loads(last.out.splitlines()[-1])
    after = records(done)
    assert all(after[name] == when for name, when in before.items() if not name.startswith(("shards/", "listed/", "ends/")))
    whole = prepare(yaml, [f"output={tmp_path}/whole"])
    assert whole["digest"] == report["digest"]


def records(done: Path) -> dict[str, int]:
    """Maps every recorded task to the time of its record."""
    return {str(p.relative_to(done)): p.stat().st_mtime_ns for p in done.glob("*/*.json")}
