"""Tests the simulation of pipelines: a virtual cluster runs each task once, whatever fails, in the time that the tasks need."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from heliostat.curation import making, prepare
from heliostat.curation.minhash import components, exact
from heliostat.curation.pieces import FilePart
from heliostat.curation.prepare import InputFile
from heliostat.curation.simulation import simulate, tables
from heliostat.curation.simulation.measuring import MeasuringCluster
from heliostat.curation.simulation.profile import STAR_ROUNDS, SURVEY_BYTES_PER_S, Profile, Scaling, Sizes, synthesized
from heliostat.curation.simulation.requests import MOST_S, Requests
from heliostat.curation.simulation.virtual_cluster import AWAY_S, SimulatedFaults, VirtualCluster, VirtualExecutor
from heliostat.curation.text import ahead, packing
from heliostat.curation.text.sampling import SampledTexts
from heliostat.curation.text.tasks import TextSharding
from heliostat.data.manifest_table import in_memory
from heliostat.data.row_groups import ShardCollector
from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import crew, dispatchers, merging, spill
from heliostat.tasks import flow as flows
from heliostat.tasks.clusters import CountedTasks, Task, TaskKind
from heliostat.tasks.flow import Flow
from heliostat.tasks.spill import SpilledRun, named
from heliostat.tasks.work import Work, key

from tests.unit.command_line import run

GB = 1 << 30
NONE = SimulatedFaults(node_days=1e9, poison=0, slow=0, bursts_per_day=1e-9)
FEW = 400


def read(bytes: int = 1000, **more: Any) -> Profile:
    """Returns a profile in which a task of kind "read" takes 10 s for `bytes` bytes and keeps 100 documents."""
    profile = Profile()
    profile.begin("read")
    runs = [("00/" + "0" * 32 + f"-{bytes // 2}.parquet", 100, bytes)]
    record = {"runs": runs, "reasons": {}, "files": [runs[0][0]], "seconds": 10.0, "wall": 11.0, "run": "x", **more}
    profile.add("read", 0, bytes, record)
    return profile


def ran(folder: Path, cluster: VirtualCluster, count: int = FEW, bytes: int = 1000) -> tuple[Flow, list[dict[str, Any]]]:
    flow = Flow(Work(Location(str(folder))))
    flow.cluster = cluster
    tasks = (Task(key("read", i), {"number": i}, bytes=bytes, careful=True) for i in range(count))
    return flow, flow.all("read", print, tasks)


def test_tasks_take_the_time_that_the_cpus_need(tmp_path):
    """400 tasks of 10 s on 40 CPUs take ten rounds, plus start and storage, and the driver's own time."""
    cluster = VirtualCluster(5, 8, 8 * GB, read(), NONE)
    flow, records = ran(tmp_path, cluster)
    assert len(records) == FEW and flow.done == {"read": FEW}
    assert flow.seconds["read"] == pytest.approx(10.0 * FEW)
    assert 100 <= cluster.clock < 105
    assert sum(run[1] for record in records for run in record["runs"]) == 100 * FEW


def test_a_larger_task_takes_longer_and_keeps_more(tmp_path):
    _, (one,) = ran(tmp_path, VirtualCluster(1, 1, GB, read(), NONE), 1, 5000)
    assert one["seconds"] == 50.0 and [run[1:] for run in one["runs"]] == [[500, 5000]] and spill.size_of(one["files"][0]) == 2500


@pytest.mark.parametrize("faults", [
    SimulatedFaults(node_days=0.001, poison=0, slow=0, bursts_per_day=1e-9),
    SimulatedFaults(node_days=1e9, poison=0.02, slow=0, bursts_per_day=1e-9),
    SimulatedFaults(node_days=1e9, poison=0, slow=0.2, bursts_per_day=1e-9),
    SimulatedFaults(node_days=1e9, poison=0, slow=0, bursts_per_day=2000),
    SimulatedFaults(node_days=0.004, poison=0.02, slow=0.2, bursts_per_day=2000),
], ids=["lost nodes", "documents that end the process", "slow nodes", "503", "all"])  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.ci
def test_every_task_is_recorded_once_whatever_fails(tmp_path, faults, seed):
    cluster = VirtualCluster(5, 8, 8 * GB, read(), faults, seed)
    flow, records = ran(tmp_path, cluster)
    assert flow.done == {"read": FEW} and len(records) == FEW
    (times,) = cluster.kinds
    assert FEW + cluster.backups <= times.starts <= FEW + cluster.lost + cluster.poisoned + cluster.backups
    assert cluster.lost + cluster.poisoned + cluster.stretched > 0
    crashed = [record["reasons"]["crashed"] for record in records if "crashed" in record["reasons"]]
    assert flow.crashed == sum(crashed) and bool(crashed) == (faults.poison > 0) and set(crashed) <= {1}
    assert all(record["examples"] == {"crashed": ["poison"]} for record in records if "crashed" in record["reasons"])


def test_a_simulation_gives_the_same_tasks_again(tmp_path):
    """Which tasks fail follows from their keys and the seed."""
    found = []
    for name in ("a", "b"):
        cluster = VirtualCluster(5, 8, 8 * GB, read(), SimulatedFaults(poison=0.02, slow=0.2))
        found.append((ran(tmp_path / name, cluster)[1], cluster.poisoned, cluster.stretched))
    assert [[record["runs"] for record in records] for records, *_ in found[:1]] == [
        [record["runs"] for record in records] for records, *_ in found[1:]
    ]
    assert found[0][1:] == found[1][1:]


def test_records_are_scaled_and_files_get_new_names():
    name = "ab/" + "1" * 32 + "-100.parquet"
    tally = "ab/" + "2" * 32 + "-70.json"
    record = {"files": [name, tally], "rows": 3, "seconds": 0.5, "none": None, "yes": True, "why": "some words"}
    scaled = Scaling("key", 2.0).of(record)
    assert scaled | {"files": []} == {"files": [], "rows": 6, "seconds": 1.0, "none": None, "yes": True, "why": "some words"}
    assert scaled["files"][0] != name and spill.size_of(scaled["files"][0]) == 200 and scaled["files"][1] == tally
    assert Scaling("other", 2.0).of(record)["files"][0] != scaled["files"][0]


def test_a_task_with_more_documents_differs_less_from_the_mean():
    """The mean rate of the measured tasks stays, so the sum of the CPU seconds doesn't depend on the size of the tasks."""
    profile, rates = Profile(), (1.0, 2.0, 6.0)
    profile.begin("read")
    for rate in rates:
        profile.add("read", 0, 100, {"seconds": 100 * rate + 5.0, "opening": 5.0})
    measured = profile.tasks["read", 0]
    for growth, share in ((0.5, 1.0), (1.0, 1.0), (4.0, 0.5), (100.0, 0.1)):
        seconds = [profile.seconds("read", 0, task, growth) / growth / 100 for task in measured]
        assert seconds == pytest.approx([3 + share * (rate - 3) for rate in rates]) and sum(seconds) == pytest.approx(9)


@pytest.mark.parametrize("sizes", [[], [100, 300]])
def test_each_run_has_its_own_list_of_repeated_texts(sizes):
    """A simulated task has another number of runs than the measured one. Without copies in the sample, no run has a list."""
    names = [f"00/{i:032}-{size}.parquet" for i, size in enumerate(sizes)]
    run, profile = SpilledRun("00/" + "0" * 32 + "-10.parquet", 5, 1000), Profile()
    profile.begin("copies")
    profile.add("copies", 0, 2000, {"copies": names or [None] * 2, "files": names, "seconds": 1.0})
    task = Task("k", {"first": 0, "runs": [run] * 8})
    record = synthesized(TaskKind("copies", print, exact.copies), 0, task, Sizes().read(task), profile, Sizes())
    assert len(set(record["copies"])) == (8 if sizes else 1) and len(record["copies"]) == 8
    assert sum(spill.size_of(name) for name in record["files"]) == 4 * sum(sizes)


@pytest.mark.parametrize("measured", [1, 2, 5, 7])
def test_the_simulated_rounds_of_stars_end_with_a_list_of_the_members(tmp_path, measured):
    """Only the last round of the sample has this list, and a sample may need more rounds than are simulated for a small one."""
    profile, kind = Profile(), "minhash-0-stars"
    for call in range(measured):
        members = named(b"members", ".parquet") if call + 1 == measured else None
        edges = [named(f"edges {call}".encode(), ".parquet")]
        record = {"edges_files": edges, "edges": 9, "unsettled": int(members is None), "members": members, "seconds": 1.0}
        profile.add(kind, profile.begin(kind), 1000, record | {"files": edges})
    flow = Flow(Work(Location(str(tmp_path))))
    flow.cluster = VirtualCluster(1, 4, GB, profile, NONE)
    names, rounds = components.stars(flow, "minhash-0", [named(b"edges", ".parquet")], 4, 1000)
    assert all(names) and rounds == max(measured, STAR_ROUNDS)


def test_documents_are_sent_as_compressed_as_they_are_stored():
    """The search for equal texts reads all documents, so its time is that of the network. Zstandard halves their bytes."""
    sizes, runs = Sizes(), [SpilledRun(f"00/{i:032}-{40 * 10**6}.parquet", 5, 100 * 10**6) for i in range(4)]
    task = Task("k", {"low": 0, "high": spill.ALL // 2}, {"runs": sizes.share(runs, runs)})
    assert sizes.read(task) == 200 * 10**6 and sizes.stored(task, sizes.read(task)) == 80 * 10**6
    alone = Task("k", {"first": 0, "runs": runs[:2]})
    assert sizes.read(alone) == 200 * 10**6 and sizes.stored(alone, 10**6) == 400_000
    assert sizes.stored(Task("k", {}, bytes=7), 7) == 7
    seconds = Requests().of_task("sign", task, {"seconds": 0.1}, 4, 4, 200 * 10**6, 80 * 10**6, 0.0, 1)
    assert 0.8 < seconds < 0.9


@pytest.mark.parametrize(("seconds", "expected"), [(20.0, 20.4), (0.1, 1.4)])
def test_the_input_is_read_while_the_task_works(seconds, expected):
    """Only the first block delays the task. Then the CPU or the network is the limit."""
    task = Task("k", {"piece": [FilePart("a.jsonl", 10**9, 1, 0, 10**8)]})
    took = Requests().of_task("read", task, {"seconds": seconds}, 0, 0, 10**8, 10**8, 0.0, 1)
    assert took == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("at", "seconds"), [(0.0, 0.0), (3.0, 2.0), (8.0, 4.0), (9.9, 55.0), (10.0, 10.0), (5.0, 5000.0)])
def test_requests_are_spread_evenly_over_the_time_of_their_task(at, seconds):
    """The rate of a short task that begins many times at the same moment would otherwise count in one bucket."""
    requests = Requests()
    requests.add("p", 120.0, 7, at, seconds)
    of = requests.buckets["p"]
    assert sum(of.values()) == pytest.approx(120.0) and requests.total["p"] == 120.0
    end = at + min(seconds, MOST_S)
    shares = {n: max(0.0, min(end, 10 * n + 10) - max(at, 10 * n)) / (end - at) for n in of} if seconds else {0: 1.0}
    assert {n: of[n] / 120 for n in of if of[n]} == pytest.approx({n: share for n, share in shares.items() if share})


def test_a_task_reads_its_share_of_the_keys():
    sizes, runs = Sizes(), [SpilledRun("00/" + "0" * 32 + "-10.parquet", 5, 1000) for _ in range(8)]
    shared = sizes.share("reference", runs)
    assert sizes.read(Task("k", {"part": 0, "parts": 4}, {"runs": shared})) == 2000
    for keys in ({"low": 0, "high": spill.ALL // 8}, {"high": spill.ALL // 8}):
        assert sizes.read(Task("k", {**keys, "runs": runs})) == 1000
    assert sizes.read(Task("k", {"number": 3}, bytes=77)) == 77


def test_what_a_small_sample_does_not_do_is_derived_from_the_arguments(tmp_path):
    """A sample needs no merge of runs, but a large input does."""
    cluster = VirtualCluster(1, 4, GB, read(), NONE)
    flow = Flow(Work(Location(str(tmp_path))))
    flow.cluster = cluster
    runs = [SpilledRun(f"00/{i:032}-10.parquet", 500, 1000) for i in range(4)]
    arguments = {"runs": runs, "low": 0, "high": spill.ALL // 2, "run_bytes": 900}
    (record,) = flow.all("merge", merging.merge, iter([Task("k" * 32, arguments)]))
    assert [run[1:] for run in record["runs"]] == [[333, 666]] * 3


def test_a_run_is_measured(tmp_path):
    """The measuring cluster passes all on, and keeps bytes and record of each task, by kind and call."""
    inner = VirtualCluster(2, 2, GB, read(), NONE)
    measuring = MeasuringCluster(inner)
    ran(tmp_path, measuring, 3, 2000)  # type: ignore[arg-type]
    measured = measuring.profile.tasks["read", 0]
    assert [(task.bytes, task.record["seconds"]) for task in measured] == [(2000, 20.0)] * 3


def test_tasks_that_wait_for_a_lost_node_are_not_lost_with_it(tmp_path):
    """A node is lost once, with the tasks that it runs then. The next tasks start when the node is replaced."""
    cluster = VirtualCluster(1, 1, GB, read(), NONE)
    cluster.failures = [[15.0, 20.0]]
    executor = cluster.executor(TaskKind("read", print, print))
    for i in range(4):
        executor.start((None, "run", "read"), [Task(key("read", i), {}, bytes=1000)], {}, 1, None)
    assert cluster.lost == 1 and cluster.free(0, 15.0) == 15.0 + AWAY_S
    assert [round(end, 1) for end, _ in sorted(executor.ends)] == [10.0, 15.0, 325.0, 335.0]


def test_a_full_call_leaves_no_task_alone(tmp_path):
    """The first calls have one task each, because nothing is measured yet. Then 4,000 short tasks take 62 calls, and a few at
    the end."""
    cluster = VirtualCluster(1, 2, 8 * GB, read(), NONE)
    flow, _ = ran(tmp_path, cluster, 4000, 10)
    assert flow.done == {"read": 4000} and cluster.kinds[0].starts < 120


def test_calls_become_shorter_before_the_end_if_the_number_of_tasks_is_known(tmp_path, monkeypatch):
    """2,000 tasks of 1 s on 80 CPUs need 25 s. On 16,000 CPUs, the last batch of tasks that the driver looks up is too small to
    shorten calls, like the batches of 64 tasks here. Then long calls end last."""
    monkeypatch.setattr(flows, "BATCH", 64)
    clocks = list[float]()
    for known in (True, False):
        cluster = VirtualCluster(5, 16, 64 * GB, read(), NONE)
        flow = Flow(Work(Location(str(tmp_path))), cluster=cluster)
        tasks = (Task(key("read", i), {"number": i}, bytes=100) for i in range(2000))
        assert len(flow.all("read", print, CountedTasks(tasks, 2000) if known else tasks)) == 2000
        clocks.append(cluster.clock)
    assert clocks[0] < 27 < 30 < clocks[1], clocks


def test_short_tasks_share_calls_before_every_cpu_has_one(tmp_path):
    """The driver starts 1,000 calls per second. With 1,600 CPUs, 3,000 tasks of 0.1 s would be 3,000 calls."""
    cluster = VirtualCluster(100, 16, 64 * GB, read(), NONE)
    ran(tmp_path, cluster, 3000, 10)
    assert cluster.kinds[0].starts < 2000


def test_dispatchers_start_the_first_tasks_of_a_large_cluster_within_seconds(tmp_path, monkeypatch):
    """4,000 tasks of 10 s on 4,000 CPUs, without the time of the driver's own code. One process starts them in 4 s."""
    cluster = VirtualCluster(250, 16, 64 * GB, read(), NONE)
    flow, _ = ran(tmp_path, cluster, 4000, 1000)
    monkeypatch.setattr(dispatchers, "MOST", 0)
    alone = VirtualCluster(250, 16, 64 * GB, read(), NONE)
    ran(tmp_path / "alone", alone, 4000, 1000)
    assert flow.done == {"read": 4000} and cluster.dispatched >= 4000 and not alone.dispatched
    times = [one.clock - one.driver_seconds for one in (cluster, alone)]
    assert 10 < times[0] < 12 < 13.5 < times[1] < 16, times


def test_a_slow_look_for_ended_tasks_does_not_stop_the_start_of_others(tmp_path, monkeypatch):
    """On a busy machine, a look at all calls may take longer than the time between two looks. 200 tasks of 10 s on 208 CPUs take
    10 s, and the looks between their starts."""
    ended = VirtualExecutor.ended

    def slow(executor, references, wait_s):
        executor.cluster.spend(0.06)
        return ended(executor, references, wait_s)

    monkeypatch.setattr(crew, "MEASURE_S", 0.05)
    monkeypatch.setattr(VirtualExecutor, "ended", slow)
    cluster = VirtualCluster(13, 16, 64 * GB, read(), NONE)
    flow, _ = ran(tmp_path, cluster, 200, 1000)
    assert flow.done == {"read": 200} and cluster.clock < 15


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 200])
def test_the_number_of_tasks_that_follow_is_exact_if_the_number_of_tasks_is_known(tmp_path, monkeypatch, count):
    monkeypatch.setattr(flows, "BATCH", 64)
    flow, tasks = Flow(Work(Location(str(tmp_path)))), (Task(key("read", i), {}) for i in range(count))
    left = [left for *_, left in flow._looked_up("read", CountedTasks(tasks, count), lambda record: True)]
    assert left == list(range(count - 1, -1, -1))


def test_a_backup_repeats_the_tasks_that_the_late_call_has_not_finished(tmp_path, monkeypatch):
    """Ten tasks of 10 s take 100 s each on a slow node. At 250 s, two of them have a record, so the backup takes 80 s."""
    cluster = VirtualCluster(2, 1, GB, read(), NONE)
    executor = cluster.executor(TaskKind("read", print, print))
    monkeypatch.setattr(executor, "_slow", lambda task, backup: 1.0 if backup else 10.0)
    tasks = [Task(key("read", i), {}, bytes=1000) for i in range(10)]
    executor.start((None, "run", "read"), tasks, {}, 1, None)
    cluster.clock = 250.0
    backup = executor.start((None, "run", "read"), tasks, {}, 1, None, backup=True)
    assert executor.nodes[backup][0] == pytest.approx(330.0, abs=2) and len(executor.keys[backup]) == 10


def test_a_simulation_keeps_no_record_that_the_driver_has(tmp_path):
    """The report shows the driver's memory, so the simulation must not add the records of all short tasks."""
    cluster = VirtualCluster(5, 8, 8 * GB, read(), SimulatedFaults(node_days=0.001, slow=0.2))
    flow, _ = ran(tmp_path, cluster, 4000, 10)
    (executor,) = cluster.executors
    assert flow.done == {"read": 4000} and cluster.kinds[0].starts < 3000 and not executor.recorded
    assert len(executor.results) == len(executor.keys) == len(executor.nodes) <= cluster.backups


def test_a_kind_begins_with_its_first_task(tmp_path):
    """A driver prepares an executor before it merges the files that the executor's tasks read."""
    cluster = VirtualCluster(1, 1, GB, read(), NONE)
    executor = cluster.executor(TaskKind("read", print, print))
    cluster.clock += 100
    executor.start((None, "run", "read"), [Task("k", {}, bytes=1000)], {}, 1, None)
    assert cluster.kinds[0].begin >= 100


def test_a_sampled_task_reads_only_its_share_of_the_records():
    """In files that can't be split, a sample takes a share of the records, so the whole file is more work than was measured."""
    piece = [FilePart("a.jsonl.gz", 1000, 1), FilePart("b.jsonl", 500, 1)]
    source = SampledTexts("in", None, "", {"records": 0.1, "lines": 1.0})  # type: ignore[arg-type]
    assert Sizes().read(Task("k", {"piece": piece, "source": source}, bytes=1500)) == 600
    assert Sizes().read(Task("k", {"piece": piece, "source": None}, bytes=1500)) == 1500


def test_lines_are_counted_in_the_time_of_their_bytes(tmp_path):
    cluster = VirtualCluster(1, 1, GB, read(), NONE)
    flow = Flow(Work(Location(str(tmp_path))))
    flow.cluster = cluster
    part = FilePart("a.jsonl", 10**10, 1, stop=10**9)
    (record,) = flow.all("lines", print, iter([Task("k", {"input": "in", "part": part})]))
    assert record["seconds"] == 2.0 and cluster.requests.total["input"] == ahead.reads(10**9)


def test_a_large_compressed_file_is_read_in_parts(tmp_path):
    flow = Flow(Work(Location(str(tmp_path))))
    flow.cluster = cluster = VirtualCluster(1, 2, GB, read(), NONE)
    cut = [[part] for part in (FilePart("a.jsonl.zst", 10**9, 1, i * 10**8, (i + 1) * 10**8) for i in range(10))]
    parts = [part for (part,) in packing.divided(flow, "in", cut, 10**8, 10**12)]
    assert [(part.start, part.stop) for part in parts] == [(part.start, part.stop) for (part,) in cut]
    assert cluster.clock > 10**9 / SURVEY_BYTES_PER_S / 2


def test_a_tokenizer_trains_on_the_text_that_it_is_given():
    """The files of many tasks have more text than the tokenizer reads."""
    samples = ["00/" + "0" * 32 + "-1000.parquet"] * 64
    for train_bytes, read in ((4000, 4000), (9000, 5000)):
        arguments = {"samples": samples, "bytes": 5000, "high": 1 << 60, "config": {"train_bytes": train_bytes}}
        assert Sizes().read(Task("k", arguments)) == read


def test_a_list_of_dropped_documents_needs_no_measurement_and_other_unknown_tasks_are_an_error(tmp_path):
    """Only the simulation's own failures may drop documents."""
    flow = Flow(Work(Location(str(tmp_path))))
    flow.cluster = VirtualCluster(1, 1, GB, read(), NONE)
    assert flow.all("listed", print, iter([Task("k", {"part": 0, "parts": 1})]))[0]["listed"]
    with pytest.raises(ConfigError, match=r"^--simulate: other: the sample ran no such task\. Pass a larger"):
        flow.all("other", print, iter([Task("k", {})]))


def test_a_task_on_gpus_is_not_measured():
    with pytest.raises(ConfigError, match=r"^--simulate: embed: models in actors aren't supported"):
        MeasuringCluster(VirtualCluster(1, 1, GB, read(), NONE)).executor(TaskKind("embed", print, print, actors=2))


def test_a_small_task_never_takes_negative_time(tmp_path):
    _, (one,) = ran(tmp_path, VirtualCluster(1, 1, GB, read(opening=10.0005), NONE), 1, 10**6)
    assert one["seconds"] == 0.0


def test_an_input_has_the_given_size(monkeypatch):
    monkeypatch.setattr(simulate, "MOST_FILES", 1000)
    for count, each, size in ((3, 100, 450), (3, 100, 30), (600, 10, 10**6), (1200, 1, 1200)):
        files = [InputFile(str(i), each, 1) for i in range(count)]
        larger = simulate.enlarged(files, size)
        assert sum(file.bytes for file in larger) == pytest.approx(size, rel=0.01) and len(larger) <= max(
            count, simulate.MOST_FILES
        )
    assert [f.path for f in simulate.enlarged([InputFile("", 5, 1)], 10, "a.jsonl")] == ["00/000000/a.jsonl", "01/000001/a.jsonl"]


@pytest.mark.ci
def test_an_input_grows_by_copies_of_its_files():
    files = [InputFile("a.jsonl", 300, 1), InputFile("b/c.jsonl", 700, 2)]
    larger = simulate.enlarged(files, 10_000)
    assert sum(file.bytes for file in larger) == 10_000 and len({file.path for file in larger}) == 20
    many = simulate.enlarged([InputFile("a", 1, 1)], 10**8)
    assert len(many) <= simulate.MOST_FILES and sum(file.bytes for file in many) == 10**8


@pytest.mark.parametrize(("call", "says"), [
    (lambda: simulate.nodes_of("500"), "--cluster: '500' isn't NODESxCPUS. Pass for example 500x32"),
    (lambda: simulate.nodes_of("0x32"), "--cluster: '0x32' isn't NODESxCPUS"),
    (lambda: simulate.nodes_of("99999x9999"), "--cluster: 99999x9999 has more than 1,000,000 CPUs. Pass a smaller cluster"),
    (lambda: simulate.bytes_of("0TB"), "--simulate: '0TB' isn't a size"),
    (lambda: simulate.bytes_of("-5TB"), "--simulate: '-5TB' isn't a size"),
    (lambda: simulate.bytes_of("2PB"), "--simulate: 2PB is more than 1,000 TB. Pass a smaller size"),
    (lambda: simulate.bytes_of("much"), "--simulate: 'much' isn't a size. Pass for example 100TB"),
    (lambda: simulate.enlarged([InputFile("a", 0, 1)], 5), "--simulate: the input's files are empty"),
])  # fmt: skip
def test_a_mistake_is_one_line(call, says):
    with pytest.raises(ConfigError, match=f"^{says}"):
        call()
    assert simulate.nodes_of("500x32") == (500, 32) and simulate.bytes_of("100TB") == 10**14


def test_the_report_has_times_requests_and_failures(tmp_path):
    cluster = VirtualCluster(5, 8, 8 * GB, read(), SimulatedFaults(node_days=0.001, poison=0.02))
    ran(tmp_path, cluster)
    report = simulate.report(cluster, [InputFile("a", 400_000, 1)], 5_000_000) | {"name": "n", "cost": 1.0, "currency": "USD"}
    report |= {"sample": {"bytes": 10}, "rows": 3}
    (kind,) = report["kinds"]
    assert kind["tasks"] == FEW and report["times_bound"] > 1 and report["failures"]["repeated"] == cluster.backups
    assert report["requests"]["work/done/read/00*"]["total"] == cluster.kinds[0].starts
    assert len(tables.of_kinds(report)) == 2 and len(tables.of_requests(report)) == 1 + len(report["requests"])
    assert any(f"{FEW} tasks have a record" in line for line in tables.explain(report))


@pytest.mark.parametrize(("options", "says"), [
    (["--cluster", "5x2"], "--cluster: only for a simulation. Remove --cluster, or add --simulate"),
    (["--simulate", "1TB"], "--simulate: needs the share of the input to measure. Add --sample"),
    (["--simulate", "0", "--sample", "1%"], "--simulate: '0' isn't a size"),
    (["--simulate", "1TB", "--sample", "1%", "--cluster", "5"], "--cluster: '5' isn't NODESxCPUS"),
    (["--simulate", "1TB", "--sample", "1%", "--force"], "--force: not with --sample"),
    (["--simulate", "1TB", "--sample", "1%", "--set", "input=sklearn:digits"],
     "--simulate: input sklearn:digits has fewer than 2,000 images. Use an input with files"),
])  # fmt: skip
def test_a_mistake_is_found_before_ray_starts(tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.setattr(prepare, "_start_ray", lambda _: pytest.fail("Ray starts"))
    path, here = tmp_path / "p.yaml", tmp_path / "in"
    here.mkdir()
    (here / "a.jpg").write_bytes(b"x")
    path.write_text(
        f"name: n\npipeline: heliostat.pipelines:ImagePipeline\ninput: {here}\noutput: {tmp_path}/out\nresolution: 8\n"
    )
    code, _, told = run(monkeypatch, capsys, "data", "prepare", str(path), *options)
    assert code == 2 and says in told


def test_a_shard_has_a_row_group_for_each_chunk_of_tokens(tmp_path):
    """Readers of the dataset keep every row group, so their number follows from `chunk_tokens`."""
    measured = {"rows": [9, 8], "tokens": [300, 300], "bytes": [1, 2], "place": [1, 2], "content": ["a", "b"]}
    shard = {"path": "x", "file_bytes": 10, "documents": 4, "duplicates": 0, "bytes": 1000, "cut": 0, "counts": "a", "ends": [],
             "footer": "f", "row_groups": measured}  # fmt: skip
    profile = Profile()
    profile.begin("shards")
    profile.add("shards", 0, 1000, {"shards": [shard], "ends": [], "files": [], "seconds": 1.0, "run": "x"})
    flow = Flow(Work(Location(str(tmp_path))))
    flow.cluster = VirtualCluster(1, 1, GB, profile, NONE)
    plan = flow.share(TextSharding("out", 2, "{}", 0, 1000, False))
    runs = flow.share([SpilledRun("00/" + "0" * 32 + "-10.parquet", 5, 20_000)])
    tasks = (Task(key("shards", i), {"first": i, "stop": i + 1}, {"runs": runs, "plan": plan}, 10_000) for i in range(2))
    shards = ShardCollector()
    for record in flow.all("shards", print, tasks):
        for one in record["shards"]:
            shards.add(one)
    groups = in_memory(shards.rows())
    assert len(groups) == 2 * 6 and set(groups["tokens"].to_pylist()) == {1000} and set(groups["rows"].to_pylist()) == {9}
    assert len(set(groups["path"].to_pylist())) == 2


@pytest.mark.parametrize("size", [10, 1 << 20, 60 << 20, 600 << 20, 6 << 30, 16 << 30, 10**13])
def test_a_round_of_stars_has_short_tasks_and_few_reads(size):
    """Each task of a round writes a file, which all tasks of the next round read. A step with 95 tasks that read 4,750 files each
    took a minute."""
    parts = components.parts_of([f"00/{number:032x}-{size // 10}.parquet" for number in range(10)], most=10**6)
    assert parts == 1 or (size / parts <= components.MOST_PART and size / parts >= components.LEAST_PART / 2)
    if size / parts < components.MOST_PART / 2:
        assert parts <= merging.MOST_FILES and parts * parts <= merging.MANY_RANGES, "no round needs a merge"
    assert components.parts_of([f"00/{0:032x}-{size}.parquet"], most=3) <= 3


@pytest.mark.parametrize("shards", [1, 3, 100, 9265, 92_650])
def test_shards_that_are_written_at_the_same_time_have_many_prefixes(shards):
    """A store divides its keys by prefix, and neighbors share it. At most twice the mean is in one prefix at a time."""
    numbers = making.spread(range(shards))
    assert sorted(numbers) == list(range(shards)) == sorted(making.spread(list(range(shards))))
    prefixes = 1 + (shards - 1) // 1000
    for at in range(0, shards - 2000, 1000):
        assert max(Counter(number // 1000 for number in numbers[at : at + 2000]).values()) <= 2 * 2000 / prefixes + 30
