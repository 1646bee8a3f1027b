"""Tests the packed names of temporary files, of which the driver holds millions."""

import pickle

import pytest
from heliostat.tasks.names import NAMED, SpilledNames, SpilledRun, named, packed, size_of, unpacked

from tests.unit.bounded import python_peak

PLAIN = [named(b"a", ".parquet"), named(b"b" * 1000, ".json"), f"ff/{'f' * 32}-{10**19 - 1}.parquet", f"00/{'0' * 32}-0.json"]
ZEROS = "0" * 32
ODD = ["", "a", "3f/a", "über/名前\n", "x" * 1000, f"01/{ZEROS}-9.json", f"00/{ZEROS}-09.json", f"00/{ZEROS}-9.txt",
       f"00/{ZEROS}-{10**19}.json", f"00/{ZEROS}-٣.json"]  # fmt: skip


@pytest.mark.parametrize("name", PLAIN + ODD)
def test_a_packed_name_is_unpacked_unchanged(name):
    """No name changes, whether it has the form of a temporary file or not. A name of this form takes 25 bytes."""
    assert list(unpacked(packed("first", name, "last"))) == ["first", name, "last"]
    assert len(packed(name)) == (25 if name in PLAIN else 9 + len(name.encode()))


def test_names_keep_their_order_and_their_sizes():
    names = SpilledNames()
    for name in PLAIN:
        names.append(name)
    names.extend(ODD)
    assert [*names] == PLAIN + ODD and [*names] == [*names], "a list can be read again"
    assert [size_of(name) for name in PLAIN] == [1, 1000, 10**19 - 1, 0] and all(map(NAMED.fullmatch, PLAIN))


@pytest.mark.parametrize("decided", [(), (PLAIN[0],), (PLAIN[1], "odd", PLAIN[2])])
def test_a_run_has_its_fields_in_another_process_too(decided):
    """Tasks get runs from the driver as pickles. Runs with the same fields are equal."""
    run = SpilledRun(PLAIN[0], 5, 1 << 40, decided)
    again = pickle.loads(pickle.dumps(run))  # noqa: S301
    assert (again.name, again.rows, again.bytes, again.decided) == (PLAIN[0], 5, 1 << 40, decided)
    assert again == run and hash(again) == hash(run) and len({run, again}) == 1
    assert run not in (SpilledRun(PLAIN[0], 6, 1 << 40, decided), SpilledRun(PLAIN[0], 5, 1 << 40, (*decided, "more")), PLAIN[0])
    assert eval(repr(run)) == run


def test_the_driver_holds_few_bytes_per_run_and_per_name():
    """A run with a list of dropped documents takes 156 bytes in a list (395 bytes with strings), and a name takes 25 bytes."""
    count, decided = 20_000, named(b"decided", ".parquet")
    names = [f"{i % 256:02x}/{i % 256:02x}{i:030x}-{10**7 + i}.parquet" for i in range(count)]
    assert python_peak(lambda: [SpilledRun(name, 10**6, 10**9, (decided,)) for name in names]) < 180 * count

    def collected() -> SpilledNames:
        collection = SpilledNames()
        for name in names:
            collection.append(name)
        return collection

    assert python_peak(collected) < 60 * count, "twice 25 bytes while the list grows"
    assert [*collected()] == names
