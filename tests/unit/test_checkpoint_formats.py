"""Tests that checkpoints of older formats are read unchanged, and that a damaged index of a shard is detected before its use."""

import json
import re
from pathlib import Path

import pytest
import torch
from heliostat.checkpoint import checksums, index, layout, retention
from heliostat.errors import CheckpointError, CorruptCheckpointError
from heliostat.storage.locations import Location
from heliostat.tune.trial import clone

from tests.unit.build_checkpoint import age, save, slices
from tests.unit.build_job import job

WORLD = 3
TENSORS = {
    "master.w": torch.arange(800_001, dtype=torch.float32),  # a rank's part has blocks enough
    "exp_avg.w": torch.arange(10, 22, dtype=torch.float32),
    "ema.one": torch.ones(1),
}
TABLE = {"buffer.table": torch.arange(6).reshape(2, 3), "buffer.odd": torch.tensor(7)}


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return Location(str(tmp_path / "run"))


def _save(run: Location, step: int, world: int = WORLD) -> Path:
    return save(run, step, [slices(TENSORS, rank, world) | TABLE for rank in range(world)], job=job().dump())


@pytest.mark.parametrize("number", [2, 3, 4])
def test_every_format_holds_the_same_numbers(run: Location, number: int) -> None:
    """Tensors are read whole, as a stream, and in any slice, also in formats 2 and 3, whose `checkpoint.json` lists every
    chunk."""
    folder = _save(run, 10)
    if number < 4:
        age(folder, number)
    assert sorted(p.name for p in folder.glob("shard-*.json")) == (
        [f"shard-0000{r}.json" for r in range(3)] if number > 3 else []
    )
    found = layout.open_checkpoint(run, 10)
    for name, tensor in {**TENSORS, **TABLE}.items():
        assert torch.equal(found.read(name), tensor.reshape(-1)) and found.tensors[name].shape == list(tensor.shape)
        assert torch.equal(torch.cat(list(found.stream(name))), tensor.reshape(-1))
    for first, numel in [(0, 1), (266_660, 20), (533_000, 267_001), (5, 799_990)]:
        part = torch.empty(numel)
        found.fill(found.slices("master.w", first, part))
        assert torch.equal(part, TENSORS["master.w"][first : first + numel])
    assert [row["whole"] for row in retention.survey(run)] == [True]


def test_a_restore_reads_the_indexes_of_the_shards_that_it_needs_and_no_other(run: Location) -> None:
    folder = _save(run, 10)
    found = layout.open_checkpoint(run, 10)
    assert found.needed("master.w", 300_000, 100) == {1} and not found.places
    (folder / "shard-00000.json").write_bytes(b"?")  # torn after the checkpoint was opened
    part = torch.empty(100)
    found.fill(found.slices("master.w", 300_000, part))
    assert torch.equal(part, TENSORS["master.w"][300_000:300_100]) and set(found.places) == {1}


@pytest.mark.parametrize("kind", ["flipped", "cut", "gone", "swapped"])
def test_a_torn_index_of_a_shard_is_found_before_anything_is_used(run: Location, kind: str) -> None:
    """An index that is missing or of another size makes the checkpoint incomplete. Its checksum shows any other fault when it is
    read."""
    for step in (10, 20):
        folder = _save(run, step)
    file, other = folder / "shard-00001.json", folder / "shard-00002.json"
    data = file.read_bytes()
    if kind == "gone":
        file.unlink()
    elif kind == "swapped":  # of a save of the same cut with other contents: its own checksums are as they should be
        told = json.loads(data)
        told["tensors"]["master.w"]["crc32"][0] ^= 1
        file.write_bytes(json.dumps(told).encode().ljust(len(data))[: len(data)])
    else:
        file.write_bytes(data[:-1] if kind == "cut" else bytes([data[0] ^ 1]) + data[1:])
    assert other.exists()
    if kind in ("cut", "gone"):
        with pytest.raises(CorruptCheckpointError, match=r"shard-00001\.json: expected \d+ bytes, found (\d+|none)"):
            layout.open_checkpoint(run, 20)
        assert layout.latest(run).step == 10  # type: ignore[union-attr]
        return
    found, target = layout.open_checkpoint(run, 20), torch.zeros(800_001)
    with pytest.raises(
        CorruptCheckpointError,
        match=r"step-00000020/shard-00001\.json: its bytes have changed since they were written \(CRC-32\)",
    ) as e:
        found.fill(found.slices("master.w", 0, target))
    assert e.value.step == 20 and not target.any()


def test_an_index_that_does_not_fit_its_checkpoint_is_refused(run: Location) -> None:
    """Its checksum is valid, so it was written this way: a place outside the shard, an unknown tensor, a missing chunk."""
    folder = _save(run, 10)
    for change, said in [
        ({"offset": 1 << 40}, "a chunk is outside its shard"),
        ({"crc32": []}, "a chunk doesn't have one CRC-32 per block"),
        ({"numel": 1, "crc32": [1]}, "lacks the elements of 'master.w'"),
        ({"start": 1}, "lacks the elements of 'master.w'"),
    ]:
        told = json.loads((folder / "shard-00000.json").read_bytes())
        told["tensors"]["master.w"] |= change
        _forge(run, json.dumps(told).encode())
        with pytest.raises(CorruptCheckpointError, match=re.escape(said)):
            layout.open_checkpoint(run, 10).read("master.w")
        _save(run, 10)
    _forge(run, json.dumps({"tensors": {"other": told["tensors"]["master.w"]}}).encode())
    with pytest.raises(CorruptCheckpointError, match="'other' isn't a tensor of the checkpoint"):
        layout.open_checkpoint(run, 10).read("master.w")


def _forge(run: Location, data: bytes) -> None:
    """Replaces the index of the first shard, and updates `checkpoint.json`."""
    place = layout.folder(run, 10)
    root = layout.decode(place.join(layout.INDEX).read())
    del root["crc32"]
    root["shards"][0]["index"] = index.seal(data)
    place.join("shard-00000.json").write(data)
    place.join(layout.INDEX).write(layout.encode(root))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"chunks": [{"shard": 0, "start": 0, "numel": 12, "offset": 1 << 40, "crc32": []}]},
            "lists chunks, but only the formats 2 and 3 list chunks",
        ),
        ({"columns": [2, -4]}, "can't have 2 blocks of columns in rows of -4 elements"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(run: Location, change: dict[str, object], said: str) -> None:
    """For example, a tensor at places that its shard's own index, which is checked, doesn't have."""
    place = Location(str(_save(run, 10))).join(layout.INDEX)
    root = layout.decode(place.read())
    del root["crc32"]
    root["tensors"]["exp_avg.w"] |= change
    place.write(layout.encode(root))
    with pytest.raises(CheckpointError, match=f"tensors: 'exp_avg.w': {said}"):
        layout.open_checkpoint(run, 10)


def test_a_format_of_a_newer_version_is_named(run: Location) -> None:
    folder = _save(run, 10)
    root = layout.decode((folder / "checkpoint.json").read_bytes())
    del root["crc32"]
    (folder / "checkpoint.json").write_bytes(layout.encode({**root, "format": 6}))
    with pytest.raises(
        CheckpointError, match=r"format 6 isn't supported by this version .* \(2, 3, 4, 5\)\. Use a newer heliostat"
    ):
        layout.open_checkpoint(run, 10)


@pytest.mark.parametrize("number", [3, 4])
def test_a_clone_has_all_files_of_its_donor(run: Location, tmp_path: Path, number: int) -> None:
    folder, other = _save(run, 10), Location(str(tmp_path / "other"))
    if number < 4:
        age(folder, number)
    assert clone({"id": "1", "folder": str(run), "step": 10}, other)
    made = Path(layout.folder(other, 10).path)
    assert {p.name: p.read_bytes() for p in made.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert torch.equal(layout.open_checkpoint(other, 10).read("master.w"), TENSORS["master.w"])


def test_a_block_is_checked_in_the_middle_of_a_chunk(run: Location) -> None:
    """The requested slice is in one block, which isn't the first of the chunk. Only that block's checksum counts."""
    folder = _save(run, 10, world=1)
    found = layout.open_checkpoint(run, 10)
    first = checksums.BLOCK // 4 + 10
    ((_, part),) = found.slices("master.w", first, torch.empty(4))
    data = bytearray((folder / "shard-00000.safetensors").read_bytes())
    data[part.offset + 1] ^= 1  # of the first block
    (folder / "shard-00000.safetensors").write_bytes(data)
    target = torch.empty(4)
    found.fill(found.slices("master.w", first, target))
    assert torch.equal(target, TENSORS["master.w"][first : first + 4])
    with pytest.raises(CorruptCheckpointError, match=r"bytes \d+ to \d+ have changed since they were written"):
        found.read("master.w")
