"""Types the tour (docs/tour.md) with the README, and each tutorial, command by command, in a fresh clone: everything works in
that order, and prints the page's output.

`python -m docs.site.walk PAGE` refreshes a page. `make test-slow`; long.
"""

from pathlib import Path

import pytest

from docs.site.walk import clone, run, steps, walk
from docs.site.walk import commands as read

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]
DOWN = "heliostat cluster down clusters/local.yaml"


@pytest.mark.parametrize(
    "pages",
    [("docs/tour.md", "README.md"), ("docs/tutorials/text.md",), ("docs/tutorials/images.md",), ("docs/tutorials/cluster.md",)],
    ids=lambda pages: Path(pages[0]).stem,
)
def test_every_command_of_a_page_works_in_its_order_and_prints_what_is_shown(pages: tuple[str, ...], tmp_path: Path):
    folder = clone(tmp_path / "heliostat")
    texts = [(folder / page).read_text() for page in pages]
    assert sum(len(step.commands) for text in texts for step in steps(text)) > 5
    faults, already = [], set()
    try:
        for text in texts:
            faults += walk(text, folder, already).faults
    finally:
        run(next(read(DOWN)), folder)
    assert faults == []
