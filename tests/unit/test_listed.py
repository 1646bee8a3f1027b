"""Tests the list of dropped documents of large inputs."""

import pyarrow.parquet as pq
import pytest
from heliostat.curation import making
from heliostat.curation.stage import Document, Dropped
from heliostat.storage.locations import Location

from tests.unit.build_curation import Given, curate


@pytest.mark.parametrize("most", [1, 3])
def test_the_list_of_dropped_documents_is_the_same_from_many_temporary_files(tmp_path, monkeypatch, most):
    """Above SELECTED files, tasks first select the rows. The list has no rows of the stages."""
    given = {f"d{n:03}": "word " * (n % 7) for n in range(60)} | {f"e{n}": "DROP" for n in range(5)}
    monkeypatch.setattr(Given, "read", lambda self, part: iter([Dropped(part.path, "empty", "no text")] if part.path[0] == "e"
                                                               else [Document(part.path, self.texts[part.path])]))  # fmt: skip
    curated, here = curate(tmp_path / "work", given, [{"stage": "length", "min_words": 3}], pieces=9)
    listed, names = dict[int, list[dict[str, str]]](), sorted(curated.left_out)
    for selected in (1024, most):
        monkeypatch.setattr(making, "SELECTED", selected)
        output = Location(str(tmp_path / f"out{selected}"))
        (path,) = making.listed(here, 5, names, output)()
        listed[selected] = pq.read_table(output.join(path).path).to_pylist()
    assert listed[1024] == listed[most] and [row["id"] for row in listed[most]] == [f"e{n}" for n in range(5)]
    assert len(names) > 3 and here.done["select"] == -(-len(names) // most)
