"""Tests that all records are read in one way: a written record is restored, and any other content is one line with the file and
its fault."""

import dataclasses
import json
import math
import random
from dataclasses import dataclass, field

import pytest
from heliostat.data import manifest
from heliostat.data.dataset import DataPlan
from heliostat.data.mixing import Shape
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location
from heliostat.storage.records import Format, Number, closed

from tests.unit.test_manifest import META, some_rows


@closed
@dataclass
class Thing:
    name: str
    seconds: Number = 0.0
    marks: list[tuple[int, float]] = field(default_factory=list)


THING = Format(Thing, "thing", ConfigError, lambda t: None if t.name else "it has no name", "Delete it")


def test_what_was_written_comes_back(tmp_path):
    """It is restored to the bit, with its tuples. This includes files with one record per line."""
    made = Thing("a", math.pi, [(1, 0.1), (2, 1e-300)])
    path = tmp_path / "x.json"
    path.write_text(json.dumps(dataclasses.asdict(made)))
    assert THING.read(path) == made == THING.read(Location(str(path)))
    path.write_text(f"{path.read_text()}\n\n{path.read_text()}\n")
    assert THING.read_lines(path) == [made, made]
    with pytest.raises(FileNotFoundError):
        THING.read(tmp_path / "y.json")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "Invalid JSON"),
        ('{"name": "a"', "Invalid JSON"),
        ("[" * 5000, "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"name": 1}', "name: Input should be a valid string"),
        ('{"name": "a", "seconds": NaN}', "seconds: Input should be a finite number"),
        ('{"name": "a", "seconds": "1"}', "seconds: Input should be a valid number"),
        ('{"name": "a", "marks": [[1, 2], [1]]}', "marks.1.1: Field required"),
        ('{"name": "a", "more\\u001b": 1}', "more\\x1b: Unexpected keyword argument"),
        ('{"name": ""}', "it has no name"),
    ],
)
def test_anything_else_is_one_line_that_names_the_file_and_its_first_fault(tmp_path, text, fault):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        THING.read(path)
    said = str(e.value)
    assert (
        said.startswith(f"{path}: isn't a valid thing (") and fault in said and said.endswith("). Delete it") and "\n" not in said
    )


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_record_that_is_replaced_while_it_is_read_is_read_again(place):
    """An object became shorter between the requests for its length and its bytes. A damaged record stays damaged."""
    shorter, longer = b'{"name": "a"}', b'{"name": "a", "seconds": 12345.6}'
    place.write(longer)
    with place.fs.open_input_file(place.path) as file:  # which asks for the length
        place.write(shorter)
        torn = file.read()
    assert torn != shorter and torn.startswith(shorter)
    told = [torn, longer[: len(shorter)], shorter]

    class Replaced(Location):
        def read(self, most: int | None = None) -> bytes:
            return told.pop(0)

    assert THING.read(Replaced(place.uri)) == Thing("a") and not told
    place.write(longer[:-2])
    with pytest.raises(ConfigError, match=r": isn't a valid thing \(Invalid JSON: .*\)\. Delete it"):
        THING.read(place)


def test_a_data_plan_of_any_age_comes_back_and_an_impossible_one_is_refused():
    """Plans of the first runs name neither skips nor a unit. Every rule that the order relies on is checked before the run."""
    mix = ((0, (1.0, 2.0)), (5, (0.0, 1.0)))
    plan = DataPlan(("a", "b"), ("d", "e"), mix, (None, 2.0), 64, 1, 0.1, Shape(8, 4, 2, 16))
    raw = plan.dump()
    assert DataPlan.parse(raw, "x") == plan
    shape = raw["shape"]
    old = {**raw, "shape": {k: v for k, v in shape.items() if k != "unit"}}
    del old["skips"]
    assert DataPlan.parse(old, "x") == plan
    wrong = [{"shape": {**shape, "lanes": 3}}, {"shape": {**shape, "window": 15}}, {"shape": {**shape, "window": 10**12}},
             {"mix": [[0, [1.0]]]}, {"mix": [[0, [0.0, 0.0]]]}, {"mix": [[5, [1, 1]], [5, [1, 1]]]}, {"mix": []},
             {"digests": ["d"]}, {"max_epochs": [None, -1.0]}, {"sequence_length": "64"}, {"seed": -1}, {"held_fraction": 1.5},
             {"unheard": 1}, {"skips": [[1, 2]]}]  # fmt: skip
    for change in wrong:
        with pytest.raises(DataError, match=r"^x: (isn't a valid data plan|written by another version)"):
            DataPlan.parse({**raw, **change}, "x")


@pytest.mark.parametrize(
    "change",
    [{"path": "../x.parquet"}, {"path": "/etc/x"}, {"path": "shards/../../x"}, {"path": "a//b"}, {"path": "a\x1bb"}, {"rows": -1},
     {"tokens": 2**60}, {"footer": "none"}, {"row_group": -1}],
)  # fmt: skip
def test_a_manifest_with_a_right_digest_that_cannot_be_true_is_refused(tmp_path, change):
    """A place outside the dataset is never opened, even with a valid digest."""
    place, rows = Location(str(tmp_path)), some_rows(random.Random(1))
    manifest.write(place, rows, META)
    manifest.read(place)
    manifest.write(place, [{**rows[0], **change}, *rows[1:]], META)
    with pytest.raises(
        DataError,
        match=r"\.parquet: (isn't a valid manifest \((rows|tokens|footer|row_group): |lists .* a path outside)",
    ):
        manifest.read(place)
