"""Tests `heliostat run verify`: a run passes if it trained on the right samples; any other fails, with its first wrong step."""

import dataclasses
import itertools
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heliostat.checkpoint import layout
from heliostat.cli.main import main
from heliostat.data import manifest, receipt
from heliostat.data.dataset import Dataset, open_dataset
from heliostat.data.manifest import Manifest
from heliostat.data.mixing import Shape
from heliostat.data.order import Order, SamplePlaces, Split
from heliostat.errors import ConfigError, VerifyError
from heliostat.runs import segments, verify
from heliostat.runs.history import History
from heliostat.storage.locations import Location

from tests.seeds import every_seed
from tests.unit.build_run import CHANGE, CUTS, Run, copied, wrong
from tests.unit.test_dataset import LENGTH, make_dataset, make_plan, naive


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    folder = tmp_path_factory.mktemp("data")
    return [make_dataset(folder / name, seed, shards=2) for name, seed in (("a", 1), ("b", 2))]


@pytest.fixture(scope="module")
def made(sources: list[Manifest], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run") / "run", make_plan(*sources))


@pytest.fixture(scope="module")
def changed(sources: list[Manifest], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Returns a run whose data was changed once: it has other sources and another seed from step CHANGE on."""
    second = dataclasses.replace(make_plan(sources[1], seed=9), mix=((CHANGE, (1.0,)),))
    return Run(tmp_path_factory.mktemp("changed") / "run", make_plan(*sources), second)


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """Returns a separate valid run for each test."""
    return copied(made, tmp_path)


@pytest.fixture
def changed_run(changed: Run, tmp_path: Path) -> Run:
    return copied(changed, tmp_path)


def right(steps: int, batch: int = 8) -> dict[str, Any]:
    return {
        "ok": True,
        "steps": steps,
        "samples": steps * batch,
        "lost": 0,
        "repeated": 0,
        "replaced": 0,
        "first_difference": None,
    }


# right runs ----------------------------------------------------------------------------------------------------------


def test_a_right_run_verifies(run):
    """Two sources, more than an epoch of one of them, and receipts that end within rounds, including the last one."""
    assert verify.verify(run.location) == right(23)


@pytest.mark.parametrize("shape", [Shape(8, 8, 1, 8), Shape(8, 2, 3, 24), Shape(6, 3, 4, 16), Shape(4, 1, 5, 100)], ids=str)
@pytest.mark.parametrize("steps", [1, 5, 14])
def test_it_verifies_whatever_the_cut(sources, tmp_path, shape, steps):
    """Rounds within windows, windows within rounds, and neither a multiple of the other."""
    made = Run(tmp_path / "run", dataclasses.replace(make_plan(*sources), shape=shape), cuts=(0, steps))
    assert verify.verify(made.location) == right(steps, shape.batch)


def test_a_run_whose_data_was_changed_verifies(changed_run):
    """Each step is compared with its segment. A checkpoint of the old data after the change doesn't count."""
    assert verify.verify(changed_run.location) == right(23)
    changed_run.checkpoint(22, chain="00", data_digest=changed_run.plans[0].digest)
    assert verify.verify(changed_run.location) == right(23)


def test_a_run_with_bad_samples_verifies(sources, tmp_path):
    """Some tokens are outside the vocabulary. The replacements are checked and counted, and don't count as repetitions."""
    small = [
        manifest.write(Location(str(tmp_path / s.location.name)), s.chunks.to_pylist(), {"kind": "tokens", "vocab_size": 59_000})
        for s in sources
    ]
    for s in sources:
        shutil.copytree(s.location.join("shards").path, tmp_path / s.location.name / "shards")
    made = Run(tmp_path / "run", make_plan(*small))
    data = open_dataset(made.plans[0])
    planned = data.order.locate(np.concatenate([data.order.step(step).ravel() for step in range(23)]))
    contents = [naive(small[s], c, r) for s, c, r in zip(planned.source, planned.chunk, planned.row, strict=True)]
    bad = sum(max(content) >= 59_000 for content in contents)
    assert bad > 10 and verify.verify(made.location) == {**right(23), "replaced": bad}


def test_receipts_may_overlap_if_they_agree(run):
    """A run that resumed from an older checkpoint leaves such receipts, with checkpoints at other steps."""
    for first, end in ((0, 7), (3, 16), (10, 22)):
        run.receipt(first, end)
    assert verify.verify(run.location) == right(23)


def test_a_torn_checkpoint_says_nothing(run):
    """Without a complete checkpoint.json, the checkpoint doesn't exist, so nothing is lost."""
    layout.folder(run.location, 40).join(layout.INDEX).write(b"{}")
    assert verify.verify(run.location) == right(23)


# wrong runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(CUTS[-1]))
def test_a_changed_digest_is_found_at_its_step(run, step):
    """For any step: the report names that step, the others are right, and the chain isn't reported as wrong."""
    end = next(c for c in CUTS if c > step)
    first = CUTS[CUTS.index(end) - 1]
    steps = [wrong(d) if s == step else d for s, d in enumerate(run.digests[first:end], first)]
    run.receipt(first, end, steps=steps)
    report = verify.verify(run.location)
    assert not report["ok"] and report["steps"] == 22 and report["samples"] == 184 and report["lost"] == 0
    assert report["first_difference"] == {
        "step": step + 1,
        "what": "digest",
        "where": f"step-{end:08d}.json",
        "expected": run.digests[step],
        "found": wrong(run.digests[step]),
    }


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("token", [0, LENGTH - 1])
def test_a_token_that_was_not_the_datasets_is_found(sources, tmp_path, source, token):
    """For a run that trained on one sample with one changed token, the report names the step with this sample."""
    order = open_dataset(make_plan(*sources)).order
    there = order.locate(order.step(6).ravel())
    i = int(np.flatnonzero(there.source == source)[0])

    class Spoiled(Run):
        def content(self, where: Manifest, chunk: int, row: int) -> list[int]:
            found = naive(where, chunk, row)
            if (where.digest, chunk, row) == (sources[source].digest, there.chunk[i], there.row[i]):
                found[token] += 1
            return found

    assert Spoiled(tmp_path / "run", make_plan(*sources), cuts=(0, 9)).difference() == (6, "digest")


@pytest.mark.parametrize(("first", "end"), [*itertools.pairwise(CUTS)])
def test_a_missing_receipt_is_lost_samples(run, first, end):
    """This includes the last one, because a checkpoint follows it. The chain after the gap is still checked, and is right."""
    run.file(end).delete()
    assert run.difference() == (first, "receipt")
    report = verify.verify(run.location)
    assert (report["steps"], report["samples"], report["lost"]) == (23 - end + first, 184 - 8 * (end - first), 8 * (end - first))
    run.checkpoint(23, chain=wrong(run.chains[23]))
    assert verify.verify(run.location)["steps"] == 23 - end + first


def test_a_run_is_as_long_as_its_receipts(run):
    """Without the last receipt and the checkpoint after it, it is a valid run of fewer steps."""
    run.file(23).delete()
    layout.folder(run.location, 23).delete()
    assert verify.verify(run.location) == right(20)


@pytest.mark.parametrize("end", CUTS[1:])
def test_a_wrong_chain_is_found_at_its_link(run, end):
    """The fault is in a receipt: the report names the link's last step, and all digests are right."""
    run.receipt(CUTS[CUTS.index(end) - 1], end, chain=wrong(run.chains[end]))
    assert run.difference() == (end - 1, "chain")
    assert verify.verify(run.location)["steps"] == 23


@pytest.mark.parametrize("step", [20, 23])
def test_a_checkpoint_whose_chain_is_another_is_found(run, step):
    """A run that trained on other samples saved it."""
    run.checkpoint(step, chain=wrong(run.chains[step]))
    report = verify.verify(run.location)
    assert report["first_difference"]["where"] == f"checkpoint {step}" and run.difference() == (step - 1, "chain")


@pytest.mark.parametrize("step", range(3, 16))
def test_overlapping_receipts_that_disagree_are_found(run, step):
    """An outdated file is next to the newer ones: the report names the step at which they differ."""
    run.receipt(3, 16, steps=[wrong(d) if s == step else d for s, d in enumerate(run.digests[3:16], 3)])
    assert run.difference() == (step, "digest")


def test_the_first_of_several_faults_is_named(run):
    """The first by step, for any kinds and files."""
    run.checkpoint(23, chain="00")
    assert run.difference() == (22, "chain")
    run.file(20).delete()
    assert run.difference() == (11, "receipt")
    run.receipt(3, 10, chain="00")
    assert run.difference() == (9, "chain")
    run.receipt(0, 3, data_digest="f" * 32)
    assert run.difference() == (0, "data plan")


@pytest.mark.parametrize("step", [CHANGE - 1, CHANGE, 22])
def test_a_fault_of_a_changed_run_is_found(changed_run, step):
    """In the last step of the old segment, in the first of the new one, and at the end."""
    end = next(c for c in CUTS if c > step)
    first = CUTS[CUTS.index(end) - 1]
    changed_run.receipt(first, end, steps=[*changed_run.digests[first:step], "00", *changed_run.digests[step + 1 : end]])
    assert changed_run.difference() == (step, "digest")


def test_a_receipt_of_other_data_is_found(changed_run):
    """Its steps were trained by the old plan after the change."""
    changed_run.receipt(11, 20, data_digest=changed_run.plans[0].digest)
    assert changed_run.difference() == (11, "data plan")


def test_a_damaged_receipt_is_named(run):
    """Truncated, or with another file's content: one line has the file."""
    whole = run.file(10).read()
    for content in (whole[:50], b"[]", b"{}", b"\xff"):
        run.file(10).write(content)
        with pytest.raises(VerifyError, match=r"receipts/step-00000010\.json: isn't a valid receipt \("):
            verify.verify(run.location)


def test_a_run_without_receipts_says_so(run):
    """It was stopped before its first checkpoint."""
    run.location.join("receipts").delete()
    run.location.join("checkpoints").delete()
    with pytest.raises(ConfigError, match=r"has no receipts yet\. heliostat writes the first receipt with the first checkpoint"):
        verify.verify(run.location)


# every sample once an epoch ------------------------------------------------------------------------------------------


@every_seed(20)
def test_repeated_samples_are_counted(seed):
    """The number equals a plain count of each epoch's places, for any split into units. The same sample in two epochs isn't a
    repetition."""
    rng = np.random.default_rng(seed)
    counts = [rng.integers(0, 30, 6), rng.integers(1, 9, 3)]
    splits = [Split(n, np.zeros_like(n), np.zeros_like(n)) for n in counts]
    seen = verify.SeenSamples(SimpleNamespace(order=SimpleNamespace(splits=splits)))  # type: ignore[arg-type]
    everywhere = [(s, c, r) for s, n in enumerate(counts) for c, size in enumerate(n.tolist()) for r in range(size)]
    places, found = Counter(), 0
    for epoch in range(4):
        for _ in range(5):
            some = [(s, epoch + int(rng.integers(2)), c, r) for s, c, r in rng.choice(everywhere, 12).tolist()]
            places.update(some)
            source, epochs, chunk, row = np.array(some).T
            found += seen.add(
                SamplePlaces(np.arange(12), source.astype(np.int16), epochs.astype(np.int32), chunk.astype(np.int32), row)
            )
    assert found == sum(n - 1 for n in places.values()) > 0


def test_an_order_that_repeats_a_sample_is_found(sources, tmp_path, monkeypatch):
    """The run trained on exactly that order, so the receipts are right, but the run is wrong."""
    locate = Order.locate

    def faulty(self: Order, positions: np.ndarray) -> SamplePlaces:
        found = locate(self, positions)
        row = np.where((found.row == 1) & (found.source == 0) & (found.epoch == 0), 0, found.row)
        return dataclasses.replace(found, row=row)

    monkeypatch.setattr(Order, "locate", faulty)
    made = Run(tmp_path / "run", make_plan(*sources), cuts=(0, 23))
    report = verify.verify(made.location)
    assert report["steps"] == 23 and report["first_difference"] is None
    assert not report["ok"] and report["repeated"] > 0 and "come twice within an epoch" in verify.explain(report)


# how it reads --------------------------------------------------------------------------------------------------------


def test_a_windows_chunks_are_read_about_once(sources, tmp_path, monkeypatch):
    """Units have at least one window, and cover each step once, in order."""
    made = Run(tmp_path / "run", dataclasses.replace(make_plan(*sources), shape=Shape(4, 1, 1, 32)), cuts=(0, 40))
    loads = []
    load = Dataset.load
    monkeypatch.setattr(Dataset, "load", lambda self, positions: loads.append(len(positions)) or load(self, positions))
    found = list(verify.units(History(made.location)))
    assert [(u.first, u.end) for u in found] == [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40)]
    assert verify.verify(made.location) == right(40, 4) and sorted(loads) == [32] * 5


# the command ---------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    """Runs the command; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["heliostat", *arguments])
    with pytest.raises(SystemExit) as e:
        main()
    return e.value.code or 0, *capsys.readouterr()


def test_the_command_says_that_a_run_is_right(run, monkeypatch, capsys):
    """Exit code 0, one line, and nothing on standard error. --json prints the report."""
    code, out, err = command(monkeypatch, capsys, "run", "verify", str(run.location))
    assert (code, err) == (0, "") and out == (
        "23 steps match their receipts: 184 samples, 0 lost, 0 repeated, 0 bad ones replaced\n"
    )
    code, out, err = command(monkeypatch, capsys, "run", "verify", str(run.location), "--json")
    assert (code, err) == (0, "") and json.loads(out) == right(23)


def test_the_command_fails_on_a_wrong_run(run, monkeypatch, capsys):
    """Exit code 1, and one line with the first differing step. With --json, the report is printed, too."""
    run.receipt(3, 10, steps=[*run.digests[3:7], "00", *run.digests[8:10]])
    code, out, err = command(monkeypatch, capsys, "run", "verify", str(run.location), "--json")
    told = json.loads(out)
    assert code == 1 and told["first_difference"]["step"] == 8 and not told["ok"]
    assert told["error"]["type"] == "VerifyError" and told["error"]["exit_code"] == 1 and told["error"]["message"] in err
    assert err == (
        f"error: {run.location}: step 8 is the first step that differs: the digest of the step's samples is {run.digests[7]}, "
        "but step-00000010.json has 00\n"
    )


@pytest.mark.parametrize("arguments", [("run", "verify"), ("run", "samples", "--step", "1")], ids=lambda a: a[1])
def test_a_folder_that_holds_no_run_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    """Such a folder is bad input, and the error has an alternative."""
    code, out, err = command(monkeypatch, capsys, *arguments, str(tmp_path))
    assert (code, out) == (2, "") and err == (
        f"error: {tmp_path}: isn't a run (no checkpoints, no receipts). Pass a run id, or a run's folder STORAGE/NAME\n"
    )


def rows_run(tmp_path: Path, versions: list[int | None]) -> tuple[Location, Manifest]:
    """Writes a run of a dataset of rows, with a receipt of each version for every four steps (None: version 1, which has no
    version field)."""
    rows = []
    for s in range(3):
        columns = {"caption": [f"{s}:{i}" for i in range(100)], "image": [None if i % 7 == 0 else bytes([i]) for i in range(100)]}
        path = tmp_path / f"data/shards/{s}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path, row_group_size=20, write_page_checksum=True)
        rows += manifest.read_footer(Location(str(tmp_path / "data")), f"shards/{s}.parquet", None)
    source = manifest.write(Location(str(tmp_path / "data")), rows, {"kind": "rows"})
    plan, run = dataclasses.replace(make_plan(source), sequence_length=None), Location(str(tmp_path / "run"))
    segments.begin(run, plan, 0)
    data, chain = Dataset(plan), receipt.GENESIS
    for number, version in enumerate(versions):
        steps = []
        for step in range(4 * number, 4 * number + 4):
            loaded = data.load(data.order.step(step).ravel())
            digests = receipt.sample_digests(loaded.samples, loaded.content, version or 1).reshape(plan.shape.lanes, -1)
            steps += receipt.step_digests(np.array([[receipt.lane_digest(lane) for lane in digests]]))
        chain = receipt.extend(chain, steps)
        sealed = json.loads(receipt.seal(4 * number, steps, chain, plan.digest)) | {"version": version}
        told = json.dumps({k: v for k, v in sealed.items() if v is not None})
        run.join("receipts", f"step-{4 * number + 4:08d}.json").write(told.encode())
    return run, source


@pytest.mark.parametrize("versions", [[None], [2], [None, None, 2], [None, 2, None], [1, 2]], ids=str)
def test_each_receipt_is_checked_by_its_own_version(tmp_path, versions):
    """A run of rows that resumed with a newer heliostat, or again with an older one, passes, and so does the chain."""
    run, _ = rows_run(tmp_path, versions)
    report = verify.verify(run)
    assert report["ok"] and report["steps"] == 4 * len(versions) and report["lost"] == 0


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_a_gap_between_versions_breaks_no_chain(tmp_path, gap):
    """The version of the receipt before a gap computes the steps in the gap."""
    run, _ = rows_run(tmp_path, [2, None, None, None, 2, 2])
    run.join("receipts", f"step-{4 * gap + 4:08d}.json").delete()
    report = verify.verify(run)
    if gap > 1:
        assert report["lost"] == 32 and report["first_difference"]["what"] == "receipt" and report["steps"] == 20
    assert not report["ok"]


def test_a_receipt_of_a_version_to_come_is_named(tmp_path):
    run, _ = rows_run(tmp_path, [2, 2])
    file = run.join("receipts", "step-00000008.json")
    file.write(json.dumps(json.loads(file.read()) | {"version": 99}).encode())
    with pytest.raises(VerifyError, match=r"step-00000008\.json: has version 99, from a newer heliostat"):
        verify.verify(run)
